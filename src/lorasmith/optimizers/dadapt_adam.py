"""D-Adaptation of Adam (Defazio & Mishchenko 2023, https://arxiv.org/abs/2301.07733).

It estimates its learning rate. Arguments are called as in the authors' package, dadaptation; weight decay is decoupled
unless told otherwise.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from pytorch_optimizer import DAdaptAdam


def build(
    param_groups: Iterable[dict[str, Any]],
    *,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    decouple: bool = True,
    use_bias_correction: bool = False,
    growth_rate: float = math.inf,
    d0: float = 1e-6,
) -> torch.optim.Optimizer:
    """Return it over groups of parameters with one `lr`, which multiplies the estimate."""
    return DAdaptAdam(
        list(param_groups),
        weight_decay=weight_decay,
        betas=betas,
        eps=eps,
        weight_decouple=decouple,
        bias_correction=use_bias_correction,
        growth_rate=growth_rate,
        d0=d0,
    )
