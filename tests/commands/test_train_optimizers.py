"""Optimizers of `lorasmith train` through the front door: each option counts.

That a stopped run goes on to the same bytes with each of them is tried in test_train_killed.py.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorasmith.cli import main
from lorasmith.training_run import session
from tests.commands.test_train_options import SGD, Place, learned, norm, same

QUICK = ["--train", "text_encoder"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SOURCE_DATE_EPOCH", "1700000000")
        patched.setattr(session, "write_report", lambda folder, contents: folder)  # half of a run's time
        yield Place(tmp_path_factory.mktemp("place"))


def test_adafactor_makes_its_own_rate_where_asked(place: Place) -> None:
    relative = ["--optimizer", "adafactor", "--optimizer-args", "relative_step=True"]
    result = place.train(*QUICK, *relative)
    assert "adafactor makes its own learning rate (relative_step); this one has no part in it" in result.plan
    assert same(result, place.train(*QUICK, *relative, "--learning-rate", 0.5))
    assert not same(result, place.train(*QUICK, "--optimizer", "adafactor"))


def test_a_found_rate_begins_at_1_and_is_logged(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--base", place.base, "--images", place.pictures.parent, "--resolution", 64, "--rank", 2]
    words += ["--no-before-after", "--no-progress", "--steps", 3, *QUICK, "--optimizer", "Prodigy"]
    assert main([str(word) for word in [*words, "--output", place.path / "prodigy"]]) == 0
    lines = [json.loads(line) for line in (place.path / "prodigy" / "logs" / "loss.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == [1, 1, 1]
    found = [line["d*lr"] for line in lines]
    assert found == sorted(found) and 0 < found[0] < 1e-3
    state = torch.load(place.path / "prodigy" / "states" / "step-00000003" / "optimizer.pt", weights_only=True)
    assert state["optimizer"]["param_groups"][0]["d"] == found[-1]
    assert "text encoder 1, prodigy, constant" in " ".join(capsys.readouterr().out.split())


def test_schedule_free_saves_the_average_and_goes_on_as_if_nothing_was_saved(place: Place) -> None:
    options = [*QUICK, "--steps", 3, "--optimizer", "schedule_free_adamw", "--validation-split", 0.4]
    plain = place.train(*options)
    assert same(place.train(*options, "--save-every-steps", 1, "--validate-every-steps", 2), plain)
    trained = load_file(plain.folder / "states" / "step-00000003" / "network.safetensors")
    saved = learned(plain.tensors)
    assert all(not torch.equal(tensor, trained[name]) for name, tensor in saved.items())
    assert norm(saved) < norm(learned(trained))  # what began at zero is on its way


def test_an_optimizers_arguments_count(place: Place) -> None:
    slow = place.train(*QUICK, "--optimizer-args", "betas=0.5,0.6")
    assert not same(slow, place.train(*QUICK)) and slow.metadata["ss_optimizer"] == "adamw(betas=0.5,0.6)"
    assert same(place.train(*QUICK, "--optimizer-args", "betas=(0.9, 0.999)", "eps=1e-8"), place.train(*QUICK))
    assert "adamw (betas=0.5,0.6), constant" in slow.plan


@pytest.mark.parametrize(
    ("options", "times"),
    [
        (["--lora-plus-ratio", 3, "--unet-lora-plus-ratio", 2], {"te": 3, "unet": 2}),
        (["--text-encoder-lora-plus-ratio", 3, "--unet-lr", 0], {"te": 3, "unet": 0}),
        (["--unet-lora-plus-ratio", 3, "--text-encoder-lr", 0], {"te": 0, "unet": 3}),
    ],
)
def test_each_part_learns_as_fast_as_is_said(place: Place, options: list[object], times: dict[str, int]) -> None:
    """One step of plain descent is the rate times the gradient; the halves that begin at zero are the first to move."""
    plain = place.train(*SGD, "--steps", 1, "--max-grad-norm", 0)
    result = place.train(*SGD, "--steps", 1, "--max-grad-norm", 0, *options)
    for name, tensor in learned(result.tensors).items():
        torch.testing.assert_close(tensor, plain.tensors[name] * times[name.split("_")[1]])
    assert ("0 (it stays as it is)" in result.plan) == (0 in times.values())
    assert ("3 times that for the half that begins at zero" in result.plan) == (3 in times.values())


def test_a_part_that_stays_as_it_is_keeps_what_it_started_from(place: Place) -> None:
    first = place.train("--steps", 1)
    options = ["--steps", 1, "--weights", first.folder / "last.safetensors", "--text-encoder-lr", 0]
    more = place.train(*options).tensors
    kept = {name for name, tensor in learned(first.tensors).items() if torch.equal(tensor, more[name])}
    assert {name for name in more if name.startswith("lora_te") and name.endswith("lora_up.weight")} <= kept
    assert len(kept) < 100 < len(learned(more))


def test_excluded_tensors_are_not_decayed(place: Place) -> None:
    strong = [*SGD[:2], "--learning-rate", 0.01, "--weight-decay", 10, *QUICK, "--steps", 1]
    everything, nothing = place.train(*strong), place.train(*SGD, *QUICK, "--steps", 1)
    downs = place.train(*strong, "--weight-decay-exclude", "*.lora_down.weight")
    for name, tensor in downs.tensors.items():
        if name.endswith("lora_down.weight"):
            assert torch.equal(tensor, nothing.tensors[name]) and not torch.equal(tensor, everything.tensors[name])
    assert same(place.train(*strong, "--weight-decay-exclude", "*"), nothing)


def test_dora_scales_are_not_decayed_unless_that_is_asked_for(place: Place) -> None:
    still = [*QUICK, "--steps", 1, "--adapter", "dora", *SGD[:2], "--learning-rate", 1e-6]
    begun = place.train(*still, "--weight-decay", 0).tensors
    kept, decayed = (place.train(*still, "--weight-decay", 1e5, *more) for more in ([], ["--weight-decay-exclude"]))
    names = [name for name in begun if name.endswith(".dora_scale")]
    assert len(names) == 72
    for name in names:
        assert torch.equal(kept.tensors[name], begun[name])
        torch.testing.assert_close(decayed.tensors[name], 0.9 * begun[name], rtol=1e-3, atol=1e-5)


def test_where_bitsandbytes_is_missing_one_line_says_so(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    result = place.train(*QUICK, "--optimizer", "adamw8bit")
    assert result.plan.count("adamw8bit cannot be used here") == 1 and "so adamw is, which does the same" in result.plan
    assert same(result, place.train(*QUICK)) and result.metadata["ss_optimizer"] == "adamw()"


def test_a_run_does_not_go_on_with_another_optimizer(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    whole = place.train(*QUICK, "--steps", 4, "--state-every-steps", 2, "--keep-states", 9)
    cut = place.path / "elsewhere"
    shutil.copytree(whole.folder, cut)
    facts = cut / "states" / "step-00000002" / "state.json"
    facts.write_text(facts.read_text().replace('"adamw"', '"adamw8bit"'))
    assert main(["train", "--resume", str(facts.parent)]) == 2
    assert "the run was trained with adamw8bit, but here that would be adamw" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizer", "lino"], "there is no optimizer named 'lino'; did you mean lion?"),
        (["--optimizer-args", "beta=1"], "adamw has no argument of that name; did you mean betas?"),
        (["--optimizer-args", "betas"], "expected key=value, such as betas=0.9,0.99"),
        (["--optimizer", "prodigy", "--unet-lr", "0.5"], "prodigy makes one learning rate for all that is trained"),
        (["--optimizer", "prodigy", "--lora-plus-ratio", "4"], "prodigy makes one learning rate for all that is"),
        (["--optimizer", "prodigy", "--block-lr", *["0"] * 24, "0.5"], "lora_plus_ratio and block_lr cannot differ"),
        (
            ["--optimizer", "dadapt_sgd", "--train", "unet", "--block-lr", *["1"] * 24, "0.5"],
            "and block_lr cannot differ",
        ),
        (["--optimizer", "schedule_free_sgd", "--lr-schedule", "cosine"], "needs no schedule, but lr_schedule = cosin"),
        (["--optimizer", "schedule_free_sgd", "--ema-decay", "0.9"], "saves an average of the weights by itself"),
        (["--optimizer", "schedule_free_sgd", "--max-norm", "1"], "so max_norm would hold back others than are saved"),
        (["--optimizer", "schedule_free_adamw", "--product-decay", "1"], "so product_decay would hold back others"),
        (
            ["--optimizer", "adafactor", "--optimizer-args", "relative_step=True", "--lr-warmup-steps", "3"],
            "makes its own learning rate (relative_step), but lr_schedule = constant with 3 steps of warm-up",
        ),
        (["--unet-lr", "0", "--text-encoder-lr", "0"], "every part that is to be trained has a learning rate of 0"),
        (["--train", "unet", "--text-encoder-lora-plus-ratio", "2"], "but train = unet leaves the text encoder alone"),
        (["--train", "text_encoder", "--unet-lora-plus-ratio", "2"], "but train = text_encoder leaves the U-Net alone"),
        (["--unet-lr", "-1"], "--unet-lr -1: expected a number at least 0"),
    ],
)
def test_mistakes(place: Place, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    words = ["train", "--base", str(place.base), "--images", str(place.pictures.parent), "--output", "nowhere"]
    assert main([*words, "--dry-run", "--steps", "20", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not Path("nowhere").exists()


def test_lora_plus_needs_an_up_half(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--base", str(place.base), "--images", str(place.pictures.parent), "--resolution", "64"]
    words += ["--output", str(place.path / "full"), "--adapter", "full", "--lora-plus-ratio", "4", "--steps", "1"]
    assert main([*words, "--no-progress", *QUICK]) == 2
    assert "lora_plus_ratio is for adapters with a lora_up.weight, and there is none" in capsys.readouterr().err
