"""Two or more sides measured in one run: they take turns, so that what else the machine does meets all alike."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median

Side = Callable[[], float]  # does the thing once and returns the seconds that it took


def take_turns(sides: Mapping[str, Side], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each side: one unmeasured round, then `repeats` rounds, every second one backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    for number in range(repeats):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            seconds[name].append(sides[name]())
    return seconds


def print_times(seconds: Mapping[str, Sequence[float]], more: Mapping[str, str] | None = None) -> None:
    """Print each side's median and range, and what else is known of it."""
    width = max(map(len, seconds))
    for name, values in seconds.items():
        line = f"{name:<{width}}  {median(values):8.3f} s  ({min(values):.3f} to {max(values):.3f})"
        print(line + (f"  {more[name]}" if more else ""))


def print_ratio(ours: str, theirs: str, seconds: Mapping[str, Sequence[float]]) -> None:
    """Print one side's time as a share of the other's: the median of the rounds, each measured one after the other."""
    rounds = [a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
    low, high = min(rounds), max(rounds)
    print(f"time {ours} / {theirs}: {median(rounds):.3f}  ({low:.3f} to {high:.3f} in {len(rounds)} rounds)")
