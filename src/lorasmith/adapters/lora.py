"""LoRA: delta(W) = alpha / rank * up @ down (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

On a k x k convolution `down` has the layer's kernel, stride and padding and `up` is 1 x 1, as kohya-ss/sd-scripts and
LyCORIS do it.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.adapters.base import Adapter


class _Factor(nn.Module):
    """Holds one matrix as `.weight`, so that its saved name is the child's name plus `.weight`."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape, dtype=torch.float32))


class LoRA(Adapter):
    """A low-rank change of a Linear or Conv2d."""

    required_names = frozenset({"lora_down.weight", "lora_up.weight"})
    optional_names = frozenset({"alpha"})

    def __init__(self, layer_shape: Sequence[int], rank: int, alpha: float | None = None) -> None:
        super().__init__(layer_shape, rank, alpha)
        num_out, num_in, *kernel = layer_shape
        self.rank = rank
        self.lora_down = _Factor(rank, num_in, *kernel)
        self.lora_up = _Factor(num_out, rank, *(1 for _ in kernel))
        self.alpha: Tensor
        self.register_buffer("alpha", torch.tensor(float(rank if alpha is None else alpha)))

    @classmethod
    def from_tensors(cls, layer_shape: Sequence[int], tensors: Mapping[str, Tensor]) -> "LoRA":
        """Build from `lora_down.weight`, `lora_up.weight` and, where the file has it, `alpha` (absent: alpha = rank).

        A 1 x 1 convolution's factors may be stored with 2 or 4 dimensions; they are reshaped.

        Raises:
            ValueError: the factors do not fit a layer of this shape.
        """
        down, up, alpha = tensors["lora_down.weight"], tensors["lora_up.weight"], tensors.get("alpha")
        rank = down.shape[0] if down.dim() else 0
        wanted_down, wanted_up = (rank, *layer_shape[1:]), (layer_shape[0], rank, *(1 for _ in layer_shape[2:]))
        if not rank or not (_is_reshapable(down, wanted_down) and _is_reshapable(up, wanted_up)):
            raise ValueError(
                f"down {_show(down.shape)} and up {_show(up.shape)} in the file; "
                f"the layer's weight is {_show(layer_shape)}"
            )
        if alpha is not None and alpha.numel() != 1:
            raise ValueError(f"alpha of shape {_show(alpha.shape)} in the file; a single number is needed")
        adapter = cls(layer_shape, rank, None if alpha is None else float(alpha))
        with torch.no_grad():
            adapter.lora_down.weight.copy_(down.reshape(wanted_down))
            adapter.lora_up.weight.copy_(up.reshape(wanted_up))
        return adapter

    @staticmethod
    def largest_rank(layer_shape: Sequence[int]) -> int:
        """Return min(out, in * kernel): no product of two factors has a higher rank."""
        return min(layer_shape[0], math.prod(layer_shape[1:]))

    def reset(self, weight: Tensor, generator: torch.Generator) -> None:
        """Draw `down` as torch draws a layer's own weight, and zero `up`."""
        with torch.no_grad():
            drawn = torch.empty(self.lora_down.weight.shape, dtype=torch.float32, device="cpu")
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            self.lora_down.weight.copy_(drawn)
            self.lora_up.weight.zero_()

    def delta(self, weight: Tensor) -> Tensor:
        """Return alpha / rank * up @ down, in fp32 and of the weight's shape; `up`, which is small, takes the scale."""
        with torch.autocast(weight.device.type, enabled=False):
            up = self.lora_up.weight.float().flatten(1) * (self.alpha / self.rank)
            return (up @ self.lora_down.weight.float().flatten(1)).view(weight.shape)

    def delta_norm(self, weight: Tensor) -> Tensor:
        """Return the Frobenius norm of delta without building it."""
        return product_norm(self.lora_down.weight, self.lora_up.weight) * (self.alpha / self.rank).abs()

    def scale_(self, factor: float) -> None:
        """Scale both factors by sqrt(factor), so that neither outgrows the other."""
        with torch.no_grad():
            self.lora_down.weight.mul_(math.sqrt(factor))
            self.lora_up.weight.mul_(math.sqrt(factor))

    def forward(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """Return output + multiplier * alpha / rank * up(down(x)); the scale is put into `up`, which is small."""
        down = self.lora_down.weight.to(x.dtype)
        up = (self.lora_up.weight * (self.alpha * (self.multiplier / self.rank))).to(x.dtype)
        if isinstance(layer, nn.Conv2d):
            assert layer.groups == 1 and layer.padding_mode == "zeros", "LoRA on a grouped or circular convolution"
            return output + F.conv2d(F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation), up)
        return output + F.linear(F.linear(x, down), up)


def product_norm(down: Tensor, up: Tensor) -> Tensor:
    """Return the Frobenius norm of up @ down from two rank x rank Gram matrices, in fp32.

    |U D|^2 = trace(U^T U D D^T).
    """
    down, up = down.detach().float().flatten(1), up.detach().float().flatten(1)
    return ((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt()


def _is_reshapable(tensor: Tensor, shape: Sequence[int]) -> bool:
    """True if the shapes differ at most in trailing ones."""
    return _without_ones(tensor.shape) == _without_ones(shape)


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(shape)
    while len(sizes) > 2 and sizes[-1] == 1:
        sizes = sizes[:-1]
    return sizes


def _show(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


ADAPTER = LoRA
