"""Captions from one metadata file, JSON or JSONL, the fine-tuning ("captions") method of sd-scripts.

    {"0001": {"caption": "a cat on a sofa", "tags": "cat, sofa"}, "sub/0002.png": {"tags": "dog"}}

A key is a picture's path, absolute or in the image folder, with or without the extension; or its name alone, also of a
picture in a folder inside, if no other there is called so.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from lorasmith.data import metadata_files
from lorasmith.data.caption_files import listed
from lorasmith.data.images import folders_within, pictures_in, probe_all, require_folder
from lorasmith.data.metadata_files import Entry
from lorasmith.data.records import ImageRecord, Scan
from lorasmith.data.subsets import Subset
from lorasmith.errors import UserError


def scan_subset(subset: Subset) -> Scan:
    """Return a subset's pictures; see `scan`."""
    assert subset.metadata is not None
    return scan(
        subset.metadata,
        Path(subset.place),
        caption=subset.caption,
        repeats=subset.repeats,
        skip_unreadable=subset.skip_unreadable,
        caption_option='class_tokens = "your words"' if subset.in_dataset_file else '--caption "your words"',
    )


def scan(
    metadata: Path,
    folder: Path,
    *,
    caption: str | None = None,
    repeats: int = 1,
    skip_unreadable: bool = False,
    caption_option: str = '--caption "your words"',
) -> Scan:
    """Return the pictures named in a metadata file, with `caption, tags` as caption, sorted by path, each decoded once.

    Args:
        folder: where the pictures lie.
        caption: for pictures that have neither caption nor tags.
        repeats: how often each picture counts in an epoch (sd-scripts: dataset_repeats).
        caption_option: how a caption for all is given, for a message.

    Raises:
        UserError: the file is missing, broken (with line and column) or of another form; no key has a picture, several
            keys have the same one, one key has several; pictures without any caption; unreadable pictures.
    """
    require_folder(folder)
    entries, pictures = _found(metadata, folder)
    texts = {picture: entries[key].text for key, picture in pictures.items()}
    uncaptioned = [picture for picture, text in texts.items() if not text]
    if uncaptioned and caption is None:
        raise UserError(
            f"{len(uncaptioned)} pictures have neither caption nor tags in {metadata}; add them there, or give "
            f"{caption_option} for all of them:{listed(uncaptioned)}"
        )
    used = sorted(texts, key=lambda path: path.as_posix())
    probed, probe_notes = probe_all(used, skip_unreadable=skip_unreadable)
    group = folder.resolve().name
    records = [
        ImageRecord(
            picture, texts[picture] or caption or "", probed[picture][0], repeats, False, group, probed[picture][1]
        )
        for picture in used
        if picture in probed
    ]
    notes = _notes(metadata, folder, entries, pictures, repeats)
    if caption is not None:
        notes.append(f'{len(uncaptioned)} pictures have neither caption nor tags and get "{caption}"')
    return Scan(records, notes + probe_notes)


def captions_of(metadata: Path, folder: Path) -> dict[Path, str]:
    """Return the pictures in a folder that a metadata file names, each with its `caption, tags`, "" without any.

    Raises:
        UserError: as `scan`, but for pictures.
    """
    entries, pictures = _found(metadata, folder)
    return {picture: entries[key].text for key, picture in pictures.items()}


def _found(metadata: Path, folder: Path) -> tuple[dict[str, Entry], dict[str, Path]]:
    entries = metadata_files.read(metadata)
    pictures = find_pictures(metadata, entries, folder)
    if not pictures:
        raise UserError(_nothing_found(metadata, entries, folder))
    return entries, pictures


def find_pictures(metadata: Path, entries: Mapping[str, Entry], folder: Path) -> dict[str, Path]:
    """Return the picture of each key that has one in a folder.

    Raises:
        UserError: a key has several pictures, or a picture several keys.
    """
    finder = _Finder(folder)
    pictures: dict[str, Path] = {}
    owners: dict[Path, str] = {}
    for key, entry in entries.items():
        found = finder.find(key)
        if not found:
            continue
        where = f"{metadata}, line {entry.line}"
        if len(found) > 1:
            is_one_folder = len({path.parent for path in found}) == 1
            names = " and ".join(path.name if is_one_folder else str(path) for path in found)
            what = "the extension" if is_one_folder else "its folder"
            raise UserError(f'{where}: the key "{key}" fits {names}; write it with {what}.')
        (picture,) = found
        same = finder.resolved(picture)
        if same in owners:
            first = owners[same]
            raise UserError(
                f'{where}: the keys "{first}" and "{key}" both mean {picture} (the first one is in line '
                f"{entries[first].line}); keep one of them."
            )
        owners[same], pictures[key] = key, picture
    return pictures


class _Finder:
    """Finds pictures by keys; each folder is listed once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listed: dict[Path, dict[str, list[Path]]] = {}
        self._resolved: dict[Path, Path] = {}
        self._below: dict[str, list[Path]] | None = None

    def find(self, key: str) -> list[Path]:
        """Return the pictures that a key may mean: none, one, or several."""
        for path in self._candidates(key):
            if found := self._in(path.parent).get(path.name):
                return found
        name = PureWindowsPath(key).name
        return self._in_all_below().get(name, []) if name == key or _is_absolute(key) else []

    def resolved(self, picture: Path) -> Path:
        """Return the path without links to folders, the same for each way to write it."""
        folder = picture.parent
        if folder not in self._resolved:
            self._resolved[folder] = folder.resolve()
        return self._resolved[folder] / picture.name

    def _candidates(self, key: str) -> Iterator[Path]:
        """Return where the picture of a key may lie; one that is absolute may be from another machine."""
        if not _is_absolute(key):
            yield self._folder / key.replace("\\", "/")
            return
        yield Path(key)
        parts = PureWindowsPath(key).parts[1:]
        for number in range(len(parts)):
            yield self._folder.joinpath(*parts[number:])

    def _in(self, folder: Path) -> dict[str, list[Path]]:
        """Return a folder's pictures by their names, and by these without the extension."""
        if folder not in self._listed:
            self._listed[folder] = _by_name(pictures_in(folder) if folder.is_dir() else [])
        return self._listed[folder]

    def _in_all_below(self) -> dict[str, list[Path]]:
        if self._below is None:
            self._below = _by_name([path for place in folders_within(self._folder) for path in pictures_in(place)])
        return self._below


def _by_name(pictures: Sequence[Path]) -> dict[str, list[Path]]:
    by_stem: dict[str, list[Path]] = {}
    by_name: dict[str, list[Path]] = {}
    for path in pictures:
        by_stem.setdefault(path.stem, []).append(path)
        by_name.setdefault(path.name, []).append(path)
    return by_stem | by_name


def _is_absolute(key: str) -> bool:
    return PurePosixPath(key).is_absolute() or PureWindowsPath(key).is_absolute()


def _nothing_found(metadata: Path, entries: Mapping[str, Entry], folder: Path) -> str:
    beside = [path.name for path in pictures_in(folder)]
    example = f"e.g. {beside[0]}" if beside else "none of them directly in it"
    return (
        f'none of the {len(entries)} keys of {metadata} (e.g. "{next(iter(entries))}") has a picture in {folder} '
        f"({len(beside)} pictures, {example}); a key is a picture's path, absolute or in that folder, with or "
        "without its extension. Give the folder the keys were made for."
    )


def _notes(
    metadata: Path, folder: Path, entries: Mapping[str, Entry], pictures: Mapping[str, Path], repeats: int
) -> list[str]:
    times = "once" if repeats == 1 else f"{repeats} times"
    notes = [f"{metadata.name}: {len(pictures)} pictures of {folder}, each {times} an epoch"]
    missing = [key for key in entries if key not in pictures]
    if missing:
        notes.append(f"{metadata.name}: {len(missing)} keys have no picture and are not used ({_some(missing)})")
    used = {picture.resolve() for picture in pictures.values()}
    left = [path.name for path in pictures_in(folder) if path.resolve() not in used]
    if left:
        notes.append(
            f"{len(left)} pictures in {folder} have no entry in {metadata.name} and are not used ({_some(left)})"
        )
    return notes


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
