"""The cache folder: tensors that cost time to make, kept on the disk and found again by what they were made from.

    CACHE/lorasmith-cache.json              says that the folder is a cache, so that nothing else is ever taken for one
    CACHE/latents/PART/SEGMENT.safetensors  latents made by one VAE; CACHE/text/... by one text encoder
    CACHE/facts/...                         what is known of files; see `file_facts.py`

A part is all that made its entries, a name in it all that one entry was made from, both as SHA-256: whatever differs
is another entry, so nothing stale can be found. Entries are written many at a time into segments, each by one process,
beside their place and then renamed; a segment never changes again.
"""

import hashlib
import json
import os
import re
import secrets
import sys
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lorasmith.checkpoint import SAFE_DTYPES, read_header, write_safetensors
from lorasmith.errors import UserError
from lorasmith.file_facts import count_facts, mark_used

Kind = Literal["latents", "text", "facts"]
Say = Callable[[str], None]
Entry = Mapping[str, Tensor]  # the tensors of one entry, on the CPU

TENSOR_KINDS: tuple[Kind, ...] = ("latents", "text")
KINDS: tuple[Kind, ...] = (*TENSOR_KINDS, "facts")
_MARKER, _FORMAT = "lorasmith-cache.json", "lorasmith cache 1"
_ENVIRONMENT = "LORASMITH_CACHE"
_IS_WINDOWS = os.name == "nt"
_MOST_BYTES, _MOST_SECONDS = 64 * 2**20, 60.0  # of work in memory, which a crash would lose
_PART_NAME = re.compile(r"[0-9a-f]{32}")
_SEGMENT_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
_FACTS_NAME = re.compile(r"[0-9a-f]{32}\.json")
_UNFINISHED_NAME = re.compile(r"\.[0-9a-f]{32}\.(safetensors|json)\..+")
_UNFINISHED_SECONDS = 3600.0  # a file that is being written is younger


def default_place() -> Path:
    """Return the cache folder of this user: LORASMITH_CACHE, or where the system keeps such things."""
    if given := os.environ.get(_ENVIRONMENT):
        return Path(os.path.abspath(os.path.expanduser(given)))
    home = Path(os.path.expanduser("~"))
    if _IS_WINDOWS:
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "lorasmith" / "cache"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "lorasmith"
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else home / ".cache") / "lorasmith"


def open_cache(path: Path, say: Say) -> Path | None:
    """Return the folder, made if it is new; None, and a line said, if it can neither be read nor made.

    Raises:
        UserError: it holds other things.
    """
    try:
        if not is_cache(path):
            path.mkdir(parents=True, exist_ok=True)
            _refuse_strangers(path)
            (path / _MARKER).write_text(json.dumps({"format": _FORMAT}) + "\n", encoding="utf-8")
    except OSError as error:
        say(f"cache: {path} cannot be used ({error.strerror}); going on in memory")
        return None
    return path


def _refuse_strangers(path: Path) -> None:
    strangers = sorted(os.listdir(path))
    if strangers and not is_cache(path):  # another process may have made it just now
        raise UserError(
            f"{path} is to be the cache folder, but holds other things ({', '.join(strangers[:3])}); "
            f"give a new or empty folder (--cache-dir or {_ENVIRONMENT})."
        )


def is_cache(path: Path) -> bool:
    """Whether a folder is a cache of ours."""
    return (path / _MARKER).is_file()


def cannot_write(cache: Path, error: OSError | UserError) -> str:
    """Return what to say when the cache cannot be written to, the same whatever was to be written."""
    reason = error.strerror if isinstance(error, OSError) else "the disk is full"
    return f"cache: {cache} cannot be written to ({reason}); going on in memory"


def identify(made_from: Any) -> str:
    """Return the SHA-256, in hex, of what something is made from: values that JSON can hold."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Part:
    """What one model part makes: `id` identifies everything that decides the result; `model` is for people."""

    kind: Kind
    id: str
    model: str


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: a segment, the bytes in it with their checksum, and what they are."""

    file: Path
    begin: int
    size: int
    checksum: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Store:
    """The entries of one part, by name. May be read by several threads.

    What is put is in memory until it is written, which happens by itself after a while and at `flush`. Without a
    cache, or when it cannot be written to, everything stays in memory.
    """

    def __init__(self, cache: Path | None, part: Part, say: Say) -> None:
        self._cache, self._part, self._say = cache, part, say
        self._folder = None if cache is None else cache / part.kind / part.id[:32]
        self._is_writable = cache is not None
        self._kept: dict[str, Entry] = {}
        self._waiting: dict[str, Entry] = {}
        self._waiting_bytes, self._waiting_since = 0, 0.0
        self._index: dict[str, dict[str, _Place]] = {}
        self._looked_into: set[Path] = set()
        self._lock = threading.Lock()
        self._has_told_of_damage = False

    @property
    def is_writable(self) -> bool:
        """Whether what is put reaches the disk."""
        return self._is_writable

    def __contains__(self, name: str) -> bool:
        return name in self._waiting or name in self._kept or name in self._index

    def look_up(self, names: Collection[str]) -> None:
        """Find out which of these entries are on the disk; what others have written since is found too."""
        if self._folder is None:
            return
        wanted = set(names)
        for file in _named(self._folder, _SEGMENT_NAME):  # older first: of two copies the newer one counts
            if file not in self._looked_into:
                self._looked_into.add(file)
                self._take_in(file, wanted)

    def _take_in(self, file: Path, wanted: Collection[str]) -> None:
        try:
            segment = _read_segment(file)
        except FileNotFoundError:  # pruned meanwhile
            return
        except OSError as error:
            self._tell_of_damage(f"{file} cannot be read ({error.strerror})")
            return
        if segment is None or segment.part != self._part.id:
            self._tell_of_damage(f"{file} is damaged")
            file.unlink(missing_ok=True)  # no process will ever read anything in it
            return
        found = {name: places for name, places in segment.entries.items() if name in wanted}
        self._index.update(found)
        if found:
            mark_used(file)

    def get(self, name: str) -> dict[str, Tensor] | None:
        """Return an entry; None if it is not there, or not any more, or damaged."""
        if (in_memory := self._waiting.get(name, self._kept.get(name))) is not None:
            return dict(in_memory)
        places = self._index.get(name)
        if places is None:
            return None
        try:
            return {field: _read_tensor(place) for field, place in places.items()}
        except FileNotFoundError:  # pruned while this run reads
            pass
        except (OSError, ValueError) as error:
            self._tell_of_damage(f"{next(iter(places.values())).file}: {error}")
        self._index.pop(name, None)
        return None

    def put(self, name: str, entry: Entry) -> None:
        """Add an entry, to be written."""
        if not self._is_writable:
            self.keep(name, entry)
            return
        with self._lock:
            if not self._waiting:
                self._waiting_since = time.monotonic()
            self._waiting[name] = entry
            self._waiting_bytes += sum(tensor.nbytes for tensor in entry.values())
            is_due = time.monotonic() - self._waiting_since > _MOST_SECONDS
            if is_due or self._waiting_bytes > _MOST_BYTES:
                self._write()

    def keep(self, name: str, entry: Entry) -> None:
        """Add an entry that stays in memory."""
        self._kept[name] = entry

    def flush(self) -> None:
        """Write what waits in memory."""
        with self._lock:
            if self._waiting:
                self._write()

    def _write(self) -> None:
        assert self._folder is not None and self._cache is not None
        file = self._folder / f"{time.time_ns():016x}{secrets.token_hex(8)}.safetensors"
        try:
            _write_segment(file, self._part, self._waiting)
            segment = _read_segment(file)
        except (OSError, UserError) as error:
            segment = None
            self._say(cannot_write(self._cache, error))
        if segment is None:
            self._is_writable = False
            self._kept.update(self._waiting)
        else:
            self._looked_into.add(file)
            self._index.update(segment.entries)
        self._waiting, self._waiting_bytes = {}, 0  # last: another thread may be reading

    def _tell_of_damage(self, what: str) -> None:
        if not self._has_told_of_damage:
            self._has_told_of_damage = True
            self._say(f"cache: {what}; what it held is made anew")


def in_words(size: float) -> str:
    """Return a number of bytes for people: 1.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


# ---- segments ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Segment:
    part: str
    model: str
    entries: dict[str, dict[str, _Place]] = field(repr=False)


def _write_segment(file: Path, part: Part, entries: Mapping[str, Entry]) -> None:
    tensors = {f"{name}/{key}": tensor for name, entry in entries.items() for key, tensor in entry.items()}
    checksums = {key: zlib.crc32(_bytes_of(tensors[key])) for key in sorted(tensors)}
    rows = [(key, tensors[key].dtype, tuple(tensors[key].shape), checksum) for key, checksum in checksums.items()]
    metadata = {
        "format": _FORMAT,
        "part": part.id,
        "model": part.model,
        "crc32": " ".join(f"{checksum:08x}" for checksum in checksums.values()),
        "seal": _seal(part.id, rows),
    }
    write_safetensors(file, tensors, metadata)


def _seal(part: str, rows: Iterable[tuple[str, torch.dtype, tuple[int, ...], int]]) -> str:
    """Return a hash of what a header says of its tensors; that of their places is needless, as their bytes tell."""
    return hashlib.sha256("\n".join([part, *map(str, rows)]).encode()).hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def _read_segment(file: Path) -> _Segment | None:
    """Return what a segment's header says; None if it is damaged or cut short.

    Raises:
        OSError: it cannot be read.
    """
    try:
        size = file.stat().st_size
        header = read_header(file, size)
        metadata = header.pop("__metadata__")
        begin = size - max(facts["data_offsets"][1] for facts in header.values())
        checksums = dict(zip(sorted(header), metadata["crc32"].split(), strict=True))
        entries: dict[str, dict[str, _Place]] = {}
        rows = []
        for key, checksum in checksums.items():
            facts = header[key]
            name, _, tensor = key.partition("/")
            first, end = facts["data_offsets"]
            dtype, shape = SAFE_DTYPES[facts["dtype"]], tuple(facts["shape"])
            place = _Place(file, begin + first, end - first, int(checksum, 16), dtype, shape)
            entries.setdefault(name, {})[tensor] = place
            rows.append((key, dtype, shape, place.checksum))
        if metadata["seal"] != _seal(metadata["part"], rows):
            return None
        return _Segment(metadata["part"], metadata["model"], entries)
    except (UserError, KeyError, ValueError, TypeError, AttributeError):
        return None


def _read_tensor(place: _Place) -> Tensor:
    """Read one tensor, which is opened anew each time, so that any number of segments can be read from."""
    with place.file.open("rb") as file:
        file.seek(place.begin)
        data = bytearray(file.read(place.size))
    if len(data) != place.size or zlib.crc32(data) != place.checksum:
        raise ValueError("an entry is damaged")
    return torch.frombuffer(data, dtype=place.dtype).reshape(place.shape)


def _named(folder: Path, name: re.Pattern[str]) -> list[Path]:
    """Return a folder's files of these names, sorted; links are never followed."""
    try:
        with os.scandir(folder) as found:
            return sorted(
                folder / one.name for one in found if name.fullmatch(one.name) and one.is_file(follow_symlinks=False)
            )
    except OSError:
        return []


# ---- upkeep --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CachedFile:
    """One file of the cache. part, model: "" for facts; num_entries: 0 for what was left unfinished or is damaged.

    last_used: Unix time.
    """

    path: Path
    kind: Kind
    part: str
    model: str
    num_entries: int
    size: int
    last_used: float


def require_cache(path: Path) -> None:
    """Check that a folder is a cache.

    Raises:
        UserError: it is not, or not there.
    """
    if not is_cache(path):
        reason = "it was not made by lorasmith" if path.is_dir() else "there is no such folder"
        raise UserError(f"{path} is no cache folder: {reason}; give the cache's folder with --cache-dir.")


def cached_files(cache: Path) -> list[CachedFile]:
    """Return all files that lorasmith wrote into the cache, by kind and part."""
    found = []
    for kind in TENSOR_KINDS:
        for folder in _part_folders(cache / kind):
            for file in [*_named(folder, _SEGMENT_NAME), *_named(folder, _UNFINISHED_NAME)]:
                segment = _read_segment(file) if _SEGMENT_NAME.fullmatch(file.name) else None
                model, number = ("", 0) if segment is None else (segment.model, len(segment.entries))
                found.append(_cached_file(file, kind, folder.name, model, number))
    for file in [*_named(cache / "facts", _FACTS_NAME), *_named(cache / "facts", _UNFINISHED_NAME)]:
        number = count_facts(file) if _FACTS_NAME.fullmatch(file.name) else 0
        found.append(_cached_file(file, "facts", "", "", number))
    return found


def choose_unwanted(
    files: Iterable[CachedFile], *, now: float, older_than: float | None = None, max_size: int | None = None
) -> list[CachedFile]:
    """Return the files to remove: those not used for so many seconds, and the longest unused above a size in all.

    What a stopped process left unfinished goes too. With neither given, all files do.
    """
    files = sorted(files, key=lambda file: file.last_used)
    unwanted, total = [], sum(file.size for file in files)
    for file in files:
        is_left_over = _UNFINISHED_NAME.fullmatch(file.path.name) and now - file.last_used > _UNFINISHED_SECONDS
        is_old = older_than is not None and now - file.last_used > older_than
        is_too_much = max_size is not None and total > max_size
        if is_left_over or is_old or is_too_much or (older_than is None and max_size is None):
            unwanted.append(file)
            total -= file.size
    return unwanted


def remove(files: Iterable[CachedFile]) -> list[CachedFile]:
    """Remove files of the cache, and folders that are empty then; return those that are in use and had to stay."""
    kept = []
    for file in files:
        try:
            file.path.unlink(missing_ok=True)
        except OSError:  # Windows keeps what is being read
            kept.append(file)
            continue
        if file.kind != "facts" and not os.listdir(file.path.parent):
            file.path.parent.rmdir()
    return kept


def _part_folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as found:
            return sorted(
                folder / one.name
                for one in found
                if _PART_NAME.fullmatch(one.name) and one.is_dir(follow_symlinks=False)
            )
    except OSError:
        return []


def _cached_file(file: Path, kind: Kind, part: str, model: str, num_entries: int) -> CachedFile:
    stat = file.stat()
    return CachedFile(file, kind, part, model, num_entries, stat.st_size, stat.st_mtime)
