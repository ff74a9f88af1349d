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
            self.path, lying = path, _visible(path / CELLS)
            here = {name: self.file(name) for name in lying & set(marks) if _is_whole(self.file(name), marks[name])}
            self.drawn |= here
            if not path.exists() or (lying == set(here) and self._has_nothing_else()):
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

    def _has_nothing_else(self) -> bool:
        """Whether nothing lies there beside the pictures but sheets of all of these, and no page yet."""
        others = _visible(self.path) - {CELLS}
        is_done = set(self._marks) <= _visible(self.path / CELLS)
        return self.path.is_dir() and (not others or (is_done and all(map(_SHEET.fullmatch, others))))


def _names(wanted: Path) -> Iterator[Path]:
    yield wanted
    named = wanted if wanted.name not in ("", "..") else Path(os.path.abspath(wanted))
    for number in range(2, _MOST_FOLDERS) if named.name else ():
        yield named.with_name(f"{named.name}-{number}")


def _visible(folder: Path) -> set[str]:
    """Return the names in a folder, without what a program that was killed left of a file it was writing."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.is_dir() else set()


def _is_whole(path: Path, mark: str) -> bool:
    """Whether a picture with this mark lies there; others are not decoded."""
    try:
        with Image.open(path) as picture:
            if picture.info.get(_MARK) != mark:
                return False
            picture.load()
            return True
    except (OSError, SyntaxError, ValueError):
        return False
