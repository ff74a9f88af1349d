"""What an adapter is: a small trainable change to one frozen Linear or Conv2d layer.

`delta` defines it (law 2): training, merging, extracting and generating all mean W + multiplier * delta(W). A module of
this package names its class as `ADAPTER`; `lorasmith.network` finds it by the module's name.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(nn.Module, ABC):
    """A change to one layer; its `state_dict` is what a file holds for that layer, without the layer's name.

    Parameters are fp32 whatever the base model's dtype is.
    """

    required_names: ClassVar[frozenset[str]]  # tensors that a file has for every layer adapted in this way
    optional_names: ClassVar[frozenset[str]] = frozenset()

    multiplier: float = 1.0  # strength at which the change is applied; not saved

    def __init__(self, layer_shape: Sequence[int], rank: int, alpha: float | None = None, **options: Any) -> None:
        """Build for a layer whose weight has `layer_shape`; `alpha` None means alpha = rank."""
        super().__init__()

    @classmethod
    @abstractmethod
    def from_tensors(cls, layer_shape: Sequence[int], tensors: Mapping[str, Tensor]) -> "Adapter":
        """Build from a file's tensors for one layer; rank and alpha are read from them.

        Raises:
            ValueError: the tensors do not fit a layer of this shape; the message names both shapes.
        """

    @staticmethod
    @abstractmethod
    def largest_rank(layer_shape: Sequence[int]) -> int:
        """Return the largest rank that such a layer can make use of."""

    @abstractmethod
    def reset(self, weight: Tensor, generator: torch.Generator) -> None:
        """Start afresh: afterwards `delta(weight)` is zero. `generator` is on the CPU."""

    @abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """Return the change of the layer's weight, in fp32 and of the weight's shape, without the multiplier."""

    @abstractmethod
    def scale_(self, factor: float) -> None:
        """Make `delta` `factor` times what it was, in place."""

    def delta_norm(self, weight: Tensor) -> Tensor:
        """Return the Frobenius norm of `delta(weight)`, a 0-dim tensor."""
        return self.delta(weight).norm()

    def forward(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """Return what the adapted layer makes of `x`; `output` is what the layer alone made of it."""
        weight = layer.get_parameter("weight")
        return apply_weight(layer, (weight.float() + self.multiplier * self.delta(weight)).to(weight.dtype), x)


def apply_weight(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """Run a Linear or Conv2d with another weight in place of its own."""
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    assert isinstance(layer, nn.Linear), f"an adapter goes on a Linear or Conv2d, not on a {type(layer).__name__}"
    return F.linear(x, weight, layer.bias)
