"""sd-scripts' .npz files: a picture's latents, drawn once from the VAE's posterior and stored unscaled, in float32.

    photos/a_0640x0480_sd.npz   today, of a picture of this size: latents, latents_flipped, original_size, crop_ltrb
    photos/a.npz, a_flip.npz    2022 (finetune/prepare_buckets_latents.py): arr_0

Versions in between wrote today's keys into `a.npz`. No form says which VAE, which pixels, or how they were resized.
(library/strategy_base.py: save_latents_to_disk; library/train_util.py: get_crop_ltrb; all multiply by the VAE's scale
when they train.)
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lorasmith.checkpoint import atomic_file
from lorasmith.data.buckets import CropPlan, Size
from lorasmith.errors import UserError

Form = Literal["today", "2022"]
Key = tuple[int, bool]  # record index, whether mirrored
Moments = tuple[Tensor, Tensor]  # mean and std, each (C, H/f, W/f)

_OLD, _FLIPPED = ".npz", "_flip.npz"


class Unfit(Exception):
    """A file is not what is wanted; the text says why, without the file's name."""


@dataclass(frozen=True)
class Wish:
    """The latents of one picture, as a run wants them.

    stem: the path of the files without what their names end with. size: (width, height) of the picture. latent_shape:
    (C, H/f, W/f).
    """

    stem: Path
    size: Size
    crop: CropPlan
    latent_shape: tuple[int, int, int]
    has_mirrored: bool

    def files(self, form: Form) -> list[Path]:
        """Return the files of a form: the latents', and that of the mirror image's where it has its own."""
        if form == "today":
            return [self._with(f"_{self.size[0]:04d}x{self.size[1]:04d}_sd.npz")]
        return [self._with(_OLD), *([self._with(_FLIPPED)] if self.has_mirrored else [])]

    def _with(self, ending: str) -> Path:
        return self.stem.with_name(self.stem.name + ending)


@dataclass(frozen=True)
class Found:
    """What files hold: latents and those of the mirror image, each (C, H/f, W/f) float32, unscaled."""

    latents: Tensor
    mirrored: Tensor | None
    has_mask: bool

    @property
    def content_hash(self) -> str:
        """SHA-256 of the values."""
        digest = hashlib.sha256()
        for values in (self.latents, self.mirrored):
            digest.update(b"" if values is None else values.numpy().tobytes())
        return digest.hexdigest()


def stem_of(picture: Path, folder: Path, npz_dir: Path | None) -> Path:
    """Return a picture's path without its extension, or its place in a folder of files that is laid out like its own.

    Raises:
        UserError: it lies outside of the folder.
    """
    stem = picture.with_suffix("")
    if npz_dir is None:
        return stem
    if not stem.is_relative_to(folder):
        raise UserError(
            f"{picture} lies outside of {folder}, so it has no place in npz_dir = {npz_dir}; leave npz_dir out, and "
            "the files are beside the pictures."
        )
    return npz_dir / stem.relative_to(folder)


# ---- reading -------------------------------------------------------------------------------------------------------


def find(wish: Wish) -> Found:
    """Return what there is for a picture: today's file, else an older one.

    Raises:
        Unfit: there is none, or none that fits.
    """
    reasons = []
    for file in (*wish.files("today"), wish.files("2022")[0]):
        try:
            return _read(file, wish)
        except FileNotFoundError:
            continue
        except Unfit as error:
            reasons.append(f"{file.name}: {error}")
    raise Unfit("; ".join(reasons) or "no file")


def check(file: Path, wish: Wish) -> None:
    """Check that one file holds what is wanted of it.

    Raises:
        Unfit: it does not. FileNotFoundError: it is not there.
    """
    if file in wish.files("today"):
        _read(file, wish)
    else:
        _values(_arrays(file), "arr_0", wish)


def _read(file: Path, wish: Wish) -> Found:
    _check_crop(wish.crop)
    arrays = _arrays(file)
    if "arr_0" in arrays:
        mirrored = None
        if wish.has_mirrored:
            try:
                mirrored = _values(_arrays(wish.files("2022")[1]), "arr_0", wish)
            except FileNotFoundError:
                raise Unfit("the mirror image's file is missing") from None
        return Found(_values(arrays, "arr_0", wish), mirrored, False)
    latents = _values(arrays, "latents", wish)
    mirrored = _values(arrays, "latents_flipped", wish) if wish.has_mirrored else None
    for name, expected in (("original_size", wish.size), ("crop_ltrb", crop_ltrb(wish.crop.shape, wish.size))):
        found = np.asarray(arrays.get(name, ()))
        if found.shape != (len(expected),) or not np.all(np.abs(found - expected) <= (name == "crop_ltrb")):
            raise Unfit(f"{name} is {found.tolist()} instead of {list(expected)}")
    return Found(latents, mirrored, "alpha_mask" in arrays)


def _arrays(file: Path) -> Mapping[str, Any]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            return dict(archive)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file can trip numpy in any way there is
        raise Unfit(f"it is damaged ({error or type(error).__name__})") from error


def _values(arrays: Mapping[str, Any], name: str, wish: Wish) -> Tensor:
    if name not in arrays:
        raise Unfit(f"it holds no {name}, but {', '.join(arrays) or 'nothing'}")
    values = arrays[name]
    if values.shape != wish.latent_shape:
        raise Unfit(f"{name} is of shape {values.shape} instead of {wish.latent_shape}")
    if values.dtype.kind != "f" or not np.isfinite(values).all():
        raise Unfit(f"{name} holds what is no number")
    return torch.from_numpy(values.astype(np.float32))


def _check_crop(crop: CropPlan) -> None:
    """Refuse a crop that sd-scripts would not have cached: all of its are in the middle."""
    left, top = ((whole - part) // 2 for whole, part in zip(crop.resize, crop.shape, strict=True))
    if crop.crop[:2] != (left, top):
        raise Unfit("this run cuts out another part than the middle")


class WithFiles(Mapping[Key, Moments]):
    """Latents of which some are in files: each of these is one frozen draw, so its std is 0.

    Args:
        wishes: what is taken from files, by record index, with the hash that it has.
        latent_scale: what stored latents are multiplied by.
    """

    def __init__(
        self, wishes: Mapping[int, tuple[Wish, str]], latent_scale: float, others: Mapping[Key, Moments]
    ) -> None:
        self._wishes, self._scale, self._others = wishes, latent_scale, others
        self._keys = {(index, False) for index in wishes}
        self._keys |= {(index, True) for index, (wish, _) in wishes.items() if wish.has_mirrored}

    def __getitem__(self, key: Key) -> Moments:
        index, is_mirrored = key
        if index not in self._wishes:
            return self._others[key]
        wish, content_hash = self._wishes[index]
        try:
            found = find(wish)
            if found.content_hash != content_hash:
                raise Unfit("it holds other values than at the start")
        except Unfit as error:
            raise UserError(
                f"the .npz file of {wish.stem} has changed during the run ({error}); leave these files alone while "
                "training and start the run again."
            ) from error
        values = found.mirrored if is_mirrored else found.latents
        assert values is not None
        return values * self._scale, torch.zeros_like(values)

    def __contains__(self, key: object) -> bool:
        return key in self._others or key in self._keys

    def __iter__(self) -> Iterator[Key]:
        yield from self._others
        yield from self._keys

    def __len__(self) -> int:
        return len(self._others) + len(self._keys)


# ---- writing -------------------------------------------------------------------------------------------------------


def write_today(file: Path, wish: Wish, latents: Tensor, mirrored: Tensor | None) -> None:
    """Write a picture's file as sd-scripts does today, whole or not at all; latents are unscaled.

    Raises:
        UserError: the disk is full.
    """
    flipped = {} if mirrored is None else {"latents_flipped": mirrored.numpy()}
    where = crop_ltrb(wish.crop.shape, wish.size)
    _write(file, {"latents": latents.numpy(), "original_size": wish.size, "crop_ltrb": where, **flipped})


def write_2022(file: Path, latents: Tensor) -> None:
    """Write one of a picture's files as sd-scripts did in 2022, whole or not at all; latents are unscaled.

    Raises:
        UserError: the disk is full.
    """
    _write(file, {"arr_0": latents.numpy()})


def _write(file: Path, arrays: Mapping[str, Any]) -> None:
    with atomic_file(file) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)


def crop_ltrb(shape: Size, size: Size) -> tuple[float, float, float, float]:
    """Return left, top, right, bottom as sd-scripts stores them: the whole picture fitted into the shape.

    Not the part that is cut out, which covers the shape.
    """
    if shape[0] * size[1] > shape[1] * size[0]:  # the shape is wider: the heights meet
        width, height = shape[1] * size[0] / size[1], float(shape[1])
    else:
        width, height = float(shape[0]), shape[0] * size[1] / size[0]
    left, top = (shape[0] - width) // 2, (shape[1] - height) // 2
    return left, top, left + width, top + height
