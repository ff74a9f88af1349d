"""Sheets: labelled grids of pictures, one row a moment of training, one column a prompt; and contact sheets."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from lorasmith.data.buckets import CropPlan

_GAP, _LABEL_WIDTH, _FONT_SIZE, _SMALLEST_CELL, _LARGEST_CELL = 8, 92, 13, 160, 384
_INK, _PAPER, _FAINT, _ALERT = (40, 40, 46), (250, 250, 248), (120, 120, 128), (176, 32, 32)
_MASKED_OUT = (214, 24, 24)
_CONTACT, _CONTACTS_PER_ROW = 200, 6


def sheet(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Return one picture with a caption above each column and a label before each row.

    The widest are shown between 160 and 384 pixels wide; small ones are enlarged without smoothing by whole factors.
    Each keeps its own shape.
    """
    cell = _cell_size([picture for _, pictures in rows for picture in pictures])
    font = ImageFont.load_default(size=_FONT_SIZE)
    captions = ["\n".join(textwrap.wrap(text, max(10, cell[0] // 7))[:4]) for text in columns]
    header = _GAP + (_FONT_SIZE + 4) * max((text.count("\n") + 1 for text in captions), default=0)
    size = (_LABEL_WIDTH + len(columns) * (cell[0] + _GAP) + _GAP, header + len(rows) * (cell[1] + _GAP) + _GAP)
    page = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(page)
    for column, text in enumerate(captions):
        draw.text((_LABEL_WIDTH + column * (cell[0] + _GAP), _GAP // 2), text, _INK, font)
    for row, (label, pictures) in enumerate(rows):
        top = header + _GAP + row * (cell[1] + _GAP)
        draw.text((_GAP, top + cell[1] // 2 - _FONT_SIZE), "\n".join(textwrap.wrap(label, 11)), _INK, font)
        for column, picture in enumerate(pictures):
            page.paste(fitted(picture, cell), (_LABEL_WIDTH + column * (cell[0] + _GAP), top))
    return page


def _cell_size(pictures: Sequence[Image.Image]) -> tuple[int, int]:
    width = max((picture.width for picture in pictures), default=_SMALLEST_CELL)
    height = max((picture.height for picture in pictures), default=_SMALLEST_CELL)
    if width < _SMALLEST_CELL:
        factor: float = -(-_SMALLEST_CELL // width)
    else:
        factor = min(1.0, _LARGEST_CELL / width)
    return round(width * factor), round(height * factor)


def fitted(picture: Image.Image, cell: tuple[int, int]) -> Image.Image:
    """Return the picture as large as the cell allows: pictures of a run may differ, a resumed one may change size."""
    factor = min(cell[0] / picture.width, cell[1] / picture.height)
    if factor >= 1:
        size, resample = (picture.width * int(factor), picture.height * int(factor)), Image.Resampling.NEAREST
    else:
        size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
        resample = Image.Resampling.LANCZOS
    return picture.convert("RGB").resize(size, resample)


def crop_view(picture: Image.Image, crop: CropPlan, most: int = _CONTACT) -> Image.Image:
    """Return the whole picture, no side above `most`, with what is cropped away in grey and red."""
    view = picture.convert("RGB")
    view.thumbnail((most, most), Image.Resampling.LANCZOS)
    across, down = view.width / crop.resize[0], view.height / crop.resize[1]
    left, top, right, bottom = crop.crop
    kept = (round(left * across), round(top * down), round(right * across), round(bottom * down))
    away = Image.blend(view.convert("L").convert("RGB"), Image.new("RGB", view.size, _ALERT), 0.4)
    away.paste(view.crop(kept), kept[:2])
    ImageDraw.Draw(away).rectangle((kept[0], kept[1], kept[2] - 1, kept[3] - 1), outline=_PAPER)
    return away


@dataclass(frozen=True)
class Entry:
    """One picture of a contact sheet, with a title, its text in ink and notes in red; None: there is none to show."""

    picture: Image.Image | None
    title: str
    text: str
    notes: Sequence[str] = ()


def contact_sheet(entries: Sequence[Entry]) -> Image.Image:
    """Return pictures in rows of six at most, each with what is said of it below; cells of a row are equally high."""
    font = ImageFont.load_default(size=_FONT_SIZE)
    per_row = max(1, min(_CONTACTS_PER_ROW, len(entries)))
    rows = [entries[begin : begin + per_row] for begin in range(0, len(entries), per_row)]
    lines = [[_lines(entry) for entry in row] for row in rows]
    line_height = _FONT_SIZE + 4
    heights = [_CONTACT + _GAP + line_height * max(map(len, texts)) + _GAP for texts in lines]
    page = Image.new("RGB", (per_row * (_CONTACT + _GAP) + _GAP, sum(heights) + _GAP), _PAPER)
    draw = ImageDraw.Draw(page)
    top = _GAP
    for row, texts, height in zip(rows, lines, heights, strict=True):
        for column, (entry, of_entry) in enumerate(zip(row, texts, strict=True)):
            left = _GAP + column * (_CONTACT + _GAP)
            if entry.picture is None:
                draw.rectangle((left, top, left + _CONTACT - 1, top + _CONTACT - 1), outline=_ALERT)
                draw.line((left, top, left + _CONTACT - 1, top + _CONTACT - 1), fill=_ALERT)
            else:
                page.paste(fitted(entry.picture, (_CONTACT, _CONTACT)), (left, top))
            for number, (line, colour) in enumerate(of_entry):
                draw.text((left, top + _CONTACT + _GAP // 2 + number * line_height), line, colour, font)
        top += height
    return page


def tinted(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """Return a picture, red and without colours where its mask leaves it out; mask: grey, white where it is learned."""
    red = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, _MASKED_OUT), 0.6)
    return Image.composite(picture.convert("RGB"), red, mask.resize(picture.size, Image.Resampling.BOX))


def _lines(entry: Entry) -> list[tuple[str, tuple[int, int, int]]]:
    """Return what stands below a picture: line and colour, three lines of text and two of each note at most."""
    title = [(line, _FAINT) for line in _wrapped(entry.title, 1)]
    text = [(line, _INK) for line in _wrapped(entry.text, 3)]
    return title + text + [(line, _ALERT) for note in entry.notes for line in _wrapped(note, 2)]


def _wrapped(text: str, most: int) -> list[str]:
    return textwrap.wrap(text, _CONTACT // 7, max_lines=most, placeholder="...")
