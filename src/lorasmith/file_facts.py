"""What was found out about files, kept for the next run: only of files that are proven to be unchanged since.

The proof is a file's size, both its times, and its number on the disk. As in git, a fact is not kept of a file that was
changed less than two seconds before it was read: it might be changed again without any of these telling. Facts spare
work and nothing else: what a file holds is always named by a hash of its content.

All facts of one folder's files are in one file, `facts/HASH.json`: a line with its SHA-256 and a line of JSON, written
beside its place and renamed. So readers see it whole whatever else happens, on network drives too, where the locks that
a database needs often do not work. Of two processes that write at once the later one wins, and the facts that only the
other one had are found out again.
"""

import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorasmith.checkpoint import atomic_file

_RACY = 2_000_000_000  # nanoseconds; as coarse as the times of any file system
Proof = list[int]


class FileFacts:
    """Facts of one sort about files: a value that JSON can hold for each.

    Args:
        folder: where facts are kept.
        made_with: whatever else decides the values, such as versions of programs; facts made with others do not count.
    """

    def __init__(self, folder: Path, made_with: Any) -> None:
        self._folder, self._made_with = folder, made_with
        self._proofs: dict[Path, Proof] = {}

    def known(self, paths: Iterable[Path]) -> dict[Path, Any]:
        """Return what is known of those files that did not change since."""
        now, found = time.time_ns(), {}
        for folder, own in _by_folder(paths).items():
            kept = self._read(folder)
            for path in own:
                if (proof := _proof(path)) is None:
                    continue
                is_known = kept.get(path.name, (None,))[0] == proof
                if is_known:
                    found[path] = kept[path.name][1]
                if is_known or min(abs(now - proof[1]), abs(now - proof[2])) > _RACY:
                    self._proofs[path] = proof
        return found

    def remember(self, facts: Mapping[Path, Any]) -> None:
        """Keep facts of files that `known` was asked for and that have not changed since then.

        Raises:
            OSError, UserError: the folder cannot be written to.
        """
        lasting = [path for path in facts if (proof := self._proofs.get(path)) and proof == _proof(path)]
        for folder, own in _by_folder(lasting).items():
            kept = self._read(folder)  # by now another process may have added to it
            kept.update({path.name: [self._proofs[path], facts[path]] for path in own})
            text = json.dumps({"made_with": self._made_with, "folder": folder, "facts": kept})
            with atomic_file(self._file(folder)) as temporary:
                temporary.write_text(f"{_digest(text)}\n{text}\n", encoding="utf-8")

    def _read(self, folder: str) -> dict[str, Any]:
        """Return what is kept of a folder's files by their names: proof and value."""
        file = self._file(folder)
        content = _content(file)
        if content is None:
            return {}
        mark_used(file)
        return content["facts"]

    def _file(self, folder: str) -> Path:
        return self._folder / f"{_digest(json.dumps([folder, self._made_with]))[:32]}.json"


def mark_used(file: Path) -> None:
    """Have the time of a cached file say when it was last used; what may only be read stays as it is."""
    with suppress(OSError):
        os.utime(file)


def count_facts(file: Path) -> int:
    """Return how many facts are kept in a file; 0 if it is damaged."""
    content = _content(file)
    return 0 if content is None else len(content["facts"])


def _content(file: Path) -> dict[str, Any] | None:
    try:
        digest, text = file.read_text(encoding="utf-8").split("\n")[:2]
    except (OSError, ValueError):  # not there, or damaged
        return None
    return json.loads(text) if _digest(text) == digest else None


def _by_folder(paths: Iterable[Path]) -> dict[str, list[Path]]:
    folders: dict[Path, list[Path]] = defaultdict(list)
    for path in paths:
        folders[path.parent].append(path)
    found: dict[str, list[Path]] = defaultdict(list)
    for folder, own in folders.items():  # one folder may be written in several ways
        found[os.path.abspath(folder)] += own
    return found


def _proof(path: Path) -> Proof | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
