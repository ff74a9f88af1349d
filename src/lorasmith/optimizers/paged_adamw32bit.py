"""AdamW with paged states, bitsandbytes' (Dettmers et al. 2021, https://arxiv.org/abs/2110.02861).

Pages move to the main memory when the GPU's is full; a CPU has nothing to page.
"""

from collections.abc import Iterable
from typing import Any

import torch

STAND_IN = "adamw"  # where bitsandbytes is not installed, or has nothing for the machine


def build(
    param_groups: Iterable[dict[str, Any]],
    *,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """Return it over groups of parameters that each carry their own `lr`."""
    from bitsandbytes.optim import PagedAdamW32bit  # pyright: ignore[reportMissingImports]  # an extra

    return PagedAdamW32bit(
        list(param_groups),
        weight_decay=weight_decay,
        betas=betas,
        eps=eps,
    )
