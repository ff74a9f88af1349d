"""Perturbed-attention guidance (arXiv:2403.17377): the denoiser as it is without some of its self-attentions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lorasmith.errors import UserError


def chosen(names: Sequence[str], asked: Sequence[str]) -> list[str]:
    """Return those self-attentions whose names begin as asked, with whole words such as `mid` or `down_blocks.1`.

    Raises:
        UserError: one that is asked for begins no name.
    """
    found: set[str] = set()
    for one in asked:
        own = {name for name in names if name.startswith((f"{one}.", f"{one}_"))}
        if not own:
            blocks = sorted({name.partition(".attentions.")[0] for name in names})
            raise UserError(
                f"--pag-layers {one}: the U-Net has no self-attention there; it has some in {', '.join(blocks)}."
            )
        found |= own
    return [name for name in names if name in found]


@contextmanager
def perturbed(denoiser: Any, names: Sequence[str]) -> Iterator[None]:
    """While entered, each place in these self-attentions sees itself alone (equation 14)."""
    layers = [denoiser.get_submodule(name) for name in names]
    usual = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.set_processor(_ITSELF)
        yield
    finally:
        for layer, processor in zip(layers, usual, strict=True):
            layer.set_processor(processor)


class _Itself:
    """What diffusers' layers of attention call: an identity in place of the scores."""

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return attn.to_out[0](attn.to_v(hidden_states))


_ITSELF = _Itself()  # always the same, so that what is compiled knows it again
