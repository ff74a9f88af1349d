"""LoKr: delta(W) = scale * kron(w1, w2), a large matrix from two small ones (LyCORIS; Yeh et al. 2023, 2309.14859).

A layer of out = l * k outputs and in = m * n inputs has w1 (l, m) and w2 (k, n, kernel). Each may be a product of
low-rank factors, `lokr_w1_a @ lokr_w1_b` and `lokr_w2_a @ lokr_w2_b`, and w2 of a convolution the kernel `lokr_t2`
between an input and an output factor. The scale is alpha / rank if w1 or w2 is such a product, and 1 if none is. With
`dora_scale` the change is weight-decomposed.
"""

import math
import sys
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.adapters._decomposition import decomposed, fit_scale, new_scale, refuse_multiple, reset_scale
from lorasmith.adapters._tensors import build, draw_uniform_, show, size_of, split_shape, with_alpha, zeros
from lorasmith.adapters.base import Adapter

_W1 = [{"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}]
_W2 = [{"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"}]
_W1_NAMES, _W2_NAMES = set().union(*_W1), set().union(*_W2)


class LoKr(Adapter):
    """A change of a Linear or Conv2d that is a Kronecker product."""

    required_names = frozenset()
    optional_names = frozenset({"alpha", "dora_scale"} | _W1_NAMES | _W2_NAMES)
    lycoris_args = "algo=lokr"

    lokr_w1: nn.Parameter | None
    lokr_w1_a: nn.Parameter
    lokr_w1_b: nn.Parameter
    lokr_w2: nn.Parameter | None
    lokr_w2_a: nn.Parameter
    lokr_w2_b: nn.Parameter
    lokr_t2: nn.Parameter | None

    def __init__(
        self,
        layer_shape: Sequence[int],
        rank: int,
        alpha: float | None = None,
        *,
        factor: int = -1,
        decompose_both: bool = False,
        full_matrix: bool = False,
        unbalanced_factorization: bool = False,
        use_tucker: bool = False,
        dora_wd: bool = False,
        wd_on_output: bool = True,
    ) -> None:
        """Build for a layer. `rank` is that of w2's factors; from half of w2's larger side on, w2 is whole.

        Args:
            factor: w1 gets a side of this size where it divides the layer's, else the next smaller that does; -1: as
                near to the square root as there is one.
            decompose_both: w1 is a product of factors too, where the rank is small enough.
            full_matrix: neither is a product, whatever the rank.
            unbalanced_factorization: w1 has the larger part of the outputs.
            use_tucker: w2 of a convolution with a kernel above 1 x 1 has `lokr_t2`.
            dora_wd: train magnitudes as DoRA does; `wd_on_output=False`: of the inputs instead of the outputs.
        """
        super().__init__(layer_shape, rank, alpha)
        num_out, num_in, kernel = split_shape(layer_shape)
        (out_1, out_2), (in_1, in_2) = factorization(num_out, factor), factorization(num_in, factor)
        if unbalanced_factorization:
            out_1, out_2 = out_2, out_1
        is_product_1 = decompose_both and not full_matrix and rank < max(out_1, in_1) / 2
        is_product_2 = not full_matrix and rank < max(out_2, in_2) / 2
        has_kernel = is_product_2 and use_tucker and math.prod(kernel) > 1
        self._hold(
            rank,
            _shapes_1(out_1, in_1, rank if is_product_1 else None)
            | _shapes_2(out_2, in_2, kernel, rank if is_product_2 else None, has_kernel=has_kernel),
        )
        self.dora_scale = new_scale(layer_shape, wd_on_output=wd_on_output) if dora_wd else None
        self.alpha: Tensor
        self.register_buffer("alpha", torch.tensor(float(rank if alpha is None or self._is_whole() else alpha)))

    def _hold(self, rank: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Take parameters of these shapes."""
        self.rank = rank
        for name in sorted(_W1_NAMES | _W2_NAMES):
            self.register_parameter(name, zeros(*shapes[name]) if name in shapes else None)

    def _is_whole(self) -> bool:
        return self.lokr_w1 is not None and self.lokr_w2 is not None

    @classmethod
    def matches(cls, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether w1 and w2 are both there, each in one of its forms."""
        names = set(tensors) - {"alpha", "dora_scale"}
        return any(names == first | second for first in _W1 for second in _W2)

    @classmethod
    def from_tensors(cls, layer_shape: Sequence[int], tensors: Mapping[str, Tensor]) -> "LoKr":
        """Build from w1 and w2 in any of their forms; no alpha: scale 1.

        Raises:
            ValueError: they do not fit a layer of this shape.
        """
        num_out, num_in, kernel = split_shape(layer_shape)
        is_product_1, is_product_2 = "lokr_w1" not in tensors, "lokr_w2" not in tensors
        has_kernel, is_decomposed = "lokr_t2" in tensors, "dora_scale" in tensors
        rank = size_of(tensors, "lokr_w1_b", 0) if is_product_1 else None
        if rank is None:
            rank = size_of(tensors, "lokr_w2_b", 0) if is_product_2 else 1
        out_1 = size_of(tensors, "lokr_w1_a" if is_product_1 else "lokr_w1", 0)
        in_1 = size_of(tensors, "lokr_w1_b" if is_product_1 else "lokr_w1", 1)
        if num_out % out_1 or num_in % in_1:
            raise ValueError(f"w1 {show((out_1, in_1))} in the file; the layer's weight is {show(layer_shape)}")
        tensors = with_alpha(tensors, rank)
        if is_product_2 and not has_kernel and tensors["lokr_w2_b"].dim() > 2:
            tensors["lokr_w2_b"] = tensors["lokr_w2_b"].flatten(1)
        tensors, on_out = fit_scale(layer_shape, tensors) if is_decomposed else (tensors, True)
        out_2, in_2, rank_2 = num_out // out_1, num_in // in_1, rank if is_product_2 else None
        shapes = _shapes_1(out_1, in_1, rank if is_product_1 else None)
        shapes |= _shapes_2(out_2, in_2, kernel, rank_2, has_kernel=has_kernel)

        def make() -> LoKr:
            adapter = cls(layer_shape, 1, full_matrix=True, dora_wd=is_decomposed, wd_on_output=on_out)
            adapter._hold(rank, shapes)
            return adapter

        return build(make, layer_shape, tensors)

    @classmethod
    def largest_rank(cls, layer_shape: Sequence[int]) -> int:
        """Return sys.maxsize: a large rank means that w2 is whole."""
        split_shape(layer_shape)
        return sys.maxsize

    def reset(self, weight: Tensor, generator: torch.Generator) -> None:
        """Draw as torch draws a layer's own weight; w2, or w2_b, is zero."""
        zero = "lokr_w2" if self.lokr_w2 is not None else "lokr_w2_b"
        for name, parameter in self.named_parameters():
            if name not in (zero, "dora_scale"):
                draw_uniform_(parameter, generator)
        with torch.no_grad():
            self.get_parameter(zero).zero_()
        if self.dora_scale is not None:
            reset_scale(self.dora_scale, weight)

    def delta(self, weight: Tensor) -> Tensor:
        """Return the change, in fp32 and of the weight's shape."""
        with torch.autocast(weight.device.type, enabled=False):
            w1, w2 = self._parts()
            w1 = w1.reshape(*w1.shape, *(1 for _ in weight.shape[2:]))
            w2 = w2.reshape(w2.shape[0], -1, *weight.shape[2:]).contiguous()  # torch.kron fails on any other layout
            change = torch.kron(w1, w2).view(weight.shape)
            return change if self.dora_scale is None else decomposed(weight, change, self.dora_scale)

    def _parts(self) -> tuple[Tensor, Tensor]:
        """Return w1, which takes the scale, and w2."""
        w1 = self.lokr_w1 if self.lokr_w1 is not None else self.lokr_w1_a @ self.lokr_w1_b
        if self.lokr_w2 is not None:
            w2 = self.lokr_w2
        elif self.lokr_t2 is not None:
            w2 = torch.einsum("p q ..., p o, q i -> o i ...", self.lokr_t2, self.lokr_w2_a, self.lokr_w2_b)
        else:
            w2 = self.lokr_w2_a @ self.lokr_w2_b
        return w1 if self._is_whole() else w1 * (self.alpha / self.rank), w2

    def scale_(self, factor: float) -> None:
        """Scale w1 and w2 by sqrt(factor).

        Raises:
            ValueError: it is weight-decomposed.
        """
        if self.dora_scale is not None:
            raise refuse_multiple()
        with torch.no_grad():
            for part in (self.lokr_w1, self.lokr_w1_a, self.lokr_w2, self.lokr_w2_a):
                if part is not None:
                    part.mul_(math.sqrt(factor))

    def forward(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """Return what the layer makes of `x` with the change; for a Linear without building it."""
        if isinstance(layer, nn.Conv2d) or self.dora_scale is not None:
            return super().forward(layer, x, output)
        with torch.autocast(x.device.type, enabled=False):
            w1, w2 = self._parts()
        w1, w2 = (w1 * self.multiplier).to(x.dtype), w2.to(x.dtype)
        inner = F.linear(x.unflatten(-1, (w1.shape[1], w2.shape[1])), w2)  # (..., m, k)
        return output + (w1 @ inner).flatten(-2)


def factorization(size: int, factor: int) -> tuple[int, int]:
    """Return two factors of a size, the smaller first, as LyCORIS chooses them.

    The smaller is `factor` or, if that is the larger, its counterpart; where it does not divide the size, the largest
    divisor below it and below the square root. -1: the largest divisor up to the square root.
    """
    if factor > 0 and size % factor == 0:
        smaller = min(factor, size // factor)
    else:
        limit = min(factor if factor > 0 else size, math.isqrt(size))
        smaller = next(divisor for divisor in range(limit, 0, -1) if size % divisor == 0)
    return smaller, size // smaller


def _shapes_1(num_out: int, num_in: int, rank: int | None) -> dict[str, tuple[int, ...]]:
    if rank is None:
        return {"lokr_w1": (num_out, num_in)}
    return {"lokr_w1_a": (num_out, rank), "lokr_w1_b": (rank, num_in)}


def _shapes_2(
    num_out: int, num_in: int, kernel: tuple[int, ...], rank: int | None, *, has_kernel: bool
) -> dict[str, tuple[int, ...]]:
    if rank is None:
        return {"lokr_w2": (num_out, num_in, *kernel)}
    if has_kernel:
        return {"lokr_t2": (rank, rank, *kernel), "lokr_w2_a": (rank, num_out), "lokr_w2_b": (rank, num_in)}
    return {"lokr_w2_a": (num_out, rank), "lokr_w2_b": (rank, num_in * math.prod(kernel))}


ADAPTER = LoKr
