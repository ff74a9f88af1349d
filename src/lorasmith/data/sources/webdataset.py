"""WebDataset tar shards: pictures in plain tar files, each with its caption in a member of the same base name.

    shards/set-{000..099}.tar    shards/*.tar    shards

Nothing is unpacked: a picture is read from its place in the archive. Each process opens only the shards whose number is
its own (number % processes), so no disk and no machine needs to hold them all.
"""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lorasmith.data.caption_files import accepted_extensions, chosen_lines, refuse
from lorasmith.data.images import extensions, probe_all
from lorasmith.data.metadata_files import Entry
from lorasmith.data.places import shards_of
from lorasmith.data.records import ByteRange, ImageRecord, Scan
from lorasmith.data.subsets import Subset
from lorasmith.errors import UserError

_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # WebDataset's own (base_plus_ext)
_PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip"), b"BZh": ("bzip2", "bunzip2"), b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}  # fmt: skip
_BLOCK = 512
_NUM_LISTED = 20


@dataclass(frozen=True)
class Sample:
    """Members with the same base name; by their suffixes, all that stands behind the base's dot, in lower case."""

    key: str
    members: dict[str, ByteRange] = field(default_factory=dict)

    def with_ending(self, endings: Collection[str]) -> list[str]:
        """Return the suffixes with one of these endings: those that are nothing more (`jpg`), or else all (`a.jpg`)."""
        found = [suffix for suffix in self.members if f".{suffix.rpartition('.')[2]}" in endings]
        return [suffix for suffix in found if "." not in suffix] or found


@dataclass
class Shard:
    """What is in one tar file; fault: why it is not whole, and "" if it is."""

    path: Path
    number: int
    samples: list[Sample]
    twice: list[str]
    fault: str = ""


class _BadShard(Exception):
    """A shard that cannot be used at all; says why and what to do."""


@dataclass
class _Captions:
    """The captions of all samples as they are found, and what is wrong or worth a note."""

    problems: dict[str, list[str]] = field(default_factory=dict)  # kind -> members
    origins: Counter[str] = field(default_factory=Counter)
    several_lines: list[str] = field(default_factory=list)


def scan_share(subset: Subset, index: int, count: int) -> Scan:
    """Return the pictures of those shards that process `index` of `count` reads, each decoded once.

    Raises:
        UserError: a shard is missing, compressed, cut off or no tar file; a name comes twice; a sample has several
            pictures; captions are missing or broken; unreadable pictures; there is no picture at all.
    """
    paths = shards_of(subset.place)
    shards = _read_shards(paths, index, count, skip_unreadable=subset.skip_unreadable)
    names = tuple(path.name for path in paths)
    if not shards:
        return Scan([], shards=names)
    pictures, without = _find_pictures(shards)
    if not pictures:
        raise UserError(_nothing_found(shards))
    captions = _Captions()
    texts = {place: _caption(place, sample, subset, captions) for place, (_, sample, _) in pictures.items()}
    _refuse_bad_captions(texts, captions, subset)
    probed, probe_notes = probe_all(
        list(pictures),
        skip_unreadable=subset.skip_unreadable,
        data={place: sample.members[suffix] for place, (_, sample, suffix) in pictures.items()},
    )
    records = [
        ImageRecord(
            place,
            texts[place] or subset.caption or "",
            probed[place][0],
            subset.repeats,
            subset.is_prior,
            shard.path.resolve().parent.name,
            probed[place][1],
            shard=shard.number,
            data=sample.members[suffix],
        )
        for place, (shard, sample, suffix) in pictures.items()
        if place in probed
    ]
    return Scan(records, [*_notes(shards, texts, captions, without, subset), *probe_notes], names)


# ---- tar files -----------------------------------------------------------------------------------------------------


def read_shard(path: Path, number: int = 0) -> Shard:
    """Return the samples of a tar file, in the order of their first members; reads no more than the members' headers.

    A sample's members need not stand together. Hidden files and those that are none (folders, links) are left out.

    Raises:
        _BadShard: it is missing, compressed, or no tar file.
    """
    samples: dict[str, Sample] = {}
    shard = Shard(path, number, [], [])
    for name, member in _members(shard):
        divided = _NAME.fullmatch(name)
        if divided is None or PurePosixPath(name).name.startswith("."):
            continue
        key, suffix = divided[1], divided[2].lower()
        sample = samples.setdefault(key, Sample(key))
        if suffix in sample.members:
            shard.twice.append(f"{path}/{name}")
        sample.members[suffix] = member
    shard.samples = list(samples.values())
    return shard


def _members(shard: Shard) -> Iterator[tuple[str, ByteRange]]:
    """Yield names and places of the whole files in a tar file; what is wrong at its end is left in `fault`."""
    path = shard.path
    try:
        length = path.stat().st_size
        with path.open("rb") as file:
            _refuse_packed(path, file.read(6))
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:", errors="replace") as tar:
                try:
                    for info in tar:
                        if info.isreg() and info.offset_data + info.size <= length:
                            if info.issparse():
                                raise _BadShard(f"{info.name} in it is stored as a sparse file; pack without --sparse")
                            yield info.name, ByteRange(path, info.offset_data, info.size)
                except tarfile.ReadError:
                    shard.fault = "cut off or damaged: its last file is not whole"
                    return
                file.seek(tar.offset)  # tarfile ends in silence at a damaged header as at the mark of the end
                end = file.read(_BLOCK)
                if len(end) < _BLOCK or end.strip(b"\0"):
                    shard.fault = "cut off or damaged: the mark at a tar file's end is missing"
                elif file.read().strip(b"\0"):
                    shard.fault = "more data follow after its end, as when two tar files were put together"
    except OSError as error:
        raise _BadShard(f"it cannot be opened ({error.strerror})") from error
    except tarfile.ReadError as error:
        raise _BadShard("not a tar file" if length else "empty (0 bytes)") from error


def _refuse_packed(path: Path, beginning: bytes) -> None:
    for mark, (kind, command) in _PACKED.items():
        if beginning.startswith(mark):
            raise _BadShard(
                f"compressed ({kind}), and nothing in it could be read without unpacking all before it; unpack it "
                f"({command} {path.name}): pictures hardly get smaller by that"
            )


def _read_shards(paths: Sequence[Path], index: int, count: int, *, skip_unreadable: bool) -> list[Shard]:
    shards, bad = [], []
    for number in range(index, len(paths), count):
        try:
            shards.append(read_shard(paths[number], number))
        except _BadShard as error:
            bad.append(f"{paths[number]}: {error}")
    own = len(range(index, len(paths), count))
    which = f"{own} shards" if count == 1 else f"the {own} shards that process {index} of {count} reads"
    problems = [f"{len(bad)} of {which} cannot be read:{_listed(bad)}"] if bad else []
    faulty = [f"{shard.path}: {shard.fault}" for shard in shards if shard.fault]
    if faulty and not skip_unreadable:
        problems.append(
            f"{len(faulty)} of {which} are not whole; copy or pack them again, or use what is whole in them with "
            f"--skip-unreadable:{_listed(faulty)}"
        )
    twice = [name for shard in shards for name in shard.twice]
    if twice:
        problems.append(f"{len(twice)} names come twice in their shard; keep one of each:{_listed(twice)}")
    refuse(problems)
    return shards


# ---- samples -------------------------------------------------------------------------------------------------------

_Pictures = dict[Path, tuple[Shard, Sample, str]]  # where it lies -> its shard, sample and suffix


def _find_pictures(shards: Sequence[Shard]) -> tuple[_Pictures, list[str]]:
    """Return the picture of each sample, and the names of samples that have none."""
    readable = extensions()
    pictures: _Pictures = {}
    without, several = [], []
    for shard in shards:
        for sample in shard.samples:
            suffixes = sample.with_ending(readable)
            if len(suffixes) == 1:
                pictures[_place(shard.path, sample, suffixes[0])] = (shard, sample, suffixes[0])
            elif suffixes:
                several.append(f"{shard.path}/{sample.key}: .{', .'.join(suffixes)}")
            else:
                without.append(f"{sample.key}.{next(iter(sample.members))}")
    if several:
        raise UserError(
            f"{len(several)} samples have more than one picture. Names are divided at the first dot, so `v1.5 a.jpg` "
            f"and `v1.5 b.jpg` are one sample, `v1`; rename them, or keep one picture of each:{_listed(several)}"
        )
    return pictures, without


def _place(shard: Path, sample: Sample, suffix: str) -> Path:
    return shard / f"{sample.key}.{suffix}".lstrip("/")


def _caption(place: Path, sample: Sample, subset: Subset, captions: _Captions) -> str:
    """Return a sample's own caption, "" if it has none: of .caption, .txt, .json, .cls the first there is."""
    given = subset.caption_extension
    for ending in (*accepted_extensions(given), *((".json", ".cls") if given is None else ())):
        for suffix in sample.with_ending([ending])[:1]:
            where = f"{place.parent / PurePosixPath(sample.key).name}.{suffix}"
            text = _text_in(sample.members[suffix].read(), suffix, where, captions)
            if text is None:
                return ""
            line, is_cut = chosen_lines(text, all_lines=subset.captions.wildcards)
            if is_cut:
                captions.several_lines.append(where)
            if line:
                captions.origins[ending] += 1
                return line
            if ending in accepted_extensions(given):
                captions.problems.setdefault("have an empty first line; write the caption there", []).append(where)
                return ""
    return ""


def _text_in(data: bytes, suffix: str, where: str, captions: _Captions) -> str | None:
    """Return what a member says of its picture, None if that is broken, which is noted."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        captions.problems.setdefault("are not UTF-8; save them again as UTF-8 and pack them anew", []).append(where)
        return None
    if suffix.endswith("cls"):
        return "" if text.strip().lstrip("-").isdigit() else text  # the number of a class is no caption
    if not suffix.endswith("json"):
        return text
    try:
        return _entry(json.loads(text)).text
    except (ValueError, RecursionError) as error:
        kind = 'are no JSON such as {"caption": "a cat", "tags": "cat, sofa"}'
        captions.problems.setdefault(kind, []).append(f"{where}: {error}")
        return None


def _entry(value: object) -> Entry:
    """Return caption and tags of an object, which may hold more: programs that download pictures write much there."""
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}")
    tags = value.get("tags")
    if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags):
        tags = ", ".join(tags)
    texts = {"caption": value.get("caption") or "", "tags": tags or ""}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{name} is a {type(text).__name__}")
    return Entry(**texts)


def _refuse_bad_captions(texts: dict[Path, str], captions: _Captions, subset: Subset) -> None:
    problems = [
        f"{len(members)} caption members {kind}:{_listed(members)}" for kind, members in captions.problems.items()
    ]
    uncaptioned = [str(place) for place, text in texts.items() if not text]
    if uncaptioned and subset.caption is None and not problems:
        endings = ", ".join(accepted_extensions(subset.caption_extension))
        others = ", or a .json with caption or tags" if subset.caption_extension is None else ""
        problems.append(
            f"{len(uncaptioned)} pictures have no caption; a sample's caption is a member with the same base name and "
            f'the extension {endings}{others}; pack it beside, or give --caption "your words" for all of them:'
            f"{_listed(uncaptioned)}"
        )
    refuse(problems)


# ---- sentences -----------------------------------------------------------------------------------------------------


def _notes(
    shards: Sequence[Shard], texts: dict[Path, str], captions: _Captions, without: Sequence[str], subset: Subset
) -> list[str]:
    times = "once" if subset.repeats == 1 else f"{subset.repeats} times"
    used = [f"{number} from {ending}" for ending, number in captions.origins.items()]
    num_default = sum(not text for text in texts.values())
    used += [f'{num_default} the default, "{subset.caption}"'] if num_default else []
    names = _some([shard.path.name for shard in shards])
    notes = [
        f"{len(shards)} shard{'s' * (len(shards) > 1)} ({names}): {len(texts)} pictures, each {times} an epoch; "
        f"captions: {', '.join(used)}"
    ]
    if captions.several_lines:
        files = captions.several_lines
        notes.append(f"only the first line is used of {len(files)} captions ({_some(files)})")
    if without:
        notes.append(f"{len(without)} samples have no picture that is read and are not used ({_some(without)})")
    notes += [f"{shard.path.name} is used as far as it is whole: {shard.fault}" for shard in shards if shard.fault]
    if subset.caption is not None and not num_default:
        notes.append(f'caption = "{subset.caption}" is not used: every picture has one of its own')
    return notes


def _nothing_found(shards: Sequence[Shard]) -> str:
    kinds = Counter(suffix for shard in shards for sample in shard.samples for suffix in sample.members)
    found = ", ".join(f"{number} .{suffix}" for suffix, number in kinds.most_common(5)) or "nothing with an extension"
    return (
        f"no pictures found in {_some([str(shard.path) for shard in shards])}; found {found}, but pictures are known "
        "by their extension (.jpg, .png, .webp and the like)."
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _listed(lines: Sequence[str]) -> str:
    more = [f"and {len(lines) - _NUM_LISTED} more"] if len(lines) > _NUM_LISTED else []
    return "".join(f"\n  {line}" for line in [*lines[:_NUM_LISTED], *more])
