"""Captions in text files beside the pictures: found and read, and all that is wrong with any of them said at once."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorasmith.data.faces import face_of
from lorasmith.errors import UserError

DEFAULT_EXTENSIONS = (".caption", ".txt")


@dataclass
class CaptionFiles:
    """The caption files of one folder's pictures.

    files: picture -> its file, first lines: picture -> its caption, which is all lines where they were asked for. The
    other lists are for errors and for the plan.
    """

    files: dict[Path, Path] = field(default_factory=dict)
    first_lines: dict[Path, str] = field(default_factory=dict)
    wrong_encoding: list[Path] = field(default_factory=list)
    empty: list[Path] = field(default_factory=list)
    several_lines: list[Path] = field(default_factory=list)
    unused: list[Path] = field(default_factory=list)


def accepted_extensions(given: str | None) -> tuple[str, ...]:
    """Return the extensions of caption files in order of preference: the given one (with or without a dot), or both."""
    return DEFAULT_EXTENSIONS if given is None else ("." + given.lstrip(".").lower(),)


def read_caption_files(
    folder: Path,
    pictures: Sequence[Path],
    accepted: Sequence[str],
    *,
    all_lines: bool = False,
    show: Callable[[Iterable[Path]], Iterable[Path]] = iter,
) -> CaptionFiles:
    """Return the first line of the text file beside each picture that has one; extensions in either case.

    Pictures whose names tell of a face (`name_CX_CY_W_H.png`) may share the file of the picture they were cut from.

    Args:
        all_lines: return all lines that hold something, divided by line feeds.
        show: shows the progress through the files that are read.
    """
    found = CaptionFiles()
    known = {*DEFAULT_EXTENSIONS, *accepted}
    beside = {
        (path.stem, path.suffix.lower()): path
        for path in sorted(folder.iterdir(), key=lambda path: path.name)
        if path.suffix.lower() in known and path.is_file() and not path.name.startswith(".")
    }
    for picture in pictures:
        stems = [picture.stem, *([picture.stem.rsplit("_", 4)[0]] if face_of(picture) else [])]
        keys = ((stem, extension) for stem in stems for extension in accepted)
        file = next((beside[key] for key in keys if key in beside), None)
        if file is not None:
            found.files[picture] = file
    used = dict.fromkeys(found.files.values())  # each is read once, also where a.jpg and a.png share it
    texts = {file: _text(file, found, all_lines=all_lines) for file in show(used)}
    found.first_lines = {picture: texts[file] for picture, file in found.files.items()}
    found.unused = [path for path in beside.values() if path not in used]
    return found


def _text(file: Path, found: CaptionFiles, *, all_lines: bool) -> str:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16 without a mark decodes as UTF-8, with a zero after every letter
        found.wrong_encoding.append(file)
        return ""
    chosen, is_cut = chosen_lines(text, all_lines=all_lines)
    if not chosen:
        found.empty.append(file)
    elif is_cut:
        found.several_lines.append(file)
    return chosen


def chosen_lines(text: str, *, all_lines: bool) -> tuple[str, bool]:
    """Return a text's first line, or all that hold something, and whether there are more that are not used."""
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
    if all_lines:
        lines = ["\n".join(filter(None, lines))]
    return lines[0], any(lines[1:])


def caption_problems(all_found: Iterable[CaptionFiles]) -> list[str]:
    """Return a paragraph for each kind of mistake in caption files, naming all files and the fix."""
    together = list(all_found)
    wrong_encoding = [file for found in together for file in found.wrong_encoding]
    empty = [file for found in together for file in found.empty]
    problems = []
    if wrong_encoding:
        problems.append(
            f"{len(wrong_encoding)} caption files are not UTF-8; save them again as UTF-8 (Notepad: Save as, Encoding: "
            f"UTF-8; elsewhere: iconv -t UTF-8):{listed(wrong_encoding)}"
        )
    if empty:
        problems.append(
            f"{len(empty)} caption files have an empty first line; write the caption there, or delete the file to use "
            f"the default caption:{listed(empty)}"
        )
    return problems


def uncaptioned_problem(
    pictures: Sequence[Path], accepted: Sequence[str], *, is_prior: bool, in_dataset_file: bool = False
) -> str:
    """Return a paragraph that names the pictures without any caption, and the ways to give them one."""
    option = "" if is_prior else ', or give --caption "your words" for all of them'
    ways = f"{option}, or name their folder `1_your words`"
    if in_dataset_file:
        ways = ', or write class_tokens = "your words" for all of them'
    return (
        f"{len(pictures)} pictures have no caption; write a file beside each, with the same name and the extension "
        f"{' or '.join(accepted)}{ways}:{listed(pictures)}"
    )


def refuse(problems: Sequence[str]) -> None:
    """Raise all problems as one UserError, if there are any."""
    if problems:
        raise UserError("\n".join(problems))


def listed(paths: Iterable[Path]) -> str:
    """Return the paths, each on a line of its own, to stand at the end of a message."""
    return "".join(f"\n  {path}" for path in paths)
