"""LoHa: delta(W) = alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b), two low-rank matrices multiplied element by element.

FedPara, Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098; names and shapes as LyCORIS saves them: its rank is up
to rank^2. With `hada_t1` and `hada_t2`, LyCORIS' Tucker form for kernels above 1 x 1, each half is the kernel t between
an input and an output factor. With `dora_scale` the change is weight-decomposed.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lorasmith.adapters._decomposition import decomposed, fit_scale, new_scale, refuse_multiple, reset_scale
from lorasmith.adapters._tensors import build, draw_normal_, size_of, split_shape, with_alpha, zeros
from lorasmith.adapters.base import Adapter


class LoHa(Adapter):
    """A change of a Linear or Conv2d that is a Hadamard product."""

    required_names = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
    optional_names = frozenset({"alpha", "dora_scale", "hada_t1", "hada_t2"})
    lycoris_args = "algo=loha"

    def __init__(
        self,
        layer_shape: Sequence[int],
        rank: int,
        alpha: float | None = None,
        *,
        use_tucker: bool = False,
        dora_wd: bool = False,
        wd_on_output: bool = True,
    ) -> None:
        """Build for a layer.

        Args:
            use_tucker: give convolutions with a kernel above 1 x 1 the Tucker form.
            dora_wd: train magnitudes as DoRA does; `wd_on_output=False`: of the inputs instead of the outputs.
        """
        super().__init__(layer_shape, rank, alpha)
        num_out, num_in, kernel = split_shape(layer_shape)
        has_kernel = use_tucker and math.prod(kernel) > 1
        a, b = (
            ((rank, num_out), (rank, num_in)) if has_kernel else ((num_out, rank), (rank, num_in * math.prod(kernel)))
        )
        self.rank = rank
        self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b = zeros(*a), zeros(*b), zeros(*a), zeros(*b)
        self.hada_t1 = zeros(rank, rank, *kernel) if has_kernel else None
        self.hada_t2 = zeros(rank, rank, *kernel) if has_kernel else None
        self.dora_scale = new_scale(layer_shape, wd_on_output=wd_on_output) if dora_wd else None
        self.alpha: Tensor
        self.register_buffer("alpha", torch.tensor(float(rank if alpha is None else alpha)))

    @classmethod
    def from_tensors(cls, layer_shape: Sequence[int], tensors: Mapping[str, Tensor]) -> "LoHa":
        """Build from the four factors and what the file has of the rest; no alpha: alpha = rank.

        Raises:
            ValueError: they do not fit a layer of this shape.
        """
        rank, on_out = size_of(tensors, "hada_w1_b", 0), True
        tensors = with_alpha(tensors, rank)
        has_kernel, is_decomposed = "hada_t1" in tensors, "dora_scale" in tensors
        if is_decomposed:
            tensors, on_out = fit_scale(layer_shape, tensors)
        return build(
            lambda: cls(layer_shape, rank, use_tucker=has_kernel, dora_wd=is_decomposed, wd_on_output=on_out),
            layer_shape,
            tensors,
        )

    @classmethod
    def largest_rank(cls, layer_shape: Sequence[int]) -> int:
        """Return min(out, in * kernel), the largest rank of each of the two matrices."""
        num_out, num_in, kernel = split_shape(layer_shape)
        return min(num_out, num_in * math.prod(kernel))

    def reset(self, weight: Tensor, generator: torch.Generator) -> None:
        """Draw as LyCORIS does: all but w2_a, which is zero."""
        for kernel in (self.hada_t1, self.hada_t2):
            if kernel is not None:
                draw_normal_(kernel, 0.1, generator)
        draw_normal_(self.hada_w1_b, 1, generator)
        draw_normal_(self.hada_w1_a, 0.1, generator)
        draw_normal_(self.hada_w2_b, 1, generator)
        with torch.no_grad():
            self.hada_w2_a.zero_()
        if self.dora_scale is not None:
            reset_scale(self.dora_scale, weight)

    def delta(self, weight: Tensor) -> Tensor:
        """Return the change, in fp32 and of the weight's shape."""
        with torch.autocast(weight.device.type, enabled=False):
            first = _half(self.hada_w1_a * (self.alpha / self.rank), self.hada_w1_b, self.hada_t1)
            change = (first * _half(self.hada_w2_a, self.hada_w2_b, self.hada_t2)).view(weight.shape)
            return change if self.dora_scale is None else decomposed(weight, change, self.dora_scale)

    def scale_(self, factor: float) -> None:
        """Scale the output factors by sqrt(factor).

        Raises:
            ValueError: it is weight-decomposed.
        """
        if self.dora_scale is not None:
            raise refuse_multiple()
        with torch.no_grad():
            self.hada_w1_a.mul_(math.sqrt(factor))
            self.hada_w2_a.mul_(math.sqrt(factor))


def _half(a: Tensor, b: Tensor, kernel: nn.Parameter | None) -> Tensor:
    return a @ b if kernel is None else torch.einsum("p q ..., p o, q i -> o i ...", kernel, a, b)


ADAPTER = LoHa
