"""Learning-rate schedules against those of diffusers and transformers."""

import math
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from diffusers import optimization as diffusers_schedules
from hypothesis import given
from hypothesis import strategies as st
from transformers import optimization as transformers_schedules

from lorasmith import lr
from lorasmith.config import OptimizerSection
from lorasmith.errors import UserError
from lorasmith.lr import Schedule

NAMES = sorted(lr.SCHEDULES)
TABLE = ((1.0, 5.0), (0.5, 7.0), (0.25, math.inf))


def theirs(make: Any, total: int, **options: Any) -> list[float]:
    """Return what a scheduler of theirs makes of a rate of 1, step by step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer=optimizer, **options)
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def ours(schedule: Schedule) -> list[float]:
    return [schedule.multiplier(step) for step in range(schedule.total_steps)]


@pytest.mark.parametrize("package", [diffusers_schedules, transformers_schedules], ids=["diffusers", "transformers"])
@pytest.mark.parametrize(
    ("name", "their_name", "options", "their_options"),
    [
        ("constant", "get_constant_schedule_with_warmup", {}, {}),
        ("linear", "get_linear_schedule_with_warmup", {}, {}),
        ("cosine", "get_cosine_schedule_with_warmup", {}, {}),
        ("cosine_restarts", "get_cosine_with_hard_restarts_schedule_with_warmup", {"cycles": 3}, {"num_cycles": 3}),
        (
            "polynomial",
            "get_polynomial_decay_schedule_with_warmup",
            {"power": 3.0, "floor": 0.01},
            {"power": 3.0, "lr_end": 0.01},
        ),
    ],
)
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (9, 10), (0, 1), (7, 40)])
def test_the_same_as_theirs_at_every_step(
    package: Any, name: str, their_name: str, options: Any, their_options: Any, warmup: int, total: int
) -> None:
    length = {} if name == "constant" else {"num_training_steps": total}
    rates = theirs(getattr(package, their_name), total, num_warmup_steps=warmup, **length, **their_options)
    assert ours(Schedule(name, total, warmup, **options)) == pytest.approx(rates, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 4])
def test_a_cosine_with_a_floor_is_transformers_cosine_with_min_lr(warmup: int) -> None:
    rates = theirs(
        transformers_schedules.get_cosine_with_min_lr_schedule_with_warmup, 20,
        num_warmup_steps=warmup, num_training_steps=20, min_lr_rate=0.1,
    )  # fmt: skip
    assert ours(Schedule("cosine", 20, warmup, floor=0.1)) == pytest.approx(rates, abs=1e-12)


@pytest.mark.parametrize(("warmup", "timescale"), [(0, None), (4, None), (4, 9), (0, 3)])
def test_inverse_sqrt_is_transformers(warmup: int, timescale: int | None) -> None:
    make = transformers_schedules.get_inverse_sqrt_schedule
    rates = theirs(make, 30, num_warmup_steps=warmup, timescale=timescale)
    assert ours(Schedule("inverse_sqrt", 30, warmup, timescale=timescale)) == pytest.approx(rates, abs=1e-12)


@pytest.mark.parametrize(("warmup", "floor"), [(0, 0.0), (4, 0.0), (0, 0.2)])
def test_warmup_stable_decay_is_transformers(warmup: int, floor: float) -> None:
    rates = theirs(
        transformers_schedules.get_wsd_schedule, 30,
        num_warmup_steps=warmup, num_decay_steps=8, num_training_steps=30, min_lr_ratio=floor,
    )  # fmt: skip
    schedule = Schedule("warmup_stable_decay", 30, warmup, decay_steps=8, floor=floor)
    assert ours(schedule) == pytest.approx(rates, abs=1e-12)


def test_piecewise_is_diffusers() -> None:
    rates = theirs(diffusers_schedules.get_piecewise_constant_schedule, 40, step_rules="1:10,0.1:20,2:30,0.005")
    schedule = lr.resolve("piecewise", 40, **defaults(table="1:10,0.1:20,2:30,0.005"))
    assert ours(schedule) == rates
    shares = lr.resolve("piecewise", 40, **defaults(table="1:0.25,0.1:0.5,2:0.75,0.005"))
    assert shares == schedule


def defaults(**given: Any) -> dict[str, Any]:
    section = OptimizerSection()
    return {
        "warmup_steps": section.lr_warmup_steps, "decay_steps": section.lr_decay_steps, "cycles": section.lr_cycles,
        "power": section.lr_power, "timescale": section.lr_timescale, "floor": section.lr_min_ratio,
        "table": section.lr_table, **given,
    }  # fmt: skip


@given(
    st.sampled_from(NAMES), st.integers(0, 50), st.integers(1, 100), st.integers(0, 300), st.floats(0, 1),
    st.integers(0, 60), st.integers(1, 5), st.floats(0.1, 4),
)  # fmt: skip
def test_always_between_0_and_1(
    name: str, warmup: int, total: int, step: int, floor: float, decay: int, cycles: int, power: float
) -> None:
    schedule = Schedule(name, total, warmup, cycles, power, None, decay, floor, TABLE)
    assert 0.0 <= schedule.multiplier(step) <= 1.0


@given(st.sampled_from(["linear", "cosine", "polynomial", "warmup_stable_decay"]), st.integers(2, 60), st.floats(0, 1))
def test_the_floor_is_where_it_ends(name: str, total: int, floor: float) -> None:
    schedule = Schedule(name, total, 0, decay_steps=total // 2, floor=floor, power=2.0)
    values = [schedule.multiplier(step) for step in range(total + 1)]
    assert values[0] == pytest.approx(1.0) and values[-1] == pytest.approx(floor, abs=1e-12)
    assert all(later <= value + 1e-12 for value, later in pairwise(values))


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_restarts", "polynomial", "warmup_stable_decay"])
def test_after_its_last_step_it_stays_at_the_floor(name: str) -> None:
    schedule = Schedule(name, 10, 2, cycles=2, power=2.0, decay_steps=4, floor=0.25)
    assert [schedule.multiplier(step) for step in (10, 11, 40)] == pytest.approx([0.25] * 3)


def test_shares_of_the_run_are_turned_into_steps() -> None:
    schedule = lr.resolve("warmup_stable_decay", 400, **defaults(warmup_steps=0.05, decay_steps=0.25))
    assert (schedule.warmup_steps, schedule.decay_steps) == (20, 100)
    assert lr.steps_of(7, 400) == 7 and lr.steps_of(0, 400) == 0


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("constant", {"warmup_steps": 40}, "lr_warmup_steps = 40 is not below the run's 40 steps"),
        ("warmup_stable_decay", {"warmup_steps": 25, "decay_steps": 0.5}, "25 and lr_decay_steps = 0.5 are more tog"),
    ],
)
def test_what_is_longer_than_the_run_is_refused(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        lr.resolve(name, 40, **defaults(**given))


@pytest.mark.parametrize("text", ["", "1:10", "1:10,0.1:5,2", "1:10,0.1:10,2", "a:10,1", "1:2:3,1", "1:0,2", "-1:3,1"])
def test_a_table_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no table of learning rates; give multipliers"):
        lr.parse_table(text)


def test_the_options_and_the_table_have_the_same_names() -> None:
    assert get_args(OptimizerSection.model_fields["lr_schedule"].annotation) == tuple(lr.SCHEDULES)


@pytest.mark.parametrize("total", [1, 2, 5, 59, 60, 61, 1600])
def test_the_chart_shows_the_schedule(total: int) -> None:
    schedule = Schedule("linear", total)
    *rows, axis = lr.chart(schedule, width=60, height=5)
    columns = max(len(row) for row in rows) - len(" 1.00 |")
    assert columns == min(60, total) and all(ord(letter) < 128 for row in rows for letter in row)
    assert rows[0].startswith(" 1.00 |*") and axis.split() == ["step", "1", str(total)]
    drawn = sum(row.count("*") for row in rows)
    assert drawn == columns
    if total >= 60:
        heights = [next(i for i, row in enumerate(rows) if row.ljust(67)[7 + x] == "*") for x in range(60)]
        assert heights == sorted(heights) and heights[0] == 0 and heights[-1] == 4
