"""What is wrong with a set of pictures and captions, and what to do about it: rules on facts, without a file.

A rule is a function of (`Facts`, `Wishes`) that returns findings. `RULES` lists them all; the order within a severity
is theirs. What opens files and pictures and gathers the facts is `lorasmith check`.
"""

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

from lorasmith.data.caption_files import CaptionFiles
from lorasmith.data.mask_files import BLACK_BELOW, MaskLook, fits

Severity = Literal["error", "warning", "hint"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "hint")

WIDEST = 2.0  # how many times wider or higher than the training shape; a crop then cuts half of the picture away
BLURRED_BELOW = 20.0  # of `inspection.sharpness`: measured on photographs, blurred by 2 pixels in 512 and sharp
_IMBALANCE = 3.0
MANY_REPEATS = 500  # sd-scripts' documents go up to about 200; years and picture numbers are above
_FEWEST_TAGGED, _FEWEST_TAGS, _LONGEST_TAG = 10, 3, 4  # captions, tags in the median one, words in a tag

_CAPTION_LIKE = {".txt", ".caption", ".captions", ".text", ".cap", ".tag", ".tags", ".md"}
_OFFICE = {".doc", ".docx", ".odt", ".rtf", ".pages", ".json", ".yaml", ".yml", ".xml", ".csv"}


@dataclass(frozen=True)
class Group:
    """A folder whose pictures are trained; of a DreamBooth folder `N_identifier class` the words are known."""

    path: Path
    name: str
    repeats: int = 1
    words: str | None = None  # after the `N_`; None for a plain folder

    @property
    def identifier(self) -> str:
        return (self.words or "").split(" ")[0]

    @property
    def class_words(self) -> list[str]:
        return _plain(self.words or "").split()[1:]


@dataclass(frozen=True)
class PictureMask:
    """A picture's mask: its file, None for its own transparency; what it is like, or why it cannot be read."""

    path: Path | None
    look: MaskLook | None
    problem: str = ""


@dataclass(frozen=True)
class Picture:
    """One picture; `problem` says why it cannot be read, and then nothing is known of what it shows.

    caption: from its file; "" where that is no caption, None where there is no file. content_hash: SHA-256 of the file.
    sharpness: as `inspection.sharpness` measures it.
    """

    path: Path
    group: Group
    problem: str = ""
    size: tuple[int, int] = (0, 0)
    content_hash: str = ""
    sharpness: float = BLURRED_BELOW
    has_transparency: bool = False
    num_frames: int = 1
    caption: str | None = None
    caption_file: Path | None = None
    mask: PictureMask | None = None


@dataclass(frozen=True)
class Facts:
    """All that is known of a folder.

    foreign: pictures of kinds that are not read. unused: pictures where training does not look; unused_details: what is
    wrong with some of them besides. stray_captions: picture -> a file that was probably meant as its caption.
    office_files: the same, but no plain text. alike: picture -> an earlier one that looks the same but is another file.
    has_masks: masks are asked for. unused_masks: without a picture. doubtful_masks: see `mask_files.Matches`. metadata:
    the file with all captions, which are in no files beside the pictures then.
    """

    folder: Path
    groups: Sequence[Group]
    pictures: Sequence[Picture]
    captions: Sequence[CaptionFiles] = ()
    accepted: Sequence[str] = (".caption", ".txt")
    foreign: Sequence[Path] = ()
    unused: Sequence[Path] = ()
    stray_captions: Mapping[Path, Path] = field(default_factory=dict)
    office_files: Mapping[Path, Path] = field(default_factory=dict)
    alike: Mapping[Path, Path] = field(default_factory=dict)
    has_masks: bool = False
    unused_masks: Sequence[Path] = ()
    doubtful_masks: Mapping[Path, Sequence[Path]] = field(default_factory=dict)
    metadata: Path | None = None
    unused_details: Mapping[Path, str] = field(default_factory=dict)

    @property
    def readable(self) -> list[Picture]:
        return [picture for picture in self.pictures if not picture.problem]

    @property
    def captioned(self) -> list[Picture]:
        return [picture for picture in self.pictures if picture.caption]

    @property
    def masked(self) -> list[tuple[Picture, PictureMask, MaskLook]]:
        """The pictures with a mask that can be read, with it."""
        pairs = [(picture, picture.mask) for picture in self.pictures]
        return [(picture, mask, mask.look) for picture, mask in pairs if mask is not None and mask.look is not None]


@dataclass(frozen=True)
class Wishes:
    """How the pictures will be trained.

    trigger: a word that every caption should hold. default_caption: for pictures in a plain folder without one.
    count_tokens: the number of tokens of each text, without start and end.
    """

    resolution: tuple[int, int]
    count_tokens: Callable[[Sequence[str]], list[int]]
    trigger: str | None = None
    default_caption: str | None = None
    max_tokens: int = 75


@dataclass(frozen=True)
class Place:
    """A file (or folder) of a finding, with what is to be said of this one."""

    path: Path
    detail: str = ""


@dataclass(frozen=True)
class Finding:
    """One kind of trouble: `kind` never changes, for scripts; `message` and `fix` are for people."""

    severity: Severity
    kind: str
    message: str
    fix: str
    places: tuple[Place, ...] = ()


def find_all(facts: Facts, wishes: Wishes) -> list[Finding]:
    """Return what all rules find, errors first."""
    found = [finding for rule in RULES for finding in rule(facts, wishes)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def duplicates(pictures: Iterable[Picture]) -> dict[Path, Path]:
    """Return for each picture whose file is a copy of another one's, which to keep: a captioned one, or the first."""
    first: dict[str, Path] = {}
    found = {}
    for picture in sorted(pictures, key=lambda picture: not picture.caption):
        if not picture.problem and first.setdefault(picture.content_hash, picture.path) != picture.path:
            found[picture.path] = first[picture.content_hash]
    return found


def strays(
    files: Iterable[Path], uncaptioned: Iterable[Path], picture_extensions: Iterable[str]
) -> tuple[dict[Path, Path], dict[Path, Path]]:
    """Return (picture -> text file, picture -> office file) for files that were probably meant as captions.

    A name is compared without capitals, spaces at its ends and everything that only looks like an extension, so that
    `Dog 1.JPG.txt`, `dog 1.txt.txt` and `dog 1.text` all belong to `dog 1.jpg`.

    Args:
        files: all files of one folder that are not read as captions. uncaptioned: its pictures without a caption.
    """
    endings = _CAPTION_LIKE | set(picture_extensions)
    texts: dict[str, Path] = {}
    office: dict[str, Path] = {}
    for file in sorted(files):
        kind = file.suffix.lower()
        if kind in _CAPTION_LIKE:
            texts.setdefault(_bare_name(file.stem, endings), file)
        elif kind in _OFFICE:
            office.setdefault(_bare_name(file.stem, endings), file)
    keys = {picture: picture.stem.strip().lower() for picture in uncaptioned}
    return (
        {picture: texts[key] for picture, key in keys.items() if key in texts},
        {picture: office[key] for picture, key in keys.items() if key in office and key not in texts},
    )


def _bare_name(stem: str, endings: set[str]) -> str:
    name = stem.strip().lower()
    while (dot := name.rfind(".")) > 0 and name[dot:] in endings:
        name = name[:dot].strip()
    return name


# ---- files ---------------------------------------------------------------------------------------------------------


def unreadable(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """Pictures that cannot be decoded."""
    yield from _finding(
        "error",
        "unreadable",
        "{pictures} cannot be read; training stops at {them}",
        "copy {them} again from where {they} came, or remove {them}; `train --skip-unreadable` leaves {them} out",
        [Place(picture.path, picture.problem) for picture in facts.pictures if picture.problem],
    )


def foreign_kind(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """HEIC, RAW and the like."""
    yield from _finding(
        "warning",
        "kind-not-read",
        "{pictures} of a kind that is not read (HEIC, RAW, PSD and the like) would be left out",
        "save {them} as JPEG or PNG (iPhone: Settings, Camera, Formats, Most Compatible)",
        [Place(path) for path in facts.foreign],
    )


def unused_pictures(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """Pictures directly in the parent of DreamBooth folders, or in folders that are not looked into."""
    if facts.metadata is not None:
        why, advice = f"no entry in {facts.metadata.name}", "write one for {them} there (lorasmith captions does it)"
    elif any(group.words is not None for group in facts.groups):
        why = "only the folders named `N_identifier class` are trained"
        advice = "move {them} into one of those folders, or give another folder"
    else:
        why = "folders inside the given one are not trained"
        advice = "move {them} into the folder itself, give another folder, or train with --recursive"
    yield from _finding(
        "warning",
        "unused-picture",
        "{pictures} would be left out: " + why,
        advice,
        [Place(path, facts.unused_details.get(path, "")) for path in facts.unused],
    )


def no_pictures(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """Nothing is left to train on."""
    if not facts.readable:
        yield Finding(
            "error",
            "no-pictures",
            "no picture is left to train on",
            "put .jpg or .png pictures into the folder, or mend those that are listed here",
        )


def same_file(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """Exact copies."""
    by_path = {picture.path: picture for picture in facts.pictures}
    places = []
    for copy, first in duplicates(facts.pictures).items():
        differs = by_path[copy].caption != by_path[first].caption or by_path[copy].group != by_path[first].group
        detail = f"the same file as {_name(facts, first)}" + (", with another caption" if differs else "")
        places.append(Place(copy, detail))
    yield from _finding(
        "warning",
        "duplicate",
        "{pictures} more than once; a copy counts double and is learned by heart",
        "keep one of each (--fix leaves the copies out); to show a picture more often, raise its folder's repeats",
        places,
    )


def same_look(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """Other files that show the same: another size, another compression, the next frame."""
    yield from _finding(
        "warning",
        "near-duplicate",
        "{pictures} nearly the same as another one (saved again, resized, or the next of a series)",
        "keep the best of each, unless you mean to show it more often",
        [Place(path, f"looks like {_name(facts, first)}") for path, first in facts.alike.items()],
    )


# ---- what a picture shows ------------------------------------------------------------------------------------------


def too_small(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """Fewer pixels than are trained."""
    wanted = wishes.resolution[0] * wishes.resolution[1]
    places = [
        Place(picture.path, f"{_times(picture.size)}, enlarged {(wanted / area) ** 0.5:.1f} times")
        for picture in facts.readable
        if (area := picture.size[0] * picture.size[1]) < wanted
    ]
    yield from _finding(
        "warning",
        "too-small",
        f"{{pictures}} smaller than the training size {_times(wishes.resolution)}; enlarging teaches blur",
        "take larger versions, remove {them}, or train at a lower --resolution",
        places,
    )


def extreme_aspect(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """So long or so high that a crop cuts most of it away."""
    shape = wishes.resolution[0] / wishes.resolution[1]
    places = []
    for picture in facts.readable:
        ratio = picture.size[0] / picture.size[1] / shape
        if max(ratio, 1 / ratio) > WIDEST:
            lost = 1 - min(ratio, 1 / ratio)
            places.append(Place(picture.path, f"{_times(picture.size)}, a crop would cut {lost:.0%} away"))
    yield from _finding(
        "warning",
        "extreme-aspect",
        f"{{pictures}} much {'longer or higher' if shape == 1 else 'longer or narrower'} than the training shape",
        "crop {them} to what matters, or train with --buckets",
        places,
    )


def blurred(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """No part of the picture is sharp."""
    yield from _finding(
        "warning",
        "blurred",
        "{pictures} without any sharp part, blurred or nearly of one colour",
        "look at {them} (--sheet) and remove those that are not meant to be so",
        [
            Place(picture.path, f"sharpness {picture.sharpness:.0f}, below {BLURRED_BELOW:.0f}")
            for picture in facts.readable
            if picture.sharpness < BLURRED_BELOW
        ],
    )


def transparent(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """Transparency is laid on a colour."""
    yield from _finding(
        "hint",
        "transparent",
        "{pictures} with transparent parts, which become white",
        "if white is not what should be learned, lay {them} on backgrounds of your own",
        [Place(picture.path) for picture in facts.readable if picture.has_transparency and not _is_own_mask(picture)],
    )


def animated(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """Only the first frame counts."""
    yield from _finding(
        "hint",
        "animated",
        "{pictures} with several frames, of which only the first is used",
        "save the frame that you mean as a picture of its own",
        [Place(picture.path, f"{picture.num_frames} frames") for picture in facts.readable if picture.num_frames > 1],
    )


# ---- caption files -------------------------------------------------------------------------------------------------


def caption_missing(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """Neither a file nor words from the folder's name or an option."""
    if facts.metadata is not None:
        advice = f'write it in {facts.metadata.name}; or give --caption "your words" for all'
    else:
        advice = (
            f"write a file beside each, with the same name and the extension {' or '.join(facts.accepted)}; or give "
            '--caption "your words" for all; or name the folder `1_your words`'
        )
    yield from _finding(
        "error",
        "caption-missing",
        "{pictures} without a caption; training stops at {them}",
        advice,
        [
            Place(picture.path)
            for picture in facts.pictures
            if picture.caption is None and picture.group.words is None and wishes.default_caption is None
        ],
    )


def caption_empty(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """Nothing in the first line."""
    yield from _finding(
        "error",
        "caption-empty",
        "{files} with an empty first line, where the caption should be; training stops at {them}",
        "write the caption there, or delete the file to use the folder's words",
        [Place(path) for found in facts.captions for path in found.empty],
        "caption file",
    )


def caption_encoding(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """Not UTF-8."""
    yield from _finding(
        "error",
        "caption-encoding",
        "{files} not in UTF-8; training stops at {them}",
        "save again as UTF-8 (Notepad: Save as, Encoding: UTF-8; --fix does it for UTF-16)",
        [Place(path) for found in facts.captions for path in found.wrong_encoding],
        "caption file",
    )


def caption_not_read(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """Meant as captions, but called otherwise."""
    wanted = facts.accepted[-1]
    yield from _finding(
        "warning",
        "caption-not-read",
        f"{{files}} not read as a caption: it must be called like its picture, with {' or '.join(facts.accepted)}",
        "rename as it says there (--fix does it)",
        [
            Place(file, f"should be {picture.stem}{wanted}, for {_name(facts, picture)}")
            for picture, file in facts.stray_captions.items()
        ],
        "file",
    )
    yield from _finding(
        "warning",
        "caption-no-text",
        "{files} called like a picture, but not plain text and not read as a caption",
        "open it and save its text as it says there",
        [
            Place(file, f"should be plain text in {picture.stem}{wanted}")
            for picture, file in facts.office_files.items()
        ],
        "file",
    )


def caption_unused(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """Caption files that belong to no picture, or to one that has another."""
    its_picture = {picture.path.with_suffix(""): picture for picture in facts.pictures}
    known = set(facts.stray_captions.values())
    places = []
    for file in chain.from_iterable(found.unused for found in facts.captions):
        picture = its_picture.get(file.with_suffix(""))
        if file in known:
            continue
        if picture is None:
            places.append(Place(file, "there is no picture with this name"))
        elif picture.caption_file is not None:
            places.append(Place(file, f"{picture.caption_file.name} is read instead"))
    yield from _finding(
        "warning",
        "caption-unused",
        "{files} read for no picture",
        "rename, or remove what is left over",
        places,
        "caption file",
    )


def caption_capitals(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """`.TXT` is read here, but not everywhere."""
    yield from _finding(
        "hint",
        "caption-capitals",
        "{files} with an extension in capitals: read here, but not by every trainer",
        "rename to lower case if others shall read it too (--fix does it)",
        [
            Place(path, f"should be {path.stem}{path.suffix.lower()}")
            for found in facts.captions
            for path in dict.fromkeys(found.files.values())
            if path.suffix != path.suffix.lower()
        ],
        "caption file",
    )


def caption_several_lines(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """Only the first line counts."""
    yield from _finding(
        "hint",
        "caption-several-lines",
        "{files} with several lines, of which only the first is used",
        "join the lines, if all of it is the caption",
        [Place(path) for found in facts.captions for path in found.several_lines],
        "caption file",
    )


def caption_shared(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """a.jpg and a.png have one a.txt."""
    by_file: dict[Path, list[Picture]] = defaultdict(list)
    for picture in facts.pictures:
        if picture.caption_file is not None:
            by_file[picture.caption_file].append(picture)
    yield from _finding(
        "hint",
        "caption-shared",
        "{files} that several pictures of one name share",
        "rename one picture, and give it a caption of its own",
        [
            Place(file, f"for {' and '.join(picture.path.name for picture in its)}")
            for file, its in by_file.items()
            if len(its) > 1
        ],
        "caption file",
    )


# ---- what a caption says -------------------------------------------------------------------------------------------


def caption_long(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """More tokens than the text encoder takes."""
    captioned = facts.captioned
    lengths = wishes.count_tokens([picture.caption or "" for picture in captioned])
    yield from _finding(
        "warning",
        "caption-long",
        f"{{pictures}} with a caption of more than {wishes.max_tokens} tokens; the rest is not seen",
        "shorten, what matters first; or train with a larger --max-token-length (75 tokens are about 50 words)",
        [
            Place(picture.path, f"{length} tokens, {length - wishes.max_tokens} too many")
            for picture, length in zip(captioned, lengths, strict=True)
            if length > wishes.max_tokens
        ],
    )


def trigger_missing(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """A caption file replaces the folder's words, and with them the trigger."""
    places = [
        Place(picture.path, f'no "{trigger}" in: {_short(picture.caption or "")}')
        for picture in facts.captioned
        if (trigger := wishes.trigger or picture.group.identifier) and not _says(picture.caption or "", [trigger])
    ]
    yield from _finding(
        "warning",
        "trigger-missing",
        "{pictures} with a caption that does not hold the trigger word"
        + ("" if wishes.trigger else " of the folder's name (a caption file replaces the name)"),
        "put the word first in these captions"
        + ("" if wishes.trigger else "; or give --trigger, if you use another word"),
        places,
    )
    default = wishes.default_caption
    if wishes.trigger and default is not None and not _says(default, [wishes.trigger]):
        yield Finding(
            "warning",
            "trigger-missing-default",
            f'the caption for pictures without one, "{default}", does not hold the trigger word "{wishes.trigger}"',
            "put the word into --caption",
        )
    groups = {
        picture.group: None
        for picture in facts.readable
        if wishes.trigger and picture.caption is None and picture.group.words
    }
    yield from _finding(
        "warning",
        "trigger-missing-folder",
        "{files} whose name is the caption of its pictures and does not hold the trigger word",
        "put the word into the folder's name: `10_word class`",
        [Place(group.path) for group in groups if not _says(group.words or "", [wishes.trigger or ""])],
        "folder",
    )


def class_contradicted(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """The folder says dog, the caption does not."""
    others = {" ".join(group.class_words) for group in facts.groups if group.class_words}
    places = []
    for picture in facts.captioned:
        own, caption = picture.group.class_words, picture.caption or ""
        if not own or _says(caption, own):
            continue
        name = " ".join(own)
        named = sorted(other for other in others - {name} if _says(caption, other.split()))
        detail = f'no "{name}" in: {_short(caption)}' + (f' (it says "{named[0]}", another folder)' if named else "")
        places.append(Place(picture.path, detail))
    yield from _finding(
        "warning",
        "class-contradicted",
        "{pictures} with a caption that does not name the class in the folder's name",
        "name the class in the caption; or move the picture into the folder where it belongs",
        places,
    )


def tag_once(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """Tags that teach nothing, or are misspelt; of captions that are sentences nothing is said."""
    lists = {picture.path: _tags(picture.caption or "") for picture in facts.captioned}
    lists = {path: tags for path, tags in lists.items() if tags}
    if len(lists) < _FEWEST_TAGGED or statistics.median(map(len, lists.values())) < _FEWEST_TAGS:
        return
    counts = Counter(tag for tags in lists.values() for tag in set(tags))
    near = _near_spellings([tag for tag, count in counts.items() if count > 1])
    places = []
    for path, tags in lists.items():
        for tag in dict.fromkeys(tags):
            if counts[tag] == 1:
                better = next((other for part in _shortenings(tag) for other in near.get(part, ())), None)
                places.append(Place(path, f'"{tag}"' + (f', perhaps "{better}"?' if better else "")))
    yield from _finding(
        "hint",
        "tag-once",
        "{files} in one caption only: too rare to be learned, or misspelt",
        "correct or remove; nothing is wrong with a rare tag that is right",
        places,
        "tag",
    )


# ---- folders -------------------------------------------------------------------------------------------------------


def imbalance(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """One folder is seen far more often than another."""
    counts = Counter(picture.group for picture in facts.readable)
    totals = {group: number * group.repeats for group, number in counts.items()}
    if len(totals) < 2 or max(totals.values()) <= _IMBALANCE * min(totals.values()):
        return
    largest = max(totals.values())
    places = []
    for group, total in sorted(totals.items(), key=lambda item: -item[1]):
        detail = f"{_count(counts[group], 'picture')} x {group.repeats} = {total} an epoch"
        if total * _IMBALANCE < largest:
            detail += f"; `{round(largest / counts[group])}_{group.words}` would be as many as the largest"
        places.append(Place(group.path, detail))
    yield Finding(
        "warning",
        "imbalance",
        f"the largest folder is shown {largest / min(totals.values()):.0f} times as often as the smallest",
        "change the number before the _ so that pictures x repeats are about equal, or add pictures",
        tuple(places),
    )


def many_repeats(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """2023_holiday means two thousand times."""
    yield from _finding(
        "warning",
        "many-repeats",
        "{files} with a large number before the _, which is how often each picture counts in an epoch",
        "if it is a year or another number, rename the folder (1_your words)",
        [
            Place(group.path, f"{group.repeats} times")
            for group in facts.groups
            if group.words is not None and group.repeats > MANY_REPEATS
        ],
        "folder",
    )


# ---- masks ---------------------------------------------------------------------------------------------------------


def mask_unreadable(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """Masks that cannot be decoded."""
    yield from _finding(
        "error",
        "mask-unreadable",
        "{pictures} with a mask that cannot be read; training stops at {them}",
        "save the mask anew, or remove it, so that all of the picture is learned",
        [
            Place(picture.path, f"{picture.mask.path}: {picture.mask.problem}")
            for picture in facts.pictures
            if picture.mask is not None and picture.mask.problem
        ],
    )


def mask_doubtful(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """Two masks of one name, or one mask for pictures in several folders."""
    yield from _finding(
        "error",
        "mask-doubtful",
        "{files} of which it is not clear what belongs to what; training stops at {them}",
        "keep one mask of each name, in folders named as the pictures' folders",
        [Place(path, " or ".join(map(str, several))) for path, several in facts.doubtful_masks.items()],
        "picture or mask",
    )


def mask_missing(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """No mask of the picture's name, or no transparency."""
    without = [Place(picture.path) for picture in facts.readable if facts.has_masks and picture.mask is None]
    if len(without) < len(facts.readable) or facts.doubtful_masks:
        yield from _finding(
            "warning",
            "mask-missing",
            "{pictures} without a mask, learned as a whole",
            "if only part of it should be learned: make a mask named as the picture, or with --alpha-mask transparency",
            [place for place in without if place.path not in facts.doubtful_masks],
        )
    else:
        yield from _finding(
            "error",
            "mask-none",
            "{pictures}, and none has a mask; training stops",
            "name masks as their pictures, with any extension, in folders named as the pictures' folders (with "
            "--alpha-mask: save pictures with transparency); or train without masks",
            without,
        )


def mask_unused(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """Masks without a picture of their name."""
    yield from _finding(
        "warning",
        "mask-unused",
        "{files} without a picture, not used",
        "name {them} as the picture that {they} should mask, or remove {them}",
        [Place(path) for path in facts.unused_masks],
        "mask",
    )


def mask_shape(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """Another aspect ratio is an error, another size is not."""
    other = [(picture, mask, look) for picture, mask, look in facts.masked if look.size != picture.size]
    places: dict[bool, list[Place]] = {True: [], False: []}
    for picture, mask, look in other:
        detail = f"{_times(picture.size)}, but {mask.path} is {_times(look.size)}"
        places[fits(look.size, picture.size)].append(Place(picture.path, detail))
    yield from _finding(
        "error",
        "mask-shape",
        "{pictures} with a mask of another aspect ratio; training stops at {them}",
        "make the mask anew from the picture as it is now, upright",
        places[False],
    )
    yield from _finding(
        "hint",
        "mask-size",
        "{pictures} with a mask of another size, which is resized",
        "nothing, if it was meant so; a mask of the picture's size is sharper",
        places[True],
    )


def mask_values(facts: Facts, wishes: Wishes) -> Iterable[Finding]:
    """Masks that leave nothing to learn, or everything, or whose values are not grey."""
    black = [
        Place(picture.path, _of_mask(mask, f"brightest value {look.brightest} of 255"))
        for picture, mask, look in facts.masked
        if look.brightest < BLACK_BELOW
    ]
    white = [Place(picture.path, _of_mask(mask)) for picture, mask, look in facts.masked if look.darkest == 255]
    coloured = [Place(picture.path, _of_mask(mask)) for picture, mask, look in facts.masked if look.is_coloured]
    yield from _finding(
        "error",
        "mask-black",
        "{pictures} with a mask that is black (or transparent) everywhere; training stops at {them}",
        "make white what should be learned (a mask saved as 0 and 1 must be 0 and 255), or leave the picture out",
        black,
    )
    yield from _finding(
        "hint",
        "mask-white",
        "{pictures} with a mask that is white everywhere, which does nothing",
        "nothing, if all of the picture should be learned",
        white,
    )
    yield from _finding(
        "hint",
        "mask-coloured",
        "{pictures} with a coloured mask, of which only the red channel counts",
        "save the mask in grey, white where the picture should be learned",
        coloured,
    )


def _is_own_mask(picture: Picture) -> bool:
    return picture.mask is not None and picture.mask.path is None


def _of_mask(mask: PictureMask, detail: str = "") -> str:
    return ": ".join(part for part in (str(mask.path or ""), detail) if part)


RULES: tuple[Callable[[Facts, Wishes], Iterable[Finding]], ...] = (
    no_pictures, unreadable, caption_missing, caption_empty, caption_encoding,
    unused_pictures, foreign_kind, same_file, same_look, too_small, extreme_aspect, blurred,
    caption_not_read, caption_unused, caption_long, trigger_missing, class_contradicted, imbalance, many_repeats,
    mask_unreadable, mask_doubtful, mask_shape, mask_missing, mask_unused, mask_values,
    transparent, animated, caption_capitals, caption_several_lines, caption_shared, tag_once,
)  # fmt: skip


# ---- words ---------------------------------------------------------------------------------------------------------


def _finding(
    severity: Severity, kind: str, message: str, fix: str, places: Sequence[Place], noun: str = "picture"
) -> Iterable[Finding]:
    """Yield one finding if there are places; {pictures} or {files} becomes their number, {them} and {they} follow."""
    if places:
        count, one = _count(len(places), noun), len(places) == 1
        words = {"pictures": count, "files": count, "them": "it" if one else "them", "they": "it" if one else "they"}
        yield Finding(severity, kind, message.format(**words), fix.format(**words), tuple(places))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _name(facts: Facts, path: Path) -> str:
    return path.relative_to(facts.folder).as_posix()


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(text: str) -> str:
    return " ".join(text.lower().replace("_", " ").split())


def _says(text: str, words: Iterable[str]) -> bool:
    """Whether each word stands in the text as a word, in any case, with _ for a space, or in the plural."""
    plain = _plain(text)
    return all(re.search(rf"(?<!\w){re.escape(_plain(word))}(?:e?s)?(?!\w)", plain) for word in words)


def _tags(caption: str) -> list[str]:
    """Return the tags of a caption in plain spelling, or none if it is not divided, or into sentences."""
    tags = [plain for part in caption.split(",") if (plain := _plain(part))]
    return tags if len(tags) > 1 and all(len(tag.split()) <= _LONGEST_TAG for tag in tags) else []


def _near_spellings(tags: Iterable[str]) -> dict[str, list[str]]:
    """Return which tags become a text when a letter is left out: two with a common text are one slip apart."""
    near: dict[str, list[str]] = defaultdict(list)
    for tag in tags:
        for part in _shortenings(tag):
            near[part].append(tag)
    return near


def _shortenings(tag: str) -> set[str]:
    return {tag, *(tag[:i] + tag[i + 1 :] for i in range(len(tag)))} if len(tag) > 4 else {tag}
