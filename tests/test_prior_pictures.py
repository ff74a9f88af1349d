"""Regularization pictures drawn by the base model: how many, where, and the same after a stop."""

from pathlib import Path

import pytest
from PIL import Image

from lorasmith.data.sources.folder import scan
from lorasmith.prior_pictures import class_words, draw, missing, path_of


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


def drawn(prompt: str, seed: int) -> Image.Image:
    assert prompt == "a dog"
    return Image.new("RGB", (8, 8), (seed % 256, seed // 256 % 256, 7))


def draw_all(folder: Path, wanted: int, *, stop_after: int | None = None) -> None:
    to_draw = missing(folder, "a dog", wanted)
    draw(to_draw, to_draw.numbers[:stop_after], drawn, seed=5)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_stopped_start_comes_to_the_same_pictures(tmp_path: Path) -> None:
    draw_all(tmp_path / "straight", 5)
    draw_all(tmp_path / "stopped", 5, stop_after=2)
    assert len(missing(tmp_path / "stopped", "a dog", 5).numbers) == 3
    draw_all(tmp_path / "stopped", 5)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "straight")
    assert len({value for name, value in contents(tmp_path / "straight").items() if name.endswith(".png")}) == 5
    assert missing(tmp_path / "straight", "a dog", 5).numbers == []
    draw_all(tmp_path / "straight", 7)
    assert len(scan(tmp_path / "straight", is_prior=True).records) == 7


def test_pictures_of_the_user_count_and_are_left_alone(tmp_path: Path) -> None:
    mine = picture(tmp_path / "direct" / "mine.png")
    mine.with_suffix(".txt").write_text("my dog")
    before = contents(tmp_path / "direct")
    draw_all(tmp_path / "direct", 3)
    assert contents(tmp_path / "direct").items() >= before.items()
    records = scan(tmp_path / "direct", is_prior=True).records
    assert sorted(record.caption for record in records) == ["a dog", "a dog", "my dog"]
    picture(tmp_path / "parent" / "3_dog" / "mine.png")
    draw_all(tmp_path / "parent", 3)
    assert {record.group for record in scan(tmp_path / "parent", is_prior=True).records} == {"3_dog", "1_a dog"}
    assert len(scan(tmp_path / "parent", is_prior=True).records) == 3


def test_a_number_in_use_is_not_drawn_over(tmp_path: Path) -> None:
    draw_all(tmp_path, 3)
    folder = missing(tmp_path, "a dog", 4).folder
    path_of(folder, 2).unlink()
    assert missing(tmp_path, "a dog", 4).numbers == [2, 4]


@pytest.mark.parametrize(
    "prompt, name",
    [("a dog", "1_a dog"), ('a/b: "c"?', "1_a b c"), ("...", "1_drawn"), ("x" * 200, "1_" + "x" * 80)],
)
def test_any_prompt_makes_a_folder_that_training_reads(tmp_path: Path, prompt: str, name: str) -> None:
    to_draw = missing(tmp_path, prompt, 1)
    assert to_draw.folder.name == name
    draw(to_draw, to_draw.numbers, lambda prompt, seed: Image.new("RGB", (8, 8)), seed=0)
    (record,) = scan(tmp_path, is_prior=True).records
    assert record.caption == prompt


def test_the_class_is_what_stands_behind_the_identifier(tmp_path: Path) -> None:
    picture(tmp_path / "20_sks dog" / "a.png")
    picture(tmp_path / "5_sks dog" / "b.png")
    assert class_words(tmp_path) == ["dog"]
    picture(tmp_path / "5_zwx black cat" / "b.png")
    assert sorted(class_words(tmp_path)) == ["black cat", "dog"]
    picture(tmp_path / "plain" / "a.png")
    assert class_words(tmp_path / "plain") == []
