"""Stopping politely: the first signal is noted, the second one works as ever, and the handlers come back."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from lorasmith.interrupt import StopRequest

NUMBERS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def handlers_come_back() -> Iterator[None]:
    usual = [signal.default_int_handler, signal.SIG_DFL]
    before = [signal.signal(number, handler) for number, handler in zip(NUMBERS, usual, strict=True)]
    yield
    after = [signal.getsignal(number) for number in NUMBERS]
    for number, handler in zip(NUMBERS, before, strict=True):  # a shell's background jobs ignore Ctrl+C
        signal.signal(number, handler)
    assert after == usual


def test_nobody_asked_nothing_is_noted() -> None:
    with StopRequest() as stop:
        pass
    assert stop.signal_number is None
    assert not stop.exit_code


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_is_noted_and_the_code_runs_on(number: int) -> None:
    with StopRequest() as stop:
        signal.raise_signal(number)
        assert stop.signal_number == number
    assert stop.exit_code == 128 + number


def test_a_second_ctrl_c_is_an_ordinary_one() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal_number == signal.SIGINT
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_after_sigterm_ends_at_once_too() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), StopRequest():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("is_asked", [False, True])
def test_the_handlers_of_before_come_back(is_asked: bool) -> None:
    heard: list[int] = []
    before = [signal.getsignal(number) for number in NUMBERS]
    for number in NUMBERS:
        signal.signal(number, lambda number, _: heard.append(number))
    with StopRequest():
        if is_asked:
            signal.raise_signal(signal.SIGTERM)
        assert heard == []
    for number in NUMBERS:
        signal.raise_signal(number)
    assert heard == NUMBERS
    for number, handler in zip(NUMBERS, before, strict=True):
        signal.signal(number, handler)


def test_an_error_inside_gives_the_handlers_back() -> None:
    with pytest.raises(ZeroDivisionError), StopRequest():
        raise ZeroDivisionError  # the fixture compares the handlers


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM between processes")
def test_a_second_sigterm_ends_the_program() -> None:
    program = (
        "import signal; from lorasmith.interrupt import StopRequest\n"
        "with StopRequest():\n"
        "    signal.raise_signal(signal.SIGTERM); print('goes on', flush=True)\n"
        "    signal.raise_signal(signal.SIGTERM); print('never', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("goes on\n", -signal.SIGTERM)


def test_the_answer_is_given_at_once_and_once(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest("stopping after this step"):
        signal.raise_signal(signal.SIGTERM)
        assert capfd.readouterr().err == "\nstopping after this step\n"
    assert capfd.readouterr().err == ""
