"""Progress: what a person sees on a terminal and in a log file, on a clock that the test winds."""

import io
import re
from collections.abc import Iterator

import psutil
import pytest
import torch

from lorasmith import progress
from lorasmith.progress import Progress, memory_free, memory_name, memory_used

CPU = torch.device("cpu")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Seconds since the start, in a list of one; the progress reads it."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    yield now


def run(clock: list[float], total: int, done: int = 0, *, seconds: float = 0.5, is_shown: bool = True) -> None:
    with Progress(total, done, CPU, is_shown=is_shown) as shown:
        for step in range(done, total):
            clock[0] += seconds
            shown.advance(1 / (step + 1))


def steps_told(text: str) -> list[int]:
    return [int(step) for step in re.findall(r"^step (\d+)/", text, re.MULTILINE)]


def test_without_a_terminal_each_tenth_has_a_line(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    run(clock, 200)
    told = capsys.readouterr()
    assert steps_told(told.out) == list(range(20, 201, 20))
    assert told.err == ""


def test_slow_steps_have_a_line_at_least_every_half_minute(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    run(clock, 100, seconds=11.0)
    told = steps_told(capsys.readouterr().out)
    assert max(b - a for a, b in zip([0, *told], told, strict=False)) * 11 <= 33 and told[-1] == 100


@pytest.mark.parametrize("total", [1, 3, 7])
def test_a_short_run_tells_every_step(clock: list[float], capsys: pytest.CaptureFixture[str], total: int) -> None:
    run(clock, total)
    assert steps_told(capsys.readouterr().out) == list(range(1, total + 1))


def test_speed_and_time_left_count_only_what_this_start_did(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    run(clock, 100, 60, seconds=0.5)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("step 70/100") and "2.00 steps/s" in first and "00:15 left" in first
    assert last.startswith("step 100/100") and "00:00 left" in last


def test_the_loss_is_a_moving_average_that_starts_at_the_first(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    run(clock, 3)
    average = 1.0
    expected = [average]
    for loss in (1 / 2, 1 / 3):
        average = 0.95 * average + 0.05 * loss
        expected.append(average)
    told = re.findall(r"loss ([\d.]+)", capsys.readouterr().out)
    assert told == [f"{value:.4f}" for value in expected]


def test_a_terminal_gets_a_bar_that_begins_where_the_run_went_on(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    run(clock, 10, 6)
    bar = terminal.getvalue()
    assert "6/10" in bar and "10/10" in bar and "0/10 " not in bar.replace("10/10", "")
    assert "loss=" in bar and "ram=" in bar
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("has_terminal", [False, True])
@pytest.mark.parametrize("is_shown", [False, True])
def test_what_is_said_is_one_line_for_those_who_want_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, has_terminal: bool, is_shown: bool
) -> None:
    if has_terminal:
        monkeypatch.setattr("sys.stderr", Terminal())
    with Progress(10, 0, CPU, is_shown=is_shown) as shown:
        shown.say("saved out/last.safetensors")
    assert capsys.readouterr().out == ("saved out/last.safetensors\n" if is_shown else "")


def test_nothing_is_shown_that_is_not_wanted(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    run(clock, 10, is_shown=False)
    assert capsys.readouterr() == ("", "")


def test_memory_is_that_of_this_process() -> None:
    before = memory_used(CPU)
    held = torch.ones(2**26, dtype=torch.uint8)
    assert memory_used(CPU) - before >= 0.9 * held.numel()
    assert (memory_name(CPU), memory_name(torch.device("cuda"))) == ("ram", "gpu")


def test_free_memory_is_part_of_what_the_machine_has() -> None:
    assert 0 < memory_free(CPU) <= psutil.virtual_memory().total
