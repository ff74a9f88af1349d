"""Crops around a face whose place stands in the picture's file name: `name_CX_CY_W_H.png`.

The four whole numbers are the middle and the size of the face in pixels of the upright picture, as sd-scripts' face
detection writes them; the crop is sd-scripts' (`crop_target`), for a shape of any bucket.
"""

from dataclasses import dataclass
from pathlib import Path

from lorasmith.data.buckets import CropPlan, Size


@dataclass(frozen=True)
class Face:
    """The middle (x, y) and the size (width, height) of a face, in pixels."""

    middle: tuple[int, int]
    size: Size


@dataclass(frozen=True)
class FaceDraws:
    """What is random in a crop around a face, each in [0, 1): the scale, and two shifts for either axis."""

    scale: float
    across: tuple[float, float]
    down: tuple[float, float]


def face_of(path: Path) -> Face | None:
    """Return the face that a picture's name tells of, if its last four parts between underscores are such numbers."""
    numbers = path.stem.split("_")[1:][-4:]
    if len(numbers) < 4 or not all(number.isascii() and number.isdigit() for number in numbers):
        return None
    x, y, width, height = map(int, numbers)
    return Face((x, y), (width, height)) if width and height else None


def crop_around(
    face: Face,
    size: Size,
    shape: Size,
    portions: tuple[float, float],
    draws: FaceDraws,
    *,
    random_crop: bool = False,
) -> CropPlan:
    """Return how a picture of this size is brought to a shape around its face.

    Args:
        portions: the least and the most that the shape's shorter side measures, in sizes of the face; the picture is
            never enlarged for it beyond what it takes to cover the shape.
        random_crop: shift the crop far instead of hardly.
    """
    face_side, short = max(face.size), min(shape)
    cover = max(shape[0] / size[0], shape[1] / size[1])
    least, most = (max(cover, min(1.0, short / (face_side * portion))) for portion in (portions[1], portions[0]))
    scale = least + draws.scale * (most - least)
    resize = (max(shape[0], int(size[0] * scale + 0.5)), max(shape[1], int(size[1] * scale + 0.5)))
    shakes = portions[0] != portions[1] and face_side > short // 10 and face_side >= 40
    corner = []
    for axis, (first, second) in enumerate((draws.across, draws.down)):
        middle = int(face.middle[axis] * scale + 0.5)
        start = middle - shape[axis] // 2
        if random_crop:
            reach = max(resize[axis] - middle, middle)
            start += int(first * (reach + 1)) + int(second * (reach + 1)) - reach
        elif shakes:
            reach = face_side // 20
            start += int(first * (2 * reach + 1)) - reach
        corner.append(max(0, min(start, resize[axis] - shape[axis])))
    left, top = corner
    lost_area = 1 - (shape[0] * shape[1]) / (resize[0] * resize[1])
    return CropPlan(resize, (left, top, left + shape[0], top + shape[1]), lost_area)
