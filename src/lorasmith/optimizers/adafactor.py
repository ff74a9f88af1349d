"""Adafactor (Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235), transformers' own, which takes little memory.

With `relative_step` it makes the learning rate by itself, from the step and the size of the weights; the run's rate and
schedule then have no part in it.
"""

from collections.abc import Iterable
from typing import Any

import torch


def build(
    param_groups: Iterable[dict[str, Any]],
    *,
    weight_decay: float = 0.01,
    relative_step: bool = False,
    scale_parameter: bool | None = None,
    warmup_init: bool = False,
    eps: tuple[float, float] = (1e-30, 1e-3),
    clip_threshold: float = 1.0,
    decay_rate: float = -0.8,
    beta1: float | None = None,
) -> torch.optim.Optimizer:
    """Return Adafactor over groups of parameters that each carry their own `lr`.

    Args:
        scale_parameter: multiply the rate by the size of each tensor; None: with `relative_step` only, since half of a
            LoRA begins at zero.
    """
    from transformers.optimization import Adafactor  # takes seconds, with all that it imports

    return Adafactor(
        list(param_groups),
        weight_decay=weight_decay,
        relative_step=relative_step,
        scale_parameter=relative_step if scale_parameter is None else scale_parameter,
        warmup_init=warmup_init,
        eps=eps,
        clip_threshold=clip_threshold,
        decay_rate=decay_rate,
        beta1=beta1,
    )
