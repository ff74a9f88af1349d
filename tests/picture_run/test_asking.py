"""Prompts that are typed: on a terminal, with earlier ones coming back, and piped in."""

import io
import os
import sys

import pytest

from lorasmith.picture_run.asking import asked_prompts

PROGRAM = "from lorasmith.picture_run.asking import asked_prompts; print('typed', list(asked_prompts()))"


@pytest.mark.parametrize("typed", ["a cat\n a dog \n\na cow\n", "a cat\na dog"])
def test_lines_until_an_empty_one_or_the_end(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    assert list(asked_prompts()) == ["a cat", "a dog"]


def test_on_a_terminal_earlier_lines_come_back_and_can_be_edited() -> None:
    pty = pytest.importorskip("pty")
    pytest.importorskip("readline")
    up, back, end = b"\x1b[A", b"\x7f", b"\x04"
    process, terminal = pty.fork()
    if process == 0:
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, "-c", PROGRAM])
    answers, shown = [b"a cat\n", up + back + b"p\n", end], b""
    while True:
        try:
            shown += os.read(terminal, 1024)
        except OSError:  # as Linux says that the other side has ended
            break
        if b"typed" in shown and shown.endswith(b"]\r\n"):
            break
        if answers and shown.endswith(b"prompt: "):
            os.write(terminal, answers.pop(0))
    os.close(terminal)
    os.waitpid(process, 0)
    assert b"typed ['a cat', 'a cap']" in shown
