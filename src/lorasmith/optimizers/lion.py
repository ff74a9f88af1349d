"""Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675): steps of one size, by the sign; half of AdamW's memory."""

from collections.abc import Iterable
from typing import Any

import torch
from pytorch_optimizer import Lion


def build(
    param_groups: Iterable[dict[str, Any]], *, weight_decay: float = 0.01, betas: tuple[float, float] = (0.9, 0.99)
) -> torch.optim.Optimizer:
    """Return Lion over groups of parameters that each carry their own `lr`."""
    return Lion(list(param_groups), weight_decay=weight_decay, betas=betas)
