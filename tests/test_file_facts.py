"""Facts of files: told again only while nothing about the file has changed."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lorasmith import file_facts
from lorasmith.file_facts import FileFacts, count_facts

LATER = 10**10  # nanoseconds


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock goes ahead, so that files that were just made are not young."""
    now = time.time_ns
    monkeypatch.setattr(file_facts.time, "time_ns", lambda: now() + LATER)


def written(path: Path, text: str = "abc") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def ask(tmp_path: Path, path: Path, made_with: object = "x") -> object:
    return FileFacts(tmp_path / "facts", made_with).known([path]).get(path)


def tell(tmp_path: Path, path: Path, value: object, made_with: object = "x") -> None:
    facts = FileFacts(tmp_path / "facts", made_with)
    facts.known([path])
    facts.remember({path: value})


def restored(path: Path, change: Callable[[], object]) -> None:
    """Change a file and give it back the time that it had."""
    stat = path.stat()
    change()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.usefixtures("later")
def test_a_fact_is_told_again_until_the_file_changes_in_any_way(tmp_path: Path) -> None:
    file, other = written(tmp_path / "a" / "x"), written(tmp_path / "a" / "y", "xyz")
    changes: list[Callable[[], object]] = [
        lambda: written(file, "abcd"),  # another size
        lambda: os.utime(file, ns=(0, 0)),
        lambda: restored(file, lambda: written(file, "xyz")),  # as long as before, with its old time
        lambda: restored(file, lambda: os.replace(other, file)),  # another file in its place
        lambda: file.unlink(),
    ]
    for change in changes:
        tell(tmp_path, file, ["é", 1])
        assert ask(tmp_path, file) == ["é", 1]
        change()
        assert ask(tmp_path, file) is None


@pytest.mark.usefixtures("later")
def test_a_folder_is_the_same_however_it_is_written_and_others_facts_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, other = written(tmp_path / "a" / "x"), written(tmp_path / "a" / "y")
    monkeypatch.chdir(tmp_path)
    tell(tmp_path, Path("a/x"), 1)
    tell(tmp_path, tmp_path / "a" / ".." / "a" / "y", 2)
    assert FileFacts(tmp_path / "facts", "x").known([file, other]) == {file: 1, other: 2}
    assert ask(tmp_path, file, "y") is None  # made with something else
    tell(tmp_path, file, 3, "y")
    assert (ask(tmp_path, file), ask(tmp_path, file, "y")) == (1, 3)


def test_a_file_that_was_changed_just_before_is_not_trusted(tmp_path: Path) -> None:
    file = written(tmp_path / "a")
    tell(tmp_path, file, 1)
    assert ask(tmp_path, file) is None


@pytest.mark.usefixtures("later")
def test_a_file_that_changes_while_it_is_read_is_not_trusted(tmp_path: Path) -> None:
    file = written(tmp_path / "a")
    facts = FileFacts(tmp_path / "facts", "x")
    facts.known([file])
    written(file, "longer")
    facts.remember({file: 1})
    assert ask(tmp_path, file) is None


@pytest.mark.usefixtures("later")
def test_damage_anywhere_makes_facts_unknown_never_wrong(tmp_path: Path) -> None:
    file = written(tmp_path / "a")
    tell(tmp_path, file, 12345)
    (kept,) = (tmp_path / "facts").iterdir()
    whole = kept.read_bytes()
    assert count_facts(kept) == 1
    for place in range(len(whole)):
        kept.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert ask(tmp_path, file) in (None, 12345)
        kept.write_bytes(whole[:place])
        assert ask(tmp_path, file) in (None, 12345)
    kept.write_bytes(b"\xff\xfe")
    assert count_facts(kept) == 0
