"""Whose a mask is, and whether it fits."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from lorasmith.data.mask_files import Matches, fits, match

PLACE, FOLDER = Path("photos"), Path("masks")
SIDES = st.integers(min_value=1, max_value=3000)


def matched(pictures: list[str], masks: list[str]) -> Matches:
    return match([PLACE / name for name in pictures], PLACE, [FOLDER / name for name in masks], FOLDER)


def test_a_mask_has_its_pictures_name_and_any_extension() -> None:
    found = matched(["a.jpg", "b.c.png", "d.webp"], ["a.png", "b.c.jpg", "b.png", "D.png"])
    assert found.of == {PLACE / "a.jpg": FOLDER / "a.png", PLACE / "b.c.png": FOLDER / "b.c.jpg"}
    assert found.unused == [FOLDER / "b.png", FOLDER / "D.png"] and not found.doubtful


def test_the_folder_of_the_same_name_comes_before_the_masks_outside() -> None:
    found = matched(["1_a x/1.jpg", "2_b y/2.jpg"], ["1_a x/1.png", "1.png", "2.png"])
    assert found.of == {PLACE / "1_a x/1.jpg": FOLDER / "1_a x/1.png", PLACE / "2_b y/2.jpg": FOLDER / "2.png"}
    assert found.unused == [FOLDER / "1.png"]


def test_two_masks_of_a_name_and_a_mask_for_two_folders_are_doubtful() -> None:
    found = matched(["a.jpg", "x/1.jpg", "y/1.jpg"], ["a.png", "a.webp", "1.png"])
    assert found.doubtful == {
        PLACE / "a.jpg": [FOLDER / "a.png", FOLDER / "a.webp"],
        FOLDER / "1.png": [PLACE / "x/1.jpg", PLACE / "y/1.jpg"],
    }
    assert not found.unused


def test_pictures_of_one_folder_and_name_share_a_mask() -> None:
    found = matched(["a.jpg", "a.png"], ["a.png"])
    assert set(found.of.values()) == {FOLDER / "a.png"} and len(found.of) == 2 and not found.doubtful


def test_pictures_that_lie_elsewhere_find_masks_by_their_names() -> None:
    archived = Path("train/00001.png")
    assert match([archived], Path("org/name"), [FOLDER / "00001.png"], FOLDER).of == {archived: FOLDER / "00001.png"}


@given(SIDES, SIDES, st.floats(min_value=0.05, max_value=8))
def test_a_resized_mask_fits_however_its_sides_were_rounded(width: int, height: int, factor: float) -> None:
    for extra in ((0, 0), (1, 0), (0, 1), (1, 1)):
        size = (max(1, int(width * factor) + extra[0]), max(1, int(height * factor) + extra[1]))
        assert fits(size, (width, height)) and fits((width, height), size)


def test_another_aspect_ratio_does_not_fit() -> None:
    for picture, mask in (((640, 480), (480, 640)), ((512, 512), (512, 500)), ((1000, 800), (256, 256))):
        assert not fits(mask, picture) and not fits(picture, mask)
    assert fits((100, 67), (3000, 2000)) and not fits((100, 70), (3000, 2000))
