"""Sheets: the size follows from rows and columns, every picture is there unchanged, in a grid, and in its own shape."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lorasmith.sheets import Entry, contact_sheet, sheet


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    """A picture whose first pixel no other seed's has."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels[0, 0] = seed + 1, 7, 255
    return Image.fromarray(pixels)


def place(page: Image.Image, picture: Image.Image) -> tuple[int, int]:
    """The (left, top) at which the picture stands on the page, pixel for pixel."""
    pixels, wanted = np.asarray(page), np.asarray(picture)
    for top, left in np.argwhere((pixels == wanted[0, 0]).all(axis=2)):
        if np.array_equal(pixels[top : top + picture.height, left : left + picture.width], wanted):
            return int(left), int(top)
    raise AssertionError("the picture is not on the page")


def grid(num_rows: int, num_columns: int, size: tuple[int, int]) -> list[tuple[str, list[Image.Image]]]:
    return [
        (f"step {row}", [noise(size, row * num_columns + column) for column in range(num_columns)])
        for row in range(num_rows)
    ]


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(160, 200), st.integers(20, 200))
def test_every_picture_stands_unchanged_in_its_row_and_column(
    num_rows: int, num_columns: int, width: int, height: int
) -> None:
    rows = grid(num_rows, num_columns, (width, height))
    page = sheet([f"prompt {column}" for column in range(num_columns)], rows)
    places = [[place(page, picture) for picture in pictures] for _, pictures in rows]
    lefts, tops = [left for left, _ in places[0]], [row[0][1] for row in places]
    assert places == [[(left, top) for left in lefts] for top in tops]
    assert all(b - a >= width for a, b in zip(lefts, [*lefts[1:], page.width], strict=True))
    assert all(b - a >= height for a, b in zip(tops, [*tops[1:], page.height], strict=True))


def test_each_row_and_each_column_adds_the_same() -> None:
    def size(num_rows: int, num_columns: int) -> tuple[int, int]:
        return sheet(["a prompt"] * num_columns, grid(num_rows, num_columns, (160, 100))).size

    one, wider, taller, both = size(1, 1), size(1, 2), size(2, 1), size(3, 4)
    step = wider[0] - one[0], taller[1] - one[1]
    assert step[0] >= 160 and step[1] >= 100
    assert (wider[1], taller[0]) == (one[1], one[0])
    assert both == (one[0] + 3 * step[0], one[1] + 2 * step[1])


@pytest.mark.parametrize("size", [(64, 64), (50, 80), (100, 30)])
def test_a_small_picture_is_enlarged_by_a_whole_factor_without_smoothing(size: tuple[int, int]) -> None:
    picture = noise(size, 0)
    factor = -(-160 // size[0])
    enlarged = np.asarray(picture).repeat(factor, axis=0).repeat(factor, axis=1)
    place(sheet(["a prompt"], [("before", [picture])]), Image.fromarray(enlarged))


@pytest.mark.parametrize("size", [(768, 512), (512, 768), (2048, 100)])
def test_a_large_picture_is_made_smaller_in_its_own_shape(size: tuple[int, int]) -> None:
    page = sheet(["a prompt"], [("before", [Image.new("RGB", size, (255, 0, 0))])])
    box = red_box(page)
    assert box[0] == 384
    assert abs(box[1] - 384 * size[1] / size[0]) <= 1


def test_pictures_of_two_shapes_keep_them_on_one_sheet() -> None:
    tall, wide = Image.new("RGB", (200, 320), (255, 0, 0)), Image.new("RGB", (320, 200), (0, 0, 255))
    for pictures in ([tall, wide], [wide, tall]):
        page = sheet(["one", "two"], [("step 1", pictures)])
        assert red_box(page) == tall.size
        place(page, wide)


def test_the_sheet_of_pictures_that_became_larger_shows_the_small_ones_by_whole_factors() -> None:
    small, large = noise((100, 100), 0), noise((350, 350), 1)
    page = sheet(["a prompt"], [("before", [small]), ("step 9", [large])])
    place(page, large)
    place(page, Image.fromarray(np.asarray(small).repeat(3, axis=0).repeat(3, axis=1)))


def test_labels_and_prompts_are_drawn_beside_the_pictures() -> None:
    picture = Image.new("RGB", (160, 160), (255, 0, 0))
    blank = np.asarray(sheet([""], [("", [picture])]))
    for columns, label, is_left in ((["a prompt"], "", False), ([""], "before", True)):
        page = np.asarray(sheet(columns, [(label, [picture])]))
        changed = np.argwhere((page != blank).any(axis=2))
        left, top = place(Image.fromarray(blank), picture)
        assert len(changed)
        assert (changed[:, 1] < left).all() if is_left else (changed[:, 0] < top).all()


def test_a_long_prompt_does_not_run_into_the_pictures() -> None:
    picture = noise((160, 160), 0)
    place(sheet(["a very long prompt " * 30], [("a very long label " * 3, [picture])]), picture)


def red_box(page: Image.Image) -> tuple[int, int]:
    """(width, height) of what is red."""
    ys, xs = np.nonzero((np.asarray(page) == (255, 0, 0)).all(axis=2))
    assert len(ys) == (xs.max() - xs.min() + 1) * (ys.max() - ys.min() + 1)
    return int(xs.max() - xs.min() + 1), int(ys.max() - ys.min() + 1)


@pytest.mark.parametrize("number", [1, 5, 6, 7, 14])
def test_a_contact_sheet_shows_every_picture_unchanged_in_rows_of_six(number: int) -> None:
    pictures = [noise((200, 150), seed) for seed in range(number)]
    page = contact_sheet([Entry(picture, f"{i}.png", "a caption") for i, picture in enumerate(pictures)])
    places = [place(page, picture) for picture in pictures]
    lefts, tops = sorted({left for left, _ in places}), sorted({top for _, top in places})
    assert places == [(lefts[i % 6], tops[i // 6]) for i in range(number)]
    assert page.width >= lefts[-1] + 200 and page.height >= tops[-1] + 200


def num_red(page: Image.Image) -> int:
    """Count the reddish pixels below the picture of a sheet of one."""
    pixels = np.asarray(page)[210:].astype(int)
    return int(((pixels[..., 0] > 150) & (pixels[..., 1] < 90) & (pixels[..., 2] < 90)).sum())


def test_a_note_makes_its_row_higher_and_stands_out() -> None:
    picture = noise((200, 200), 0)
    plain = contact_sheet([Entry(picture, "a.png", "a caption")] * 7)
    noted = contact_sheet(
        [Entry(picture, "a.png", "a caption", ["blurred: sharpness 3"])] + [Entry(picture, "b", "c")] * 6
    )
    assert noted.width == plain.width and noted.height > plain.height
    assert num_red(contact_sheet([Entry(picture, "a", "b", ["a note"])])) > num_red(
        contact_sheet([Entry(picture, "a", "b")])
    )


def test_a_picture_that_cannot_be_shown_has_a_frame_in_its_place() -> None:
    page = contact_sheet([Entry(None, "broken.jpg", "", ["unreadable"]), Entry(noise((200, 200), 1), "b.png", "")])
    left, top = place(page, noise((200, 200), 1))
    frame = page.getpixel((8, top))
    assert frame != page.getpixel((left - 2, top)) == page.getpixel((2, 2))


def test_an_empty_contact_sheet_and_endless_texts() -> None:
    assert min(contact_sheet([]).size) > 0
    endless = Entry(noise((9, 9), 0), "name " * 99, "word " * 999, ["note " * 99])
    assert contact_sheet([endless]).height < 400
