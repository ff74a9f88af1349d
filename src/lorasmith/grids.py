"""Grids of pictures over four axes, LoRA, strength, prompt and seed: which there are, and where each stands.

Each axis is laid along the columns, the rows or the sheets; where several share a side, the outer one makes bands. The
base model alone, which knows neither LoRA nor strength, is one more value where these are.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, product

AXES = ("prompt", "seed", "lora", "strength")  # from the outer to the inner where they share a side
_OF_LORA = ("lora", "strength")


@dataclass(frozen=True)
class Cell:
    """A picture, by the numbers of its values; lora and strength are None of the base model alone."""

    prompt: int
    seed: int
    lora: int | None
    strength: int | None


@dataclass(frozen=True)
class Label:
    """A name of a value; `plain` is in letters that every font has."""

    text: str
    plain: str


BASE = Label("base model", "base model")
_NOTHING = Label("", "")
Heading = tuple[Label, ...]  # of a column or a row: of its bands, from the outermost, and of itself


@dataclass(frozen=True)
class Sheet:
    """A grid of two sides: `cells` are rows of as many as there are columns. title: of what it is; the only prompt."""

    title: tuple[Label, ...]
    columns: Sequence[Heading]
    rows: Sequence[Heading]
    cells: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Sides:
    """Which axes are laid along what, each once, from the outer to the inner."""

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    sheets: tuple[str, ...]


def sides(columns: Sequence[str], rows: Sequence[str], sheets: Sequence[str]) -> Sides:
    """Return where all axes are, some of which may be said.

    Those that are not go along the side of which nothing is said; where both are said, they make sheets.
    """
    rest = [axis for axis in AXES if axis not in (*columns, *rows, *sheets)]
    if not columns and not rows:
        columns = [axis for axis in rest if axis in _OF_LORA]
        rows = [axis for axis in rest if axis not in _OF_LORA]
        if not columns:
            rows, columns = rows[:-1], rows[-1:]
        elif not rows:
            columns, rows = columns[:-1], columns[-1:]
    elif not columns:
        columns = rest
    elif not rows:
        rows = rest
    else:
        sheets = [*sheets, *rest]
    return Sides(tuple(columns), tuple(rows), tuple(sheets))


def sheets(arranged: Sides, names: Mapping[str, Sequence[Label]], *, has_base: bool) -> list[Sheet]:
    """Return the sheets of a grid.

    Args:
        names: of the values of each axis, at least one.
        has_base: the base model is shown beside the rest.
    """
    keys = {
        side: list(_keys(axes, names, has_base=has_base and axes == _home(arranged)))
        for side, axes in vars(arranged).items()
    }
    shown = {axis for axis in AXES if _is_shown(axis, arranged, names, has_base)}
    common = () if "prompt" in shown else (names["prompt"][0],)

    def heading(axes: Sequence[str], key: Mapping[str, int | None]) -> Heading:
        found = [_label(names[axis], key[axis]) for axis in axes if axis in shown]
        return tuple(label if label != BASE or BASE not in found[:i] else _NOTHING for i, label in enumerate(found))

    return [
        Sheet(
            (*(label for label in heading(arranged.sheets, sheet) if label != _NOTHING), *common),
            [heading(arranged.columns, column) for column in keys["columns"]],
            [heading(arranged.rows, row) for row in keys["rows"]],
            [[_cell(sheet | row | column) for column in keys["columns"]] for row in keys["rows"]],
        )
        for sheet in keys["sheets"]
    ]


def spans(headings: Sequence[Heading], level: int) -> Iterator[tuple[int, int]]:
    """Yield where each band of a level begins and how many columns or rows it goes over."""
    begin = 0
    for _, alike in groupby(heading[: level + 1] for heading in headings):
        length = sum(1 for _ in alike)
        yield begin, length
        begin += length


def band_starts(headings: Sequence[Heading]) -> list[int]:
    """Return which columns or rows begin a band, but for the first; the base model is one of its own."""
    return [
        number
        for number, (before, one) in enumerate(pairwise(headings), 1)
        if before[:-1] != one[:-1] or (BASE in before) != (BASE in one)
    ]


def _home(arranged: Sides) -> tuple[str, ...]:
    """Return the side on which the base model is one more value: where LoRA or strength is, columns before rows."""
    return next(axes for axes in vars(arranged).values() if set(axes) & set(_OF_LORA))


def _keys(
    axes: Sequence[str], names: Mapping[str, Sequence[Label]], *, has_base: bool
) -> Iterator[dict[str, int | None]]:
    values: list[list[int | None]] = [
        [*([None] if has_base and axis in _OF_LORA else []), *range(len(names[axis]))] for axis in axes
    ]
    for one in product(*values):
        key = dict(zip(axes, one, strict=True))
        if len({key[axis] is None for axis in _OF_LORA if axis in key}) < 2:
            yield key


def _is_shown(axis: str, arranged: Sides, names: Mapping[str, Sequence[Label]], has_base: bool) -> bool:
    """Whether an axis has headings: it has several values, or is the one that tells a LoRA from the base model."""
    if axis == "lora" or len(names[axis]) > 1:
        return True
    return axis == "strength" and has_base and axis in _home(arranged) and "lora" not in _home(arranged)


def _label(names: Sequence[Label], number: int | None) -> Label:
    return BASE if number is None else names[number]


def _cell(key: Mapping[str, int | None]) -> Cell:
    prompt, seed, lora, strength = (key[axis] for axis in AXES)
    assert prompt is not None and seed is not None
    return Cell(prompt, seed, *((None, None) if lora is None or strength is None else (lora, strength)))
