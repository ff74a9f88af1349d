"""Masks: how much each place of a picture is learned, by a folder of mask pictures or by their own transparency.

All masks are read once before training (`attach`), so that one that is missing, broken or does not fit is known at the
start. docs/masks.md tells users what becomes of them.
"""

import os
import random
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lorasmith.data.buckets import CropPlan, Size
from lorasmith.data.images import (
    Draws,
    UnreadablePicture,
    cut_out,
    folders_within,
    open_as_stored,
    open_with_alpha,
    pictures_in,
    require_folder,
)
from lorasmith.data.mask_files import BLACK_BELOW, MaskLook, Matches, fits, match
from lorasmith.data.records import ImageRecord, Mask
from lorasmith.data.subsets import Subset
from lorasmith.errors import UserError

STILL = Draws.of(random.Random(0))  # for what is not augmented, of which nothing is drawn
_COLOURED = 32  # of 255: channels that differ by less are grey after lossy compression


@dataclass(frozen=True)
class _Seen:
    """A record's mask: its file, what it is like, and of the part that is trained the mean and the brightest value."""

    path: Path | None
    look: MaskLook
    coverage: float = 0.0
    brightest: int = 0


def files_in(folder: Path) -> list[Path]:
    """Return the pictures in a folder of masks and all folders in it but hidden ones, sorted.

    Raises:
        UserError: there is no such folder.
    """
    require_folder(folder)
    return [path for place in folders_within(folder) for path in pictures_in(place)]


def match_files(folder: Path, place: Path, pictures: Sequence[Path]) -> Matches:
    """Return which file of a folder of masks belongs to which picture; see `mask_files.match`.

    Raises:
        UserError: there is no such folder, or pictures lie in it.
    """
    files = files_in(folder)
    inside = [picture for picture in pictures if _lies_in(picture, folder)]
    if inside:
        raise UserError(
            f"{len(inside)} of the pictures lie in the folder of masks, {folder} (the first is {inside[0]}); keep "
            "masks in a folder of their own."
        )
    return match(pictures, place, files, folder)


def attach(
    subset: Subset, records: Sequence[ImageRecord], crops: Sequence[CropPlan]
) -> tuple[list[ImageRecord], list[str]]:
    """Return a subset's records with their masks, each decoded once, and notes on what is not plain.

    Raises:
        UserError: no picture has a mask; masks are unreadable, black, of another shape than their pictures, or it is
            not clear whose they are. Each lists all such masks.
    """
    if subset.masks is None and not subset.alpha_mask:
        return list(records), []
    if subset.masks is not None and subset.alpha_mask:
        raise UserError(
            f"masks = {subset.masks} and alpha_mask both say what of the same pictures is learned; leave out one."
        )
    paths: Mapping[Path, Path | None] = {record.path: None for record in records}
    notes = []
    if subset.masks is not None:
        matches = _matches(subset.masks, Path(subset.place), records)
        paths, notes = matches.of, _named("masks without a picture, not used", [path.name for path in matches.unused])
    is_still = subset.augmentation.has_still_crops
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        seen = list(
            pool.map(
                lambda record, crop: (
                    _see(record, paths[record.path], crop if is_still else None) if record.path in paths else None
                ),
                records,
                crops,
            )
        )
    found = [(record, one) for record, one in zip(records, seen, strict=True) if isinstance(one, _Seen)]
    _refuse_unreadable([one for one in seen if isinstance(one, UnreadablePicture)])
    if not found:
        raise UserError(
            f"alpha_mask takes the pictures' transparency as their masks, but none of the {len(records)} pictures has "
            f"any (the first is {records[0].path}); save them as PNG or WebP with transparency, or leave it out."
        )
    _refuse_misfits(found)
    _refuse_black(found)
    resized = [one.path.name for record, one in found if one.path and one.look.size != record.size]
    coloured = [one.path.name for _, one in found if one.path and one.look.is_coloured]
    masks = [Mask(one.path, one.look.content_hash, one.coverage) if isinstance(one, _Seen) else None for one in seen]
    return [replace(record, mask=mask) for record, mask in zip(records, masks, strict=True)], [
        *notes,
        *_named("masks of another size than their pictures, resized", resized),
        *_named("masks with colours, of which only the red channel counts", coloured),
    ]


def open_mask(record: ImageRecord) -> Image.Image:
    """Return a record's mask in grey, as large as its picture.

    Raises:
        UserError: it is no longer what it was when the run began, or cannot be read.
    """
    assert record.mask is not None
    image, look = _read(record, record.mask.path)
    if look.content_hash != record.mask.content_hash:
        raise UserError(
            f"{record.mask.path} has changed during the run; leave the masks alone while training and start the run "
            "again."
        )
    return _as_large(image, record.size)


def look_at(path: Path) -> tuple[Image.Image, MaskLook]:
    """Return a mask file in grey, and what it is like.

    Raises:
        UnreadablePicture: as `images.open_image`.
    """
    image, content_hash = open_as_stored(path)
    red = image.getchannel("R")
    values = np.asarray(image, dtype=np.int16)
    is_coloured = bool(np.abs(values - values[:, :, :1]).max() > _COLOURED)
    darkest, brightest = (int(value) for value in (values[:, :, 0].min(), values[:, :, 0].max()))
    return red, MaskLook(red.size, content_hash, darkest, brightest, is_coloured)


def look_at_alpha(record: ImageRecord) -> tuple[Image.Image, MaskLook]:
    """Return how opaque a picture's places are, in grey, and what it is like as a mask.

    Raises:
        UnreadablePicture: as `images.open_image`.
    """
    picture, alpha = open_with_alpha(record)
    image = alpha or Image.new("L", picture.size, 255)
    values = np.asarray(image)
    return image, MaskLook(image.size, "", int(values.min()), int(values.max()), is_coloured=False)


def latent_mask(mask: Image.Image, crop: CropPlan, factor: int, **where: Any) -> Tensor:
    """Return what is trained of a mask, (1, H/f, W/f) float32 in [0, 1]: means over the pixels of each latent.

    Args:
        where: what `images.cut_out` is told for the picture, so that the mask follows it.
    """
    values = np.asarray(cut_out(mask, crop, resample=Image.Resampling.BOX, **where), dtype=np.float32)  # (H, W)
    height, width = values.shape
    means = values.reshape(height // factor, factor, width // factor, factor).mean(axis=(1, 3)) / 255
    return torch.from_numpy(means)[None]


def _read(record: ImageRecord, path: Path | None) -> tuple[Image.Image, MaskLook]:
    return look_at_alpha(record) if path is None else look_at(path)


def _as_large(image: Image.Image, size: Size) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BOX)


def _see(record: ImageRecord, path: Path | None, crop: CropPlan | None) -> "_Seen | UnreadablePicture | None":
    """Return what there is to know of a mask, None for opaque pictures; crop: if the same part is always trained."""
    try:
        image, look = _read(record, path)
    except UnreadablePicture as error:
        return error
    if path is None and look.darkest == 255:
        return None
    if not fits(look.size, record.size):
        return _Seen(path, look)
    trained = _as_large(image, record.size)
    if crop is not None:
        trained = cut_out(trained, crop, draws=STILL, resample=Image.Resampling.BOX)
    values = np.asarray(trained)
    return _Seen(path, look, float(values.mean()) / 255, int(values.max()))


def _matches(folder: Path, place: Path, records: Sequence[ImageRecord]) -> Matches:
    matches = match_files(folder, place, [record.path for record in records])
    if matches.doubtful:
        lines = [f"{name}: {' or '.join(map(str, several))}" for name, several in matches.doubtful.items()]
        raise UserError(
            "it is not clear which mask belongs to which picture; keep one mask of each name, in folders named as the "
            f"pictures' folders:{_listed(lines)}"
        )
    if not matches.of:
        example = f"the first mask is {matches.unused[0]}" if matches.unused else "there are no pictures in it at all"
        raise UserError(
            f"no mask in {folder} belongs to any picture: a mask is named as its picture, with any extension, in a "
            f"folder named as the picture's. The first picture is {records[0].path}, {example}."
        )
    return matches


def _lies_in(path: Path, folder: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def _refuse_unreadable(errors: Sequence[UnreadablePicture]) -> None:
    if errors:
        raise UserError(
            f"{_count(len(errors))} cannot be read; save {_them(errors)} anew, or remove {_them(errors)}, so that all "
            f"of the picture is learned:{_listed(map(str, errors))}"
        )


def _refuse_misfits(found: Sequence[tuple[ImageRecord, _Seen]]) -> None:
    misfits = [(record, seen) for record, seen in found if not fits(seen.look.size, record.size)]
    if misfits:
        lines = [
            f"{seen.path}: {_times(seen.look.size)}, but {record.path.name} is {_times(record.size)}"
            for record, seen in misfits
        ]
        raise UserError(
            f"{_count(len(misfits))} of another aspect ratio than the picture; make {_them(misfits)} anew from the "
            f"picture as it is now:{_listed(lines)}"
        )


def _refuse_black(found: Sequence[tuple[ImageRecord, _Seen]]) -> None:
    lines = []
    for record, seen in found:
        if seen.brightest < BLACK_BELOW:
            is_black = seen.look.brightest < BLACK_BELOW
            where = "everywhere" if is_black else "in all that the crop keeps"
            hint = "; if it was saved as 0 and 1, save it as 0 and 255" if 0 < seen.look.brightest < BLACK_BELOW else ""
            what = "transparent" if seen.path is None else "black"
            lines.append(f"{seen.path or record.path}: {what} {where}{hint}")
    if lines:
        raise UserError(
            f"{_count(len(lines))} would leave nothing to learn of the picture (white, or opaque, is what is "
            f"learned); mend {_them(lines)}, or leave out the picture:{_listed(lines)}"
        )


def _named(what: str, names: Sequence[str]) -> list[str]:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{what} ({len(names)}): {', '.join(names[:3])}{more}"] if names else []


def _listed(lines: Iterable[str]) -> str:
    return "".join(f"\n  {line}" for line in lines)


def _count(number: int) -> str:
    return f"{number:,} mask{'' if number == 1 else 's'}"


def _them(things: Sequence[object]) -> str:
    return "it" if len(things) == 1 else "them"


def _times(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
