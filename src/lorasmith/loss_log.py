"""Losses as JSON lines: the record that the report, the resume and other programs read."""

import json
import os
from pathlib import Path
from typing import Any


class LossLog:
    """Appends `{"step": 1, "loss": 0.1, "lr": 0.0001}` lines; steps count from 1.

    Opened for a resumed run, lines of later steps are dropped first, so that each step stands once.

    Args:
        name: what the number is called in a line.
    """

    def __init__(self, path: Path, *, done: int, name: str = "loss") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [(step, line) for step, line in _lines(path) if step <= done]
        temporary = path.with_suffix(".partial")
        temporary.write_text("".join(line for _, line in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file, self._name = path.open("a", encoding="utf-8", buffering=1), name
        self.losses: list[tuple[int, float]] = [(step, json.loads(line)[name]) for step, line in kept]

    def append(self, step: int, loss: float, **facts: Any) -> None:
        """Write a line; `facts` are further values that JSON can hold, such as lr, the learning rate."""
        self._file.write(json.dumps({"step": step, self._name: loss, **facts}) + "\n")
        self.losses.append((step, loss))

    def close(self) -> None:
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return what stands in a log's whole lines."""
    return [json.loads(line) for _, line in _lines(path)]


def _lines(path: Path) -> list[tuple[int, str]]:
    """Return the whole lines of a log with their steps.

    Left out are a last line that a crash cut short, and what a power cut left where a line was (zeros, or part of it).
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [(step, line) for line in lines if line.endswith("\n") and (step := _step_of(line)) is not None]


def _step_of(line: str) -> int | None:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return None
