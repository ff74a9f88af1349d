"""Prodigy (Mishchenko & Defazio 2023, https://arxiv.org/abs/2306.06101): Adam that estimates its learning rate.

Arguments are called as in the authors' package, prodigyopt.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from pytorch_optimizer import Prodigy


def build(
    param_groups: Iterable[dict[str, Any]],
    *,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    beta3: float | None = None,
    eps: float = 1e-8,
    decouple: bool = True,
    use_bias_correction: bool = False,
    safeguard_warmup: bool = False,
    d0: float = 1e-6,
    d_coef: float = 1.0,
    growth_rate: float = math.inf,
) -> torch.optim.Optimizer:
    """Return Prodigy over groups of parameters with one `lr`, which multiplies the estimate."""
    return Prodigy(
        list(param_groups),
        weight_decay=weight_decay,
        betas=betas,
        beta3=beta3,
        eps=eps,
        weight_decouple=decouple,
        bias_correction=use_bias_correction,
        safeguard_warmup=safeguard_warmup,
        d0=d0,
        d_coef=d_coef,
        growth_rate=growth_rate,
    )
