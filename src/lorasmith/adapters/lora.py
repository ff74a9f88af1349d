"""LoRA: delta(W) = alpha / rank * up @ down (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

On a k x k convolution `down` has the layer's kernel, stride and padding and `up` is 1 x 1, as kohya-ss/sd-scripts and
LyCORIS do it (there it is called LoCon). With `lora_mid`, LyCORIS' Tucker form, `down` is 1 x 1 too and the kernel is
that of a rank x rank convolution between them.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.adapters._tensors import Factor, build, draw_uniform_, is_reshapable, show, split_shape, with_alpha
from lorasmith.adapters.base import Adapter


class LoRA(Adapter):
    """A low-rank change of a Linear or Conv2d."""

    required_names = frozenset({"lora_down.weight", "lora_up.weight"})
    optional_names = frozenset({"alpha", "lora_mid.weight"})
    lycoris_args = "algo=lora"
    has_inner_dropout = True

    def __init__(
        self, layer_shape: Sequence[int], rank: int, alpha: float | None = None, *, use_tucker: bool = False
    ) -> None:
        """Build for a layer; `use_tucker` gives convolutions with a kernel above 1 x 1 a `lora_mid`."""
        super().__init__(layer_shape, rank, alpha)
        num_out, num_in, kernel = split_shape(layer_shape)
        ones = (1,) * len(kernel)
        has_mid = use_tucker and math.prod(kernel) > 1
        self.rank = rank
        self.lora_down = Factor(rank, num_in, *(ones if has_mid else kernel))
        self.lora_mid = Factor(rank, rank, *kernel) if has_mid else None
        self.lora_up = Factor(num_out, rank, *ones)
        self.alpha: Tensor
        self.register_buffer("alpha", torch.tensor(float(rank if alpha is None else alpha)))

    @classmethod
    def from_tensors(cls, layer_shape: Sequence[int], tensors: Mapping[str, Tensor]) -> "LoRA":
        """Build from `lora_down.weight`, `lora_up.weight` and what the file has of `lora_mid.weight` and `alpha`.

        A 1 x 1 convolution's factors may be stored with 2 or 4 dimensions; they are reshaped. No alpha: alpha = rank.

        Raises:
            ValueError: the factors do not fit a layer of this shape.
        """
        rank, has_mid = check_factors(layer_shape, tensors)
        return build(lambda: cls(layer_shape, rank, use_tucker=has_mid), layer_shape, with_alpha(tensors, rank))

    @classmethod
    def largest_rank(cls, layer_shape: Sequence[int]) -> int:
        """Return min(out, in * kernel): no product of two factors has a higher rank."""
        num_out, num_in, kernel = split_shape(layer_shape)
        return min(num_out, num_in * math.prod(kernel))

    def reset(self, weight: Tensor, generator: torch.Generator) -> None:
        """Draw `down` (and `mid`) as torch draws a layer's own weight, and zero `up`."""
        draw_uniform_(self.lora_down.weight, generator)
        if self.lora_mid is not None:
            draw_uniform_(self.lora_mid.weight, generator)
        with torch.no_grad():
            self.lora_up.weight.zero_()

    def delta(self, weight: Tensor) -> Tensor:
        """Return alpha / rank * up @ down, in fp32 and of the weight's shape; `up`, which is small, takes the scale."""
        with torch.autocast(weight.device.type, enabled=False):
            up = self.lora_up.weight.float().flatten(1) * (self.alpha / self.rank)
            down = self.lora_down.weight.float().flatten(1)
            if self.lora_mid is None:
                return (up @ down).view(weight.shape)
            return torch.einsum("m n ..., o m, n i -> o i ...", self.lora_mid.weight.float(), up, down)

    def delta_square(self, weight: Tensor) -> Tensor:
        """Return |U D|^2 = trace(U^T U D D^T), scaled; delta is built only where there is a `mid`."""
        if self.lora_mid is not None:
            return super().delta_square(weight)
        down, up = self.lora_down.weight.flatten(1), self.lora_up.weight.flatten(1)
        return ((up.T @ up) * (down @ down.T)).sum() * (self.alpha / self.rank).square()

    def delta_norm(self, weight: Tensor) -> Tensor:
        """Return the Frobenius norm of delta, without building it where there is no `mid`."""
        if self.lora_mid is not None:
            return self.delta(weight).norm()
        return product_norm(self.lora_down.weight, self.lora_up.weight) * (self.alpha / self.rank).abs()

    def scale_(self, factor: float) -> None:
        """Scale both factors by sqrt(factor), so that neither outgrows the other."""
        with torch.no_grad():
            self.lora_down.weight.mul_(math.sqrt(factor))
            self.lora_up.weight.mul_(math.sqrt(factor))

    def forward(self, layer: torch.nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """Return output + multiplier * alpha / rank * up(down(x)); the scale is put into `up`, which is small."""
        down = self.lora_down.weight.to(x.dtype)
        up = (self.lora_up.weight * (self.alpha * (self.multiplier / self.rank))).to(x.dtype)
        if isinstance(layer, torch.nn.Conv2d):
            assert layer.groups == 1 and layer.padding_mode == "zeros", "LoRA on a grouped or circular convolution"
            kernel = down if self.lora_mid is None else self.lora_mid.weight.to(x.dtype)
            inner = x if self.lora_mid is None else F.conv2d(x, down)
            hidden = F.conv2d(inner, kernel, None, layer.stride, layer.padding, layer.dilation)
            return output + F.conv2d(hidden if self.drop is None else self.drop(hidden, 1), up)
        hidden = F.linear(x, down)
        return output + F.linear(hidden if self.drop is None else self.drop(hidden, -1), up)


def check_factors(layer_shape: Sequence[int], tensors: Mapping[str, Tensor]) -> tuple[int, bool]:
    """Return the rank of a file's factors, and whether there is a `mid` between them.

    Raises:
        ValueError: `down` and `up` do not fit the layer or each other.
    """
    down, up, has_mid = tensors["lora_down.weight"], tensors["lora_up.weight"], "lora_mid.weight" in tensors
    rank = down.shape[0] if down.dim() else 0
    ones = tuple(1 for _ in layer_shape[2:])
    wanted_down = (rank, *layer_shape[1:2], *(ones if has_mid else layer_shape[2:]))
    if not rank or not (is_reshapable(down, wanted_down) and is_reshapable(up, (layer_shape[0], rank, *ones))):
        raise ValueError(
            f"down {show(down.shape)} and up {show(up.shape)} in the file; the layer's weight is {show(layer_shape)}"
        )
    return rank, has_mid


def product_norm(down: Tensor, up: Tensor) -> Tensor:
    """Return the Frobenius norm of up @ down from two rank x rank Gram matrices, in fp32.

    |U D|^2 = trace(U^T U D D^T).
    """
    down, up = down.detach().float().flatten(1), up.detach().float().flatten(1)
    return ((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt()


ADAPTER = LoRA
