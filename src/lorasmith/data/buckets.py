"""Which shape each picture is trained in: pure integer arithmetic on (width, height) in pixels.

The rules are sd-scripts' (`make_bucket_resolutions`, `BucketManager.select_bucket`), so that a data set lands in the
same buckets here as there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorasmith.errors import UserError

Size = tuple[int, int]


@dataclass(frozen=True)
class CropPlan:
    """How a picture is brought to its shape: resized, then cropped.

    resize: (width, height) of the whole picture after resizing. crop: (left, top, right, bottom) in the resized
    picture. lost_area: share of the picture that the crop cuts away, in [0, 1).
    """

    resize: Size
    crop: tuple[int, int, int, int]
    lost_area: float

    @property
    def shape(self) -> Size:
        """The (width, height) that is trained."""
        left, top, right, bottom = self.crop
        return right - left, bottom - top


def bucket_shapes(resolution: Size, min_side: int, max_side: int, step: int) -> list[Size]:
    """Return the shapes of at most the resolution's area whose sides are multiples of `step`, sorted.

    Limits that are not multiples of `step` are moved inwards to the next ones, so that every side is one.

    Raises:
        UserError: the resolution does not lie within the limits.
    """
    smallest, largest = math.ceil(min_side / step) * step, max_side // step * step
    if min(resolution) < smallest or max(resolution) > largest:
        raise UserError(
            f"the resolution is {_times(resolution)}, but the sides of buckets go from {smallest} to {largest} "
            f"(bucket_min = {min_side}, bucket_max = {max_side}, bucket_step = {step}); both sides of the resolution "
            "must lie within: change the resolution or the limits, or leave buckets off."
        )
    area = resolution[0] * resolution[1]
    square = math.isqrt(area) // step * step
    shapes = {(square, square)}
    for width in range(smallest, largest + 1, step):
        height = min(largest, area // width // step * step)
        if height >= smallest:
            shapes |= {(width, height), (height, width)}
    return sorted(shapes)


def assign(size: Size, shapes: Sequence[Size]) -> Size:
    """Return the shape for a picture: its own size if there is such a shape, else the nearest aspect ratio.

    Ties go to the first in the list. Nearness is |w/h - W/H|, as in sd-scripts.
    """
    if size in shapes:
        return size
    return min(shapes, key=lambda shape: abs(shape[0] / shape[1] - size[0] / size[1]))


def cover_and_crop(size: Size, shape: Size) -> CropPlan:
    """Return how a picture is resized to just cover the shape and cropped in the middle."""
    (width, height), (to_width, to_height) = size, shape
    if width * to_height > height * to_width:  # wider than the shape: the heights meet
        resize = (_rounded(width * to_height, height), to_height)
    else:
        resize = (to_width, _rounded(height * to_width, width))
    left, top = (resize[0] - to_width) // 2, (resize[1] - to_height) // 2
    lost_area = 1 - (to_width * to_height) / (resize[0] * resize[1])
    return CropPlan(resize, (left, top, left + to_width, top + to_height), lost_area)


def _rounded(numerator: int, denominator: int) -> int:
    """Return the quotient rounded to the nearest integer, halves up."""
    return (2 * numerator + denominator) // (2 * denominator)


def _times(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
