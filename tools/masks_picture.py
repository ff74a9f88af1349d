"""Draws what masks do, for docs/masks.md: a demo picture, its mask, what is learned, and the mask on the latents.

    python tools/masks_picture.py

writes `docs/masks.png`. The mask is made here, of what differs from the colour in the picture's corner.
"""

import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lorasmith.data.buckets import CropPlan
from lorasmith.data.images import Draws, cut_out
from lorasmith.data.masks import latent_mask
from lorasmith.sheets import sheet, tinted

_ROOT = Path(__file__).resolve().parents[1]
_PICTURES = _ROOT / "src" / "lorasmith" / "demo" / "pictures" / "10_sks robot"
_SIDE, _FACTOR, _DIFFERENT = 320, 8, 90
_COLUMNS = ["picture", "mask: white is learned", "red is masked out", "the loss counts, for each latent"]


def mask_of(picture: Image.Image) -> Image.Image:
    """Return white where a picture is not of the colour of its corner."""
    values = np.asarray(picture, dtype=np.int16)
    return Image.fromarray(np.where(np.abs(values - values[2, 2]).sum(axis=2) > _DIFFERENT, 255, 0).astype(np.uint8))


def row(picture: Image.Image, mask: Image.Image, draws: Draws, *, flip: bool, random_crop: bool) -> list[Image.Image]:
    """Return a picture and its mask as they are trained."""
    side = _SIDE * 5 // 4 if random_crop else _SIDE
    crop = CropPlan((side, side), (0, 0, _SIDE, _SIDE), lost_area=1 - _SIDE**2 / side**2)
    shown, own = (
        cut_out(image, crop, draws=draws, flip=flip, random_crop=random_crop, resample=resample)
        for image, resample in ((picture, Image.Resampling.LANCZOS), (mask, Image.Resampling.BOX))
    )
    counts = latent_mask(mask, crop, _FACTOR, draws=draws, flip=flip, random_crop=random_crop)[0]
    grid = Image.fromarray((counts * 255).round().byte().numpy()).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
    return [shown, own, tinted(shown, own), grid]


def main() -> None:
    """Draw and write."""
    mirrored = next(draws for n in range(99) if (draws := Draws.of(random.Random(n))).is_mirrored)
    names = ("robot-03.png", "robot-07.png", "robot-14.png")
    rows = []
    for name, (label, flip, moves) in zip(
        names, (("as it is", False, False), ("mirrored", True, False), ("random crop", False, True)), strict=True
    ):
        with Image.open(_PICTURES / name) as image:
            picture = ImageOps.contain(image.convert("RGB"), (_SIDE, _SIDE))
        rows.append((label, row(picture, mask_of(picture), mirrored, flip=flip, random_crop=moves)))
    sheet(_COLUMNS, rows).save(_ROOT / "docs" / "masks.png", optimize=True)


if __name__ == "__main__":
    main()
