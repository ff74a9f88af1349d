"""GLoRA: delta(W) = alpha / rank * (W @ a1 @ a2 + b1 @ b2) (Chavan et al. 2023, 2306.07967, as LyCORIS has it).

On a convolution a1 and a2 mix the inputs of each place of the kernel, and b2 has the kernel. In files of early LyCORIS
the two of each pair are the other way round; they are told by their shapes, as ComfyUI does.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.adapters._tensors import Factor, build, draw_uniform_, is_reshapable, size_of, split_shape, with_alpha
from lorasmith.adapters.base import Adapter


class GLoRA(Adapter):
    """A low-rank change of a Linear or Conv2d, and a low-rank change of its inputs."""

    required_names = frozenset({"a1.weight", "a2.weight", "b1.weight", "b2.weight"})
    optional_names = frozenset({"alpha"})
    lycoris_args = "algo=glora"

    def __init__(self, layer_shape: Sequence[int], rank: int, alpha: float | None = None) -> None:
        super().__init__(layer_shape, rank, alpha)
        num_out, num_in, kernel = split_shape(layer_shape)
        ones = (1,) * len(kernel)
        self.rank = rank
        self.a1, self.a2 = Factor(num_in, rank, *ones), Factor(rank, num_in, *ones)
        self.b1, self.b2 = Factor(num_out, rank, *ones), Factor(rank, num_in, *kernel)
        self.alpha: Tensor
        self.register_buffer("alpha", torch.tensor(float(rank if alpha is None else alpha)))

    @classmethod
    def from_tensors(cls, layer_shape: Sequence[int], tensors: Mapping[str, Tensor]) -> "GLoRA":
        """Build from the four factors, in either order, and `alpha`; none: alpha = rank.

        Raises:
            ValueError: they do not fit a layer of this shape.
        """
        _, num_in, kernel = split_shape(layer_shape)
        rank = size_of(tensors, "a2.weight", 0)
        if not is_reshapable(tensors["b2.weight"], (rank, num_in, *kernel)):
            other = size_of(tensors, "a1.weight", 0)
            if is_reshapable(tensors["b1.weight"], (other, num_in, *kernel)):
                rank, swapped = other, {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
                tensors = {
                    f"{swapped[name[:2]]}.weight" if name != "alpha" else name: tensor
                    for name, tensor in tensors.items()
                }
        return build(lambda: cls(layer_shape, rank), layer_shape, with_alpha(tensors, rank))

    @classmethod
    def largest_rank(cls, layer_shape: Sequence[int]) -> int:
        """Return min(out, in * kernel), as for a LoRA."""
        num_out, num_in, kernel = split_shape(layer_shape)
        return min(num_out, num_in * math.prod(kernel))

    def reset(self, weight: Tensor, generator: torch.Generator) -> None:
        """Draw a1 and b1 as torch draws a layer's own weight, and zero a2 and b2."""
        draw_uniform_(self.a1.weight, generator)
        draw_uniform_(self.b1.weight, generator)
        with torch.no_grad():
            self.a2.weight.zero_()
            self.b2.weight.zero_()

    def delta(self, weight: Tensor) -> Tensor:
        """Return the change, in fp32 and of the weight's shape."""
        with torch.autocast(weight.device.type, enabled=False):
            a = self.a1.weight.flatten(1) @ (self.a2.weight.flatten(1) * (self.alpha / self.rank))
            b = self.b1.weight.flatten(1) @ (self.b2.weight.flatten(1) * (self.alpha / self.rank))
            return torch.einsum("o j ..., j i -> o i ...", weight.float(), a) + b.view(weight.shape)

    def scale_(self, factor: float) -> None:
        """Scale all factors by sqrt(factor)."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(math.sqrt(factor))

    def forward(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """Return output + multiplier * alpha / rank * (W(a1(a2(x))) + b1(b2(x)))."""
        scale = self.alpha * (self.multiplier / self.rank)
        a2, b2 = self.a2.weight.to(x.dtype), self.b2.weight.to(x.dtype)
        a1, b1 = (self.a1.weight * scale).to(x.dtype), (self.b1.weight * scale).to(x.dtype)
        weight = layer.get_parameter("weight")
        if isinstance(layer, nn.Conv2d):
            assert layer.groups == 1 and layer.padding_mode == "zeros", "GLoRA on a grouped or circular convolution"
            place: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
            inner = F.conv2d(F.conv2d(x, a2), a1)
            return output + F.conv2d(inner, weight, **place) + F.conv2d(F.conv2d(x, b2, **place), b1)
        return output + F.linear(F.linear(F.linear(x, a2), a1), weight) + F.linear(F.linear(x, b2), b1)


ADAPTER = GLoRA
