"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no scheduler state.

Oracles in the tests: diffusers.optimization and transformers.optimization. Formulas with sources: docs/optimizers.md.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from lorasmith.errors import UserError

_DEFAULT_TIMESCALE = 10_000  # of inverse_sqrt without a warm-up, as in transformers and big_vision


@dataclass(frozen=True)
class Schedule:
    """One run's learning rate over its steps: rising from 0 over the warm-up, then as `name` says.

    Args:
        warmup_steps: 0 .. below total_steps.
        cycles: of cosine_restarts.
        power: of polynomial.
        timescale: steps of inverse_sqrt; None: those of the warm-up, or 10,000.
        decay_steps: at the end of warmup_stable_decay.
        floor: share of the rate, 0 .. 1, at which those schedules end that would go down to 0.
        table: of piecewise: (multiplier, step before which it holds), and the multiplier of the rest.
    """

    name: str
    total_steps: int
    warmup_steps: int = 0
    cycles: int = 1
    power: float = 1.0
    timescale: int | None = None
    decay_steps: int = 0
    floor: float = 0.0
    table: tuple[tuple[float, float], ...] = ()

    def multiplier(self, step: int) -> float:
        """Return what the learning rate is multiplied by at `step`, counted from 0."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        return SCHEDULES[self.name](self, step)

    def _progress(self, step: int) -> float:
        """Return the share of the steps after the warm-up that are done, in [0, 1]."""
        return min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))


def _constant(schedule: Schedule, step: int) -> float:
    return 1.0


def _linear(schedule: Schedule, step: int) -> float:
    return _above_floor(schedule, 1.0 - schedule._progress(step))


def _cosine(schedule: Schedule, step: int) -> float:
    return _above_floor(schedule, _half_cosine(schedule._progress(step)))


def _cosine_restarts(schedule: Schedule, step: int) -> float:
    """SGDR, Loshchilov and Hutter 2016, https://arxiv.org/abs/1608.03983, with cycles of one length."""
    progress = schedule._progress(step)
    return _above_floor(schedule, 0.0 if progress >= 1 else _half_cosine(schedule.cycles * progress % 1.0))


def _polynomial(schedule: Schedule, step: int) -> float:
    return _above_floor(schedule, (1.0 - schedule._progress(step)) ** schedule.power)


def _inverse_sqrt(schedule: Schedule, step: int) -> float:
    """Zhai et al. 2021, https://arxiv.org/abs/2106.04560, section 3.5, as big_vision and transformers write it."""
    timescale = schedule.timescale or schedule.warmup_steps or _DEFAULT_TIMESCALE
    return 1 / math.sqrt((step - schedule.warmup_steps + timescale) / timescale)


def _warmup_stable_decay(schedule: Schedule, step: int) -> float:
    """MiniCPM, Hu et al. 2024, https://arxiv.org/abs/2404.06395, with a cosine at the end."""
    decayed = step - (schedule.total_steps - schedule.decay_steps)
    return (
        1.0 if decayed < 0 else _above_floor(schedule, _half_cosine(min(1.0, decayed / max(1, schedule.decay_steps))))
    )


def _piecewise(schedule: Schedule, step: int) -> float:
    return next(value for value, end in schedule.table if step < end)


SCHEDULES: dict[str, Callable[[Schedule, int], float]] = {  # what follows the warm-up: step -> multiplier
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_restarts": _cosine_restarts,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _warmup_stable_decay,
    "piecewise": _piecewise,
}


def _half_cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _above_floor(schedule: Schedule, decay: float) -> float:
    return schedule.floor + (1.0 - schedule.floor) * decay


def steps_of(steps_or_share: float, total_steps: int) -> int:
    """Return a number of steps that may be given as a share of the run, below 1."""
    return round(steps_or_share * total_steps) if steps_or_share < 1 else int(steps_or_share)


def parse_table(text: str) -> list[tuple[float, float]]:
    """Read "1:100,0.1:150,0.01": multipliers, each with the step (or share of the run) before which it holds.

    The last one holds for the rest; this is how diffusers writes it.

    Raises:
        ValueError: it is no such table; says what was expected.
    """
    *parts, last = text.split(",")
    try:
        pairs = [part.split(":") for part in parts]
        table = [*((float(value), float(end)) for value, end in pairs), (float(last), math.inf)]
    except ValueError:
        table = []
    ends = [end for _, end in table]
    is_read = table and all(0 <= value < math.inf for value, _ in table) and ends[0] > 0
    if not is_read or any(later <= end for end, later in pairwise(ends)):
        raise ValueError(
            f"{text!r} is no table of learning rates; give multipliers, each with the step before which it holds, and "
            "the last one for the rest, such as 1:100,0.1:150,0.01 (shares of the run work too: 1:0.5,0.1)"
        )
    return table


def resolve(
    name: str,
    total_steps: int,
    *,
    warmup_steps: float,
    decay_steps: float,
    cycles: int,
    power: float,
    timescale: int | None,
    floor: float,
    table: str | None,
) -> Schedule:
    """Return a run's schedule, with all that was given as a share of the run (below 1) in steps.

    Raises:
        UserError: the warm-up, or with it the decay, is longer than the run.
    """
    warmup, decay = steps_of(warmup_steps, total_steps), steps_of(decay_steps, total_steps)
    if warmup >= total_steps:
        raise UserError(
            f"lr_warmup_steps = {warmup_steps:g} is not below the run's {total_steps} steps; "
            "lower the first, or train longer with --steps or --epochs."
        )
    if name == "warmup_stable_decay" and warmup + decay > total_steps:
        raise UserError(
            f"lr_warmup_steps = {warmup_steps:g} and lr_decay_steps = {decay_steps:g} are more together than the "
            f"run's {total_steps} steps; lower one of them, or train longer with --steps or --epochs."
        )
    pairs = () if table is None else tuple((value, _end(end, total_steps)) for value, end in parse_table(table))
    return Schedule(name, total_steps, warmup, cycles, power, timescale, decay, floor, pairs)


def _end(end: float, total_steps: int) -> float:
    return end if math.isinf(end) else steps_of(end, total_steps)


def chart(schedule: Schedule, width: int = 60, height: int = 5) -> list[str]:
    """Draw the multiplier over the steps in plain letters: as many columns as fit, at most one a step."""
    width = min(width, schedule.total_steps)
    steps = [column * (schedule.total_steps - 1) // max(1, width - 1) for column in range(width)]
    values = [schedule.multiplier(step) for step in steps]
    top = max(values) or 1.0
    rows = [round(value / top * (height - 1)) for value in values]
    lines = [
        f"{top * row / (height - 1):>5.2f} |" + "".join("*" if own == row else " " for own in rows).rstrip()
        for row in reversed(range(height))
    ]
    last = f"{schedule.total_steps}"
    return [*lines, f"step   1{last:>{max(width - 1, len(last) + 1)}}"]
