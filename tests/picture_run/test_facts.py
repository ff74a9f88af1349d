"""What is written of a picture: a model's hash is found out once, and never told of a file that has changed since."""

from pathlib import Path

import pytest

from lorasmith import file_facts
from lorasmith.cache_folder import default_place
from lorasmith.checkpoint import file_sha256
from lorasmith.picture_run import facts


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read to find their hash out; they are not young."""
    found: list[Path] = []
    now = file_facts.time.time_ns
    monkeypatch.setattr(file_facts.time, "time_ns", lambda: now() + 10**10)
    monkeypatch.setattr(facts, "file_sha256", lambda path: (found.append(path), file_sha256(path))[1])
    return found


def test_a_models_hash_is_found_out_once_while_the_file_stays_the_same(tmp_path: Path, read: list[Path]) -> None:
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"weights")
    assert [facts.known_sha256(model) for _ in range(3)] == [file_sha256(model)] * 3 and read == [model]
    model.write_bytes(b"others!")
    assert facts.known_sha256(model) == file_sha256(model) and len(read) == 2


@pytest.mark.parametrize("is_file", [True, False])
def test_without_a_cache_folder_it_is_found_out_each_time(tmp_path: Path, read: list[Path], is_file: bool) -> None:
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"weights")
    place = default_place()
    if is_file:
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "mine.txt").write_text("mine")
    assert [facts.known_sha256(model) for _ in range(2)] == [file_sha256(model)] * 2 and len(read) == 2
    assert place.is_file() or [path.name for path in place.iterdir()] == ["mine.txt"]
