"""Grids: every picture has its place, under its own names, however the axes are laid."""

from itertools import permutations, product

import pytest

from lorasmith.grids import AXES, BASE, Cell, Label, Sides, band_starts, sheets, sides, spans

COUNTS = {"prompt": 2, "seed": 3, "lora": 2, "strength": 2}


def names(counts: dict[str, int]) -> dict[str, list[Label]]:
    return {
        axis: [Label(f"{axis} {number}", f"{axis} {number}") for number in range(count)]
        for axis, count in counts.items()
    }


LAYOUTS = [
    Sides(order[:first], order[first:second], order[second:])
    for order in permutations(AXES)
    for first, second in ((0, 0), (0, 2), (1, 2), (2, 4), (2, 3), (4, 4), (1, 1))
]


def apart(layout: Sides, counts: dict[str, int]) -> set[str]:
    """What may be said of the base model's places: LoRA or strength, where the other side has the base model."""
    home = next(axes for axes in vars(layout).values() if {"lora", "strength"} & set(axes))
    return {f"{axis} {n}" for axis in ("lora", "strength") if axis not in home or counts[axis] == 1 for n in range(2)}


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("counts", [COUNTS, {**COUNTS, "strength": 1}, {**COUNTS, "lora": 1}, dict.fromkeys(AXES, 1)])
def test_every_picture_is_there_under_its_names(counts: dict[str, int], has_base: bool) -> None:
    """In all layouts: headings and title say of a place what its picture is; the only seed needs no name."""
    wanted = {Cell(*one) for one in product(*(range(counts[axis]) for axis in AXES))}
    if has_base:
        wanted |= {Cell(*one, None, None) for one in product(range(counts["prompt"]), range(counts["seed"]))}
    for layout in LAYOUTS:
        seen, others = set(), apart(layout, counts)
        alone = {f"{axis} 0" for axis in ("seed", "strength") if counts[axis] == 1}
        for sheet in sheets(layout, names(counts), has_base=has_base):
            assert len({len(one) for one in sheet.columns}) == len({len(one) for one in sheet.rows}) == 1
            for row, cells in zip(sheet.rows, sheet.cells, strict=True):
                for column, cell in zip(sheet.columns, cells, strict=True):
                    seen.add(cell)
                    said = {label.text for label in (*sheet.title, *row, *column)} - {""} | alone
                    if cell.lora is None:
                        assert BASE.text in said and said & {"lora 0", "lora 1", "strength 0", "strength 1"} <= others
                    else:
                        assert said >= {f"lora {cell.lora}", f"strength {cell.strength}"} and BASE.text not in said
                    assert said >= {f"prompt {cell.prompt}", f"seed {cell.seed}"}
        assert seen == wanted, layout


def test_the_base_model_stands_first_and_once() -> None:
    [sheet] = sheets(sides([], [], []), names(COUNTS), has_base=True)
    assert [[label.text for label in one] for one in sheet.columns] == [
        ["base model", ""],
        ["lora 0", "strength 0"], ["lora 0", "strength 1"], ["lora 1", "strength 0"], ["lora 1", "strength 1"],
    ]  # fmt: skip
    assert [row[0] for row in sheet.cells] == [Cell(p, s, None, None) for p in range(2) for s in range(3)]
    assert band_starts(sheet.columns) == [1, 3] and band_starts(sheet.rows) == [3]
    assert list(spans(sheet.columns, 0)) == [(0, 1), (1, 2), (3, 2)]
    assert list(spans(sheet.columns, 1)) == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1)]


@pytest.mark.parametrize(
    "columns, rows, apart, expected",
    [
        ("", "", "", "lora strength/prompt seed/"),
        ("lora", "strength", "", "lora/strength/prompt seed"),
        ("", "lora", "", "prompt seed strength/lora/"),
        ("seed", "", "", "seed/prompt lora strength/"),
        ("", "", "prompt seed", "lora/strength/prompt seed"),
        ("", "", "strength lora", "seed/prompt/strength lora"),
        ("", "", "lora", "strength/prompt seed/lora"),
        ("strength lora prompt seed", "", "", "strength lora prompt seed//"),
    ],
)
def test_axes_of_which_nothing_is_said(columns: str, rows: str, apart: str, expected: str) -> None:
    found = sides(columns.split(), rows.split(), apart.split())
    assert "/".join(" ".join(side) for side in vars(found).values()) == expected
