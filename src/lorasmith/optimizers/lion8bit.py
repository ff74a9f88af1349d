"""Lion with states of 8 bits, bitsandbytes' (Dettmers et al. 2021, https://arxiv.org/abs/2110.02861).

Tensors below `min_8bit_size` values keep 32 bits.
"""

from collections.abc import Iterable
from typing import Any

import torch

STAND_IN = "lion"  # where bitsandbytes is not installed, or has nothing for the machine


def build(
    param_groups: Iterable[dict[str, Any]],
    *,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.99),
    min_8bit_size: int = 4096,
) -> torch.optim.Optimizer:
    """Return it over groups of parameters that each carry their own `lr`."""
    from bitsandbytes.optim import Lion8bit  # pyright: ignore[reportMissingImports]  # an extra

    return Lion8bit(
        list(param_groups),
        weight_decay=weight_decay,
        betas=betas,
        min_8bit_size=min_8bit_size,
    )
