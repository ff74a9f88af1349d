"""The readers keep their promise for files damaged in any way, and the program that looks for such files works."""

import os
import pickle
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from fuzz_readers import damaged, kinds, read, with_pickle
from hypothesis import given, settings
from hypothesis import strategies as st

PROGRAM = Path(__file__).parents[2] / "tools" / "fuzz_readers.py"
SOUND = kinds()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "model"


@pytest.mark.parametrize("kind", SOUND)
@settings(max_examples=60)
@given(seed=st.integers(0, 2**64))
def test_a_damaged_file_is_read_or_refused(path: Path, kind: str, seed: int) -> None:
    data, wrap = SOUND[kind]
    content = wrap(damaged(data, random.Random(seed)))
    path.write_bytes(content)
    tracemalloc.start()
    try:
        read(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000 + 100 * len(content)
    finally:
        tracemalloc.stop()


@settings(max_examples=200)
@given(data=st.binary(max_size=60))
def test_any_pickle_in_an_archive_is_read_or_refused(path: Path, data: bytes) -> None:
    path.write_bytes(with_pickle(SOUND["archive"][1](SOUND["archive"][0]), data))
    read(path)


class Attack:
    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call[0], self.call[1:]


def test_the_program_notices_when_something_is_run(tmp_path: Path) -> None:
    """With the reader of pickles replaced by Python's own, it must end with a word of alarm."""
    evil = tmp_path / "evil"
    evil.write_bytes(pickle.dumps(Attack(os.system, "true")))
    code = (
        f"import sys, pickle; sys.path.insert(0, {str(PROGRAM.parent)!r}); import fuzz_readers;"
        f"sys.addaudithook(fuzz_readers.forbid); pickle.load(open({str(evil)!r}, 'rb'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 3 and "had something run: os.system" in done.stderr


def test_the_program_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), "--seconds", "1", "--keep", str(tmp_path / "kept")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not list((tmp_path / "kept").iterdir()), done.stderr
