"""Schedule-free AdamW (Defazio et al. 2024, https://arxiv.org/abs/2405.15682): an average in place of a schedule.

It trains on other weights than those that are saved; see `base.weights_to_use`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from pytorch_optimizer import ScheduleFreeAdamW


def build(
    param_groups: Iterable[dict[str, Any]],
    *,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
) -> torch.optim.Optimizer:
    """Return it over groups of parameters that each carry their own `lr`."""
    return ScheduleFreeAdamW(
        list(param_groups),
        weight_decay=weight_decay,
        betas=betas,
        eps=eps,
        r=r,
        weight_lr_power=weight_lr_power,
    )
