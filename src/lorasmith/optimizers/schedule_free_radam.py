"""Schedule-free RAdam (Defazio et al. 2024, https://arxiv.org/abs/2405.15682): an average in place of a schedule.

It trains on other weights than those that are saved; see `base.weights_to_use`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from pytorch_optimizer import ScheduleFreeRAdam


def build(
    param_groups: Iterable[dict[str, Any]],
    *,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    silent_sgd_phase: bool = True,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
) -> torch.optim.Optimizer:
    """Return it over groups of parameters that each carry their own `lr`."""
    kind = ScheduleFreeRAdam if silent_sgd_phase else _BeginningWithSGD
    return kind(
        list(param_groups),
        weight_decay=weight_decay,
        betas=betas,
        eps=eps,
        silent_sgd_phase=silent_sgd_phase,
        r=r,
        weight_lr_power=weight_lr_power,
    )


class _BeginningWithSGD(ScheduleFreeRAdam):
    """Takes its first steps, those of SGD, with the rate that is given; 4.1 of the package takes them with 1."""

    @staticmethod
    def get_rectify_step_size(**options: Any) -> tuple[float, float]:
        return ScheduleFreeRAdam.get_rectify_step_size(**{**options, "degenerated_to_sgd": True})
