"""`lorasmith train --base-loras`: the same as training on a base model that they were merged into."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorasmith.cli import main
from tests.tiny import write_tiny

COMMON = [
    "--resolution", "64", "--no-before-after", "--no-tensorboard", "--no-progress", "--workers", "0",
    "--rank", "2", "--save-precision", "float", "--no-disk-cache", "--precision", "fp32", "--caption", "sks",
    "--learning-rate", "0.01",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, pictures, and two LoRAs for it that were trained a little."""
    folder = tmp_path_factory.mktemp("place")
    write_tiny(folder / "base.safetensors", "sd1", dtype=torch.float32)
    (folder / "pictures").mkdir()
    Image.linear_gradient("L").convert("RGB").save(folder / "pictures" / "a.png")
    for name, seed in (("one", "1"), ("two", "2")):
        assert train(folder, name, "--steps", "2", "--seed", seed) == 0
    return folder


def train(place: Path, name: str, *options: str, base: str = "base.safetensors") -> int:
    given = ["train", "--base", place / base, "--images", place / "pictures", "--output", place / name, *COMMON]
    return main([*map(str, given), *options])


def test_it_is_training_on_the_merged_model(place: Path) -> None:
    loras = [str(place / name / "last.safetensors") for name in ("one", "two")]
    merged = place / "merged.safetensors"
    merge = ["merge", "--model", str(place / "base.safetensors"), "--lora", *loras, "--ratio", "3", "-2"]
    assert main([*merge, "--output", str(merged)]) == 0
    assert train(place, "on-merged", "--steps", "2", base="merged.safetensors") == 0
    folded = ["--base-loras", *loras, "--base-lora-ratios", "3", "-2"]
    assert train(place, "folded", "--steps", "2", *folded) == 0
    assert train(place, "alone", "--steps", "2") == 0
    wanted, found, alone = (load_file(place / name / "last.safetensors") for name in ("on-merged", "folded", "alone"))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert any(not torch.equal(found[name], tensor) for name, tensor in alone.items())
    with safe_open(place / "folded" / "last.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lorasmith.base_loras"]) == [
            ["last.safetensors", 3.0],
            ["last.safetensors", -2.0],
        ]


def test_a_resumed_run_wants_the_same_loras(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lora = tmp_path / "own.safetensors"
    lora.write_bytes((place / "one" / "last.safetensors").read_bytes())
    options = ["--base-loras", str(lora), "--base-lora-ratios", "2"]
    assert train(place, "whole", "--steps", "3", *options) == 0
    assert train(place, "parts", "--steps", "2", *options) == 0
    assert main(["train", "--resume", str(place / "parts"), "--steps", "3"]) == 0
    whole, parts = (load_file(place / name / "last.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    save_file({name: tensor * 2 for name, tensor in load_file(lora).items()}, lora)
    assert main(["train", "--resume", str(place / "parts"), "--steps", "4"]) == 2
    assert "not those that the run was started with" in capsys.readouterr().err


def test_the_plan_says_what_is_folded_in(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = str(place / "one" / "last.safetensors")
    assert train(place, "x", "--dry-run", "--base-loras", lora, "--base-lora-ratios", "0.5") == 0
    assert "with last.safetensors x 0.5 folded in: 264 layers" in " ".join(capsys.readouterr().out.split())


def test_what_does_not_fit_is_told_before_anything_is_loaded(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = str(place / "one" / "last.safetensors")
    assert train(place, "x", "--base-loras", lora, "--base-lora-ratios", "1", "2") == 2
    assert "1 files, but base_lora_ratios has 2 numbers" in capsys.readouterr().err
    assert train(place, "x", "--base-loras", str(place / "base.safetensors")) == 2
    assert "base.safetensors" in capsys.readouterr().err
    write_tiny(place / "sd2.safetensors", "sd2")
    assert train(place, "x", "--base-loras", lora, base="sd2.safetensors") == 2
    assert "last.safetensors" in capsys.readouterr().err
