"""Which mask belongs to which picture, and whether it fits: on paths and sizes alone."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

BLACK_BELOW = 8  # of 255: a mask that is darker everywhere teaches nothing; compression may leave a black one so bright

_Size = tuple[int, int]


@dataclass(frozen=True)
class MaskLook:
    """What a mask is like: (width, height), SHA-256 of its file, its values of 0 to 255; whether they have colours."""

    size: _Size
    content_hash: str
    darkest: int
    brightest: int
    is_coloured: bool


@dataclass(frozen=True)
class Matches:
    """The mask of each picture that has one.

    unused: masks without a picture. doubtful: a picture with several masks, or a mask that pictures in several folders
    would share -> those.
    """

    of: Mapping[Path, Path]
    unused: Sequence[Path]
    doubtful: Mapping[Path, Sequence[Path]]


def match(pictures: Sequence[Path], place: Path, masks: Sequence[Path], folder: Path) -> Matches:
    """Return which mask belongs to which picture: the one of the same name, whatever its extension.

    A picture in a folder of `place` finds its mask in the folder of the same name in `folder`, or else directly there.
    """
    by_name: dict[PurePath, list[Path]] = defaultdict(list)
    for mask in masks:
        by_name[mask.relative_to(folder).with_suffix("")].append(mask)
    found = {}
    for picture in pictures:
        within = picture.relative_to(place) if picture.is_relative_to(place) else picture
        found[picture] = by_name.get(within.with_suffix("")) or by_name.get(PurePath(picture.stem)) or []
    doubtful = {picture: several for picture, several in found.items() if len(several) > 1}
    of = {picture: several[0] for picture, several in found.items() if len(several) == 1}
    users: dict[Path, list[Path]] = defaultdict(list)
    for picture, mask in of.items():
        users[mask].append(picture)
    shared = {mask: own for mask, own in users.items() if len({picture.parent for picture in own}) > 1}
    named = {mask for several in found.values() for mask in several}
    return Matches(of, [mask for mask in masks if mask not in named], {**doubtful, **shared})


def fits(mask: _Size, picture: _Size) -> bool:
    """Whether a mask has its picture's aspect ratio: one is the other resized, each side rounded up or down."""
    difference = abs(mask[0] * picture[1] - picture[0] * mask[1])
    return difference <= max(sum(mask), sum(picture))
