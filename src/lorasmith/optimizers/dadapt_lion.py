"""D-Adaptation of Lion (Defazio & Mishchenko 2023, https://arxiv.org/abs/2301.07733).

It estimates its learning rate. Arguments are called as in the authors' package, dadaptation; weight decay is decoupled
unless told otherwise.
"""

from collections.abc import Iterable
from typing import Any

import torch
from pytorch_optimizer import DAdaptLion


def build(
    param_groups: Iterable[dict[str, Any]],
    *,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.99),
    decouple: bool = True,
    d0: float = 1e-6,
) -> torch.optim.Optimizer:
    """Return it over groups of parameters with one `lr`, which multiplies the estimate."""
    return DAdaptLion(
        list(param_groups),
        weight_decay=weight_decay,
        betas=betas,
        weight_decouple=decouple,
        d0=d0,
    )
