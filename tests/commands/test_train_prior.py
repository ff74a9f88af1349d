"""`lorasmith train --prior-pictures`: the base model draws its regularization pictures before it is trained."""

import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lorasmith.cli import main

from ..tiny import write_tiny

WORDS = ["--no-before-after", "--no-tensorboard", "--resolution", "64", "--rank", "2", "--steps", "2",
         "--sample-steps", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("base") / "sd1.safetensors", width=8)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures" / "2_sks dog"
    folder.mkdir(parents=True)
    for number in range(2):
        Image.frombytes("RGB", (64, 64), random.Random(number).randbytes(64 * 64 * 3)).save(folder / f"{number}.png")
    return folder.parent


def train(base: Path, pictures: Path, output: Path, *options: object) -> int:
    words = ["train", "--base", base, "--images", pictures, "--output", output, *WORDS, *options]
    return main([str(word) for word in words])


def test_they_are_drawn_first_and_only_once(
    base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--regularization", tmp_path / "prior", "--prior-pictures", 3]
    assert train(base, pictures, tmp_path / "dry", *asked, "--dry-run") == 0
    plan = " ".join(capsys.readouterr().out.split())
    assert 'the base model first draws 3 pictures of "dog" into' in plan and not (tmp_path / "prior").exists()
    assert train(base, pictures, tmp_path / "out", *asked) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "drawing regularization pictures: 3 to do" in printed
    assert "regularization: 3 pictures make 4 samples an epoch" in printed
    drawn = sorted((tmp_path / "prior" / "1_dog").glob("*.png"))
    assert len(drawn) == 3 and Image.open(drawn[0]).size == (64, 64)
    before = {path: path.read_bytes() for path in drawn}
    assert train(base, pictures, tmp_path / "again", *asked) == 0
    assert "drawing regularization" not in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (tmp_path / "prior" / "1_dog").glob("*.png")} == before
    ours, theirs = (load_file(tmp_path / name / "last.safetensors") for name in ("out", "again"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert main(["train", "--resume", str(tmp_path / "again"), "--steps", "3"]) == 0


def test_the_prompt_is_a_choice(base: Path, pictures: Path, tmp_path: Path) -> None:
    asked = ["--regularization", tmp_path / "prior", "--prior-pictures", 1, "--prior-prompt", "a photo of a dog"]
    assert train(base, pictures, tmp_path / "out", *asked) == 0
    folder = tmp_path / "prior" / "1_a photo of a dog"
    assert (folder / "drawn-00001.txt").read_text() == "a photo of a dog\n"


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--prior-pictures", 3], "regularization, that folder, is missing"),
        (["--prior-prompt", "a dog"], "how many are to be drawn"),
        (["--prior-pictures", 3, "--regularization", "FILE"], "is a file, but a folder of pictures is expected"),
        (["--prior-pictures", 0, "--regularization", "NEW"], "expected a whole number above 0"),
    ],
)
def test_mistakes_are_told_before_anything_is_drawn(
    base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[object], expected: str
) -> None:
    (tmp_path / "file").write_text("")
    places: dict[object, Path] = {"FILE": tmp_path / "file", "NEW": tmp_path / "new"}
    assert train(base, pictures, tmp_path / "out", *(places.get(word, word) for word in options)) == 2
    assert expected in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists() and not (tmp_path / "new").exists()


def test_an_unclear_class_is_asked_for(
    base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = pictures / "1_zwx cat"
    other.mkdir()
    Image.new("RGB", (64, 64)).save(other / "cat.png")
    asked = ["--regularization", tmp_path / "prior", "--prior-pictures", 3]
    assert train(base, pictures, tmp_path / "out", *asked) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "name cat, dog" in said and "--prior-prompt" in said
