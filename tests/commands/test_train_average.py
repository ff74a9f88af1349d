"""--ema-decay through the command: the average is saved, drawn and validated, and training goes on without it."""

import contextlib
import io
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lorasmith.cli import main
from lorasmith.training_run import session

from ..tiny import write_tiny

WORDS = ["--no-tensorboard", "--no-progress", "--resolution", "64", "--rank", "2", "--learning-rate", "0.01",
         "--save-precision", "float", "--workers", "0", "--validation-split", "0.3", "--prompts", "sks",
         "--sample-steps", "2", "--steps", "4", "--state-every-steps", "1", "--keep-states", "9"]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("base") / "sd1.safetensors", width=8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        Image.frombytes("RGB", (64, 64), random.Random(number).randbytes(64 * 64 * 3)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"sks thing, number {number}")
    return folder


@pytest.fixture(scope="module", autouse=True)
def fixed_clock() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SOURCE_DATE_EPOCH", "1700000000")
        patched.setattr(session, "write_report", lambda folder, contents: folder)  # takes long, and is not looked at
        yield


@pytest.fixture(scope="module")
def plain(base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory, fixed_clock: None) -> Path:
    return run(base, pictures, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def averaged(base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory, fixed_clock: None) -> Path:
    return run(base, pictures, tmp_path_factory.mktemp("averaged"), "--ema-decay", "0.5")


def run(base: Path, pictures: Path, output: Path, *options: str) -> Path:
    words = ["train", "--base", str(base), "--images", str(pictures), "--output", str(output), *WORDS, *options]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(words) == 0
    return output


def losses(output: Path, name: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "logs" / f"{name}.jsonl").read_text().splitlines()]


def test_the_average_is_saved_drawn_and_validated_but_not_trained_with(plain: Path, averaged: Path) -> None:
    assert losses(plain, "loss") == losses(averaged, "loss")
    assert losses(plain, "validation")[0] == losses(averaged, "validation")[0]
    assert losses(plain, "validation")[1:] != losses(averaged, "validation")[1:]
    pictures_of_end = [(out / "samples" / "step-00000004" / "00.png").read_bytes() for out in (plain, averaged)]
    assert pictures_of_end[0] != pictures_of_end[1]
    states = [load_file(averaged / "states" / f"step-{step:08d}" / "network.safetensors") for step in range(1, 5)]
    saved = load_file(averaged / "last.safetensors")
    for name in (name for name in saved if name.endswith("lora_up.weight")):
        expected = torch.zeros_like(saved[name])  # how this half begins
        for step, state in enumerate(states, start=1):
            decay = min(0.5, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * state[name]
        torch.testing.assert_close(saved[name], expected, rtol=1e-5, atol=1e-9)


def test_an_average_over_no_time_is_the_last_step(base: Path, pictures: Path, plain: Path, tmp_path: Path) -> None:
    averaged = run(base, pictures, tmp_path, "--ema-decay", "0")
    assert (plain / "last.safetensors").read_bytes() == (averaged / "last.safetensors").read_bytes()


def test_a_resumed_run_averages_on(averaged: Path, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(averaged, tmp_path / "cut"))
    (cut / "last.safetensors").unlink()
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["train", "--resume", str(cut / "states" / "step-00000002")]) == 0
    assert (averaged / "last.safetensors").read_bytes() == (cut / "last.safetensors").read_bytes()
    assert losses(averaged, "validation") == losses(cut, "validation")


@pytest.mark.parametrize("value", ["1", "-0.1"])
def test_a_decay_that_cannot_be(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str) -> None:
    assert main(["train", "--base", str(base), "--output", str(tmp_path / "out"), f"--ema-decay={value}"]) == 2
    assert "expected a number at least 0 and below 1" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_decay(averaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(averaged), "--steps", "5", "--ema-decay", "0.7"]) == 2
    assert "training.ema_decay was 0.5, now 0.7" in capsys.readouterr().err
