"""`lorasmith train --shard-base` over two processes (gloo on the CPU): as with the whole base model in each."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lorasmith.cli import main
from lorasmith.loss_log import read_log
from tests.commands.test_train_processes import (
    STEPS,
    Event,
    command,
    distance,
    learned,
    losses,
    make_pictures,
    run_two,
)
from tests.tiny import write_tiny

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no fork and cannot send signals")
SHARED = [*STEPS, "--shard-base"]
DRAWN = ["--prompts", "sks", "--before-after", "--sample-steps", "2"]
NEAR = 1e-3  # gradients are summed in another order, which Adam's first steps make more of


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("base") / "tiny.safetensors", width=16)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures; the captions are not all alike, and the cases of one change."""
    folder = make_pictures(tmp_path_factory.mktemp("pictures") / "1_sks thing", 5)
    for number in range(5):
        (folder / f"{number}.txt").write_text("sks {red|green|blue}" if number == 3 else f"sks {number % 4}")
    return folder.parent


@pytest.fixture(autouse=True)
def fixed_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


def validation_losses(output: Path) -> list[float]:
    path = output / "logs" / "validation.jsonl"
    return [line["loss"] for line in read_log(path)] if path.exists() else []


def drawn(output: Path) -> list[np.ndarray[Any, Any]]:
    files = sorted(path for path in (output / "samples").rglob("*.png") if path.name != "sheet.png")
    return [np.asarray(Image.open(path)).astype(int) for path in files]


def test_it_trains_and_draws_as_one_process_does(base: Path, pictures: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    options = ["--steps", "2", "--precision", "fp32", "--workers", "0", *DRAWN]
    assert main(command(base, pictures, one, *options, "--batch-size", "2")) == 0
    ended = run_two(command(base, pictures, two, *options, "--shard-base"), tmp_path / "logs")
    assert ended.codes == [0, 0], ended.errors
    assert (ended.outputs[1], ended.errors) == ("", ["", ""])
    assert "each of the 2 processes holds a part of the base model" in ended.outputs[0]
    held = re.search(r"this process holds (\S+) of the (\S+) MiB of U-Net and text encoder", ended.outputs[0])
    assert held is not None
    assert 0.5 <= float(held[1]) / float(held[2]) < 0.6
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert distance(learned(two), learned(one)) < NEAR
    assert len(drawn(two)) == 2  # before and after
    assert max(abs(a - b).max() for a, b in zip(drawn(one), drawn(two), strict=True)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        # a frozen text encoder, which the processes need for different captions, and weights that adapters read
        ["--train", "unet", "--wildcards", "--adapter", "dora", "--product-decay", "0.01", "--clip-skip", "2"],
        ["--gradient-checkpointing", "--max-norm", "0.05", "--no-cache-latents", "--precision", "bf16"],
        ["--regularization", "prior", "--prior-pictures", "3", "--prior-prompt", "thing", "--sample-steps", "2",
         "--diff-output-preservation"],
        ["--validation-split", "0.4", "--ema-decay", "0.9"],
    ],
    ids=["frozen text", "checkpointed", "prior", "validated"],
)  # fmt: skip
def test_it_trains_as_with_the_whole_model_in_each(
    base: Path, pictures: Path, tmp_path: Path, options: list[str]
) -> None:
    ended = {}
    for name, arguments in (("whole", STEPS), ("shared", SHARED)):
        own = [str(tmp_path / name / option) if option == "prior" else option for option in options]
        ended = run_two(command(base, pictures, tmp_path / name / "out", *arguments, *own), tmp_path / f"logs {name}")
        assert ended.codes == [0, 0], ended.errors
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    loss, near = (1e-2, 0.1) if "bf16" in options else (1e-5, NEAR)
    assert losses(shared / "out") == pytest.approx(losses(whole / "out"), rel=loss)
    assert validation_losses(shared / "out") == pytest.approx(validation_losses(whole / "out"), rel=loss)
    assert len(validation_losses(shared / "out")) == 3 * ("--validation-split" in options)
    assert distance(learned(shared / "out"), learned(whole / "out")) < near
    for path in (whole / "prior").rglob("*.png"):
        assert path.read_bytes() == (shared / path.relative_to(whole)).read_bytes()


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bytes(base: Path, pictures: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_two(command(base, pictures, whole, *SHARED), tmp_path / "logs").codes == [0, 0]
    stop = Event(1, step=1, signal_number=signal.SIGINT)
    assert run_two(command(base, pictures, cut, *SHARED), tmp_path / "logs", stop).codes == [130, 130]
    ended = run_two(["train", "--resume", str(cut)], tmp_path / "logs")
    assert ended.codes == [0, 0], ended.errors
    assert "this process holds" in ended.outputs[0]
    assert (cut / "last.safetensors").read_bytes() == (whole / "last.safetensors").read_bytes()
    # whoever goes on may share the base model or not
    again = tmp_path / "again"
    assert run_two(command(base, pictures, again, *SHARED), tmp_path / "logs", stop).codes == [130, 130]
    ended = run_two(["train", "--resume", str(again), "--no-shard-base"], tmp_path / "logs")
    assert ended.codes == [0, 0], ended.errors
    assert "this process holds" not in ended.outputs[0]
    assert distance(learned(again), learned(whole)) < NEAR


def test_one_that_fails_amid_the_models_work_is_not_waited_for(base: Path, pictures: Path, tmp_path: Path) -> None:
    event = Event(1, step=0, error=torch.OutOfMemoryError("no room"), is_amid_work=True)
    ended = run_two(command(base, pictures, tmp_path / "out", *SHARED), tmp_path / "logs", event)
    assert ended.codes == [2, 2], ended.errors
    assert ended.errors[0].startswith("lorasmith: another process of this run has ended")
    assert "process 1 (cpu:0) has too little memory" in ended.errors[1]


@pytest.mark.parametrize(
    ("options", "environment", "line"),
    [
        ([], {"ACCELERATE_USE_FSDP": "true"}, "as accelerate's configuration asks for FSDP"),
        pytest.param(["--no-shard-base"], {"ACCELERATE_USE_FSDP": "true"}, "", marks=pytest.mark.slow),
        pytest.param([], {}, "", marks=pytest.mark.slow),
    ],
)
def test_accelerates_fsdp_is_what_counts_where_the_option_is_left_out(
    base: Path, pictures: Path, tmp_path: Path, options: list[str], environment: dict[str, str], line: str
) -> None:
    arguments = command(base, pictures, tmp_path / "out", "--steps", "1", "--dry-run", *options)
    ended = run_two(arguments, tmp_path / "logs", environment=environment)
    assert ended.codes == [0, 0], ended.errors
    assert ("holds a part of the base model" in ended.outputs[0]) == bool(line)
    assert line in ended.outputs[0].replace("\n             ", " ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--network-module", "lycoris.kohya"], "network_module = lycoris.kohya reads the base model's weights"),
        pytest.param(["--compile", "eager"], "--compile is for models that each", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_done_with_a_part_of_the_model_is_told_once(
    base: Path, pictures: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    ended = run_two(command(base, pictures, tmp_path / "out", *SHARED, *options), tmp_path / "logs")
    assert ended.codes == [2, 2]
    assert ended.errors[0].startswith(f"lorasmith: {message}") and ended.errors[1] == ""


def test_one_process_is_told_that_it_holds_all(
    base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(base, pictures, tmp_path / "out", "--steps", "1", "--dry-run", "--shard-base")) == 0
    assert "shard_base does nothing for one process" in capsys.readouterr().out
