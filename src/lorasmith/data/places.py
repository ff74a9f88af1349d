"""What a user means by the place of pictures: a folder, tar shards, or a Hugging Face data set."""

import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lorasmith.data.images import pictures_in
from lorasmith.errors import UserError

_TAR = re.compile(r"\.(tar(\.\w+)?|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_TABLES = (".parquet", ".arrow")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def source_of(place: str) -> str:
    """Return the source that a place is for, by its name and, if it is a folder, by what lies in it.

    A folder with any picture is one of pictures, whatever else is in it. What is not there at all is taken for a
    folder too, whose source says so.
    """
    path = Path(place)
    if is_shards(place):
        return "webdataset"
    if path.is_file() and path.suffix.lower() in _TABLES:
        return "huggingface"
    if not path.is_dir():
        return "folder"
    folders = [path, *(Path(entry.path) for entry in os.scandir(path) if entry.is_dir())]
    kinds = {Path(name).suffix.lower() for folder in folders for name in _files_in(folder)}
    candidates = [name for name, wanted in _KINDS.items() if kinds & set(wanted)]
    return candidates[0] if candidates and not any(map(pictures_in, folders)) else "folder"


_KINDS = {"huggingface": _TABLES, "webdataset": (".tar",)}


def _files_in(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in os.scandir(folder) if entry.is_file()]
    except OSError:  # a folder in it that may not be listed holds nothing for us
        return []


def is_shards(place: str) -> bool:
    """Whether a place is the name of tar files, or a pattern of such names."""
    return bool(_TAR.search(place)) and not Path(place).is_dir()


def is_hub_id(place: str) -> bool:
    """Whether a place has the form of a data set's name on the Hugging Face hub, `org/name`."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", Path(place).as_posix())) and not place.startswith(".")


def shards_of(place: str) -> list[Path]:
    """Return the tar files that a place means, in the order of their numbers.

    That is all in a folder, or those of a pattern: `{000..099}` and `{a,b}` stand for every name they make, whether
    there is such a file or not; `*`, `?` and `[a-c]` for the files that there are, sorted.

    Raises:
        UserError: there is none, a name comes twice, or the braces are none of these.
    """
    path = Path(place)
    if "://" in place or re.match(r"(https?|s3|gs|pipe|hdfs):", place):
        raise UserError(f"{place}: shards are read from the disk only; download them, or mount where they lie.")
    if path.is_dir():
        shards = sorted((one for one in path.iterdir() if is_shards(str(one))), key=lambda one: one.name)
    else:
        shards = [shard for name in _without_braces(place) for shard in _fitting(name)]
    if not shards:
        beside = path if path.is_dir() else path.parent
        raise UserError(f"no tar shards found for {place}; {_what_is_in(beside)}.")
    twice = [str(shard) for shard, number in Counter(shards).items() if number > 1]
    if twice:
        raise UserError(f"{place} means {', '.join(twice)} more than once; each shard is given once.")
    return shards


def _without_braces(place: str) -> list[str]:
    parts = _BRACES.split(place)
    if any(set(part) & set("{}") for part in parts):
        raise UserError(f"{place}: braces in braces, or one without its partner; write {{000..099}} or {{a,b}}.")
    choices = [[part] if number % 2 == 0 else _choices(place, part) for number, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(place: str, inner: str) -> list[str]:
    ends = _RANGE.fullmatch(inner)
    if ends is None:
        if "," in inner and ".." not in inner:
            return inner.split(",")
        raise UserError(f"{place}: {{{inner}}} is no range of numbers; write {{000..099}} or {{a,b}}.")
    first, last = ends.groups()
    if int(first) > int(last):
        raise UserError(f"{place}: {{{inner}}} runs backwards; write {{{last}..{first}}}.")
    width = max(map(len, (first, last))) if any(len(end) > 1 and end[0] == "0" for end in (first, last)) else 0
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]


def _fitting(name: str) -> Sequence[Path]:
    if not glob.has_magic(name) or os.path.exists(name):
        return [Path(name)]
    return sorted(map(Path, glob.glob(name)), key=lambda path: path.as_posix())


def _what_is_in(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no folder {folder}; check the path"
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{folder} holds {', '.join(names[:3])}{more}" if names else f"{folder} is empty"
