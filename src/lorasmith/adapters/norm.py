"""Norm: w_norm is added to the weight of a LayerNorm or GroupNorm, and b_norm to its bias (LyCORIS' "train_norm").

Rank and alpha mean nothing here. Other layers cannot be adapted so.
"""

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorasmith.adapters._tensors import build, show, zeros
from lorasmith.adapters.base import Adapter


class Norm(Adapter):
    """A change of a norm layer's scale and shift."""

    required_names = frozenset()
    optional_names = frozenset({"w_norm", "b_norm", "alpha"})
    alpha_means = "nothing"
    lycoris_args = "train_norm=True"

    def __init__(self, layer_shape: Sequence[int], rank: int, alpha: float | None = None) -> None:
        """Build for a norm layer; rank and alpha mean nothing.

        Raises:
            ValueError: the layer is no norm layer.
        """
        super().__init__(layer_shape, rank, alpha)
        _check_is_norm(layer_shape)
        self.w_norm = zeros(layer_shape[0])
        self.b_norm = zeros(layer_shape[0])

    @classmethod
    def matches(cls, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether there is one of the changes, and at most an alpha beside them, which means nothing."""
        return bool(tensors.keys() & {"w_norm", "b_norm"}) and tensors.keys() <= cls.optional_names

    @classmethod
    def from_tensors(cls, layer_shape: Sequence[int], tensors: Mapping[str, Tensor]) -> "Norm":
        """Build from `w_norm`, `b_norm` or both; one that is left out is zero.

        Raises:
            ValueError: they do not fit a layer of this shape.
        """
        _check_is_norm(layer_shape)
        none = torch.zeros(layer_shape[0])
        values = {name: tensors.get(name, none) for name in ("w_norm", "b_norm")}
        return build(lambda: cls(layer_shape, 1), layer_shape, values)

    @classmethod
    def largest_rank(cls, layer_shape: Sequence[int]) -> int:
        """Return sys.maxsize: there is no rank.

        Raises:
            ValueError: the layer is no norm layer.
        """
        _check_is_norm(layer_shape)
        return sys.maxsize

    def reset(self, weight: Tensor, generator: torch.Generator) -> None:
        """Set both changes to zero."""
        with torch.no_grad():
            self.w_norm.zero_()
            self.b_norm.zero_()

    def delta(self, weight: Tensor) -> Tensor:
        """Return `w_norm`."""
        return self.w_norm.view(weight.shape).clone()

    def delta_bias(self, bias: Tensor | None) -> Tensor | None:
        """Return `b_norm`."""
        return self.b_norm

    def scale_(self, factor: float) -> None:
        """Scale both changes."""
        with torch.no_grad():
            self.w_norm.mul_(factor)
            self.b_norm.mul_(factor)


def _check_is_norm(layer_shape: Sequence[int]) -> None:
    if len(layer_shape) != 1:
        raise ValueError(
            f"the layer's weight is {show(layer_shape)}, and norm goes on the one-dimensional weights of LayerNorm and "
            "GroupNorm only"
        )


ADAPTER = Norm
