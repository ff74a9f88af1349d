"""What makes a model draw faster and changes its pictures by rounding only: the layout of its tensors, compiling."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from lorasmith.errors import UserError

BACKEND = "inductor"


class _Parts(Protocol):
    """The part of `lorasmith.models.base.LatentDiffusion` that is compiled."""

    denoiser: Any  # a module, of which torch's own types say too little


def use_channels_last(parts: Iterable[Any]) -> None:
    """Lay out the tensors of modules as (B, H, W, C), for which convolutions on GPUs are made."""
    for part in parts:
        part.to(memory_format=torch.channels_last)


def compile_denoiser(model: _Parts) -> None:
    """Have the denoiser compiled when it is first called, for CUDA into graphs that are launched as one.

    From then on forward hooks that are put on its layers, or taken off, are not noticed (torch guards no hooks), but
    changes of weights in place are.
    """
    is_cuda = next(model.denoiser.parameters()).device.type == "cuda"
    model.denoiser.compile(backend=BACKEND, mode="reduce-overhead" if is_cuda else None)


@contextmanager
def telling_of_compiler() -> Iterator[None]:
    """Make an error of torch's compiler one that says what to do.

    Raises:
        UserError: in place of that error.
    """
    try:
        yield
    except RuntimeError as error:
        of_compiler = sys.modules.get(
            "torch._dynamo.exc"
        )  # what compiles imports it; it takes seconds where nothing does
        if of_compiler is None or not isinstance(error, of_compiler.TorchDynamoException):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            "--compile: torch cannot compile the U-Net here; install what it needs, a C++ compiler and on a GPU "
            f"Triton, or leave --compile out. ({reason})"
        ) from error
