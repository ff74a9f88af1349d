"""Runs the scripts at the root of the repository, in this process."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *words: object) -> int:
    """Return the exit code of `python SCRIPT WORDS`."""
    path = str(ROOT / script)
    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit) as done:
        patched.setattr(sys, "argv", [path, *map(str, words)])
        runpy.run_path(path, run_name="__main__")
    assert isinstance(done.value.code, int)
    return done.value.code
