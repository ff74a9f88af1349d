"""Sample pictures: a sheet shows what was drawn from the same prompts in the same way, and no abandoned course."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorasmith import samples_folder
from lorasmith.samples_folder import SamplesFolder

SETTINGS = {"size": (8, 8), "guidance": 7.5}


@pytest.fixture(autouse=True)
def sheets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], list[str]]]:
    """The captions and row labels of every sheet that is drawn."""
    drawn: list[tuple[list[str], list[str]]] = []

    def sheet(columns: Any, rows: Any) -> Image.Image:
        assert all(len(pictures) == len(columns) for _, pictures in rows)
        drawn.append((list(columns), [label for label, _ in rows]))
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(samples_folder, "sheet", sheet)
    return drawn


def drawn(prompts: list[str], settings: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"prompt": prompt, **settings} for prompt in prompts]


def pictures(count: int, grey: int = 0) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (grey, number, 0)) for number in range(count)]


def test_moments_of_one_kind_are_on_one_sheet(tmp_path: Path, sheets: list[tuple[list[str], list[str]]]) -> None:
    first = SamplesFolder(tmp_path, drawn(["a", "b"], SETTINGS), done=0)
    for step in (0, 2):
        first.add(step, pictures(2))
    resumed = SamplesFolder(tmp_path, drawn(["a", "b"], SETTINGS), done=2)
    resumed.add(10, pictures(2, grey=9))
    assert sheets[-1] == (["a", "b"], ["before", "step 2", "step 10"])
    assert [picture.getpixel((0, 0)) for picture in resumed.pictures(10)] == [(9, 0, 0), (9, 1, 0)]


def test_more_than_a_hundred_pictures_keep_their_order(tmp_path: Path) -> None:
    prompts = [str(number) for number in range(112)]
    folder = SamplesFolder(tmp_path, drawn(prompts, SETTINGS), done=0)
    folder.add(0, pictures(112))
    assert [picture.getpixel((0, 0)) for picture in folder.pictures(0)] == [(0, number, 0) for number in range(112)]


@pytest.mark.parametrize(
    ("prompts", "settings"),
    [(["a", "c"], SETTINGS), (["b", "a"], SETTINGS), (["a"], SETTINGS), (["a", "b"], SETTINGS | {"guidance": 1.0})],
)
def test_other_prompts_or_settings_begin_a_new_sheet(
    tmp_path: Path, sheets: list[tuple[list[str], list[str]]], prompts: list[str], settings: dict[str, Any]
) -> None:
    first = SamplesFolder(tmp_path, drawn(["a", "b"], SETTINGS), done=0)
    first.add(0, pictures(2))
    first.add(2, pictures(2))
    other = SamplesFolder(tmp_path, drawn(prompts, settings), done=2)
    assert other.pictures(0) == []
    other.add(2, pictures(len(prompts)))  # the same step again
    other.add(4, pictures(len(prompts)))
    assert sheets[-1] == (prompts, ["step 2", "step 4"])
    assert len(first.pictures(0)) == 2


def test_a_course_that_was_gone_back_on_is_forgotten(tmp_path: Path, sheets: list[tuple[list[str], list[str]]]) -> None:
    first = SamplesFolder(tmp_path, drawn(["a"], SETTINGS), done=0)
    for step in (0, 2, 4):
        first.add(step, pictures(1))
    (tmp_path / "step-mine").mkdir()
    again = SamplesFolder(tmp_path, drawn(["a"], SETTINGS), done=2)
    assert again.pictures(4) == [] and not again.has(4) and again.has(2)
    again.add(6, pictures(1))
    assert sheets[-1] == (["a"], ["before", "step 2", "step 6"]) and (tmp_path / "step-mine").is_dir()


@pytest.mark.parametrize("content", [None, "", '{"prompts": '])
def test_a_moment_that_does_not_say_what_it_was_drawn_from_is_left_out(
    tmp_path: Path, sheets: list[tuple[list[str], list[str]]], content: str | None
) -> None:
    folder = SamplesFolder(tmp_path, drawn(["a"], SETTINGS), done=0)
    folder.add(0, pictures(1))
    told = tmp_path / "step-00000000" / "drawn-from.json"
    told.unlink() if content is None else told.write_text(content)
    assert folder.pictures(0) == [] and folder.has(0) == (content is not None)
    folder.add(2, pictures(1))
    assert sheets[-1] == (["a"], ["step 2"])
