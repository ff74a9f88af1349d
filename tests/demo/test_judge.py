"""The judge against pictures whose content is known, because they are drawn here."""

import random

import draw
import numpy as np
import pytest
from judge import blob
from mascot import POSES, UNSEEN_GROUNDS, draw_mascot
from PIL import Image, ImageCms, ImageFilter

from lorasmith.demo import COLORS, FOLDER, MASCOT, THINGS
from lorasmith.demo.judge import Judge, colors, to_lab


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


def drawings(per_thing: int) -> list[tuple[str, str, str, Image.Image]]:
    """Return (thing, color, ground, picture), drawn from seeds that no training of the judge used."""
    rng = random.Random("a test of the judge")
    labels = [(thing, *rng.sample(list(COLORS), 2)) for thing in THINGS for _ in range(per_thing)]
    return [(thing, color, ground, draw.draw(thing, color, ground, rng)) for thing, color, ground in labels]


def test_it_names_every_thing_that_is_drawn(judge: Judge) -> None:
    drawn = drawings(6)
    answers = judge.things([picture for *_, picture in drawn])
    assert sum(answer == thing for answer, (thing, *_) in zip(answers, drawn, strict=True)) >= 0.97 * len(drawn)


def test_it_knows_the_mascot_in_every_pose_also_where_the_set_does_not_show_it(judge: Judge) -> None:
    rng = random.Random("robots")
    robots = [draw_mascot(ground, pose, rng) for ground in UNSEEN_GROUNDS for pose in POSES]
    assert judge.things(robots) == [MASCOT] * len(robots)
    assert judge.mascot_score([picture for *_, picture in drawings(2)]) < 0.02


@pytest.mark.parametrize("spoil", ["blobs", "halves", "blur"])
def test_it_names_nothing_where_nothing_can_be_named(judge: Judge, spoil: str) -> None:
    rng = random.Random(spoil)
    pictures = [picture for *_, picture in drawings(2)]
    if spoil == "blobs":
        pairs = [rng.sample(list(COLORS), 2) for _ in range(40)]
        spoilt = [blob(color, ground, rng) for color, ground in pairs]
    elif spoil == "blur":
        spoilt = [picture.filter(ImageFilter.GaussianBlur(13)) for picture in pictures]
    else:
        spoilt = [left_and_right(pictures[i], pictures[i - 5]) for i in range(len(pictures))]
    named = sum(answer is not None for answer in judge.things(spoilt))
    assert named <= 0.1 * len(spoilt)


def left_and_right(left: Image.Image, right: Image.Image) -> Image.Image:
    mixed = left.copy()
    half = left.width // 2
    mixed.paste(right.crop((half, 0, right.width, right.height)), (half, 0))
    return mixed


def test_colours_are_measured_as_they_were_drawn() -> None:
    drawn = drawings(6)
    seen = [colors(picture) for *_, picture in drawn]
    assert seen == [(color, ground) for _, color, ground, _ in drawn]


def test_an_empty_ground_has_no_thing_on_it() -> None:
    assert colors(Image.new("RGB", (128, 128), COLORS["green"])) == (None, "green")


def test_lab_is_what_a_colour_management_library_says() -> None:
    rgb = np.array([*COLORS.values(), (0, 0, 0), (255, 255, 255), (3, 9, 5)], dtype=np.uint8)
    transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    library = np.array(ImageCms.applyTransform(Image.fromarray(rgb[None]), transform)).astype(float)[0]
    library[:, 0] *= 100 / 255
    library[:, 1:] = (library[:, 1:] + 128) % 256 - 128  # stored as signed bytes
    # The library's Lab has another white point (D50), which moves colours a little.
    assert np.abs(to_lab(rgb.astype(float)) - library).max() < 12
    assert np.abs(to_lab(rgb.astype(float))[:, 0] - library[:, 0]).max() < 5


def test_the_set_has_a_caption_for_every_picture_and_leaves_backgrounds_out() -> None:
    pictures = sorted((FOLDER / "pictures" / "10_sks robot").glob("*.png"))
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8") for path in pictures]
    assert 12 <= len(pictures) <= 20
    assert not [ground for ground in UNSEEN_GROUNDS if any(ground in caption for caption in captions)]
    for path, caption in zip(pictures, captions, strict=True):
        assert caption == f"a sks robot on a {colors(Image.open(path))[1]} background\n"
