"""Uploads beside a run: what was there when it was added is sent, whatever happens to it afterwards."""

import threading
from pathlib import Path
from typing import Any

import pytest

from lorasmith import uploads
from lorasmith.errors import UserError
from lorasmith.hub import Target
from lorasmith.uploads import Uploads

TARGET = Target("me/dog", False)


class Hub:
    """Takes what is sent, once it may; refuses the sends whose numbers are in `refused`."""

    def __init__(self, refused: set[int]) -> None:
        self.refused, self.is_open, self.is_asked = refused, threading.Event(), threading.Event()
        self.sent: list[dict[str, str]] = []
        self.count = 0

    def send(self, folder: Path, target: Target, message: str, **options: Any) -> str:
        self.is_asked.set()
        self.is_open.wait()
        self.count += 1
        if self.count - 1 in self.refused:
            raise UserError("not now.")
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        self.sent.append({path.relative_to(folder).as_posix(): path.read_text() for path in files})
        return ""


def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *refused: int) -> tuple[Hub, Uploads]:
    hub = Hub(set(refused))
    monkeypatch.setattr(uploads, "send", hub.send)
    return hub, Uploads(TARGET, tmp_path / "scratch")


def test_files_are_sent_as_they_were_in_the_order_of_adding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub, own = made(monkeypatch, tmp_path)
    (tmp_path / "states" / "one").mkdir(parents=True)
    for name in ("a", "states/one/b"):
        (tmp_path / name).write_text(name)
    own.add("a", {"a": tmp_path / "a"})
    (tmp_path / "a").unlink()
    own.add("states", {"states": tmp_path / "states", "kept/c": tmp_path / "states" / "one" / "b"})
    (tmp_path / "states" / "one" / "b").unlink()
    hub.is_open.set()
    own.finish()
    assert hub.sent == [{"a": "a"}, {"kept/c": "states/one/b", "states/one/b": "states/one/b"}]
    own.close()
    assert not (tmp_path / "scratch").exists()


def test_what_fails_is_tried_again_after_all_else_and_then_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub, own = made(monkeypatch, tmp_path, 0, 1, 4)
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
        own.add(name, {name: tmp_path / name})
    hub.is_open.set()
    own.finish()
    assert hub.sent == [{"c": "c"}, {"a": "a"}]
    error = capsys.readouterr().err
    assert "a: not now. It is tried again" in error and "not in me/dog: b; upload them" in error
    own.finish()
    assert hub.count == 5
    own.close()


def test_closing_drops_what_waits_and_leaves_no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub, own = made(monkeypatch, tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
        own.add(name, {name: tmp_path / name})
    hub.is_asked.wait()
    own._waiting[1].add_done_callback(lambda _: hub.is_open.set())  # the one under way ends when the other is dropped
    own.close()
    assert hub.sent == [{"a": "a"}]
    assert not (tmp_path / "scratch").exists() and (tmp_path / "b").read_text() == "b"


def test_where_no_second_name_can_be_a_copy_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise OSError("not on this disk")

    monkeypatch.setattr(uploads.os, "link", refuse)
    hub, own = made(monkeypatch, tmp_path)
    (tmp_path / "a").write_text("a")
    own.add("a", {"a": tmp_path / "a"})
    (tmp_path / "a").unlink()
    hub.is_open.set()
    own.finish()
    assert hub.sent == [{"a": "a"}]
    own.close()
