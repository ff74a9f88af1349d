"""What the adapter types share: a layer's shape, starting values, and how a file's tensors get into an adapter."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

A = TypeVar("A", bound=nn.Module)


class Factor(nn.Module):
    """Holds one matrix as `.weight`, so that its saved name is the child's name plus `.weight`."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = zeros(*shape)


def zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32))


def split_shape(layer_shape: Sequence[int]) -> tuple[int, int, tuple[int, ...]]:
    """Return the sizes (out, in, kernel) of a Linear's or Conv2d's weight; a Linear's kernel is empty.

    Raises:
        ValueError: it is a norm layer's weight.
    """
    if len(layer_shape) < 2:
        raise ValueError(
            f"the layer's weight is {show(layer_shape)}, which a norm layer has; this adapter type goes on Linear and "
            "Conv2d layers (full and norm go on norm layers)"
        )
    num_out, num_in, *kernel = layer_shape
    return num_out, num_in, tuple(kernel)


@torch.no_grad()
def draw_normal_(parameter: nn.Parameter, std: float, generator: torch.Generator) -> None:
    """Fill with normal values of mean 0, drawn on the CPU."""
    parameter.copy_(
        torch.empty(parameter.shape, dtype=torch.float32, device="cpu").normal_(0, std, generator=generator)
    )


@torch.no_grad()
def draw_uniform_(parameter: nn.Parameter, generator: torch.Generator) -> None:
    """Fill as torch fills a layer's own weight: uniformly within 1 / sqrt(inputs). Drawn on the CPU."""
    drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    parameter.copy_(drawn)


def build(make: Callable[[], A], layer_shape: Sequence[int], tensors: Mapping[str, Tensor]) -> A:
    """Return what `make` makes, with a file's tensors as its values.

    It is made without memory first, so that absurd sizes in a file cost nothing.

    Raises:
        ValueError: a tensor is missing, too many, or of another shape; the message names both shapes.
    """
    with torch.device("meta"):
        adapter = make()
    wanted = adapter.state_dict()
    if odd := sorted(wanted.keys() ^ tensors.keys()):
        raise ValueError(
            f"{', '.join(sorted(tensors))} in the file; expected are {', '.join(sorted(wanted))} for a layer whose "
            f"weight is {show(layer_shape)} (in question: {', '.join(odd)})"
        )
    values = {name: fitted(tensors, name, own.shape, layer_shape) for name, own in wanted.items()}
    adapter.load_state_dict(values, assign=True)
    return adapter


def fitted(tensors: Mapping[str, Tensor], name: str, shape: Sequence[int], layer_shape: Sequence[int]) -> Tensor:
    """Return a file's tensor in fp32 and of this shape; trailing ones do not matter, nor any in a single number.

    Raises:
        ValueError: it is of another shape; names both.
    """
    tensor = tensors[name]
    if not is_reshapable(tensor, shape):
        raise ValueError(
            f"{name} {show(tensor.shape)} in the file; {show(shape)} is needed, for the layer's weight is "
            f"{show(layer_shape)}"
        )
    return tensor.detach().reshape(tuple(shape)).to(torch.float32, copy=True)


def size_of(tensors: Mapping[str, Tensor], name: str, dim: int) -> int:
    """Return one size of a file's tensor.

    Raises:
        ValueError: it is not there, or has no such dimension, or nothing in it.
    """
    if name not in tensors:
        raise ValueError(f"{', '.join(sorted(tensors))} in the file; {name} is missing")
    if tensors[name].dim() <= dim or not tensors[name].numel():
        raise ValueError(f"{name} {show(tensors[name].shape)} in the file; a matrix is needed")
    return tensors[name].shape[dim]


def with_alpha(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return the tensors with an alpha: where the file has none it is the rank, which is scale 1."""
    return {"alpha": torch.tensor(float(rank)), **tensors}


def is_reshapable(tensor: Tensor, shape: Sequence[int]) -> bool:
    """True if the shapes differ at most in trailing ones."""
    return tensor.numel() == math.prod(shape) and _without_ones(tensor.shape) == _without_ones(shape)


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(shape)
    while len(sizes) > 2 and sizes[-1] == 1:
        sizes = sizes[:-1]
    return () if math.prod(sizes) == 1 else sizes


def show(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a single number"
