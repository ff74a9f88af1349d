"""The best steps, and giving up, against what one would do by hand, one loss at a time."""

import math

from hypothesis import given
from hypothesis import strategies as st

from lorasmith.best_steps import best_steps, has_stalled

VALUES = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@given(VALUES, st.integers(1, 5))
def test_keeping_the_best_as_they_come_keeps_the_best_of_all(values: list[int], count: int) -> None:
    losses, kept = [(10 * number, float(value)) for number, value in enumerate(values)], list[int]()
    by_step = dict(losses)
    for step, loss in losses[1:]:
        worse = [other for other in kept if by_step[other] > loss]
        if len(kept) < count or worse:
            kept.append(step)
        if len(kept) > count:
            kept.remove(max(kept, key=lambda other: (by_step[other], other)))
    assert sorted(best_steps(losses, count)) == sorted(kept)
    assert [by_step[step] for step in best_steps(losses, count)] == sorted(by_step[step] for step in kept)


@given(VALUES, st.integers(1, 5))
def test_giving_up_as_one_counts_by_hand(values: list[int], patience: int) -> None:
    lowest, waited = math.inf, 0
    for value in values:
        lowest, waited = (value, 0) if value < lowest else (lowest, waited + 1)
    losses = [(number, float(value)) for number, value in enumerate(values)]
    assert has_stalled(losses, patience) == (waited >= patience)


def test_a_broken_loss_is_never_the_best() -> None:
    assert best_steps([(0, 0.1), (1, math.nan), (2, 0.3), (3, math.inf)], 3) == [2]
