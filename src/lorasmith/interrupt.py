"""Stopping a run politely: Ctrl+C and SIGTERM ask for a stop, the loop finishes its step and saves."""

import os
import signal
from types import FrameType


class StopRequest:
    """While entered, the first SIGINT or SIGTERM is noted and `answer` printed; a second one ends the program at once.

    `signal_number` is None until a stop is asked for, and `exit_code` 0; then it is 128 + signal (Ctrl+C 130, SIGTERM
    143).
    """

    def __init__(self, answer: str = "") -> None:
        self._answer = answer
        self.signal_number: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @property
    def exit_code(self) -> int:
        return 0 if self.signal_number is None else 128 + self.signal_number

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal_number = number
        self._restore()
        if self._answer:
            os.write(2, f"\n{self._answer}\n".encode())  # print may be what was interrupted

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned
        self._previous.clear()
