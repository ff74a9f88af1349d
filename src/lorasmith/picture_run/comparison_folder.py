"""The folder of pictures that are compared: each has a mark of what it was drawn from, so drawing can go on."""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lorasmith.checkpoint import atomic_file
from lorasmith.errors import UserError

CELLS, PAGE = "cells", "index.html"
_SHEET = re.compile(r"sheet(-\d+)?\.png")
_MARK = "lorasmith"
_MOST_FOLDERS = 1000


class ComparisonFolder:
    """Where pictures go: a folder that is free, or in which the same was begun; nothing else is written to.

    `drawn` are the pictures, by the names of their files, that were drawn before and lie there or in a folder that was
    passed over.

    Args:
        wanted: where there are others, or anything else, `wanted-2`, `wanted-3` ... is taken.
        marks: of all pictures, by the names of their files.

    Raises:
        UserError: no such folder is free.
    """

    def __init__(self, wanted: Path, marks: Mapping[str, str]) -> None:
        self._marks, self.drawn = marks, dict[str, Path]()
        for path in _names(wanted):
            self.path = path
            self.drawn |= {
                name: path / CELLS / name for name, mark in marks.items() if _mark(path / CELLS / name) == mark
            }
            if self._is_ours(path):
                return
        raise UserError(f"--output {wanted}: there is no free folder of this name; give another.")

    def file(self, name: str) -> Path:
        """Return where a picture lies or is to lie."""
        return self.path / CELLS / name

    def take_over(self) -> None:
        """Make the folder, and copy into it the pictures that lie in other ones.

        Raises:
            UserError: it cannot be made.
        """
        try:
            (self.path / CELLS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--output {self.path}: no folder can be made there ({error.strerror}); give another."
            ) from error
        for name, path in self.drawn.items():
            if path != self.file(name):
                with atomic_file(self.file(name)) as temporary:
                    shutil.copyfile(path, temporary)

    def add(self, name: str, picture: Image.Image, text: str) -> None:
        """Write a picture with the text that other programs read; it is whole or not there."""
        info = PngInfo()
        info.add_text("parameters", text)
        info.add_text(_MARK, self._marks[name])
        with atomic_file(self.file(name)) as temporary:
            picture.save(temporary, "PNG", pnginfo=info)

    def _is_ours(self, path: Path) -> bool:
        """Whether nothing lies there but these pictures, and sheets of all of these, but no page yet."""
        if not path.exists():
            return True
        names = _visible(path)
        pictures = _visible(path / CELLS)
        if names - {CELLS} and (pictures != set(self._marks) or not all(map(_SHEET.fullmatch, names - {CELLS}))):
            return False
        return path.is_dir() and all(_mark(path / CELLS / name) == self._marks.get(name) for name in pictures)


def _names(wanted: Path) -> Iterator[Path]:
    yield wanted
    named = wanted if wanted.name not in ("", "..") else Path(os.path.abspath(wanted))
    for number in range(2, _MOST_FOLDERS) if named.name else ():
        yield named.with_name(f"{named.name}-{number}")


def _visible(folder: Path) -> set[str]:
    """Return the names in a folder, without what a program that was killed left of a file it was writing."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.is_dir() else set()


def _mark(path: Path) -> str | None:
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture.info.get(_MARK, "")
    except (OSError, SyntaxError, ValueError):
        return ""
