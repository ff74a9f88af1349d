"""A copy of a set of pictures without the faults that can be mended by rule; the pictures themselves stay untouched."""

import codecs
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath

from lorasmith.checkpoint import synced_folder
from lorasmith.data.images import open_image
from lorasmith.errors import UserError

_BYTE_ORDER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class Source:
    """A picture to be copied, with its caption; `folder` is where in the copy it goes.

    caption_extension: of the caption in the copy. is_converted: decode it and write it anew as PNG.
    """

    picture: Path
    folder: PurePath
    caption: Path | None
    caption_extension: str
    is_converted: bool


@dataclass(frozen=True)
class Copy:
    """Where a source goes, relative to the copy's folder."""

    source: Source
    picture: PurePath
    caption: PurePath | None


def plan(sources: Sequence[Source]) -> list[Copy]:
    """Return where each picture and caption goes: under its own name, or a numbered one where that is taken.

    Pictures that shared a caption file, or that become PNG beside a PNG, have names and captions of their own then.
    """
    taken: set[tuple[PurePath, str]] = set()
    copies = []
    for source in sources:
        stem, number = source.picture.stem, 1
        while (source.folder, stem.lower()) in taken:
            number += 1
            stem = f"{source.picture.stem}-{number}"
        taken.add((source.folder, stem.lower()))
        extension = ".png" if source.is_converted else source.picture.suffix
        caption = None if source.caption is None else source.folder / f"{stem}{source.caption_extension}"
        copies.append(Copy(source, source.folder / f"{stem}{extension}", caption))
    return copies


def require_new(folder: Path) -> None:
    """Check that a copy can go there.

    Raises:
        UserError: there is something already.
    """
    if folder.exists() or folder.is_symlink():
        raise UserError(f"--fix {folder}: this exists already, and nothing is overwritten; give a new folder.")


def write(copies: Sequence[Copy], folder: Path, *, num_threads: int) -> None:
    """Write the copies into a new folder, which appears when it is complete.

    Raises:
        UserError: the folder exists, or the disk is full.
    """
    require_new(folder)
    with synced_folder(folder) as temporary:
        for place in {copy.picture.parent for copy in copies}:
            (temporary / place).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(lambda copy: _write(copy, temporary), copies))


def _write(copy: Copy, folder: Path) -> None:
    source = copy.source
    if source.is_converted:
        open_image(source.picture).save(folder / copy.picture)
    else:
        shutil.copyfile(source.picture, folder / copy.picture)
    if source.caption is not None and copy.caption is not None:
        (folder / copy.caption).write_bytes(_as_utf8(source.caption.read_bytes()))


def _as_utf8(text: bytes) -> bytes:
    """Return UTF-16 with its mark as UTF-8, and anything else as it is."""
    return text.decode("utf-16").encode() if text.startswith(_BYTE_ORDER_MARKS) else text
