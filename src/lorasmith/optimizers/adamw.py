"""AdamW (Loshchilov & Hutter 2017, https://arxiv.org/abs/1711.05101), torch's own.

All tensors are updated in one kernel (fused), which every device has on which we train; a LoRA has hundreds.
"""

from collections.abc import Iterable
from typing import Any

import torch


def build(
    param_groups: Iterable[dict[str, Any]],
    *,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    amsgrad: bool = False,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """Return AdamW over groups of parameters that each carry their own `lr`."""
    return torch.optim.AdamW(
        list(param_groups), weight_decay=weight_decay, betas=betas, eps=eps, amsgrad=amsgrad, fused=fused
    )
