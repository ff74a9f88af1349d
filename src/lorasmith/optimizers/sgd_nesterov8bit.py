"""SGD with Nesterov's momentum in 8 bits, bitsandbytes' (Dettmers et al. 2021, https://arxiv.org/abs/2110.02861).

Tensors below `min_8bit_size` values keep 32 bits.
"""

from collections.abc import Iterable
from typing import Any

import torch

STAND_IN = "sgd"  # where bitsandbytes is not installed, or has nothing for the machine


def build(
    param_groups: Iterable[dict[str, Any]],
    *,
    weight_decay: float = 0.01,
    momentum: float = 0.9,
    min_8bit_size: int = 4096,
) -> torch.optim.Optimizer:
    """Return it over groups of parameters that each carry their own `lr`."""
    from bitsandbytes.optim import SGD8bit  # pyright: ignore[reportMissingImports]  # an extra

    return SGD8bit(
        list(param_groups),
        lr=1e-4,  # it insists on one; each group has its own
        weight_decay=weight_decay,
        momentum=momentum,
        nesterov=True,
        min_8bit_size=min_8bit_size,
    )
