"""`lorasmith grid`: the pictures are those of `lorasmith generate`, each drawn once, and nothing is drawn in vain."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lorasmith import grid_sheet, model_families
from lorasmith.cli import main
from lorasmith.commands import generate
from lorasmith.config import DrawConfig
from lorasmith.formats import kohya
from lorasmith.picture_run import comparing, drawing
from tests.commands.test_generate import is_same, parsed, text_of, write_lora
from tests.tiny import write_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "mini.safetensors", resolution=64)


@pytest.fixture(scope="module")
def loras(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_lora(folder / "robot-10.safetensors", base)
    write_lora(folder / "robot-9.safetensors", base, seed=2)
    write_lora(folder / "more" / "style.safetensors", base, seed=3)
    return folder


@pytest.fixture(scope="module")
def loaded() -> dict[Any, Any]:
    return {}


@pytest.fixture
def draw(base: Path, tmp_path: Path, loaded: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Run a command quickly and return its folder, which is new; the model is loaded once for all."""
    count, load = iter(range(1000)), comparing.load

    def load_once(cfg: DrawConfig, *rest: Any) -> Any:
        if cfg.base not in loaded:
            loaded[cfg.base] = load(cfg, *rest)
        return loaded[cfg.base]

    for command in (comparing, generate):
        monkeypatch.setattr(command, "load", load_once)

    def run(command: str, *arguments: object, output: Path | None = None, code: int = 0) -> Path:
        folder = output or tmp_path / f"out{next(count)}"
        common = ("--base", base, "--output", folder, "--size", 64, "--steps", 1, "--device", "cpu")
        assert main([command, *map(str, (*arguments, *common))]) == code
        return folder

    return run


def cells(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted((folder / "cells").iterdir())}


def test_the_pictures_are_those_of_generate(
    draw: Callable[..., Path], loras: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the byte, with variants and other LoRAs in the prompt; and their files say the same, but for the hashes."""
    prompts = ["a {red|blue|green} cat --n bad", "a dog <lora:style:0.5> --d 30 --w 72"]
    common = ["--images", 2, "--lora-folder", loras / "more", "--negative", "{ugly|worse}"]
    folder = draw("grid", loras, "--prompt", *prompts, "--strengths", 0.5, "--seeds", 7, *common)
    told = capsys.readouterr().out
    assert "2 LoRAs x 1 strength x 2 prompts x 2 seeds + 4 of the base model = 12 pictures" in told
    found = cells(folder)
    for number, name in enumerate(["", "robot-9", "robot-10"]):
        given = ["--lora", loras / f"{name}.safetensors", "--strength", 0.5] if name else []
        theirs = sorted(draw("generate", "--prompt", *prompts, "--seed", 7, *common, *given).iterdir())
        title = f"{name}-0.5" if name else "base"
        ours = [found.pop(f"{row}-{number:02d}-{title}.png") for row in ("01-7", "01-8", "02-30", "02-31")]
        for one, other in zip(ours, theirs, strict=True):
            assert is_same(one, other), one
            facts, their_facts = parsed(text_of(one)), parsed(text_of(other))
            names = [hashed.split(":")[0] for hashed in facts.pop("Lora hashes", "").split(", ")]
            their_facts.pop("Lora hashes", None)
            assert facts == their_facts
            assert names == (re.findall(r"<lora:(.*?):", facts["Prompt"]) or [""])
    assert not found
    assert {Image.open(path).size for path in folder.glob("cells/02-*")} == {(72, 64)}
    [sheet] = folder.glob("sheet*.png")
    assert min(Image.open(sheet).size) > 4 * 64
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert set(re.findall(r'src="(cells/[^"]+)"', page)) == {f"cells/{name}" for name in cells(folder)}


def test_folded_pictures_are_those_of_generate(draw: Callable[..., Path], loras: Path) -> None:
    robot, prompt = loras / "robot-9.safetensors", ["--prompt", "a cat"]
    folder = draw("grid", robot, *prompt, "--strengths", -1, "--fold", "--seeds", 7)
    [theirs] = draw("generate", *prompt, "--lora", robot, "--strength", -1, "--fold", "--seed", 7).iterdir()
    assert is_same(folder / "cells" / "01-7-01-robot-9--1.png", theirs)


def test_sheets_show_the_pictures_that_they_say(draw: Callable[..., Path], loras: Path) -> None:
    """A sheet for each prompt: its pictures are found in it, of the size that is asked for."""
    layout = ["--columns", "lora", "--rows", "strength", "--cell-size", 64]
    folder = draw("grid", loras, "--prompt", "a cat", "a dog", "--strengths", 0.5, 1, *layout)
    assert sorted(path.name for path in folder.glob("*.png")) == ["sheet-1.png", "sheet-2.png"]
    for number in (1, 2):
        sheet = np.asarray(Image.open(folder / f"sheet-{number}.png").convert("RGB"))
        windows = np.lib.stride_tricks.sliding_window_view(sheet[..., 0], (64, 64))
        for path in folder.glob("cells/*.png"):
            picture = np.asarray(Image.open(path).convert("RGB"))
            places = np.argwhere(windows[..., ::9, ::9].__eq__(picture[::9, ::9, 0]).all(axis=(2, 3)))
            is_there = any((sheet[y : y + 64, x : x + 64] == picture).all() for y, x in places)
            assert is_there == path.name.startswith(f"0{number}"), path


def test_a_grid_that_was_stopped_goes_on_with_what_is_there(
    draw: Callable[..., Path], loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = ["grid", loras, "--prompt", "a cat", "--seeds", 1, 2]
    whole = cells(draw(*command))
    real, calls = drawing.draw, []

    def stopping(*args: Any, **settings: Any) -> Any:
        calls.append(settings["seeds"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **settings)

    monkeypatch.setattr(drawing, "draw", stopping)
    place = tmp_path / "grid"
    draw(*command, output=place, code=130)
    assert "\n3 of 6 pictures are drawn" in capsys.readouterr().out
    assert len(cells(place)) == 3 and not (place / "index.html").exists()
    draw(*command, output=place)
    assert "3 of these were drawn before" in capsys.readouterr().out and len(calls) == 4 + 3
    assert {name: path.read_bytes() for name, path in cells(place).items()} == {
        name: path.read_bytes() for name, path in whole.items()
    }
    assert (place / "index.html").exists()

    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    draw(*command, "--rows", "lora", output=place)
    assert len(calls) == 4 + 3, "another layout is no reason to draw"
    draw(*command, "--guidance", 3, output=place)
    assert len(calls) == 4 + 3 + 6
    assert {path.name for path in tmp_path.iterdir()} >= {"grid", "grid-2", "grid-3"}
    assert "this goes into" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_strength_0_is_drawn_once_in_its_place(
    draw: Callable[..., Path], loras: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = draw("grid", loras, "--prompt", "a cat", "--strengths", -1, 0, 1, "--no-show-base")
    assert "2 LoRAs x 2 strengths x 1 prompt x 1 seed + 1 of the base model = 5 pictures" in capsys.readouterr().out
    assert len(cells(folder)) == 5
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert page.count('src="cells/01-1-00-base.png"') == 2 and "strength 0<" in page
    alone = draw("grid", loras / "robot-9.safetensors", "--prompt", "a cat", "--no-show-base")
    assert list(cells(alone)) == ["01-1-01-robot-9-1.png"]
    assert "base model," not in (alone / "index.html").read_text(encoding="utf-8")


def test_what_is_the_same_is_drawn_once(draw: Callable[..., Path], loras: Path) -> None:
    folder = draw("grid", loras / "robot-9.safetensors", "--prompt", "a cat", "{a cat|a cat}")
    assert len(cells(folder)) == 2


def test_a_file_of_prompts_and_a_config_file(draw: Callable[..., Path], loras: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("ein Kätzchen 猫 --s 1 --n bad\na dog --n bad\n", encoding="utf-8")
    values = {"lora": [str(loras / "robot-9.safetensors")], "prompts": str(tmp_path / "prompts.txt"), "seeds": [3, 1]}
    (tmp_path / "grid.toml").write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items()))
    folder = draw("grid", "--config", tmp_path / "grid.toml")
    assert {parsed(text_of(path))["Steps"] for path in folder.glob("cells/01-*")} == {"1"}
    assert [name[:4] for name in cells(folder)] == ["01-1"] * 2 + ["01-3"] * 2 + ["02-1"] * 2 + ["02-3"] * 2
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert ">ein Kätzchen 猫 · steps 1<" in page and ">a dog<" in page and page.index("seed 3<") < page.index("seed 1<")


def test_a_sheet_that_would_be_too_large_is_told(
    draw: Callable[..., Path], loras: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(grid_sheet, "MOST_PIXELS", 100_000)
    folder = draw("grid", loras, "--prompt", "a cat", "a dog")
    told = capsys.readouterr().out
    assert len(list(folder.glob("sheet-*.png"))) > 1 and "what would be too large for one sheet goes over" in told
    assert "whole ones make too large a sheet" in told


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--prompt", "a cat"], "missing: LORA"),
        (["ROBOT"], "missing: --prompt"),
        (["ROBOT", "--prompt", "a cat", "--base", ""], "missing: --base"),
        (["gone.safetensors", "--prompt", "a cat"], "gone.safetensors: there is no such LoRA file"),
        (["SD2", "--prompt", "a cat"], "is a LoRA for SD 2.x, and the model is SD 1.x"),
        (["BASE", "--prompt", "a cat"], "mini.safetensors"),
        (["ROBOT", "OTHER", "--prompt", "a cat"], "have the same name, robot-9"),
        (["ROBOT", "ROBOT", "--prompt", "a cat"], "is given twice"),
        (["ROBOT", "--prompt", "a cat", "a cat --s 20"], "'a cat' is given twice"),
        (["ROBOT", "--prompt", "a cat", "--prompts", "x.txt"], "prompt and prompts both say what to draw"),
        (["ROBOT", "--prompts", "x.md"], r"expected a file that ends in .txt, .toml or .json"),
        (["ROBOT", "--prompt", "a cat", "--strengths", "0.5", "0.5"], "strengths are to be different numbers"),
        (["ROBOT", "--prompt", "a cat", "--strengths", "0", "1"], "strength 0 is the base model, which is drawn"),
        (["ROBOT", "--prompt", "a cat", "--seeds", "1", "1"], "seeds are to be different numbers"),
        (["ROBOT", "--prompt", "a cat", "--seeds", "1", "2", "--images", "2"], "images counts up from one seed"),
        (["ROBOT", "--prompt", "a cat --d 5", "--seeds", "1", "2"], "--d 5 and --seeds both say the seed"),
        (["ROBOT", "--prompt", f"a cat --d {2**63 - 1}", "--images", "2"], "is too large; seeds go up to"),
        (["ROBOT", "--prompt", "a cat", "--rows", "lora", "--columns", "lora"], "lora is named twice"),
        (["ROBOT", "--prompt", "a cat", "--rows", "loras"], "'loras' is no axis of a grid; there are lora, strength"),
        (["ROBOT", "--prompt", "a <lora:robot-9:0.5> cat"], "names robot-9, which the grid puts on itself"),
        (["ROBOT", "--prompt", "a <lora:style> cat"], "<lora:style>: there is no LoRA of that name"),
        (["ROBOT", "--prompt", "a {e$$red|blue} cat"], "stands for 2 pictures; in a grid"),
        (["ROBOT", "--prompt", "a cat --q 1"], "there is no option --q"),
        (["ROBOT", "--prompt", "a cat --w 60"], "--w 60: expected a multiple of 8"),
        (["ROBOT", "--prompt", "a cat", "--sampler", "eular"], "no sampler named 'eular'; did you mean euler"),
        (["ROBOT", "--prompt", "a cat", "--sampler", "ddim", "--sigmas", "karras"], "ddim has no karras sigmas"),
        (["ROBOT", "--prompt", "a cat", "--cell-size", "4"], "expected a whole number at least 32"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(
    arguments: list[str], said: str, base: Path, loras: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def load(*args: object, **options: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(model_families, "load", load)
    monkeypatch.chdir(tmp_path)
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    kohya.write(tmp_path / "other.safetensors", {
        f"{key}.lora_down.weight": torch.ones(4, 1024), f"{key}.lora_up.weight": torch.ones(320, 4),
        f"{key}.alpha": torch.tensor(4.0),
    }, {"ss_v2": "True"})  # fmt: skip
    robot = loras / "robot-9.safetensors"
    (tmp_path / robot.name).write_bytes(robot.read_bytes())
    places = {
        "BASE": str(base),
        "ROBOT": str(robot),
        "OTHER": str(tmp_path / robot.name),
        "SD2": str(tmp_path / "other.safetensors"),
    }
    words = [places.get(word, word) for word in arguments]
    assert main(["grid", *words, *([] if "--base" in words else ["--base", str(base)])]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and "Traceback" not in error and error.count("\n") == 1
    assert not (tmp_path / "grid").exists()
