"""A run that was killed, whatever it trains with, is gone on with to the same bytes: weights, states, logs and all.

Each is killed in truth, with kill -9 in the middle of a step, in a process that is forked from a server that has
imported everything once.
"""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorasmith import plugins, validation
from lorasmith.cli import main
from lorasmith.lr import SCHEDULES
from lorasmith.training import Stepper
from lorasmith.training_run import session
from tests.commands.test_train_options import learned, norm, write_pictures
from tests.tiny import write_tiny

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no fork and cannot send signals")
IMPORTED = [
    "lorasmith.commands.train", "pytorch_optimizer", "transformers.models.clip.modeling_clip",
    "diffusers.models.autoencoders.autoencoder_kl", "diffusers.models.unets.unet_2d_condition",
]  # fmt: skip
COMMON = [
    "--resolution", "64", "--no-before-after", "--no-tensorboard", "--no-progress", "--rank", "2", "--steps", "4",
    "--train", "text_encoder", "--workers", "0", "--state-every-steps", "2", "--save-precision", "float",
]  # fmt: skip
FAST = ["--learning-rate", "0.01"]
FOUND = ["--learning-rate", "1"]  # of those that find their own
HELD_OUT = ["--validation-split", "0.2", "--validate-every-steps", "1", "--keep-best", "2"]
UNEVEN = ["--batch-size", "2", "--gradient-accumulation", "2"]  # the last step of an epoch has one unit, of one picture
DROPOUT = ["--neuron-dropout", "0.2", "--rank-dropout", "0.2", "--module-dropout", "0.4"]
NOISE = [
    "--noise-offset", "0.1", "--noise-offset-random", "--pyramid-noise-levels", "3", "--input-perturbation", "0.1",
    "--input-perturbation-random", "--timestep-density", "logit_normal",
]  # fmt: skip
CAPTIONS = ["--shuffle-caption", "--caption-dropout", "0.3", "--tag-dropout", "0.3", "--token-warmup-steps", "4"]
PICTURES = ["--flip", "--color", "--random-crop"]
LIMITS = ["--product-decay", "0.5", "--max-norm", "0.05"]
CASES = {  # every optimizer and every schedule, and with them all else that a step depends on
    "adamw": [*FAST, "--lr-schedule", "cosine", "--ema-decay", "0.5", *UNEVEN, *HELD_OUT, *DROPOUT],
    "schedule_free_adamw": [*FAST, "--lr-warmup-steps", "1", *HELD_OUT, *DROPOUT, *NOISE],
    "prodigy": [*FOUND, "--lr-schedule", "warmup_stable_decay", *UNEVEN, *LIMITS, *CAPTIONS, "--ema-decay", "0.9"],
    "adafactor": [*FAST, "--lr-schedule", "inverse_sqrt", *PICTURES, *NOISE, "--lora-plus-ratio", "4", *HELD_OUT],
    "lion": [*FAST, "--lr-schedule", "piecewise", "--lr-table", "1:3,0.5", "--ema-decay", "0.9", *CAPTIONS],
    "came": [*FAST, "--lr-schedule", "cosine_restarts", *UNEVEN, *DROPOUT],
    "sgd": [*FAST, "--lr-schedule", "linear", *LIMITS],
    "dadapt_adam": [*FOUND, "--lr-schedule", "polynomial", *DROPOUT],
    "dadapt_adagrad": [*FOUND, "--lr-schedule", "constant", *UNEVEN],
    "dadapt_adan": [*FOUND, "--lr-warmup-steps", "1", "--ema-decay", "0.5"],
    "dadapt_lion": [*FOUND, *HELD_OUT],
    "dadapt_sgd": [*FOUND, *NOISE],
    "schedule_free_radam": ["--optimizer-args", "silent_sgd_phase=False", *DROPOUT],
    "schedule_free_sgd": ["--learning-rate", "1", *UNEVEN],
    "torch.optim.RMSprop": ["--optimizer-args", "momentum=0.9", "centered=True"],
    **{name: ["--optimizer-args", "min_8bit_size=16"] for name in ("adamw8bit", "paged_adamw8bit", "lion8bit")},
    **{name: ["--optimizer-args", "min_8bit_size=16"] for name in ("paged_lion8bit", "sgd_nesterov8bit")},
    "paged_adamw32bit": [],
}
QUICK = {"adamw", "schedule_free_adamw", "prodigy", "adafactor", "torch.optim.RMSprop"}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The words that every run begins with."""
    place = tmp_path_factory.mktemp("place")
    tags = {number: f"sks, thing, round, number {number}" for number in range(5)}
    pictures = write_pictures(place / "pictures" / "1_sks thing", dict(tags))
    base = write_tiny(place / "base.safetensors", width=8)
    return ["train", "--base", str(base), "--images", str(pictures.parent), *COMMON]


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setenv("LORASMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(session, "write_report", lambda folder, contents: folder)  # takes long, and is not looked at
    monkeypatch.setattr(validation, "_NUM_DRAWS", 2)


def run(*words: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(list(words)) == 0


def ended_by(number: signal.Signals, words: Sequence[str], cache: Path, *, step: int) -> int | None:
    """Run in a process of its own that gets a signal in a step, counted from 1; return its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *IMPORTED])
    process = context.Process(target=_one, args=(number, list(words), cache, step))
    process.start()
    process.join()
    return process.exitcode


def _one(number: signal.Signals, words: list[str], cache: Path, step: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ.update(SOURCE_DATE_EPOCH="1700000000", LORASMITH_CACHE=str(cache), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    session.write_report = lambda folder, contents: folder  # for this run only, after which the process ends
    validation._NUM_DRAWS = 2
    update, steps = Stepper._update, itertools.count(1)

    def update_and_signal(self: Stepper, rate_multiplier: float) -> int | None:
        found = update(self, rate_multiplier)
        if next(steps) == step:
            os.kill(os.getpid(), number)
        return found

    Stepper._update = update_and_signal
    raise SystemExit(main(words))


def written(folder: Path) -> dict[str, Any]:
    """Return all files of a run's folder but the one that says where it lies: bytes, of states of optimizers values."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.toml"]
    return {str(path.relative_to(folder)): content(path) for path in files}


def content(path: Path) -> Any:
    if path.name == "optimizer.pt":  # the same values are not always pickled alike
        return plain(torch.load(path, weights_only=True))
    if path.name == "state.json":
        return {name: value for name, value in json.loads(path.read_text()).items() if name != "sha256"}
    return path.read_bytes()


def plain(value: Any) -> Any:
    """Return what can be compared with ==, tensors by their bits."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def test_every_optimizer_and_schedule_is_tried() -> None:
    given = {options[options.index("--lr-schedule") + 1] for options in CASES.values() if "--lr-schedule" in options}
    assert given == set(SCHEDULES) and {name for name in CASES if "." not in name} == set(plugins.names("optimizers"))


@pytest.mark.parametrize("name", [pytest.param(one, marks=[pytest.mark.slow] * (one not in QUICK)) for one in CASES])
def test_a_killed_run_comes_to_the_same_bytes(begun: list[str], tmp_path: Path, name: str) -> None:
    if name.endswith("bit"):
        pytest.importorskip("bitsandbytes", reason="the extra bitsandbytes is not installed")
    words = [*begun, "--optimizer", name, *CASES[name]]
    run(*words, "--output", str(tmp_path / "whole"))
    assert norm(learned(load_file(tmp_path / "whole" / "last.safetensors"))) > 0
    cut = tmp_path / "cut"
    assert ended_by(signal.SIGKILL, [*words, "--output", str(cut)], tmp_path / "cache", step=3) == -signal.SIGKILL
    assert not (cut / "last.safetensors").exists()
    assert [path.name for path in (cut / "states").iterdir()] == ["step-00000002"]
    run("train", "--resume", str(cut))
    assert_same(tmp_path / "whole", cut)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_was_asked_to_stop_comes_to_the_same_bytes(
    begun: list[str], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Also what was due after the step that it stopped at: a save after the epoch, and samples."""
    drawing = ["--sample-every-steps", "2", "--prompts", "sks", "--sample-steps", "1"]
    words = [*begun, *FAST, *UNEVEN, "--steps", "6", "--save-every-epochs", "1", *drawing]
    run(*words, "--output", str(tmp_path / "whole"))
    cut = tmp_path / "cut"
    assert ended_by(number, [*words, "--output", str(cut)], tmp_path / "cache", step=3) == code
    assert [path.name for path in (cut / "states").iterdir()] == ["step-00000004"]  # the one after it is finished
    assert not (cut / "epoch-000002.safetensors").exists() and not (cut / "samples" / "step-00000004").exists()
    run("train", "--resume", str(cut))
    (cut / "step-00000004.safetensors").unlink()
    assert_same(tmp_path / "whole", cut)


def assert_same(whole: Path, cut: Path) -> None:
    expected, found = written(whole), written(cut)
    assert found.keys() == expected.keys()
    assert [name for name, content in expected.items() if found[name] != content] == []
