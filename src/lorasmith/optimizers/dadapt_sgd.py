"""D-Adaptation of SGD (Defazio & Mishchenko 2023, https://arxiv.org/abs/2301.07733).

It estimates its learning rate. Arguments are called as in the authors' package, dadaptation; weight decay is part of
the gradient (L2), as there: what is decoupled would not reach the sum of steps that the weights are made of.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from pytorch_optimizer import DAdaptSGD


def build(
    param_groups: Iterable[dict[str, Any]],
    *,
    weight_decay: float = 0.01,
    momentum: float = 0.9,
    growth_rate: float = math.inf,
    d0: float = 1e-6,
) -> torch.optim.Optimizer:
    """Return it over groups of parameters with one `lr`, which multiplies the estimate."""
    return DAdaptSGD(
        list(param_groups),
        weight_decay=weight_decay,
        momentum=momentum,
        weight_decouple=False,
        growth_rate=growth_rate,
        d0=d0,
    )
