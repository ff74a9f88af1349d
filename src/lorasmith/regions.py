"""LoRAs that act in a part of the picture only, each in the white of its mask.

What a LoRA changes in a layer whose outputs have places in the picture is multiplied there by its mask, made as small
as they are. Its text side (the text encoder, and keys and values of cross-attention) has no places: so each
cross-attention is computed once without any of these LoRAs, and once with each one's text side, and the results are put
together by the masks, as sd-scripts' regional LoRA does it for the parts of a prompt.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F

from lorasmith.adapters.base import Adapter
from lorasmith.models.base import Conditioning, LatentDiffusion
from lorasmith.network import part_of

_BOX = Image.Resampling.BOX
_PIXELS = 8  # of a mask on a side, for each of the latents


class Regions:
    """The masks of LoRAs in their order, white where each acts; None: it acts everywhere."""

    def __init__(self, masks: Sequence[Image.Image | None]) -> None:
        self._masks = {number: mask for number, mask in enumerate(masks) if mask is not None}
        self._acting: int | None = None  # whose text side acts now
        self._latents = (0, 0)  # sides of the latents that the model is given now
        self._made: dict[tuple[int, tuple[int, int], tuple[int, int]], Tensor] = {}

    def has(self, number: int) -> bool:
        """Return whether a LoRA has a mask."""
        return number in self._masks

    def hook(self, number: int, name: str, adapter: Adapter) -> Callable[..., Tensor]:
        """Return a forward hook by which a LoRA's adapter acts on the layer of that saved name."""
        is_of_text = part_of(name) == "text_encoder" or name.endswith(("attn2_to_k", "attn2_to_v"))
        return partial(self._with_text if is_of_text else self._in_place, number, adapter)

    @contextmanager
    def attached(self, model: LatentDiffusion) -> Iterator[None]:
        """While entered, the model encodes texts once for each mask more, and each cross-attention takes them apart."""
        note = model.denoiser.register_forward_pre_hook(self._note_size)
        crosses = [module for name, module in model.denoiser.named_modules() if name.endswith("attn2")]
        for cross in crosses:
            cross.forward = partial(self._cross, cross.forward)
        model.encode_text = partial(self._encode, model.encode_text)
        try:
            yield
        finally:
            del model.encode_text
            for cross in crosses:
                del cross.forward
            note.remove()

    def _note_size(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        height, width = args[0].shape[-2:]
        self._latents = height, width

    def _with_text(
        self, number: int, adapter: Adapter, layer: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor:
        return adapter(layer, args[0], output) if self._acting == number else output

    def _in_place(
        self, number: int, adapter: Adapter, layer: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor:
        share = self._share(number, output)
        return torch.lerp(output, adapter(layer, args[0], output).to(output.dtype), share)  # exact where it is 0 or 1

    def _encode(self, encode: Callable[[list[str]], Conditioning], captions: list[str]) -> Conditioning:
        """Return what texts become without and with each LoRA's text side, one behind the other."""
        found = []
        for number in (None, *self._masks):
            self._acting = number
            found.append(encode(captions))
        self._acting = None
        return {name: torch.cat([one[name] for one in found], dim=1) for name in found[0]}

    def _cross(
        self, attend: Callable[..., Tensor], hidden_states: Tensor, encoder_hidden_states: Tensor, **settings: Any
    ) -> Tensor:
        """Return cross-attention (B, n, C) of all text sides, put together by their shares of each place."""
        texts = encoder_hidden_states.chunk(len(self._masks) + 1, dim=1)
        shares = self._text_shares(hidden_states)
        total: Tensor | None = None
        for number, text, share in zip((None, *self._masks), texts, shares, strict=True):
            if not share.any():
                continue
            self._acting = number
            part = attend(hidden_states, encoder_hidden_states=text, **settings) * share
            total = part if total is None else total + part
        self._acting = None
        assert total is not None, "shares of a place sum to 1"
        return total

    def _text_shares(self, hidden_states: Tensor) -> list[Tensor]:
        """Return the shares of each place, (1, n, 1), of no mask and of each; where masks overlap they share it."""
        shares = [self._share(number, hidden_states) for number in self._masks]
        total = torch.stack(shares).sum(0)
        shares = [share / total.clamp_min(1) for share in shares]
        return [(1 - total).clamp_min(0), *shares]

    def _share(self, number: int, output: Tensor) -> Tensor:
        """Return a mask as it is multiplied with a layer's output: (1, 1, h, w), (1, n, 1), or its mean for any other.

        A layer without places in the picture is one of the timestep.
        """
        size = (1, 1)
        if output.dim() == 4:
            size = output.shape[2], output.shape[3]
        elif output.dim() == 3:
            size = next(one for one in _sizes(self._latents) if one[0] * one[1] == output.shape[1])
        key = number, self._latents, size
        if key not in self._made:
            height, width = self._latents
            fitted = ImageOps.fit(self._masks[number].convert("L"), (width * _PIXELS, height * _PIXELS), _BOX)
            levels = torch.from_numpy(np.asarray(fitted, dtype=np.float32))[None, None] / 255
            self._made[key] = F.interpolate(levels, size, mode="area").to(output.device, output.dtype)
        share = self._made[key]
        if output.dim() == 4:
            return share
        return share.flatten(2).transpose(1, 2) if output.dim() == 3 else share.flatten(1)


def _sizes(latents: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the sides that layers have on the way down a U-Net: halved, and rounded up."""
    found = [latents]
    while max(found[-1]) > 1:
        found.append(((found[-1][0] + 1) // 2, (found[-1][1] + 1) // 2))
    return found
