"""Sheets of a grid as pictures: headings over columns and before rows, bands of the outer axes, and a title.

All distances are in units of the letters, and these grow with the pictures, so that a sheet is read as well when it is
shown whole on a screen.
"""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from lorasmith.data.buckets import Size
from lorasmith.grids import Cell, Heading, Label, Sheet, band_starts, spans
from lorasmith.sheets import fitted

LONGEST_SIDE, MOST_PIXELS = 65_500, 100_000_000  # beyond, programs refuse to show a picture
SMALLEST_CELL = 128  # of pictures that are made smaller, the shorter side
_SMALLEST_SHOWN = 160  # narrower pictures are enlarged, by whole factors
_INK, _PAPER, _FAINT, _RULE = (40, 40, 46), (250, 250, 248), (108, 108, 116), (206, 206, 200)
_LETTER, _SMALLEST_LETTER, _LARGEST_LETTER = 1 / 16, 13, 30  # height as a share of a cell's width, and in pixels
_LINE, _MARGIN, _GAP, _BAND_GAP, _HEADING_GAP = 1.3, 1.5, 0.25, 1.0, 0.45
_ROW_HEADING = 12.0  # how wide one may be
_MOST_LINES = 4  # over a column, and of the title
_UNKNOWN = re.compile("\0+( *\0+)*")
_FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")  # Latin, Greek, Cyrillic and signs
_BOLD = _FONT.with_name("DejaVuSans-Bold.ttf")

Font = ImageFont.FreeTypeFont
Color = tuple[int, int, int]
Box = tuple[int, int, int, int]  # left, top, right, bottom


def cell_size(sizes: Sequence[Size], longest: int | None) -> Size:
    """Return the size of cells for pictures of these sizes, whose longer side is at most `longest`.

    Pictures are made larger by whole factors only.
    """
    width, height = max(size[0] for size in sizes), max(size[1] for size in sizes)
    factor: float = max(1, -(-_SMALLEST_SHOWN // width))
    if longest is not None:
        most = longest / max(width, height)
        factor = min(factor, int(most) or most)
    return max(1, round(width * factor)), max(1, round(height * factor))


def parts(sheet: Sheet, facts: str, cell: Size) -> list[tuple[Sheet, Size]]:
    """Return the sheets, with the size of their cells, that show a sheet without one being too large.

    Cells are made smaller as far as is sensible; then rows, and columns, go on in another sheet.
    """
    while _is_too_large(sheet, facts, cell) and min(cell) > SMALLEST_CELL:
        cell = max(1, cell[0] * 9 // 10), max(1, cell[1] * 9 // 10)
    if not _is_too_large(sheet, facts, cell) or len(sheet.rows) == len(sheet.columns) == 1:
        return [(sheet, cell)]
    if len(sheet.rows) > 1:
        middle = (len(sheet.rows) + 1) // 2
        halves = [replace(sheet, rows=sheet.rows[part], cells=sheet.cells[part]) for part in _halves(middle)]
    else:
        middle = (len(sheet.columns) + 1) // 2
        halves = [
            replace(sheet, columns=sheet.columns[part], cells=[row[part] for row in sheet.cells])
            for part in _halves(middle)
        ]
    return [found for half in halves for found in parts(half, facts, cell)]


def draw(sheet: Sheet, facts: str, cell: Size, picture: Callable[[Cell], Image.Image]) -> Image.Image:
    """Return a sheet.

    Args:
        facts: what stands below the title, in small letters.
        cell: size of the pictures on it, in pixels.
        picture: returns a cell's; one is asked for at a time.
    """
    frame = _frame(sheet, facts, cell)
    page = Image.new("RGB", frame.size, _PAPER)
    pen = ImageDraw.Draw(page)
    for text in frame.texts:
        pen.text(text.place, text.line, text.color, text.font, text.anchor)
    for line in frame.rules:
        pen.rectangle(line, _RULE)
    for row, top in zip(sheet.cells, frame.tops, strict=True):
        for one, left in zip(row, frame.lefts, strict=True):
            shown = fitted(picture(one), cell)
            page.paste(shown, (left + (cell[0] - shown.width) // 2, top + (cell[1] - shown.height) // 2))
    return page


# --- where everything is ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Text:
    line: str
    place: tuple[int, int]
    color: Color
    font: Font
    anchor: str


@dataclass(frozen=True)
class _Frame:
    """All of a sheet but its pictures; these begin at `lefts` and `tops`."""

    size: Size
    lefts: Sequence[int]
    tops: Sequence[int]
    texts: Sequence[_Text]
    rules: Sequence[Box]


@dataclass(frozen=True)
class _Scale:
    """Lengths in pixels, from the height of letters."""

    letter: int

    def __call__(self, letters: float) -> int:
        return max(1, round(self.letter * letters))

    def lines(self, count: int) -> int:
        return count * self(_LINE)


def _is_too_large(sheet: Sheet, facts: str, cell: Size) -> bool:
    width, height = _frame(sheet, facts, cell).size
    return max(width, height) > LONGEST_SIDE or width * height > MOST_PIXELS


def _halves(middle: int) -> tuple[slice, slice]:
    return slice(middle), slice(middle, None)


def _frame(sheet: Sheet, facts: str, cell: Size) -> _Frame:
    scale = _Scale(min(max(round(cell[0] * _LETTER), _SMALLEST_LETTER), _LARGEST_LETTER))
    widths = _row_heading_widths(sheet.rows, scale)
    left = scale(_MARGIN) + sum(width + scale(_HEADING_GAP) * 2 for width in widths)
    lefts, right = _places(sheet.columns, left, cell[0], scale)
    width = max(right + scale(_MARGIN), scale(24))

    texts, top = [], scale(_MARGIN)
    for text, font, color in (
        (" · ".join(map(_shown, sheet.title)), _font(_BOLD, scale(1.2)), _INK),
        (facts, _font(_FONT, scale(0.8)), _FAINT),
    ):
        lines = _lines(text, font, width - 2 * scale(_MARGIN), _MOST_LINES) if text else []
        texts += _texts(lines, (scale(_MARGIN), top), color, font)
        top += len(lines) * round(font.size * _LINE) + scale(0.3)
    top += scale(0.6)

    headings, rules, top = _column_headings(sheet.columns, lefts, top, cell[0], scale)
    tops, bottom = _places(sheet.rows, top, cell[1], scale)
    more, more_rules = _row_headings(sheet.rows, tops, widths, cell[1], scale)
    size = width, bottom + scale(_MARGIN)
    return _Frame(size, lefts, tops, [*texts, *headings, *more], [*rules, *more_rules])


def _places(headings: Sequence[Heading], begin: int, length: int, scale: _Scale) -> tuple[list[int], int]:
    """Return where each column or row begins, and where the last one ends; bands stand apart."""
    places, starts = [begin], band_starts(headings)
    for number in range(1, len(headings)):
        places.append(places[-1] + length + scale(_BAND_GAP if number in starts else _GAP))
    return places, places[-1] + length


def _column_headings(
    headings: Sequence[Heading], lefts: Sequence[int], top: int, length: int, scale: _Scale
) -> tuple[list[_Text], list[Box], int]:
    """Return what stands over the columns, with a line under each band's name, and where the pictures begin."""
    font, texts, rules = _font(_FONT, scale(1)), [], []
    levels = [
        [
            (begin, lefts[begin], lefts[begin + count - 1] + length)
            for begin, count in spans(headings, level)
            if headings[begin][level].text
        ]
        for level in range(len(headings[0]))
    ]
    wrapped = [
        [_lines(_shown(headings[begin][level]), font, right - left, _MOST_LINES) for begin, left, right in bands]
        for level, bands in enumerate(levels)
    ]
    bottoms = []
    for of_level in wrapped:
        top += scale.lines(max(map(len, of_level), default=0)) + scale(_HEADING_GAP)
        bottoms.append(top)
    for level, (bands, of_level) in enumerate(zip(levels, wrapped, strict=True)):
        for (begin, left, right), lines in zip(bands, of_level, strict=True):
            is_band = any(label.text for label in headings[begin][level + 1 :])
            bottom = bottoms[level] if is_band else top
            if is_band:
                rules.append((left, bottom - scale(_HEADING_GAP / 2), right - 1, bottom - scale(_HEADING_GAP / 2)))
            place = (left + right) // 2, bottom - scale(_HEADING_GAP) - scale.lines(len(lines))
            color = _INK if level == 0 else _FAINT
            texts += _texts(lines, place, color, font, is_centered=True)
    return texts, rules, top + scale(_HEADING_GAP / 2)


def _row_heading_widths(headings: Sequence[Heading], scale: _Scale) -> list[int]:
    font, widths = _font(_FONT, scale(1)), []
    for level in range(len(headings[0])):
        texts = {_shown(heading[level]) for heading in headings if any(label.text for label in heading[level + 1 :])}
        ends = {_shown(heading[level]) for heading in headings} - texts
        wanted = max((font.getlength(text) for text in (texts or ends)), default=0)
        widths.append(min(round(wanted) + 1, scale(_ROW_HEADING)))
    return widths


def _row_headings(
    headings: Sequence[Heading], tops: Sequence[int], widths: Sequence[int], length: int, scale: _Scale
) -> tuple[list[_Text], list[Box]]:
    """Return what stands before the rows, in the middle of each, with a line along each band."""
    font, texts, rules = _font(_FONT, scale(1)), [], []
    gap = scale(_HEADING_GAP)
    for level in range(len(widths)):
        left = scale(_MARGIN) + sum(widths[:level]) + 2 * gap * level
        for begin, count in spans(headings, level):
            top, bottom = tops[begin], tops[begin + count - 1] + length
            if not headings[begin][level].text:
                continue
            is_band = any(label.text for label in headings[begin][level + 1 :])
            width = widths[level] if is_band else sum(widths[level:]) + 2 * gap * (len(widths) - 1 - level)
            lines = _lines(_shown(headings[begin][level]), font, width, max(1, (bottom - top) // scale(_LINE)))
            place = left, (top + bottom - scale.lines(len(lines))) // 2
            texts += _texts(lines, place, _INK if level == 0 else _FAINT, font)
            if is_band:
                rules.append((left + width + gap, top, left + width + gap, bottom - 1))
    return texts, rules


# --- letters ----------------------------------------------------------------------------------------------------------


def _texts(
    lines: Sequence[str], place: tuple[int, int], color: Color, font: Font, *, is_centered: bool = False
) -> list[_Text]:
    """Return lines below one another, which begin at `place` or have their middle there."""
    x, y = place
    height, anchor = round(font.size * _LINE), "ma" if is_centered else "la"
    return [_Text(line, (x, y + number * height), color, font, anchor) for number, line in enumerate(lines)]


@cache
def _font(path: Path, size: int) -> Font:
    return ImageFont.truetype(str(path), size)


@cache
def _letters() -> frozenset[int]:
    return frozenset(FT2Font(str(_FONT)).get_charmap())


def _shown(label: Label) -> str:
    """Return a label's text, or what of it can be drawn after its plain name: the font has not the letters of all
    languages, nor are those drawn here that go from right to left.
    """
    known = "".join(
        letter if ord(letter) in _letters() and unicodedata.bidirectional(letter) not in ("R", "AL") else "\0"
        for letter in label.text
    )
    return label.text if known == label.text else f"{label.plain}: {_UNKNOWN.sub('…', known)}"


def _lines(text: str, font: Font, width: int, most: int) -> list[str]:
    """Return a text in lines; of one that would take more than `most`, the middle is left out."""

    def shortened(kept: int) -> list[str]:
        return _wrapped(f"{text[: (kept + 1) // 2].rstrip()}…{text[len(text) - kept // 2 :].lstrip()}", font, width)

    lines = _wrapped(text, font, width)
    if len(lines) > most:
        lines = shortened(bisect_right(range(1, len(text)), most, key=lambda kept: len(shortened(kept))))
    return lines[:most]


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines += [word] if lines[-1] else []
        lines[-1] = word
        while font.getlength(lines[-1]) > width and len(lines[-1]) > 1:
            word = lines[-1]
            fits = max(1, bisect_right(range(1, len(word)), width, key=lambda n, word=word: font.getlength(word[:n])))
            after = max(word.rfind(sign, 0, fits) for sign in "-_.") + 1  # file names have these for spaces
            fits = after if after > fits // 2 else fits
            lines[-1:] = [word[:fits], word[fits:]]
    return lines
