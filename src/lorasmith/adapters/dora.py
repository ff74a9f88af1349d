"""DoRA: a LoRA whose result has a trained magnitude, W' = m * (W + D) / |W + D| with D = alpha / rank * up @ down.

Liu et al. 2024, https://arxiv.org/abs/2402.09353. The multiplier scales W' - W, as in ComfyUI. LyCORIS' own multiplier
scales m / |W + D| - 1 alone and leaves D in the weight, so it agrees at 1 only.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lorasmith.adapters._decomposition import decomposed, fit_scale, new_scale, refuse_multiple, reset_scale
from lorasmith.adapters._tensors import build, with_alpha
from lorasmith.adapters.base import Adapter
from lorasmith.adapters.lora import LoRA, check_factors


class DoRA(LoRA):
    """A LoRA with `dora_scale`, the magnitude of each output's weights (or each input's)."""

    required_names = LoRA.required_names | {"dora_scale"}
    lycoris_args = "algo=lora dora_wd=True"
    has_inner_dropout = False

    def __init__(
        self,
        layer_shape: Sequence[int],
        rank: int,
        alpha: float | None = None,
        *,
        use_tucker: bool = False,
        wd_on_output: bool = True,
    ) -> None:
        """Build for a layer; `wd_on_output=False` has a magnitude for each input instead of each output."""
        super().__init__(layer_shape, rank, alpha, use_tucker=use_tucker)
        self.dora_scale = new_scale(layer_shape, wd_on_output=wd_on_output)

    @classmethod
    def from_tensors(cls, layer_shape: Sequence[int], tensors: Mapping[str, Tensor]) -> "DoRA":
        """Build from a LoRA's tensors and `dora_scale`, whose shape tells whether outputs or inputs have magnitudes.

        Raises:
            ValueError: they do not fit a layer of this shape.
        """
        rank, has_mid = check_factors(layer_shape, tensors)
        tensors, on_out = fit_scale(layer_shape, with_alpha(tensors, rank))
        return build(lambda: cls(layer_shape, rank, use_tucker=has_mid, wd_on_output=on_out), layer_shape, tensors)

    def reset(self, weight: Tensor, generator: torch.Generator) -> None:
        """Start as a LoRA does, with the magnitudes of the weight itself."""
        super().reset(weight, generator)
        reset_scale(self.dora_scale, weight)

    def delta(self, weight: Tensor) -> Tensor:
        """Return W' - W, in fp32 and of the weight's shape."""
        return decomposed(weight, super().delta(weight), self.dora_scale)

    def delta_square(self, weight: Tensor) -> Tensor:
        """Return the squared Frobenius norm of delta."""
        return Adapter.delta_square(self, weight)

    def delta_norm(self, weight: Tensor) -> Tensor:
        """Return the Frobenius norm of delta."""
        return self.delta(weight).norm()

    def scale_(self, factor: float) -> None:
        """Refuse: no other factors and magnitudes give a multiple of delta.

        Raises:
            ValueError: always.
        """
        raise refuse_multiple()

    def forward(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """Return what the layer makes of `x` with W + multiplier * (W' - W)."""
        return Adapter.forward(self, layer, x, output)


ADAPTER = DoRA
