"""Gradient descent with Nesterov's momentum (Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html)."""

from collections.abc import Iterable
from typing import Any

import torch


def build(
    param_groups: Iterable[dict[str, Any]],
    *,
    weight_decay: float = 0.01,
    momentum: float = 0.9,
    nesterov: bool = True,
) -> torch.optim.Optimizer:
    """Return torch's SGD over groups of parameters that each carry their own `lr`."""
    return torch.optim.SGD(list(param_groups), weight_decay=weight_decay, momentum=momentum, nesterov=nesterov)
