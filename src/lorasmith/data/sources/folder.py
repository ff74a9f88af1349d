"""Pictures in folders, with their captions in files beside them: the DreamBooth method, or just a folder.

Three layouts are understood: a folder of `N_identifier class` folders, one such folder itself, and a plain folder of
pictures. In the first two, N is the number of repeats and the rest of the name is the caption of pictures without one.
Asked for folders in folders, every one with pictures counts, by the rules of the nearest one named so above it.
"""

import os
import re
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

from lorasmith.data.caption_files import (
    CaptionFiles,
    accepted_extensions,
    caption_problems,
    read_caption_files,
    refuse,
    uncaptioned_problem,
)
from lorasmith.data.images import (
    advice_for_foreign,
    folders_within,
    foreign_pictures_in,
    pictures_in,
    probe_all,
    require_folder,
)
from lorasmith.data.quality import MANY_REPEATS
from lorasmith.data.records import ImageRecord, Scan
from lorasmith.data.subsets import Subset
from lorasmith.errors import UserError

_DREAMBOOTH_NAME = re.compile(r"(\d*[1-9]\d*)_(.*\S.*)")
_NO_NAME = re.compile(r"(?!)")


@dataclass(frozen=True)
class Part:
    """A folder whose pictures are used; `fallback` is the caption of those without one, None if there is no such."""

    folder: Path
    name: str
    repeats: int
    fallback: str | None
    is_dreambooth: bool
    pictures: list[Path]


def scan_subset(subset: Subset) -> Scan:
    """Return a subset's pictures; see `scan`."""
    return scan(
        Path(subset.place),
        caption=subset.caption,
        caption_extension=subset.caption_extension,
        repeats=subset.repeats,
        is_prior=subset.is_prior,
        skip_unreadable=subset.skip_unreadable,
        all_lines=subset.captions.wildcards,
        recursive=subset.recursive,
        in_dataset_file=subset.in_dataset_file,
    )


def scan(
    folder: Path,
    *,
    caption: str | None = None,
    caption_extension: str | None = None,
    repeats: int = 1,
    is_prior: bool = False,
    skip_unreadable: bool = False,
    all_lines: bool = False,
    recursive: bool = False,
    in_dataset_file: bool = False,
) -> Scan:
    """Return the pictures of a folder in any of the three layouts, sorted by folder and name, each decoded once.

    Args:
        caption: for pictures in a plain folder that have no caption file.
        caption_extension: look for caption files with this extension only, instead of `.caption` and then `.txt`.
        repeats: for a plain folder; elsewhere the folders' names say it.
        is_prior: these are regularization pictures.
        all_lines: captions are all lines of their files, not the first one only.
        recursive: take the pictures of all folders in it too, hidden ones not.
        in_dataset_file: a dataset file says how this folder counts: no name of a folder means anything.

    Raises:
        UserError: no such folder, no pictures (says where there are some), unreadable pictures, caption files that are
            empty or not UTF-8, pictures without any caption.
    """
    require_folder(folder)
    parts, notes = find_parts(folder, caption, repeats, recursive=recursive, in_dataset_file=in_dataset_file)
    if not any(part.pictures for part in parts):
        raise UserError(nothing_found(folder, in_dataset_file=in_dataset_file))
    accepted = accepted_extensions(caption_extension)
    captions = [read_caption_files(part.folder, part.pictures, accepted, all_lines=all_lines) for part in parts]
    _refuse_bad_captions(parts, captions, accepted, is_prior=is_prior, in_dataset_file=in_dataset_file)
    probed, probe_notes = probe_all(
        [picture for part in parts for picture in part.pictures], skip_unreadable=skip_unreadable
    )
    records = []
    for part, found in zip(parts, captions, strict=True):
        for picture in part.pictures:
            if picture in probed:
                size, content_hash = probed[picture]
                text = found.first_lines.get(picture, part.fallback or "")
                records.append(ImageRecord(picture, text, size, part.repeats, is_prior, part.name, content_hash))
        notes += _part_notes(part, found)
    option = "class_tokens" if in_dataset_file else "caption"
    return Scan(records, notes + probe_notes + _unused_option_notes(parts, captions, option, caption, repeats))


def find_parts(
    folder: Path, caption: str | None, repeats: int, *, recursive: bool = False, in_dataset_file: bool = False
) -> tuple[list[Part], list[str]]:
    """Return the folders to use, and notes on what is left aside."""
    pattern = _NO_NAME if in_dataset_file else _DREAMBOOTH_NAME
    if recursive:
        return _parts_within(folder, pattern, caption, repeats), []
    name, direct, subfolders = folder.resolve().name, pictures_in(folder), _subfolders(folder)
    own = pattern.fullmatch(name)
    named = {path: match for path in subfolders if (match := pattern.fullmatch(path.name))}
    if any(pictures_in(path) for path in named) and not (own and direct):
        parts = [_dreambooth_part(path, path.name, match) for path, match in named.items()]
        return parts, _parent_notes(folder, direct, [path for path in subfolders if path not in named])
    aside = {path: pictures_in(path) for path in subfolders} if direct else {}
    notes = [
        f"{path.name}: {_count(found)} in this subfolder, not used; "
        f"{'recursive = true' if in_dataset_file else '--recursive'} would use them"
        for path, found in aside.items()
        if found
    ]
    if own:
        return [_dreambooth_part(folder, name, own)], notes
    return [Part(folder, name, repeats, caption, False, direct)], notes


def _parts_within(folder: Path, pattern: re.Pattern[str], caption: str | None, repeats: int) -> list[Part]:
    """Return a part for each folder with pictures, however deep, sorted by path."""
    parts, root = [], folder.resolve()
    for place in folders_within(folder):
        pictures, path = pictures_in(place), place.relative_to(folder)
        if not pictures:
            continue
        names = reversed([root.name, *path.parts])
        match = next((match for name in names if (match := pattern.fullmatch(name))), None)
        name = path.as_posix() if path.parts else root.name
        if match:
            parts.append(Part(place, name, int(match[1]), match[2].strip(), True, pictures))
        else:
            parts.append(Part(place, name, repeats, caption, False, pictures))
    return parts


def _dreambooth_part(folder: Path, name: str, match: re.Match[str]) -> Part:
    return Part(folder, name, int(match[1]), match[2].strip(), True, pictures_in(folder))


def _parent_notes(folder: Path, direct: Sequence[Path], unnamed: Sequence[Path]) -> list[str]:
    """Say which pictures in a parent of DreamBooth folders are not used."""
    notes = [
        f"{path.name}: {_count(pictures)}, not used, for the name is not `N_identifier class` with N from 1"
        for path in unnamed
        if (pictures := pictures_in(path))
    ]
    if direct:
        notes.append(
            f"{_count(direct)} directly in {folder}, not used ({_some(direct)}): where there are `N_identifier "
            "class` folders only those count; move the pictures into one"
        )
    return notes


def _refuse_bad_captions(
    parts: Sequence[Part],
    captions: Sequence[CaptionFiles],
    accepted: Sequence[str],
    *,
    is_prior: bool,
    in_dataset_file: bool,
) -> None:
    problems = caption_problems(captions)
    uncaptioned = [
        picture
        for part, found in zip(parts, captions, strict=True)
        for picture in part.pictures
        if part.fallback is None and picture not in found.files
    ]
    if uncaptioned:
        problems.append(uncaptioned_problem(uncaptioned, accepted, is_prior=is_prior, in_dataset_file=in_dataset_file))
    refuse(problems)


def _part_notes(part: Part, captions: CaptionFiles) -> list[str]:
    """Say what is used of a folder, and what in it might be a mistake."""
    notes = [_part_summary(part, captions)]
    if part.is_dreambooth and part.repeats > MANY_REPEATS:
        notes.append(
            f"{part.name}: the {part.repeats} before the _ is taken as the number of repeats; "
            "if it is a year or another number, rename the folder (1_your words)"
        )
    foreign = foreign_pictures_in(part.folder)
    if foreign:
        notes.append(
            f"{part.name}: {_count(foreign)} of a kind that is not read ({_some(foreign)}); "
            f"{advice_for_foreign(foreign)}"
        )
    if captions.several_lines:
        files = captions.several_lines
        notes.append(f"{part.name}: only the first line is used of {_count(files, 'caption file')} ({_some(files)})")
    if captions.unused:
        notes.append(f"{part.name}: {_count(captions.unused, 'text file')} not used ({_some(captions.unused)})")
    return notes


def _part_summary(part: Part, captions: CaptionFiles) -> str:
    if not part.pictures:
        return f"{part.name}: holds no pictures"
    without = [picture for picture in part.pictures if picture not in captions.files]
    used = []
    if captions.files:
        kinds = sorted({file.suffix for file in captions.files.values()})
        used.append(f"{_count(captions.files, 'caption')} from {' and '.join(kinds)} files")
    if without:
        origin = "the folder's name" if part.is_dreambooth else "the default"
        used.append(f'{_count(without, "caption")} from {origin}, "{part.fallback}"')
    times = "once" if part.repeats == 1 else f"{part.repeats} times"
    return f"{part.name}: {_count(part.pictures)}, each {times} an epoch; {', '.join(used)}"


def _unused_option_notes(
    parts: Sequence[Part], captions: Sequence[CaptionFiles], option: str, caption: str | None, repeats: int
) -> list[str]:
    """Say so when an option that was given changes nothing."""
    is_dreambooth, notes = parts[0].is_dreambooth, []
    has_all_files = all(len(found.files) == len(part.pictures) for part, found in zip(parts, captions, strict=True))
    if caption is not None and (is_dreambooth or has_all_files):
        notes.append(f'{option} = "{caption}" is not used: every picture has one of its own or of its folder\'s name')
    if repeats != 1 and is_dreambooth:
        notes.append(f"repeats = {repeats} is not used: the folders' names say how often their pictures count")
    return notes


def nothing_found(folder: Path, *, in_dataset_file: bool = False) -> str:
    """Say that there are no pictures, and where there are some."""
    foreign = foreign_pictures_in(folder)
    near = {path: _num_pictures(path) for path in [*_subfolders(folder), folder.resolve().parent]}
    places = [f"{path} holds {number}" for path, number in near.items() if number]
    if foreign:
        advice = f"{_some(foreign)}: pictures of a kind that is not read; {advice_for_foreign(foreign)}."
    elif places:
        advice = f"{'; '.join(places)}: give that folder instead, if it is the one that you mean."
    else:
        advice = "nor are there any one level up or down; check the path."
    where = "" if in_dataset_file else ", neither directly nor in folders named `N_identifier class`"
    return f"no pictures found in {folder}{where} (looked for .jpg .png .webp .bmp .tif .gif and the like); {advice}"


def _num_pictures(folder: Path) -> int:
    """Return how many pictures would be used if this folder were given."""
    try:
        named = [path for path in _subfolders(folder) if _DREAMBOOTH_NAME.fullmatch(path.name)]
        return sum(len(pictures_in(path)) for path in named) or len(pictures_in(folder))
    except OSError:  # it may not be listed: then it is not the one that was meant
        return 0


def _subfolders(folder: Path) -> list[Path]:
    with os.scandir(folder) as found:
        return [folder / name for name in sorted(one.name for one in found if one.is_dir())]


def _count(things: Sized, name: str = "picture") -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _some(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(path.name for path in paths[:3]) + more
