"""D-Adaptation of Adan (Defazio & Mishchenko 2023, https://arxiv.org/abs/2301.07733).

It estimates its learning rate. Arguments are called as in the authors' package, dadaptation.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from pytorch_optimizer import DAdaptAdan


def build(
    param_groups: Iterable[dict[str, Any]],
    *,
    weight_decay: float = 0.01,
    betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
    eps: float = 1e-8,
    growth_rate: float = math.inf,
    d0: float = 1e-6,
) -> torch.optim.Optimizer:
    """Return it over groups of parameters with one `lr`, which multiplies the estimate."""
    return DAdaptAdan(
        list(param_groups),
        weight_decay=weight_decay,
        betas=betas,
        eps=eps,
        growth_rate=growth_rate,
        d0=d0,
    )
