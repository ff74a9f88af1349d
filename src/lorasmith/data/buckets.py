"""Which shape each picture is trained in: pure arithmetic on (width, height) in pixels.

Two rules. `less-crop`, the default, weighs what is cropped away against what is trained. `sd-scripts` is the rule of
sd-scripts (`make_bucket_resolutions`, `BucketManager.select_bucket`), so that a data set lands in the same buckets here
as there. docs/pictures.md compares them with numbers from benchmarks/bucket_loss.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from lorasmith.data.records import ImageRecord
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


@dataclass(frozen=True)
class Buckets:
    """How pictures find their shapes, whose sides are multiples of `step` and whose area is at most the resolution's.

    min_side, max_side: limits of the sides, moved inwards to multiples of `step`. is_sd_scripts: which of the rules.
    no_upscale: shapes come from the picture's own size and it is never enlarged; the limits do not count then.
    """

    resolution: Size
    min_side: int = 256
    max_side: int = 1024
    step: int = 64
    is_sd_scripts: bool = False
    no_upscale: bool = False


def bucket_crops(records: Sequence[ImageRecord], buckets: Buckets) -> list[CropPlan]:
    """Return how each record's picture is brought to its bucket's shape.

    Raises:
        UserError: the resolution does not lie within the limits; pictures that must not be enlarged are smaller than
            any shape.
    """
    if math.prod(buckets.resolution) < buckets.step**2:
        raise UserError(
            f"no bucket with sides of bucket_step = {buckets.step} is within the area of the resolution, "
            f"{_times(buckets.resolution)}; lower the step or raise the resolution."
        )
    too_small = [record for record in records if min(record.size) < buckets.step]
    if buckets.no_upscale and too_small:
        listed = "".join(f"\n  {record.path}: {_times(record.size)}" for record in too_small)
        raise UserError(
            f"{len(too_small)} pictures have a side below bucket_step = {buckets.step}, the smallest of a bucket, and "
            f"bucket_no_upscale forbids to enlarge them; leave it or them out, or lower the step:{listed}"
        )
    return [bucket_crop(record.size, buckets) for record in records]


@lru_cache(maxsize=4096)  # a memory only: many pictures have the same size
def bucket_crop(size: Size, buckets: Buckets) -> CropPlan:
    """Return how a picture is brought to its bucket's shape; without enlarging, no side may be below the step.

    Raises:
        UserError: the resolution does not lie within the limits.
    """
    step, area = buckets.step, buckets.resolution[0] * buckets.resolution[1]
    if buckets.no_upscale:
        assert min(size) >= step
        if buckets.is_sd_scripts:
            return _sd_scripts_no_upscale(size, area, step)
        own = (size[0] // step * step, size[1] // step * step)
        return cover_and_crop(size, _best_shape(size, area, step, smallest=step, largest=own))
    if buckets.is_sd_scripts:
        shapes = bucket_shapes(buckets.resolution, buckets.min_side, buckets.max_side, step)
        return cover_and_crop(size, assign(size, shapes))
    smallest, largest = _limits(buckets.resolution, buckets.min_side, buckets.max_side, step)
    return cover_and_crop(size, _best_shape(size, area, step, smallest=smallest, largest=(largest, largest)))


def _best_shape(size: Size, area: int, step: int, *, smallest: int, largest: Size) -> Size:
    """Return the shape with the most of: share of the picture that is kept, times the root of the shape's area.

    The first factor alone would take small shapes for their good ratios, the second alone would crop much. For a given
    width only the heights next to the picture's ratio can be best: up to there both factors grow, and from there on
    their product falls. Whole numbers are compared, so that every machine chooses alike.
    """
    width, height = size
    best, most, largest_area = (smallest, smallest), -1.0, 0
    for w in range(smallest, largest[0] + 1, step):
        tallest = min(largest[1], area // w // step * step)
        if tallest < smallest:
            break
        fitting = w * height // width // step * step
        for h in (min(max(fitting, smallest), tallest), min(max(fitting + step, smallest), tallest)):
            less, more = sorted((w * height, h * width))
            quality = less * less * w * h / (more * more)
            if (quality, w * h) > (most, largest_area):
                best, most, largest_area = (w, h), quality, w * h
    return best


@lru_cache(maxsize=16)
def bucket_shapes(resolution: Size, min_side: int, max_side: int, step: int) -> tuple[Size, ...]:
    """Return sd-scripts' shapes, sorted: for each width the highest that fits the area, both ways up, and the square.

    Raises:
        UserError: the resolution does not lie within the limits.
    """
    smallest, largest = _limits(resolution, min_side, max_side, step)
    area = resolution[0] * resolution[1]
    square = math.isqrt(area) // step * step
    shapes = {(square, square)}
    for width in range(smallest, largest + 1, step):
        height = min(largest, area // width // step * step)
        if height >= smallest:
            shapes |= {(width, height), (height, width)}
    return tuple(sorted(shapes))


def _limits(resolution: Size, min_side: int, max_side: int, step: int) -> tuple[int, int]:
    smallest, largest = math.ceil(min_side / step) * step, max_side // step * step
    if min(resolution) < smallest or max(resolution) > largest:
        raise UserError(
            f"the resolution is {_times(resolution)}, but the sides of buckets go from {smallest} to {largest} "
            f"(bucket_min = {min_side}, bucket_max = {max_side}, bucket_step = {step}); both sides of the resolution "
            "must lie within: change the resolution or the limits, or leave buckets off."
        )
    return smallest, largest


def assign(size: Size, shapes: Sequence[Size]) -> Size:
    """Return sd-scripts' shape for a picture: its own size if there is such a shape, else the nearest aspect ratio.

    Ties go to the first in the list. Nearness is |w/h - W/H|, as in sd-scripts.
    """
    if size in shapes:
        return size
    return min(shapes, key=lambda shape: abs(shape[0] / shape[1] - size[0] / size[1]))


def _sd_scripts_no_upscale(size: Size, area: int, step: int) -> CropPlan:
    """Return what sd-scripts does without enlarging: large pictures shrink to the area, others stay; then both are cut.

    Where sd-scripts comes to a side of zero, in very long pictures, the side is one step here; and where it exceeds the
    area by a rounded pixel, a side is one step less.
    """
    width, height = size
    if width * height <= area:
        return _cut(size, step, area)
    ratio = width / height
    wide = math.sqrt(area * ratio)
    w, h = _down(wide + 0.5, step), _down(area / wide + 0.5, step)
    by_width, by_height = (w, _down(w / ratio + 0.5, step)), (_down(h * ratio + 0.5, step), h)
    if not all(by_width) and not all(by_height):
        longest = area // step // step * step
        shape = (
            (min(_down(width, step), longest), step) if width > height else (step, min(_down(height, step), longest))
        )
        return cover_and_crop(size, shape)
    error_by_width, error_by_height = (
        abs(shape[0] / shape[1] - ratio) if all(shape) else math.inf for shape in (by_width, by_height)
    )
    if error_by_width < error_by_height:
        return _cut((w, int(w / ratio + 0.5)), step, area)
    return _cut((int(h * ratio + 0.5), h), step, area)


def _cut(resize: Size, step: int, area: int) -> CropPlan:
    """Return the middle of a picture of this size, with sides cut down to multiples of the step."""
    width, height = _down(resize[0], step), _down(resize[1], step)
    while width * height > area:  # by a rounded pixel, where the resolution is no multiple of the step
        width, height = (width - step, height) if width > height else (width, height - step)
    return _middle(resize, (width, height))


def _down(value: float, step: int) -> int:
    return int(value) // step * step


def cover_and_crop(size: Size, shape: Size) -> CropPlan:
    """Return how a picture is resized to just cover the shape and cropped in the middle."""
    (width, height), (to_width, to_height) = size, shape
    if width * to_height > height * to_width:  # wider than the shape: the heights meet
        return _middle((_rounded(width * to_height, height), to_height), shape)
    return _middle((to_width, _rounded(height * to_width, width)), shape)


def _middle(resize: Size, shape: Size) -> CropPlan:
    left, top = (resize[0] - shape[0]) // 2, (resize[1] - shape[1]) // 2
    lost_area = 1 - (shape[0] * shape[1]) / (resize[0] * resize[1])
    return CropPlan(resize, (left, top, left + shape[0], top + shape[1]), lost_area)


def _rounded(numerator: int, denominator: int) -> int:
    """Return the quotient rounded to the nearest integer, halves up."""
    return (2 * numerator + denominator) // (2 * denominator)


def _times(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
