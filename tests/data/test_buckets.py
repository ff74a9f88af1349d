"""Buckets: sd-scripts' counts and rules, and bounds that hold for any picture."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.data.buckets import assign, bucket_shapes, cover_and_crop
from lorasmith.errors import UserError

sides = st.integers(1, 5000)
sizes = st.tuples(sides, sides)


@pytest.mark.parametrize(
    "resolution, count", [((512, 512), 17), ((448, 640), 17), ((768, 768), 19), ((1024, 1024), 25)]
)
def test_as_many_as_sd_scripts(resolution: tuple[int, int], count: int) -> None:
    assert len(bucket_shapes(resolution, 256, 1024, 64)) == count


def test_the_shapes_for_512() -> None:
    wide = [(576, 448), (640, 384), (704, 320), (768, 320), (832, 256), (896, 256), (960, 256), (1024, 256)]
    assert bucket_shapes((512, 512), 256, 1024, 64) == sorted([*wide, *((h, w) for w, h in wide), (512, 512)])


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
    assert shapes == sorted(set(shapes))
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
