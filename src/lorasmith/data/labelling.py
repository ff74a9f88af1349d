"""What commands that go through many pictures have in common: which are this process's, reading them ahead, batches,
progress, and text files beside them that are whole or not there.

A start does what is missing and stops politely; the next one goes on from there.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from tqdm import tqdm

from lorasmith.checkpoint import atomic_file
from lorasmith.data.caption_files import listed
from lorasmith.data.images import (
    UnreadablePicture,
    advice_for_foreign,
    extensions,
    folders_within,
    foreign_pictures_in,
    open_image,
    pictures_in,
    require_folder,
)
from lorasmith.errors import UserError
from lorasmith.interrupt import StopRequest

_Item = TypeVar("_Item")
_Read = TypeVar("_Read")
_Made = TypeVar("_Made")
_NUM_THREADS = 4
_SECONDS_BETWEEN_LINES = 30.0
_MEMORY_WORDS = ("out of memory", "allocate memory", "not enough memory", "bad allocation")


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, from 0."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    def of(self, pictures: Sequence[Path]) -> list[Path]:
        """Return this part: every count-th picture, so that parts are equal in size and, about, in work."""
        return list(pictures[self.index :: self.count])


def choose_shard(given: str | None) -> Shard:
    """Return the part of this process: the `2/4` given, divided further among a launcher's processes."""
    index, count = (1, 1) if given is None else (int(number) for number in given.split("/"))
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return Shard((index - 1) * world + rank, count * world)


# ---- which pictures ------------------------------------------------------------------------------------------------


def find_pictures(folder: Path, *, recursive: bool) -> tuple[list[Path], list[str]]:
    """Return a folder's pictures, sorted, and notes on what is there besides.

    Raises:
        UserError: there is no such folder, or no picture in it.
    """
    require_folder(folder)
    places = folders_within(folder) if recursive else [folder]
    pictures = [path for place in places for path in pictures_in(place)]
    notes = foreign_notes(places)
    if not pictures:
        deeper = 0 if recursive else sum(len(pictures_in(place)) for place in folders_within(folder))
        hint = f"; {deeper} lie in folders in it: give --recursive" if deeper else "; check the path"
        raise UserError("\n".join([f"no pictures found in {folder}{hint}.", *notes]))
    return pictures, notes


def foreign_notes(folders: Sequence[Path]) -> list[str]:
    """Return a note on pictures in these folders of kinds that are not read."""
    foreign = [path for place in folders for path in foreign_pictures_in(place)]
    if not foreign:
        return []
    return [
        f"left out, of kinds that are not read: {_counted(foreign)} ({advice_for_foreign(foreign)}):{listed(foreign)}"
    ]


@dataclass(frozen=True)
class TextFiles:
    """The text file of each picture: the one beside it, in either case of its extension, or where it will be.

    existing: pictures whose file is there and holds something. sharing: pictures left out, since another of the same
    name has the file.
    """

    of: dict[Path, Path] = field(default_factory=dict)
    existing: set[Path] = field(default_factory=set)
    sharing: list[Path] = field(default_factory=list)


def text_files(pictures: Sequence[Path], extension: str) -> TextFiles:
    """Return the pictures' files with an extension (with or without its dot).

    Raises:
        UserError: the extension is one of pictures, which would be written over.
    """
    suffix = "." + extension.lstrip(".")
    if suffix.lower() in extensions() or suffix == "." or set(suffix) & set('/\\:*?"<>|'):
        raise UserError(f"extension {extension}: this cannot be one of text files; give .txt or .caption, for example.")
    found = TextFiles()
    there: dict[Path, dict[tuple[str, str], os.DirEntry[str]]] = {}
    taken: set[Path] = set()
    for picture in pictures:
        if picture.parent not in there:
            there[picture.parent] = _files_in(picture.parent, suffix)
        entry = there[picture.parent].get((picture.stem, suffix.lower()))
        file = Path(entry.path) if entry else picture.with_name(picture.stem + suffix)
        if file in taken:
            found.sharing.append(picture)
            continue
        taken.add(file)
        found.of[picture] = file
        if entry is not None and entry.stat().st_size:
            found.existing.add(picture)
    return found


def _files_in(folder: Path, suffix: str) -> dict[tuple[str, str], os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        split = [(os.path.splitext(entry.name), entry) for entry in sorted(entries, key=lambda entry: entry.name)]
    return {(stem, ending.lower()): entry for (stem, ending), entry in split if ending.lower() == suffix.lower()}


def write_text(file: Path, text: str) -> None:
    """Write a text file in one step: it is whole, or as it was."""
    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def read_text(file: Path) -> str:
    """Return an older text file's content, without a byte order mark.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{file} is not UTF-8, so nothing was added; save it again as UTF-8")
    return text


# ---- the work ------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What was done: how many pictures, the problems of others, and whether a stop was asked for."""

    num_done: int = 0
    problems: list[str] = field(default_factory=list)
    stop_code: int = 0

    @property
    def exit_code(self) -> int:
        return self.stop_code or int(bool(self.problems))


def label(
    pictures: Sequence[Path],
    make: Callable[[list[Image.Image]], Sequence[_Made]],
    keep: Callable[[Path, _Made], None],
    *,
    batch_size: int,
    shard: Shard,
) -> Outcome:
    """Give all pictures to `make` in batches, and each result to `keep`; see `work_through`."""
    advice = f"--batch-size {batch_size}: lower it; what is written stays"
    return work_through(pictures, open_image, make, keep, batch_size=batch_size, shard=shard, advice=advice)


def work_through(
    items: Sequence[_Item],
    read: Callable[[_Item], _Read],
    make: Callable[[list[_Read]], Sequence[_Made]],
    keep: Callable[[_Item, _Made], None],
    *,
    batch_size: int,
    shard: Shard,
    advice: str,
) -> Outcome:
    """Read all items, one a picture, give them to `make` in batches, and each result to `keep`.

    What `read` cannot read (UnreadablePicture), or `keep` refuses with a UserError, becomes a problem; the others go
    on. Ctrl+C ends after the batch.

    Args:
        advice: what to do when the memory is not enough.

    Raises:
        UserError: the memory is not enough for a batch; or `make` raises it.
    """
    outcome = Outcome()
    with (
        StopRequest(
            "stopping after this batch; what is written stays, and the same command goes on from there"
        ) as stop,
        _Progress(len(items), shard) as progress,
    ):
        for batch in _batches(items, read, batch_size):
            problems = [str(found) for _, found in batch if isinstance(found, UnreadablePicture)]
            readable = [(item, found) for item, found in batch if not isinstance(found, UnreadablePicture)]
            with enough_memory(advice):
                made = make([found for _, found in readable]) if readable else []
            if len(made) != len(readable):
                raise UserError(
                    f"the module gave {len(made)} results for {len(readable)} pictures; expected one for each."
                )
            for (item, _), one in zip(readable, made, strict=True):
                try:
                    keep(item, one)
                    outcome.num_done += 1
                except UserError as error:
                    problems.append(str(error))
            outcome.problems += problems
            progress.advance(len(batch))
            if stop.signal_number is not None:
                break
    outcome.stop_code = stop.exit_code
    return outcome


@contextmanager
def told_by_all() -> Iterator[None]:
    """Have every process tell its mistakes in the block, which the others may not meet.

    The command line lets the first process speak for all.
    """
    try:
        yield
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            print(f"lorasmith: process {os.environ['RANK']}: {error}", file=sys.stderr)
        raise


@contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Turn a lack of memory in the block, of torch, onnxruntime or Python, into a message with this advice."""
    try:
        yield
    except Exception as error:
        text = str(error).strip()
        is_lacking = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if isinstance(error, UserError) or not (is_lacking or any(word in text.lower() for word in _MEMORY_WORDS)):
            raise
        message = f"out of memory with {advice}. ({text.partition(chr(10))[0] or type(error).__name__})"
        if os.environ.get("RANK", "0") != "0":  # the command line lets the first process speak for all
            print(f"lorasmith: process {os.environ['RANK']}: {message}", file=sys.stderr)
        raise UserError(message) from error


def _batches(
    items: Sequence[_Item], read: Callable[[_Item], _Read], size: int
) -> Iterator[list[tuple[_Item, _Read | UnreadablePicture]]]:
    """Return the items read, a batch at a time; threads read the next ones meanwhile."""
    waiting: deque[Future[tuple[_Item, _Read | UnreadablePicture]]] = deque()
    left = iter(items)
    with ThreadPoolExecutor(min(_NUM_THREADS, os.cpu_count() or 1)) as pool:
        try:
            while True:
                for item in left:
                    waiting.append(pool.submit(_read_one, item, read))
                    if len(waiting) >= size + max(size, _NUM_THREADS):
                        break
                if not waiting:
                    return
                yield [waiting.popleft().result() for _ in range(min(size, len(waiting)))]
        finally:
            pool.shutdown(cancel_futures=True)


def _read_one(item: _Item, read: Callable[[_Item], _Read]) -> tuple[_Item, _Read | UnreadablePicture]:
    try:
        return item, read(item)
    except UnreadablePicture as error:
        return item, error


class _Progress:
    """A bar on a terminal, for the first of several processes; elsewhere a line each tenth and every half minute."""

    def __init__(self, total: int, shard: Shard) -> None:
        self._total, self._done = total, 0
        self._title = f"shard {shard}: " if shard.count > 1 else ""
        is_first = os.environ.get("RANK", "0") == "0"
        has_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, unit="picture", dynamic_ncols=True) if has_terminal and is_first else None
        self._is_told = not has_terminal
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, number: int) -> None:
        before, self._done = self._done, self._done + number
        if self._bar is not None:
            self._bar.update(number)
        elif self._is_told:
            self._tell(before)

    def _tell(self, before: int) -> None:
        now = time.monotonic()
        is_tenth = self._done * 10 // self._total > before * 10 // self._total
        if not is_tenth and now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        rate = self._done / max(now - self._start, 1e-9)
        left = tqdm.format_interval((self._total - self._done) / rate)
        print(f"{self._title}{self._done}/{self._total} pictures  {rate:.2f} pictures/s  {left} left", flush=True)


# ---- what is told --------------------------------------------------------------------------------------------------


def summary(
    outcome: Outcome,
    shard: Shard,
    done: str,
    num_existing: int,
    notes: Sequence[str],
    hint: str = " (--existing says what becomes of them)",
) -> str:
    """Return what is said at the end: what was written, what was there, and each picture that was left out.

    Args:
        done: what `outcome.num_done` counts, and where: "captions written beside the pictures in photos".
        num_existing: pictures of this part that had theirs already.
        hint: what to say of these.
    """
    lines = [f"shard {shard}"] if shard.count > 1 else []
    had = f"; {num_existing:,} had theirs already{hint}" if num_existing else ""
    lines.append(f"{outcome.num_done:,} {done}{had}")
    lines += notes
    if outcome.problems:
        lines.append(f"left out because of what is said of each: {len(outcome.problems):,}")
        lines += [f"  {problem}" for problem in outcome.problems]
    if outcome.stop_code:
        lines.append("stopped; the same command goes on from here")
    return "\n".join(lines)


def sharing_note(sharing: Sequence[Path]) -> list[str]:
    """Return a note on pictures that have their text file in common with another."""
    if not sharing:
        return []
    return [
        f"left out, because another picture of the same name has the text file: {_counted(sharing)}{listed(sharing)}"
    ]


def _counted(paths: Sequence[Path]) -> str:
    return f"{len(paths):,} picture{'' if len(paths) == 1 else 's'}"
