"""Progress of a run for a person: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import TypeVar

import psutil
import torch
from tqdm import tqdm

Item = TypeVar("Item")


class Progress:
    """Shows step, loss (a moving average), speed, time left and memory; prints nothing when not `is_shown`.

    Args:
        total: steps of the whole run; done: steps done before this start.
    """

    _SMOOTHING, _SECONDS_BETWEEN_LINES = 0.95, 30.0

    def __init__(self, total: int, done: int, device: torch.device, *, is_shown: bool) -> None:
        self._total, self._done, self._first, self._device = total, done, done, device
        self._is_shown = is_shown
        self._bar = (
            tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, smoothing=0.1)
            if is_shown and sys.stderr.isatty()
            else None
        )
        self._average: float | None = None
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, _type: type | None, _value: BaseException | None, _traceback: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, loss: float) -> None:
        """Count one step."""
        self._done += 1
        keep = self._SMOOTHING if self._average is not None else 0.0
        self._average = keep * (self._average or 0.0) + (1 - keep) * loss
        facts = {"loss": f"{self._average:.4f}", memory_name(self._device): f"{memory_used(self._device) / 2**30:.1f}G"}
        if self._bar is not None:
            self._bar.set_postfix(facts, refresh=False)
            self._bar.update()
        elif self._is_shown:
            self._print_line(facts)

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._is_shown:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def _print_line(self, facts: dict[str, str]) -> None:
        now, is_last = time.monotonic(), self._done == self._total
        is_tenth = self._done * 10 // self._total > (self._done - 1) * 10 // self._total
        if not (is_last or is_tenth or now - self._last_line > self._SECONDS_BETWEEN_LINES):
            return
        self._last_line = now
        rate = (self._done - self._first) / max(now - self._start, 1e-9)
        left = tqdm.format_interval((self._total - self._done) / rate)
        shown = "  ".join(f"{name} {value}" for name, value in facts.items())
        print(f"step {self._done}/{self._total}  {shown}  {rate:.2f} steps/s  {left} left", flush=True)


def counted(items: Iterable[Item], total: int, title: str, *, is_shown: bool, unit: str = "picture") -> Iterable[Item]:
    """Return the items, each a `unit`, counted by a bar on a terminal and told of by one line elsewhere."""
    is_terminal = sys.stderr.isatty()
    if is_shown and not is_terminal:
        print(f"{title}: {total} to do", flush=True)
    return tqdm(items, desc=title, total=total, unit=unit, dynamic_ncols=True, disable=not (is_shown and is_terminal))


def memory_name(device: torch.device) -> str:
    return "gpu" if device.type == "cuda" else "ram"


def memory_used(device: torch.device) -> int:
    """Return the memory in use in bytes: the peak allocated on the GPU, or what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def memory_free(device: torch.device) -> int:
    """Return the memory in bytes that can still be had: the GPU's, or the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
