"""Captions from one metadata JSON, the fine-tuning ("captions") method of sd-scripts.

    {"0001": {"caption": "a cat on a sofa", "tags": "cat, sofa"}, "sub/0002.png": {"tags": "dog"}}

A key is a picture's path, absolute or in the image folder, with or without the extension.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lorasmith.data.caption_files import listed
from lorasmith.data.images import extensions, pictures_in, probe_all, require_folder
from lorasmith.data.records import ImageRecord, Scan
from lorasmith.errors import UserError


def scan(
    metadata: Path, folder: Path, *, caption: str | None = None, repeats: int = 1, skip_unreadable: bool = False
) -> Scan:
    """Return the pictures named in a metadata JSON, with `caption, tags` as caption, sorted by path, each decoded once.

    Args:
        folder: where the pictures lie.
        caption: for pictures that have neither caption nor tags.
        repeats: how often each picture counts in an epoch (sd-scripts: dataset_repeats).

    Raises:
        UserError: the JSON is missing, broken (with line and column) or of another form; no key has a picture, several
            keys have the same one, one key has several; pictures without any caption; unreadable pictures.
    """
    require_folder(folder)
    entries = _read(metadata)
    pictures = _find_pictures(metadata, folder, entries)
    texts = {picture: _text(metadata, key, entries[key]) for key, picture in pictures.items()}
    uncaptioned = [picture for picture, text in texts.items() if not text]
    if uncaptioned and caption is None:
        raise UserError(
            f"{len(uncaptioned)} pictures have neither caption nor tags in {metadata}; add them there, or give "
            f'--caption "your words" for all of them:{listed(uncaptioned)}'
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


def _read(metadata: Path) -> dict[str, Any]:
    try:
        entries = json.loads(metadata.read_bytes().decode("utf-8-sig"), object_pairs_hook=_unique(metadata))
    except OSError as error:
        raise UserError(f"the metadata JSON {metadata} cannot be opened ({error.strerror}); check the path.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{metadata} is not UTF-8 (byte {error.start}); save it again as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{metadata} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; mend it there."
        ) from error
    if not isinstance(entries, dict) or not entries:
        raise UserError(
            f'{metadata} must hold an object with an entry for each picture, like {{"0001": {{"caption": "a cat"}}}}; '
            f"it holds {'nothing' if not entries else f'a {type(entries).__name__}'}."
        )
    return entries


def _unique(metadata: Path) -> Any:
    """Return a hook for json that refuses a key given twice, of which json would silently drop the first."""

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built = dict(pairs)
        if len(built) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise UserError(f"{metadata} has the same key more than once: {', '.join(twice)}; keep one entry of each.")
        return built

    return build


def _text(metadata: Path, key: str, entry: Any) -> str:
    """Return an entry's `caption, tags`; tags may be a text or a list of texts."""
    expected = f'{metadata}, key "{key}": expected an object such as {{"caption": "a cat", "tags": "cat, sofa"}}'
    if not isinstance(entry, dict):
        raise UserError(f"{expected}, found {entry!r}.")
    caption, tags = entry.get("caption") or "", entry.get("tags") or ""
    if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags):
        tags = ", ".join(tags)
    if not isinstance(caption, str) or not isinstance(tags, str):
        raise UserError(f"{expected}, found caption = {caption!r} and tags = {tags!r}.")
    return ", ".join(part.strip() for part in (caption, tags) if part.strip())


def _find_pictures(metadata: Path, folder: Path, entries: Mapping[str, Any]) -> dict[str, Path]:
    """Return the picture of each key that has one."""
    stems: dict[Path, dict[str, list[Path]]] = {}
    pictures: dict[str, Path] = {}
    owners: dict[Path, str] = {}
    for key in entries:
        picture = _find_picture(metadata, folder, key, stems)
        if picture is None:
            continue
        same = picture.resolve()
        if same in owners:
            raise UserError(f'{metadata}: the keys "{owners[same]}" and "{key}" both mean {picture}; keep one of them.')
        owners[same], pictures[key] = key, picture
    if not pictures:
        beside = [path.name for path in pictures_in(folder)]
        example = f"e.g. {beside[0]}" if beside else "none of them directly in it"
        raise UserError(
            f'none of the {len(entries)} keys of {metadata} (e.g. "{next(iter(entries))}") has a picture in {folder} '
            f"({len(beside)} pictures, {example}); a key is a picture's path, absolute or in that folder, with or "
            "without its extension. Give the folder the keys were made for."
        )
    return pictures


def _find_picture(metadata: Path, folder: Path, key: str, stems: dict[Path, dict[str, list[Path]]]) -> Path | None:
    """Return the picture of one key: the path itself, in the folder, or there by its name alone if it was absolute."""
    if PurePosixPath(key).is_absolute() or PureWindowsPath(key).is_absolute():
        candidates = [Path(key), folder / PureWindowsPath(key).name]  # the second: written on another machine
    else:
        candidates = [folder / key.replace("\\", "/")]
    for path in candidates:
        if path.suffix.lower() in extensions() and path.is_file():
            return path
        matches = _by_stem(path.parent, stems).get(path.name, [])
        if len(matches) > 1:
            names = " and ".join(match.name for match in matches)
            raise UserError(f'{metadata}: the key "{key}" fits {names}; write it with the extension.')
        if matches:
            return matches[0]
    return None


def _by_stem(folder: Path, stems: dict[Path, dict[str, list[Path]]]) -> dict[str, list[Path]]:
    """Return a folder's pictures by their names without extension; each folder is listed once."""
    if folder not in stems:
        found: dict[str, list[Path]] = {}
        for path in pictures_in(folder) if folder.is_dir() else []:
            found.setdefault(path.stem, []).append(path)
        stems[folder] = found
    return stems[folder]


def _notes(
    metadata: Path, folder: Path, entries: Mapping[str, Any], pictures: Mapping[str, Path], repeats: int
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
