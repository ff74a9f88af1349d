"""Full: delta(W) = diff, the whole change of a weight, and of a bias where the file has `diff_b` (LyCORIS' "full").

Rank and alpha mean nothing here; the file is as large as the layers. New ones change the weight alone, for most layers
of a transformer have no bias; `diff_b` of a file is applied and trained on.
"""

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorasmith.adapters._tensors import build, zeros
from lorasmith.adapters.base import Adapter


class Full(Adapter):
    """Any change of a layer's weight and bias, on all kinds of layers."""

    required_names = frozenset()
    optional_names = frozenset({"diff", "diff_b", "alpha"})
    alpha_means = "nothing"
    lycoris_args = "algo=full"

    def __init__(self, layer_shape: Sequence[int], rank: int, alpha: float | None = None) -> None:
        """Build for a layer; rank and alpha mean nothing."""
        super().__init__(layer_shape, rank, alpha)
        self.diff = zeros(*layer_shape)
        self.register_parameter("diff_b", None)
        self.diff_b: torch.nn.Parameter | None

    @classmethod
    def matches(cls, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether there is one of the changes, and at most an alpha beside them, which means nothing."""
        return bool(tensors.keys() & {"diff", "diff_b"}) and tensors.keys() <= cls.optional_names

    @classmethod
    def from_tensors(cls, layer_shape: Sequence[int], tensors: Mapping[str, Tensor]) -> "Full":
        """Build from `diff`, `diff_b` or both.

        Raises:
            ValueError: they do not fit a layer of this shape.
        """
        values = {name: tensor for name, tensor in tensors.items() if name != "alpha"}
        values.setdefault("diff", torch.zeros(tuple(layer_shape)))

        def make() -> Full:
            adapter = cls(layer_shape, 1)
            if "diff_b" in values:
                adapter.diff_b = zeros(layer_shape[0])
            return adapter

        return build(make, layer_shape, values)

    @classmethod
    def largest_rank(cls, layer_shape: Sequence[int]) -> int:
        """Return sys.maxsize: there is no rank."""
        return sys.maxsize

    def reset(self, weight: Tensor, generator: torch.Generator) -> None:
        """Set every change to zero."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()

    def delta(self, weight: Tensor) -> Tensor:
        """Return `diff`."""
        return self.diff.view(weight.shape).clone()

    def delta_bias(self, bias: Tensor | None) -> Tensor | None:
        """Return `diff_b`."""
        return self.diff_b

    def scale_(self, factor: float) -> None:
        """Scale both changes."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(factor)


ADAPTER = Full
