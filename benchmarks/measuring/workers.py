"""A side in a process of its own, so that its memory is its own; it waits for its turn."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Step = Callable[[], float]  # takes one step and returns its loss


class Worker:
    """Calls make(*arguments) in a new process, then what that returned, once for each turn.

    Counted are the seconds of processor time of that process, over all its threads: with one thread that is what an
    idle machine takes, and other programs on the machine disturb it less than the clock on the wall, which `on_wall`
    takes instead, for work that a GPU does.
    losses: of the steps so far, to see that all sides compute the same.
    """

    def __init__(self, make: Callable[..., Step], *arguments: Any, threads: int, on_wall: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, make, arguments, threads, on_wall), daemon=True)
        self._process.start()
        theirs.close()
        self._connection.recv()
        self.losses: list[float] = []

    def __call__(self) -> float:
        """Take one step; return its seconds."""
        self._connection.send(True)
        seconds, loss = self._connection.recv()
        self.losses.append(loss)
        return seconds

    def finish(self) -> int | None:
        """End the process; return the most bytes that it held since its first step, None where that is not told."""
        self._connection.send(False)
        peak = self._connection.recv()
        self._process.join()
        return peak


def _work(
    connection: Connection, make: Callable[..., Step], arguments: tuple[Any, ...], threads: int, on_wall: bool
) -> None:
    import torch

    torch.set_num_threads(threads)
    step, clock = make(*arguments), time.perf_counter if on_wall else time.process_time
    _forget_peak()
    connection.send("ready")
    while connection.recv():
        start = clock()
        loss = step()
        connection.send((clock() - start, loss))
    connection.send(_peak())


def _forget_peak() -> None:
    """Let the peak begin anew after loading (Linux; elsewhere it is not told at all)."""
    if (file := Path("/proc/self/clear_refs")).exists():
        file.write_text("5")


def _peak() -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
