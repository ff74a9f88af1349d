"""IA3: delta(W) = w * W, a factor for each output (or each input) of a layer (Liu et al. 2022, 2205.05638; LyCORIS).

Rank and alpha mean nothing here. The bias stays as it is, as it does where LyCORIS and A1111 merge.
"""

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorasmith.adapters._tensors import build, show, split_shape, zeros
from lorasmith.adapters.base import Adapter


class IA3(Adapter):
    """A rescaling of a Linear's or Conv2d's outputs or inputs."""

    required_names = frozenset({"weight", "on_input"})
    optional_names = frozenset({"alpha"})
    alpha_means = "nothing"
    lycoris_args = "algo=ia3"

    def __init__(
        self, layer_shape: Sequence[int], rank: int, alpha: float | None = None, *, train_on_input: bool = False
    ) -> None:
        """Build for a layer; rank and alpha mean nothing. `train_on_input`: the factors belong to the inputs."""
        super().__init__(layer_shape, rank, alpha)
        num_out, num_in, kernel = split_shape(layer_shape)
        size = num_in if train_on_input else num_out
        self.weight = zeros(*((1, size, *(1 for _ in kernel)) if kernel else (size,)))
        self.on_input: Tensor
        self.register_buffer("on_input", torch.tensor(float(train_on_input)))
        self._dim = 1 if train_on_input else 0  # of the layer's weight

    @classmethod
    def from_tensors(cls, layer_shape: Sequence[int], tensors: Mapping[str, Tensor]) -> "IA3":
        """Build from `weight`, of any shape with the right number of values, and the flag `on_input`.

        Raises:
            ValueError: they do not fit a layer of this shape.
        """
        split_shape(layer_shape)
        values = {name: tensor for name, tensor in tensors.items() if name != "alpha"}
        if values["on_input"].numel() != 1:
            raise ValueError(f"on_input {show(values['on_input'].shape)} in the file; a single number is needed")
        on_input = bool(values["on_input"].reshape(()))
        size = layer_shape[1 if on_input else 0]
        if values["weight"].numel() == size:
            values["weight"] = values["weight"].reshape(
                (1, size, *(1 for _ in layer_shape[2:])) if layer_shape[2:] else size
            )
        return build(lambda: cls(layer_shape, 1, train_on_input=on_input), layer_shape, values)

    @classmethod
    def largest_rank(cls, layer_shape: Sequence[int]) -> int:
        """Return sys.maxsize: there is no rank."""
        split_shape(layer_shape)
        return sys.maxsize

    def reset(self, weight: Tensor, generator: torch.Generator) -> None:
        """Set the factors to zero."""
        with torch.no_grad():
            self.weight.zero_()

    def delta(self, weight: Tensor) -> Tensor:
        """Return w * W, in fp32."""
        factors = self.weight.view([-1 if dim == self._dim else 1 for dim in range(weight.dim())])
        return factors * weight.float()

    def scale_(self, factor: float) -> None:
        """Scale the factors."""
        with torch.no_grad():
            self.weight.mul_(factor)


ADAPTER = IA3
