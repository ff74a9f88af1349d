"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no scheduler state."""

import math
from collections.abc import Callable

from lorasmith.errors import UserError

_DECAYS: dict[str, Callable[[float], float]] = {  # share of the run after the warm-up, in [0, 1] -> multiplier
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def multiplier(name: str, step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Return what the learning rate is multiplied by at `step` (from 0); the same as diffusers' `get_scheduler`.

    It rises from 0 at step 0 to 1 at `warmup_steps`, then goes down to 0 at `total_steps` (constant: stays).

    Raises:
        UserError: there is no schedule of that name.
    """
    if name not in _DECAYS:
        raise UserError(f"there is no learning-rate schedule named {name!r}; there are: {', '.join(_DECAYS)}.")
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return _DECAYS[name](min(1.0, progress))
