"""Weight decomposition: W' = m * (W + D) / |W + D| (DoRA, Liu et al. 2024, https://arxiv.org/abs/2402.09353, eq. 5).

D is what any adapter type makes, m is `dora_scale`. The norm is that of each output's weights, as in LyCORIS and PEFT,
or of each input's, as in older files of LyCORIS; which one is told by the shape of m: (out, 1, ...) or (1, in, ...).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lorasmith.adapters._tensors import show, split_shape, zeros

_NO_MULTIPLE = (
    "the strength of a weight-decomposed adapter (dora_scale) cannot be changed in its tensors; "
    "set the multiplier instead, or train without a limit of the norm"
)


def new_scale(layer_shape: Sequence[int], *, wd_on_output: bool) -> nn.Parameter:
    """Return an m of the right shape, still zero."""
    num_out, num_in, kernel = split_shape(layer_shape)
    return zeros(*((num_out, 1) if wd_on_output else (1, num_in)), *(1 for _ in kernel))


def reset_scale(dora_scale: nn.Parameter, weight: Tensor) -> None:
    """Set m to the weight's own norm, so that W' = W while D is zero."""
    with torch.no_grad():
        dora_scale.copy_(_norm(weight.float(), dora_scale))


def decomposed(weight: Tensor, change: Tensor, dora_scale: Tensor) -> Tensor:
    """Return W' - W for the change D; exactly 0 after `reset_scale` with D = 0."""
    ratio = dora_scale / _norm(weight.float() + change, dora_scale)
    return (ratio - 1) * weight.float() + ratio * change


def _norm(weight: Tensor, dora_scale: Tensor) -> Tensor:
    """Return the norm over all dimensions that m does not have; never 0."""
    dims = [dim for dim, size in enumerate(dora_scale.shape) if size == 1]
    return torch.linalg.vector_norm(weight, dim=dims, keepdim=True) + torch.finfo(torch.float32).eps


def fit_scale(layer_shape: Sequence[int], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Return a file's tensors with `dora_scale` in its full shape, and whether it belongs to the outputs.

    Raises:
        ValueError: it fits neither the outputs nor the inputs.
    """
    num_out, num_in, kernel = split_shape(layer_shape)
    stored, ones = tensors["dora_scale"], (1,) * len(kernel)
    if stored.numel() == num_out and stored.dim() and stored.shape[0] == num_out:
        return {**tensors, "dora_scale": stored.reshape(num_out, 1, *ones)}, True
    if stored.numel() == num_in and stored.dim() > 1 and stored.shape[1] == num_in:
        return {**tensors, "dora_scale": stored.reshape(1, num_in, *ones)}, False
    raise ValueError(
        f"dora_scale {show(stored.shape)} in the file; {num_out} x 1 or 1 x {num_in} is needed, "
        f"for the layer's weight is {show(layer_shape)}"
    )


def refuse_multiple() -> ValueError:
    """Return why a decomposed adapter has no `scale_`: no other m and D give a multiple of W' - W in general."""
    return ValueError(_NO_MULTIPLE)
