"""Which validated steps are the best ones, and when to stop waiting for a better one: read off the log of their losses.

Nothing else is kept, so a resumed run, whose log is cut to the step that it goes on from, decides as if it had not
stopped.
"""

import math
from collections.abc import Sequence

Losses = Sequence[tuple[int, float]]  # (step, loss), in the order of the steps; step 0 is the untrained model


def best_steps(losses: Losses, count: int) -> list[int]:
    """Return the `count` steps with the lowest losses, the lowest first; of equal ones the earlier is better.

    What is not trained yet, or broken (NaN), is none of them.
    """
    trained = [(loss, step) for step, loss in losses if step and math.isfinite(loss)]
    return [step for _, step in sorted(trained)[:count]]


def has_stalled(losses: Losses, patience: int) -> bool:
    """Whether none of the last `patience` losses is lower than the lowest before them, that of step 0 included."""
    values = [loss for _, loss in losses]
    return len(values) > patience and not min(values[-patience:]) < min(values[:-patience])
