"""Tags of many pictures in one metadata file, JSON or JSONL, instead of text files: added to, and written whole."""

import time
from dataclasses import replace
from pathlib import Path

from lorasmith.checkpoint import atomic_file
from lorasmith.data import metadata_files
from lorasmith.data.labelling import Shard
from lorasmith.data.metadata_files import Entry
from lorasmith.errors import UserError

_KINDS = (metadata_files.JSON, metadata_files.JSONL)
_SECONDS, _SHARE = 30.0, 20  # saved when both have passed: this time, and so many times what the last saving took


class TagMetadata:
    """A metadata file's entries; whatever else an older entry holds, a caption for instance, stays.

    Raises:
        UserError: the file is there, but is not of this form.
    """

    def __init__(self, path: Path, pictures: Path) -> None:
        self._path, self._pictures = path, pictures
        self._entries = metadata_files.read(path) if path.exists() else {}
        self._saved_at, self._took, self._has_changes = time.monotonic(), 0.0, False

    def tags(self, picture: Path) -> str:
        """Return a picture's tags, "" if there are none."""
        return self._entries.get(self._key(picture), Entry()).tags

    def set_tags(self, picture: Path, tags: str) -> None:
        """Note a picture's tags, and save all if the last time is long ago."""
        key = self._key(picture)
        self._entries[key] = replace(self._entries.get(key, Entry()), tags=tags)
        self._has_changes = True
        if time.monotonic() - self._saved_at > max(_SECONDS, _SHARE * self._took):
            self.save()

    def save(self) -> None:
        """Write the file in one step, sorted by key, if there is anything new."""
        if not self._has_changes:
            return
        start = time.monotonic()
        with atomic_file(self._path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(metadata_files.lines_to_write(self._path, dict(sorted(self._entries.items()))))
        self._saved_at, self._has_changes = time.monotonic(), False
        self._took = self._saved_at - start

    def _key(self, picture: Path) -> str:
        """Return how a picture is called here: as it is already, or else by its path in the folder."""
        path = picture.relative_to(self._pictures)
        names = (path.as_posix(), path.with_suffix("").as_posix(), str(picture), str(picture.absolute()))
        return next((name for name in names if name in self._entries), names[0])


def check_path(path: Path) -> None:
    """Check that a metadata file can be written there.

    Raises:
        UserError: it has another ending, is a folder, or its folder does not exist.
    """
    if path.suffix.lower() not in _KINDS:
        raise UserError(f"--output {path}: expected a name that ends with {' or '.join(_KINDS)}.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        reason = "this is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise UserError(f"--output {path}: {reason}; give the path of a file that may be written.")


def of_shard(path: Path, shard: Shard) -> Path:
    """Return where a part's entries go: each part has a file of its own, meta-2-of-4.json."""
    return path if shard.count == 1 else path.with_stem(f"{path.stem}-{shard.index + 1}-of-{shard.count}")
