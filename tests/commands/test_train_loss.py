"""Every option of loss, noise and regularizers does something, and a run with it is stopped and resumed exactly.

Runs are of two steps on a miniature model, of the text encoder alone where that is enough, so that each takes a part of
a second.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.adapters.lora import LoRA
from lorasmith.cli import main
from tests.commands.test_train_options import COMMON, SGD, Place, Result, distance, same, write_pictures
from tests.commands.test_train_processes import run_two

STATES = ["--state-every-steps", 1, "--keep-states", 9]
QUICK = ["--train", "text_encoder", *STATES]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SOURCE_DATE_EPOCH", "1700000000")
        patched.setenv("LORASMITH_CACHE", str(tmp_path_factory.mktemp("cache")))
        patched.setattr("lorasmith.training_run.session.write_report", lambda folder, contents: folder)
        yield Place(tmp_path_factory.mktemp("place"))


CHANGING = [
    ["--loss-type", "l1"],
    ["--loss-type", "huber"],
    ["--loss-type", "smooth_l1"],
    ["--loss-type", "huber", "--huber-c", 0.5],
    ["--loss-type", "huber", "--huber-schedule", "constant"],
    ["--loss-type", "huber", "--huber-schedule", "exponential"],
    ["--loss-type", "huber", "--huber-schedule", "exponential", "--huber-scale", 2],
    ["--min-snr-gamma", 5],
    ["--debiased-estimation"],
    ["--v-pred-like-loss", 0.2],
    ["--prediction", "v_prediction", "--scale-v-pred-loss"],
    ["--prediction", "v_prediction", "--zero-terminal-snr"],
    ["--min-timestep", 700],
    ["--max-timestep", 300],
    ["--timestep-density", "logit_normal"],
    ["--timestep-density", "logit_normal", "--timestep-logit-mean", 2],
    ["--timestep-density", "logit_normal", "--timestep-logit-std", 3],
    ["--timestep-density", "cosmap"],
    ["--noise-offset", 0.1],
    ["--noise-offset", 0.1, "--noise-offset-random"],
    ["--noise-offset", 0.1, "--noise-offset-adaptive", 0.5],
    ["--pyramid-noise-levels", 4],
    ["--pyramid-noise-levels", 4, "--pyramid-noise-discount", 0.8],
    ["--input-perturbation", 0.1],
    ["--input-perturbation", 0.1, "--input-perturbation-random"],
    ["--neuron-dropout", 0.5],
    ["--rank-dropout", 0.5],
    ["--module-dropout", 0.5],
    ["--product-decay", 5],
    ["--max-norm", 0.0001],
]
DROPOUT = ["--neuron-dropout", 0.2, "--rank-dropout", 0.3, "--module-dropout", 0.4]


def without_last(options: list[object]) -> list[object]:
    """The options but the last one, and its value."""
    last = max(number for number, word in enumerate(options) if str(word).startswith("--"))
    return options[:last]


every_option = pytest.mark.parametrize("options", CHANGING, ids=lambda options: " ".join(map(str, options)))


@every_option
def test_an_option_changes_what_is_learned_and_the_plan_says_so(place: Place, options: list[object]) -> None:
    result, without = place.train(*QUICK, *options), place.train(*QUICK, *without_last(options))
    assert not same(result, without)
    name = str([word for word in options if str(word).startswith("--")][-1])[2:].replace("-", "_")
    assert name in result.plan and name not in without.plan


TOGETHER = [  # every option once
    ["--loss-type", "huber", "--huber-c", 0.5, "--huber-schedule", "exponential", "--huber-scale", 2,
     "--min-snr-gamma", 5, "--debiased-estimation", "--v-pred-like-loss", 0.2,
     "--min-timestep", 100, "--max-timestep", 800, "--timestep-density", "logit_normal", "--timestep-logit-mean", 1,
     "--timestep-logit-std", 2],
    ["--prediction", "v_prediction", "--scale-v-pred-loss", "--zero-terminal-snr", "--timestep-density", "cosmap",
     "--loss-type", "smooth_l1"],
    ["--noise-offset", 0.1, "--noise-offset-random", "--noise-offset-adaptive", 0.5, "--pyramid-noise-levels", 4,
     "--pyramid-noise-discount", 0.8, "--input-perturbation", 0.1, "--input-perturbation-random"],
    [*DROPOUT, "--product-decay", 5, "--max-norm", 0.01],
]  # fmt: skip


@pytest.mark.parametrize("options", TOGETHER, ids=lambda options: " ".join(map(str, options)))
def test_a_run_stopped_in_the_middle_gives_the_same_bytes(place: Place, options: list[object]) -> None:
    whole = place.train(*QUICK, *options)
    assert resumed(whole) == (whole.folder / "last.safetensors").read_bytes()


def resumed(whole: Result) -> bytes:
    """Go on with a run from its first step, and return the file that it comes to."""
    last = whole.folder / "last.safetensors"
    before = last.read_bytes()
    last.unlink()
    assert main(["train", "--resume", str(whole.folder / "states" / "step-00000001")]) == 0
    after = last.read_bytes()
    last.write_bytes(before)
    return after


def test_the_loss_at_a_timestep_does_not_depend_on_the_range_it_is_drawn_from(place: Place) -> None:
    """Ranges of one timestep each, so that all draw the same one, and noise is drawn by itself."""
    narrow = place.train(*QUICK, "--min-timestep", 500, "--max-timestep", 501)
    shaped = place.train(*QUICK, "--min-timestep", 500, "--max-timestep", 501, "--timestep-density", "logit_normal")
    assert same(narrow, shaped) and narrow.logged("loss") == shaped.logged("loss")


def test_the_file_says_how_the_loss_was_made(place: Place) -> None:
    huber = place.train(*QUICK, "--loss-type", "huber", "--huber-schedule", "constant", "--huber-c", 0.3)
    plain = place.train(*QUICK).metadata
    assert huber.metadata["ss_loss_type"] == "huber" and huber.metadata["ss_huber_c"] == "0.3"
    assert huber.metadata["ss_huber_schedule"] == "constant" and huber.metadata["ss_huber_scale"] == "1.0"
    assert place.train(*QUICK, "--min-snr-gamma", 5).metadata["ss_min_snr_gamma"] == "5.0"
    assert place.train(*QUICK, "--debiased-estimation").metadata["ss_debiased_estimation"] == "True"
    zero = place.train(*QUICK, "--prediction", "v_prediction", "--zero-terminal-snr").metadata
    assert zero["ss_zero_terminal_snr"] == "True" and plain["ss_zero_terminal_snr"] == "False"
    noise = ["--noise-offset", 0.1, "--noise-offset-adaptive", 0.5, "--pyramid-noise-levels", 4]
    noisy = place.train(*QUICK, *noise, "--noise-offset-random", "--input-perturbation", 0.1).metadata
    assert (noisy["ss_noise_offset"], noisy["ss_adaptive_noise_scale"]) == ("0.1", "0.5")
    assert (noisy["ss_noise_offset_random_strength"], noisy["ss_ip_noise_gamma"]) == ("True", "0.1")
    assert (noisy["ss_multires_noise_iterations"], noisy["ss_multires_noise_discount"]) == ("4", "0.3")
    assert plain["ss_noise_offset"] == plain["ss_multires_noise_iterations"] == plain["ss_ip_noise_gamma"] == "None"
    assert (plain["ss_loss_type"], plain["ss_min_snr_gamma"]) == ("l2", "None")


def test_samples_are_drawn_with_the_schedule_that_is_trained(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorasmith.training_run import session

    ends: list[bool] = []

    def note(model: object, prompts: list[str], **settings: object) -> list[object]:
        ends.append(model.schedule.ends_in_noise)  # type: ignore[attr-defined]
        return [None]

    monkeypatch.setattr(session, "generate", note)
    monkeypatch.setattr(session.SamplesFolder, "add", lambda self, step, pictures: None)
    drawing = ["--before-after", "--prompts", "a cat", "--prediction", "v_prediction", "--train", "text_encoder"]
    place.train(*drawing, "--zero-terminal-snr")
    place.train(*drawing)
    assert ends == [True, True, False, False]


# ---- what is to stay as it is ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prior(place: Place) -> Path:
    return write_pictures(place.path / "prior" / "1_thing", {7: None, 8: None}).parent


@pytest.fixture(scope="module")
def own(place: Place) -> Path:
    return write_pictures(place.path / "own" / "1_sks thing", {0: None, 1: None}).parent


WHOLE_EPOCH = ["--batch-size", 4, *SGD, "--max-grad-norm", 0]


def test_a_new_lora_moves_nothing_that_is_to_be_kept(place: Place, own: Path, prior: Path) -> None:
    """As long as the LoRA changes nothing, the kept pictures have neither loss nor gradient."""
    once = [*WHOLE_EPOCH, "--steps", 1, "--regularization", prior]
    kept = place.train(*once, "--diff-output-preservation", images=own)
    without = place.train(*once, "--prior-loss-weight", 0, images=own)
    assert distance(kept, without) < 1e-4
    assert kept.logged("loss") == pytest.approx(without.logged("loss"), rel=1e-5)
    assert distance(kept, place.train(*once, images=own)) > 0.1
    assert "diff_output_preservation" in kept.plan


def test_a_lora_that_has_moved_is_pulled_back(place: Place, own: Path, prior: Path) -> None:
    twice = [*WHOLE_EPOCH, "--steps", 2, "--regularization", prior]
    kept = place.train(*twice, "--diff-output-preservation", *STATES, images=own)
    assert not same(kept, place.train(*twice, "--prior-loss-weight", 0, images=own))
    assert resumed(kept) == (kept.folder / "last.safetensors").read_bytes()


def test_a_dataset_file_marks_what_is_to_be_kept(place: Place, own: Path, prior: Path) -> None:
    def run(name: str, mark: str, *options: object) -> Result:
        tables = [
            f"[[datasets.subsets]]\nimage_dir = '{folder}'\nclass_tokens = '{words}'\n{more}"
            for folder, words, more in [
                (own / "1_sks thing", "sks thing", ""),
                (prior / "1_thing", "thing", f"is_reg = true\n{mark}"),
            ]
        ]
        file, folder = place.path / f"{name}.toml", place.path / name
        file.write_text("\n".join(["[[datasets]]", *tables]))
        words = ["--base", place.base, "--dataset-config", file, *COMMON, *WHOLE_EPOCH, "--steps", 2, *options]
        assert main(["train", *map(str, words), "--output", str(folder)]) == 0
        return Result(folder, "")

    marked = run("marked", "custom_attributes = {diff_output_preservation = true}")
    assert same(marked, run("asked", "", "--diff-output-preservation"))
    assert not same(marked, run("plain", ""))


# ---- what holds the adapter back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["--workers", 3], ["--gradient-checkpointing"]], ids=str)
def test_dropout_is_the_same_however_the_work_is_done(place: Place, options: list[object]) -> None:
    assert same(place.train(*DROPOUT, *options), place.train(*DROPOUT))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no fork")
def test_two_processes_of_batch_one_train_as_one_of_batch_two(place: Place, own: Path, prior: Path) -> None:
    """With everything that is drawn for a sample, a step or a layer."""
    drawn = [*DROPOUT, "--noise-offset", 0.1, "--noise-offset-random", "--pyramid-noise-levels", 3,
             "--input-perturbation", 0.1, "--timestep-density", "logit_normal", "--min-snr-gamma", 5,
             "--regularization", prior, "--diff-output-preservation", "--train", "text_encoder", "--max-norm", 0.01,
             "--device", "cpu", "--precision", "fp32", *SGD]  # fmt: skip
    one = place.train(*drawn, "--batch-size", 2, images=own)
    words = ["--base", place.base, "--images", own, *COMMON, "--rank", 2, "--steps", 2, *drawn]
    two = place.path / "two"
    ended = run_two(["train", *map(str, words), "--output", str(two)], place.path / "logs")
    assert ended.codes == [0, 0], ended.errors
    assert distance(Result(two, ""), one) < 1e-3
    assert Result(two, "").logged("loss") == pytest.approx(one.logged("loss"), rel=1e-4)


def test_validation_and_samples_are_of_the_whole_adapter(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, seen = LoRA.forward, list[tuple[bool, bool]]()

    def noted(self: LoRA, *args: Any) -> Any:
        seen.append((torch.is_grad_enabled(), self.drop is not None))
        return forward(self, *args)

    monkeypatch.setattr(LoRA, "forward", noted)
    result = place.train(*QUICK, *DROPOUT, "--before-after", "--sample-steps", 1, "--validation-split", 0.3)
    assert set(seen) == {(True, True), (False, False)}
    assert result.tensors.keys() == place.train(*QUICK).tensors.keys()


def test_how_many_norms_were_limited_is_logged(place: Place) -> None:
    assert place.train(*QUICK, "--max-norm", 0.0001).logged("num_limited") == [72, 72]
    assert place.train(*QUICK, "--max-norm", 1000).logged("num_limited") == [0, 0]
    assert same(place.train(*QUICK, "--max-norm", 1000), place.train(*QUICK))
    metadata = place.train(*QUICK, "--max-norm", 0.0001).metadata
    assert metadata["ss_scale_weight_norms"] == "0.0001"
    assert place.train(*QUICK, "--neuron-dropout", 0.5).metadata["ss_network_dropout"] == "0.5"
    assert place.train(*QUICK).metadata["ss_network_dropout"] == "None"


# ---- mistakes -------------------------------------------------------------------------------------------------------


def mistake(place: Place, capsys: pytest.CaptureFixture[str], *options: object) -> str:
    words = ["--base", place.base, "--images", place.pictures.parent, "--output", place.path / "none", *options]
    assert main(["train", *map(str, words)]) == 2
    assert not (place.path / "none").exists()
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join(error.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--huber-c", 0.2], "huber_c shapes the losses huber and smooth_l1, but loss_type = l2"),
        (["--loss-type", "huber", "--huber-scale", 2], "huber_scale has no part in huber_schedule = snr"),
        (["--min-timestep", 500, "--max-timestep", 500], "min_timestep = 500 is not below max_timestep = 500"),
        (["--timestep-logit-std", 2], "timestep_logit_std shapes timestep_density = logit_normal, but it is uniform"),
        (["--zero-terminal-snr"], "zero_terminal_snr is for models that predict v (v_prediction)"),
        (["--scale-v-pred-loss"], "give --prediction v_prediction"),
        (["--prediction", "v_prediction", "--v-pred-like-loss", 0.1], "but this one predicts v (v_prediction)"),
        (["--noise-offset-random"], "noise_offset_random changes noise_offset, which is missing"),
        (["--pyramid-noise-discount", 0.5], "pyramid_noise_discount is for pyramid_noise_levels"),
        (["--input-perturbation-random"], "input_perturbation_random is for input_perturbation"),
        (["--diff-output-preservation"], "diff_output_preservation is for regularization pictures, but"),
        (["--adapter", "dora", "--rank-dropout", 0.1], "no such place in a DoRA; give --module-dropout, which all"),
        (["--adapter", "dora", "--max-norm", 1], "max_norm scales adapters down: "),
        (["--module-dropout", 1], "--module-dropout 1: expected a number at least 0 and below 1"),
        (["--max-timestep", 1001], "--max-timestep 1001: expected a whole number above 0 and at most 1000"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_loaded(
    place: Place, capsys: pytest.CaptureFixture[str], options: list[object], message: str
) -> None:
    assert message in mistake(place, capsys, *options)


def test_a_resumed_run_keeps_its_loss(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = place.train(*QUICK, "--min-snr-gamma", 5)
    assert main(["train", "--resume", str(run.folder), "--steps", "3", "--min-snr-gamma", "4"]) == 2
    assert "min_snr_gamma was 5.0, now 4.0" in capsys.readouterr().err
