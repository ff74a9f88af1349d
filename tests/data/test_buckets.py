"""Buckets: sd-scripts' counts and rules, the better rule against all there are, bounds that hold for any picture."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lorasmith.data.buckets import Buckets, assign, bucket_crop, bucket_crops, bucket_shapes, cover_and_crop
from lorasmith.data.records import ImageRecord
from lorasmith.errors import UserError

Size = tuple[int, int]

sides = st.integers(1, 5000)
sizes = st.tuples(sides, sides)


@st.composite
def all_buckets(draw: st.DrawFn) -> Buckets:
    """Buckets of any resolution, limits and step that fit together, by either rule."""
    step = 8 * draw(st.integers(1, 12))
    low, high = sorted((draw(st.integers(step, 1200)), draw(st.integers(step, 1200))))
    smallest, largest = -(-low // step) * step, high // step * step
    assume(smallest <= largest)
    resolution = draw(st.tuples(*[st.integers(smallest, largest)] * 2))
    return Buckets(resolution, low, high, step, draw(st.booleans()), draw(st.booleans()))


@pytest.mark.parametrize(
    "resolution, count", [((512, 512), 17), ((448, 640), 17), ((768, 768), 19), ((1024, 1024), 25)]
)
def test_as_many_as_sd_scripts(resolution: tuple[int, int], count: int) -> None:
    assert len(bucket_shapes(resolution, 256, 1024, 64)) == count


def test_the_shapes_for_512() -> None:
    wide = [(576, 448), (640, 384), (704, 320), (768, 320), (832, 256), (896, 256), (960, 256), (1024, 256)]
    assert list(bucket_shapes((512, 512), 256, 1024, 64)) == sorted([*wide, *((h, w) for w, h in wide), (512, 512)])


@given(
    st.tuples(st.integers(8, 200), st.integers(8, 200)), st.integers(64, 900), st.integers(64, 2000), st.integers(1, 16)
)
def test_shapes_stay_within_area_and_limits(
    eighths: tuple[int, int], min_side: int, max_side: int, step_eighths: int
) -> None:
    resolution, step = (eighths[0] * 8, eighths[1] * 8), step_eighths * 8
    try:
        shapes = bucket_shapes(resolution, min_side, max_side, step)
    except UserError:
        # refused only when a side of the resolution lies outside the limits moved inwards
        assert min(resolution) < min_side + step or max(resolution) > max_side - step
        return
    assert list(shapes) == sorted(set(shapes))
    for width, height in shapes:
        assert min_side <= width <= max_side and min_side <= height <= max_side
        assert width % step == 0 and height % step == 0
        assert width * height <= resolution[0] * resolution[1]
        assert (height, width) in shapes


@pytest.mark.parametrize("resolution", [(192, 512), (512, 1088)])
def test_a_resolution_outside_the_limits_is_refused(resolution: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"bucket_min = 256, bucket_max = 1024"):
        bucket_shapes(resolution, 256, 1024, 64)


@given(sizes)
def test_assigned_as_sd_scripts_does(size: tuple[int, int]) -> None:
    shapes = bucket_shapes((512, 512), 256, 1024, 64)
    ratios = np.array([w / h for w, h in shapes])
    expected = size if size in shapes else shapes[np.abs(ratios - size[0] / size[1]).argmin()]
    assert assign(size, shapes) == expected


def test_its_own_size_comes_before_another_of_the_same_ratio() -> None:
    assert assign((128, 64), [(64, 32), (128, 64)]) == (128, 64)
    assert assign((192, 96), [(64, 32), (128, 64)]) == (64, 32)


def test_a_picture_of_a_buckets_size_stays_as_it_is() -> None:
    shapes = bucket_shapes((512, 512), 256, 1024, 64)
    assert (768, 320) in shapes and (640, 384) in shapes
    assert all(assign(shape, shapes) == shape and cover_and_crop(shape, shape).resize == shape for shape in shapes)


@given(sizes, st.tuples(st.integers(8, 1024), st.integers(8, 1024)))
def test_the_resized_picture_just_covers_the_shape(size: tuple[int, int], shape: tuple[int, int]) -> None:
    plan = cover_and_crop(size, shape)
    left, top, right, bottom = plan.crop
    assert plan.shape == shape
    assert min(left, top) >= 0 and right <= plan.resize[0] and bottom <= plan.resize[1]
    assert plan.resize[0] == shape[0] or plan.resize[1] == shape[1]
    scale = max(shape[0] / size[0], shape[1] / size[1])
    assert abs(plan.resize[0] - size[0] * scale) <= 0.5 + 1e-6 and abs(plan.resize[1] - size[1] * scale) <= 0.5 + 1e-6
    assert abs(left - (plan.resize[0] - right)) <= 1 and abs(top - (plan.resize[1] - bottom)) <= 1
    kept = shape[0] * shape[1] / (plan.resize[0] * plan.resize[1])
    assert plan.lost_area == pytest.approx(1 - kept) and 0 <= plan.lost_area < 1


# ---- what holds for every picture, by either rule ------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(sizes, all_buckets())
def test_every_picture_gets_one_shape_within_area_limits_and_step(size: Size, buckets: Buckets) -> None:
    size = (max(size[0], buckets.step), max(size[1], buckets.step)) if buckets.no_upscale else size
    plan = bucket_crop(size, buckets)
    width, height = plan.shape
    assert width % buckets.step == height % buckets.step == 0 and min(width, height) >= buckets.step
    assert width * height <= buckets.resolution[0] * buckets.resolution[1]
    if not buckets.no_upscale:
        assert buckets.min_side <= min(width, height) and max(width, height) <= buckets.max_side
    left, top, right, bottom = plan.crop
    assert min(left, top) >= 0 and right <= plan.resize[0] and bottom <= plan.resize[1]
    assert plan.lost_area == pytest.approx(1 - width * height / (plan.resize[0] * plan.resize[1]))
    assert bucket_crop(size, buckets) == plan


@settings(max_examples=200, deadline=None)
@given(sizes, all_buckets())
def test_the_whole_picture_is_resized_alike_in_both_directions(size: Size, buckets: Buckets) -> None:
    size = (max(size[0], buckets.step), max(size[1], buckets.step)) if buckets.no_upscale else size
    resize = bucket_crop(size, buckets).resize
    across, down = resize[0] / size[0], resize[1] / size[1]
    assert min(abs(size[0] * down - resize[0]), abs(size[1] * across - resize[1])) <= 1


@settings(max_examples=200, deadline=None)
@given(sizes, all_buckets())
def test_without_upscaling_nothing_is_ever_enlarged(size: Size, buckets: Buckets) -> None:
    buckets = Buckets(buckets.resolution, step=buckets.step, is_sd_scripts=buckets.is_sd_scripts, no_upscale=True)
    size = (max(size[0], buckets.step), max(size[1], buckets.step))
    plan = bucket_crop(size, buckets)
    assert plan.resize[0] <= size[0] and plan.resize[1] <= size[1]
    assert plan.shape[0] <= size[0] and plan.shape[1] <= size[1]


def test_pictures_that_fit_no_shape_unless_enlarged_are_refused_by_name() -> None:
    records = [ImageRecord(Path(f"{width}.png"), "", (width, 300)) for width in (63, 64, 20)]
    with pytest.raises(
        UserError, match=r"(?s)2 pictures .*bucket_step = 64.*63\.png: 63x300\n +20\.png: 20x300"
    ) as caught:
        bucket_crops(records, Buckets((512, 512), no_upscale=True))
    assert "64.png" not in str(caught.value)
    assert len(bucket_crops(records, Buckets((512, 512)))) == 3


def test_a_step_above_the_resolution_is_refused() -> None:
    with pytest.raises(UserError, match=r"bucket_step = 128 .* 64x64; lower the step"):
        bucket_crops([ImageRecord(Path("a.png"), "", (300, 300))], Buckets((64, 64), step=128, no_upscale=True))


# ---- less-crop -----------------------------------------------------------------------------------------------------


def quality(size: Size, shape: Size) -> Fraction:
    """Square of: share of the picture that is kept, times the root of the area."""
    less, more = sorted((size[0] * shape[1], size[1] * shape[0]))
    return Fraction(less, more) ** 2 * shape[0] * shape[1]


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(64, 2000)] * 2), st.integers(4, 16), st.integers(4, 16), st.booleans())
def test_no_other_shape_would_be_better(size: Size, across: int, down: int, no_upscale: bool) -> None:
    resolution = (across * 64, down * 64)
    buckets = Buckets(resolution, 256, 1024, 64, no_upscale=no_upscale)
    low = 64 if no_upscale else 256
    highs = [side // 64 * 64 if no_upscale else 1024 for side in size]
    allowed = [
        (w, h)
        for w in range(low, min(highs[0], across * down * 64) + 1, 64)
        for h in range(low, min(highs[1], across * down * 64) + 1, 64)
        if w * h <= resolution[0] * resolution[1]
    ]
    chosen = bucket_crop(size, buckets).shape
    assert chosen in allowed
    assert quality(size, chosen) == max(quality(size, shape) for shape in allowed)


@given(sizes)
def test_lying_and_standing_pictures_are_treated_alike(size: Size) -> None:
    lying, standing = (bucket_crop(way, Buckets((512, 512))).shape for way in (size, (size[1], size[0])))
    assert quality(size, lying) == quality((size[1], size[0]), standing)


@pytest.mark.parametrize(("side", "low", "high"), [(512, 256, 1024), (768, 256, 1024), (1024, 512, 2048)])
def test_pictures_prepared_for_sd_scripts_buckets_stay_as_they_are(side: int, low: int, high: int) -> None:
    for shape in bucket_shapes((side, side), low, high, 64):
        assert bucket_crop(shape, Buckets((side, side), low, high)).resize == shape


@pytest.mark.parametrize(("side", "low", "high"), [(512, 256, 1024), (768, 256, 1536), (1024, 512, 2048)])
def test_it_crops_less_than_sd_scripts_at_nearly_its_area(side: int, low: int, high: int) -> None:
    rng = np.random.default_rng(5)
    ratios = 3 ** rng.uniform(-1, 1, 500)
    pictures = [(round(2000 * math.sqrt(ratio)), round(2000 / math.sqrt(ratio))) for ratio in ratios]
    ours, theirs = (
        [bucket_crop(size, Buckets((side, side), low, high, is_sd_scripts=way)) for size in pictures]
        for way in (False, True)
    )
    lost = [np.mean([plan.lost_area for plan in plans]) for plans in (ours, theirs)]
    area = [np.mean([math.prod(plan.shape) for plan in plans]) for plans in (ours, theirs)]
    assert lost[0] < 0.85 * lost[1] and area[0] > 0.975 * area[1]


# ---- sd-scripts ----------------------------------------------------------------------------------------------------


@given(sizes)
def test_its_rule_is_sd_scripts(size: Size) -> None:
    plan = bucket_crop(size, Buckets((512, 512), is_sd_scripts=True))
    assert plan == cover_and_crop(size, assign(size, bucket_shapes((512, 512), 256, 1024, 64)))


def sd_scripts_no_upscale(width: int, height: int, max_area: int, step: int) -> tuple[Size, Size]:
    """The original, `BucketManager.select_bucket` of sd-scripts (Apache-2.0), shortened: (bucket, resized)."""

    def round_to_steps(x: float) -> int:
        x = int(x + 0.5)
        return x - x % step

    aspect_ratio = width / height
    resized_size = (width, height)
    if width * height > max_area:
        resized_width = math.sqrt(max_area * aspect_ratio)
        resized_height = max_area / resized_width
        b_width_rounded = round_to_steps(resized_width)
        b_height_in_wr = round_to_steps(b_width_rounded / aspect_ratio)
        ar_width_rounded = b_width_rounded / b_height_in_wr
        b_height_rounded = round_to_steps(resized_height)
        b_width_in_hr = round_to_steps(b_height_rounded * aspect_ratio)
        ar_height_rounded = b_width_in_hr / b_height_rounded
        if abs(ar_width_rounded - aspect_ratio) < abs(ar_height_rounded - aspect_ratio):
            resized_size = (b_width_rounded, int(b_width_rounded / aspect_ratio + 0.5))
        else:
            resized_size = (int(b_height_rounded * aspect_ratio + 0.5), b_height_rounded)
    return (resized_size[0] - resized_size[0] % step, resized_size[1] - resized_size[1] % step), resized_size


@settings(max_examples=300, deadline=None)
@given(st.tuples(st.integers(64, 5000), st.integers(64, 5000)), st.sampled_from([(512, 512), (448, 640), (1024, 1024)]))
def test_without_upscaling_its_rule_is_sd_scripts_unless_that_breaks_down(size: Size, resolution: Size) -> None:
    plan = bucket_crop(size, Buckets(resolution, is_sd_scripts=True, no_upscale=True))
    try:
        bucket, resized = sd_scripts_no_upscale(*size, resolution[0] * resolution[1], 64)
    except ZeroDivisionError:
        bucket, resized = (0, 0), (0, 0)
    if min(bucket) > 0:
        assert plan.shape == bucket and plan.resize == resized
    else:
        assert min(plan.shape) == 64


def test_a_very_long_picture_has_a_shape_too() -> None:
    for size in ((20000, 100), (100, 20000)):
        assert sorted(bucket_crop(size, Buckets((512, 512), is_sd_scripts=True, no_upscale=True)).shape) == [64, 4096]
