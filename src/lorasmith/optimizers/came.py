"""CAME (Luo et al. 2023, https://arxiv.org/abs/2307.02047): Adafactor, steadied by its confidence."""

from collections.abc import Iterable
from typing import Any

import torch
from pytorch_optimizer import CAME


def build(
    param_groups: Iterable[dict[str, Any]],
    *,
    weight_decay: float = 0.01,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    clip_threshold: float = 1.0,
    eps1: float = 1e-30,
    eps2: float = 1e-16,
) -> torch.optim.Optimizer:
    """Return CAME over groups of parameters that each carry their own `lr`."""
    return CAME(
        list(param_groups), weight_decay=weight_decay, betas=betas, clip_threshold=clip_threshold, eps1=eps1, eps2=eps2
    )
