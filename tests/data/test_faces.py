"""Crops around faces: sd-scripts' numbers, and bounds that hold for any face."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.data.faces import Face, FaceDraws, crop_around, face_of

Size = tuple[int, int]

share = st.floats(0, 1, exclude_max=True)
draws = st.builds(FaceDraws, share, st.tuples(share, share), st.tuples(share, share))
pair = st.tuples(st.integers(1, 3000), st.integers(1, 3000))
faces = st.builds(Face, pair, pair)
portions = st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)).map(lambda two: (min(two), max(two)))
shapes = st.tuples(st.integers(8, 128), st.integers(8, 128)).map(lambda eighths: (eighths[0] * 8, eighths[1] * 8))


@pytest.mark.parametrize(
    ("name", "face"),
    [
        ("girl_300_200_64_80.png", Face((300, 200), (64, 80))),
        ("a_b_c_1_2_3_4.jpg", Face((1, 2), (3, 4))),
        ("300_200_64_80.png", None),  # a name comes first
        ("girl_300_200_64.png", None),
        ("girl_300_200_64_x.png", None),
        ("girl_300_200_0_80.png", None),
        ("girl_300_200_-4_80.png", None),
        ("girl_٣_200_64_80.png", None),
        ("girl.png", None),
    ],
)
def test_a_face_is_read_from_the_last_four_numbers_of_a_name(name: str, face: Face | None) -> None:
    assert face_of(Path("somewhere_1_2_3_4") / name) == face


@settings(max_examples=300, deadline=None)
@given(faces, pair, shapes, portions, draws, st.booleans())
def test_the_crop_lies_in_the_picture_which_is_not_enlarged_needlessly(
    face: Face, size: Size, shape: Size, wanted: tuple[float, float], drawn: FaceDraws, random_crop: bool
) -> None:
    plan = crop_around(face, size, shape, wanted, drawn, random_crop=random_crop)
    left, top, right, bottom = plan.crop
    assert plan.shape == shape and min(left, top) >= 0
    assert right <= plan.resize[0] and bottom <= plan.resize[1]
    cover = max(shape[0] / size[0], shape[1] / size[1])
    for axis in (0, 1):
        assert plan.resize[axis] <= max(size[axis] * max(1.0, cover) + 0.5, shape[axis])
    assert plan.lost_area == pytest.approx(1 - shape[0] * shape[1] / (plan.resize[0] * plan.resize[1]))


@given(st.tuples(st.integers(400, 600), st.integers(400, 600)), st.integers(40, 90), portions, draws)
def test_the_face_is_in_the_middle_and_of_the_size_that_is_wanted(
    middle: Size, side: int, wanted: tuple[float, float], drawn: FaceDraws
) -> None:
    wanted = (max(wanted[0], 2.0), max(wanted[1], 2.0))
    size, shape = (1000, 1000), (64, 128)
    plan = crop_around(Face(middle, (side, side // 2)), size, shape, wanted, drawn)
    scale = plan.resize[0] / size[0]
    is_at_limit = plan.resize == (1000, 1000) or plan.resize[1] == 128
    assert is_at_limit or wanted[0] * 0.97 <= 64 / (side * scale) <= wanted[1] * 1.03
    for axis in (0, 1):
        shift = abs(plan.crop[axis] + shape[axis] / 2 - middle[axis] * scale)
        is_at_edge = plan.crop[axis] in (0, plan.resize[axis] - shape[axis])
        assert is_at_edge or shift <= 1.5 + side / 20


def sd_scripts(
    face: Face, size: Size, shape: Size, wanted: tuple[float, float], random_crop: bool, rng: random.Random
) -> tuple[Size, Size]:
    """The original, `crop_target` of sd-scripts (Apache-2.0), without the pixels: (resized, corner)."""
    image_size, target = (size[1], size[0]), (shape[1], shape[0])  # (height, width) there
    face_size, short = max(face.size), min(target)
    min_scale = max(target[0] / image_size[0], target[1] / image_size[1])
    min_scale = min(1.0, max(min_scale, short / (face_size * wanted[1])))
    max_scale = min(1.0, max(min_scale, short / (face_size * wanted[0])))
    scale = min_scale if min_scale >= max_scale else rng.uniform(min_scale, max_scale)
    resized = (int(image_size[0] * scale + 0.5), int(image_size[1] * scale + 0.5))
    face_point = (int(face.middle[1] * scale + 0.5), int(face.middle[0] * scale + 0.5))
    corner = []
    for target_size, length, face_p in zip(target, resized, face_point, strict=True):
        p1 = face_p - target_size // 2
        if random_crop:
            reach = max(length - face_p, face_p)
            p1 = p1 + (rng.randint(0, reach) + rng.randint(0, reach)) - reach
        elif wanted[0] != wanted[1] and face_size > short // 10 and face_size >= 40:
            p1 = p1 + rng.randint(-face_size // 20, +face_size // 20)
        corner.append(max(0, min(p1, length - target_size)))
    return (resized[1], resized[0]), (corner[1], corner[0])


@given(
    st.tuples(st.integers(1, 1999), st.integers(1, 1999)),
    st.tuples(st.integers(1, 900), st.integers(1, 900)),
    st.floats(0.2, 9),
    draws,
)
def test_a_single_portion_gives_sd_scripts_crop(middle: Size, side: Size, portion: float, drawn: FaceDraws) -> None:
    """With one portion nothing is random, so that the two must agree to the pixel."""
    face, size, shape = Face(middle, side), (2000, 2000), (448, 640)
    plan = crop_around(face, size, shape, (portion, portion), drawn)
    assert (plan.resize, plan.crop[:2]) == sd_scripts(face, size, shape, (portion, portion), False, random.Random(0))


@pytest.mark.parametrize("random_crop", [False, True])
def test_what_is_random_is_spread_as_in_sd_scripts(random_crop: bool) -> None:
    face, size, shape, rng = Face((900, 700), (200, 160)), (2000, 1600), (448, 640), random.Random(4)

    def drawn() -> FaceDraws:
        return FaceDraws(rng.random(), (rng.random(), rng.random()), (rng.random(), rng.random()))

    ours = [crop_around(face, size, shape, (2.0, 4.0), drawn(), random_crop=random_crop) for _ in range(4000)]
    theirs = [sd_scripts(face, size, shape, (2.0, 4.0), random_crop, rng) for _ in range(4000)]
    for found, expected in (
        ([plan.resize[0] for plan in ours], [resized[0] for resized, _ in theirs]),
        ([plan.crop[0] for plan in ours], [corner[0] for _, corner in theirs]),
        ([plan.crop[1] for plan in ours], [corner[1] for _, corner in theirs]),
    ):
        for part in (0.02, 0.25, 0.5, 0.75, 0.98):
            one, other = (sorted(values)[int(part * 4000)] for values in (found, expected))
            assert abs(one - other) <= 0.06 * (max(expected) - min(expected)) + 1
