"""The loss log: each step stands once, in order, whatever stopped the run before."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.loss_log import LossLog, read_log


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, num_steps: int) -> bytes:
    log = LossLog(path, done=0)
    for step in range(1, num_steps + 1):
        log.append(step, 1 / step, lr=1e-4 * step)
    log.close()
    return path.read_bytes()


def test_what_is_appended_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "loss.jsonl"
    write(path, 7)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines == [{"step": step, "loss": 1 / step, "lr": 1e-4 * step} for step in range(1, 8)]
    assert LossLog(path, done=7).losses == [(step, 1 / step) for step in range(1, 8)]


def test_a_step_is_in_the_file_before_the_next_one_begins(tmp_path: Path) -> None:
    log = LossLog(tmp_path / "loss.jsonl", done=0)
    for step in (1, 2, 3):
        log.append(step, 0.5, lr=1e-4)
        assert steps_in(tmp_path / "loss.jsonl") == list(range(1, step + 1))
    log.close()


@pytest.mark.parametrize("done", range(6))
def test_a_resumed_log_drops_later_steps_and_keeps_the_bytes_of_earlier_ones(tmp_path: Path, done: int) -> None:
    path = tmp_path / "loss.jsonl"
    lines = write(path, 5).splitlines(keepends=True)
    log = LossLog(path, done=done)
    assert path.read_bytes() == b"".join(lines[:done])
    assert [step for step, _ in log.losses] == list(range(1, done + 1))
    log.append(done + 1, 9.0, lr=1e-4)
    log.close()
    assert path.read_bytes().startswith(b"".join(lines[:done]))
    assert steps_in(path) == list(range(1, done + 2))


@given(cut=st.integers(min_value=0, max_value=400), done=st.integers(min_value=0, max_value=9))
def test_a_log_cut_anywhere_loses_at_most_the_line_that_was_cut(
    tmp_path_factory: pytest.TempPathFactory, cut: int, done: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "loss.jsonl"
    whole = write(path, 8)
    path.write_bytes(whole[:cut])
    num_whole = whole[:cut].count(b"\n")
    log = LossLog(path, done=done)
    log.append(done + 1, 0.25, lr=1e-4)
    log.close()
    assert steps_in(path) == [*range(1, min(num_whole, done) + 1), done + 1]


def test_nothing_is_left_beside_the_log(tmp_path: Path) -> None:
    write(tmp_path / "loss.jsonl", 2)
    LossLog(tmp_path / "loss.jsonl", done=1).close()
    assert [path.name for path in tmp_path.iterdir()] == ["loss.jsonl"]


def test_a_block_of_zeros_that_a_power_cut_left_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "loss.jsonl"
    whole = write(path, 3)
    path.write_bytes(whole + bytes(50) + b"\n")
    LossLog(path, done=3).close()
    assert path.read_bytes() == whole


def test_its_number_may_have_another_name(tmp_path: Path) -> None:
    log = LossLog(tmp_path / "pictures.jsonl", done=0, name="score")
    log.append(1, 0.5, likeness=0.25)
    log.close()

    assert read_log(tmp_path / "pictures.jsonl") == [{"step": 1, "score": 0.5, "likeness": 0.25}]
    assert LossLog(tmp_path / "pictures.jsonl", done=1, name="score").losses == [(1, 0.5)]
