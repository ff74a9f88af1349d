"""Sheets of a grid as pictures: what is pasted where, and what becomes of sheets and names that are too long."""

from dataclasses import replace

import pytest
from PIL import Image, ImageChops, ImageDraw

from lorasmith import grid_sheet, grids
from lorasmith.grids import Cell, Label, Sheet

PAPER = (250, 250, 248)


def a_sheet(columns: int = 3, rows: int = 2, *, title: str = "a title", name: str = "column") -> Sheet:
    names = {
        "prompt": [Label(f"row {number}", "row") for number in range(rows)],
        "lora": [Label(f"{name} {number}", f"LoRA {number + 1}") for number in range(columns)],
        **{axis: [Label("", "")] for axis in ("seed", "strength")},
    }
    [sheet] = grids.sheets(grids.sides([], [], []), names, has_base=False)
    return replace(sheet, title=(Label(title, title),))


def color_of(cell: Cell) -> tuple[int, int, int]:
    return 20 + 10 * (cell.lora or 0), 60 + 10 * cell.prompt, 200


def drawn(sheet: Sheet, cell: tuple[int, int] = (40, 30), size: tuple[int, int] = (40, 30)) -> Image.Image:
    return grid_sheet.draw(sheet, "some facts", cell, lambda one: Image.new("RGB", size, color_of(one)))


def place_of(page: Image.Image, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    other = ImageChops.difference(page, Image.new("RGB", page.size, color))
    box = other.convert("L").point(lambda level: 255 if level == 0 else 0).getbbox()
    assert box is not None
    return box


def test_each_picture_is_whole_in_its_column_and_row() -> None:
    sheet = a_sheet()
    page = drawn(sheet)
    boxes = {one: place_of(page, color_of(one)) for row in sheet.cells for one in row}
    assert {(right - left, bottom - top) for left, top, right, bottom in boxes.values()} == {(40, 30)}
    for (one, box), (other, beside) in ((a, b) for a in boxes.items() for b in boxes.items()):
        assert (box[0] < beside[0]) == ((one.lora or 0) < (other.lora or 0))
        assert (box[1] < beside[1]) == (one.prompt < other.prompt)
    assert max(box[2] for box in boxes.values()) < page.width and max(box[3] for box in boxes.values()) < page.height


def test_pictures_of_another_shape_stand_in_the_middle_of_their_cells() -> None:
    page = drawn(a_sheet(1, 1), (60, 60), (60, 30))
    whole = drawn(a_sheet(1, 1), (60, 60), (60, 60))
    color = color_of(Cell(0, 0, 0, 0))
    left, top, right, bottom = place_of(whole, color)
    assert place_of(page, color) == (left, top + 15, right, bottom - 15)


def test_headings_are_outside_of_the_pictures() -> None:
    """Whatever is written: where the pictures are not, there is paper, letters and lines; in them nothing else."""
    long = a_sheet(name="a_very_long_name_of_a_file_that_goes_on_and_on" * 5, title="many words " * 100)
    page = drawn(long)
    for row in long.cells:
        for one in row:
            left, top, right, bottom = place_of(page, color_of(one))
            assert page.crop((left, top, right, bottom)).getcolors() == [(1200, color_of(one))]
    assert page.height < 3 * drawn(a_sheet()).height
    pen = ImageDraw.Draw(page)
    for row in long.cells:
        for one in row:
            left, top, right, bottom = place_of(page, color_of(one))
            pen.rectangle((left, top, right - 1, bottom - 1), PAPER)
    assert ImageChops.difference(page, Image.new("RGB", page.size, PAPER)).getbbox() is not None


def test_long_names_lose_their_middle_and_keep_both_ends() -> None:
    font = grid_sheet._font(grid_sheet._FONT, 13)
    lines = grid_sheet._lines("robot_of_many_words_" * 20 + "000010", font, 160, 2)
    assert len(lines) <= 2 and all(font.getlength(line) <= 160 for line in lines)
    assert "".join(lines).startswith("robot") and lines[-1].endswith("000010") and "…" in "".join(lines)
    assert grid_sheet._lines("short", font, 160, 2) == ["short"]


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a cät, ж, α", "a cät, ж, α"),
        ("猫", "prompt 2: …"),
        ("a 猫 猫 and a dog", "prompt 2: a … and a dog"),
        ("קטן", "prompt 2: …"),
    ],
)
def test_letters_that_the_font_has_not(text: str, shown: str) -> None:
    assert grid_sheet._shown(Label(text, "prompt 2")) == shown


@pytest.mark.parametrize("columns, rows, cell", [(4, 6, (600, 400)), (3, 40, (150, 150)), (60, 1, (128, 128))])
def test_what_is_too_large_is_made_smaller_or_goes_on_elsewhere(
    columns: int, rows: int, cell: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid_sheet, "MOST_PIXELS", 1_500_000)
    monkeypatch.setattr(grid_sheet, "LONGEST_SIDE", 2000)
    sheet = a_sheet(columns, rows)
    parts = grid_sheet.parts(sheet, "facts", cell)
    for part, size in parts:
        page = drawn(part, size, size)
        assert page.width * page.height <= 1_500_000 and max(page.size) <= 2000
        assert min(size) >= grid_sheet.SMALLEST_CELL * 0.9 and size <= cell
    assert [one for row in sheet.cells for one in row] == sorted(
        (one for part, _ in parts for row in part.cells for one in row), key=lambda one: (one.prompt, one.lora)
    )


def test_one_picture_is_shown_however_large_its_sheet_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_sheet, "MOST_PIXELS", 10)
    assert [part.cells for part, _ in grid_sheet.parts(a_sheet(2, 1), "facts", (64, 64))] == [
        [[Cell(0, 0, 0, 0)]], [[Cell(0, 0, 1, 0)]]
    ]  # fmt: skip


def test_sheets_that_are_not_too_large_are_left_as_they_are() -> None:
    sheet = a_sheet(12, 8)
    assert grid_sheet.parts(sheet, "facts", (512, 768)) == [(sheet, (512, 768))]


@pytest.mark.parametrize(
    "sizes, longest, expected",
    [
        ([(512, 512)], None, (512, 512)),
        ([(512, 768), (640, 512)], None, (640, 768)),
        ([(128, 64)], None, (256, 128)),
        ([(512, 768)], 384, (256, 384)),
        ([(128, 128)], 1000, (256, 256)),
        ([(64, 64)], 96, (64, 64)),
        ([(64, 64), (32, 72)], 150, (128, 144)),
    ],
)
def test_sizes_of_cells(sizes: list[tuple[int, int]], longest: int | None, expected: tuple[int, int]) -> None:
    assert grid_sheet.cell_size(sizes, longest) == expected
