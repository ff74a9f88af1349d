"""Held-out pictures through the command: measured the same way each time, and never trained on."""

import contextlib
import io
import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lorasmith import config, validation
from lorasmith.cli import main
from lorasmith.training_run import session

from ..tiny import write_tiny

WORDS = ["--no-before-after", "--no-tensorboard", "--resolution", "64", "--rank", "2", "--learning-rate", "0.01"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("base") / "sd1.safetensors", width=8)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "_NUM_DRAWS", 4)  # 32 take long


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "write_report", lambda folder, contents: folder)  # takes long


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(6):
        Image.frombytes("RGB", (64, 64), random.Random(number).randbytes(64 * 64 * 3)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"sks thing, number {number}")
    return folder


def run(base: Path, pictures: Path, output: Path, *options: object) -> str:
    words = ["train", "--base", base, "--images", pictures, "--output", output, *WORDS, *options]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([str(word) for word in words]) == 0
    return printed.getvalue()


def logged(output: Path, name: str = "validation") -> dict[int, float]:
    lines = (output / "logs" / f"{name}.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


@pytest.mark.usefixtures("without_report")
def test_the_loss_is_measured_when_asked_and_comparable(base: Path, pictures: Path, tmp_path: Path) -> None:
    held = ["--validation-split", 0.34, "--steps", 12]
    plan = " ".join(run(base, pictures, tmp_path / "dry", *held, "--dry-run").split())
    assert "held out for validation, never trained on: 2 of 6" in plan and "epochs of 4 samples in 4 steps" in plan
    printed = run(base, pictures, tmp_path / "epochs", *held)
    losses = logged(tmp_path / "epochs")
    assert list(losses) == [0, 4, 8, 12] and len(set(losses.values())) == 4
    assert f"held-out pictures after step 4: loss {losses[4]:.4f}" in printed
    run(base, pictures, tmp_path / "steps", *held, "--validate-every-steps", 5)
    assert list(logged(tmp_path / "steps")) == [0, 5, 10, 12]
    assert logged(tmp_path / "steps")[12] == losses[12]  # the same pictures, noise and timesteps, whenever measured
    run(base, pictures, tmp_path / "seldom", *held, "--validate-every-epochs", 2)
    assert list(logged(tmp_path / "seldom")) == [0, 8, 12]


@pytest.mark.usefixtures("without_report")
def test_measuring_changes_nothing_of_the_training(base: Path, pictures: Path, tmp_path: Path) -> None:
    held = ["--validation-split", 0.34, "--steps", 6]
    run(base, pictures, tmp_path / "seldom", *held, "--validate-every-steps", 6)
    run(base, pictures, tmp_path / "often", *held, "--validate-every-steps", 1)
    assert logged(tmp_path / "seldom", "loss") == logged(tmp_path / "often", "loss")
    ours, theirs = (load_file(tmp_path / name / "last.safetensors") for name in ("seldom", "often"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.usefixtures("without_report")
def test_held_out_pictures_have_no_influence(base: Path, pictures: Path, tmp_path: Path) -> None:
    """Whatever is written about them, the LoRA is the same; what is written about the others changes it."""
    held = ["--validation-split", 0.34, "--steps", 4]
    run(base, pictures, tmp_path / "usual", *held)
    plan = run(base, pictures, tmp_path / "dry", *held, "--dry-run")
    names = plan.partition("2 of 6 (")[2].partition(")")[0].split(", ")
    first = load_file(tmp_path / "usual" / "last.safetensors")
    (pictures / names[0].replace(".png", ".txt")).write_text("something else")
    run(base, pictures, tmp_path / "changed", *held)
    second = load_file(tmp_path / "changed" / "last.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert logged(tmp_path / "changed")[0] != logged(tmp_path / "usual")[0]
    other = next(path for path in sorted(pictures.glob("*.png")) if path.name not in names)
    other.with_suffix(".txt").write_text("something else")
    run(base, pictures, tmp_path / "trained", *held)
    third = load_file(tmp_path / "trained" / "last.safetensors")
    assert not all(torch.equal(first[name], third[name]) for name in first)


def test_another_seed_holds_out_others(base: Path, pictures: Path, tmp_path: Path) -> None:
    def names(*options: object) -> str:
        plan = run(base, pictures, tmp_path / "dry", "--validation-split", 0.34, "--dry-run", *options)
        return plan.partition("2 of 6 (")[2].partition(")")[0]

    assert len({names("--validation-seed", seed) for seed in range(6)}) > 2
    assert names("--validation-seed", 3) == names("--validation-seed", 3, "--seed", 8)
    assert names() == names("--validation-seed", config.TrainConfig().training.seed)


def test_a_resumed_run_measures_as_if_it_had_not_stopped(base: Path, pictures: Path, tmp_path: Path) -> None:
    held = ["--validation-split", 0.34, "--validate-every-steps", 2]
    run(base, pictures, tmp_path / "straight", *held, "--steps", 8)
    run(base, pictures, tmp_path / "resumed", *held, "--steps", 4)
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["train", "--resume", str(tmp_path / "resumed"), "--steps", "8"]) == 0
    assert logged(tmp_path / "resumed") == logged(tmp_path / "straight")
    page = (tmp_path / "resumed" / "report" / "index.html").read_text()
    assert "held-out pictures are measured with the same noise" in page


@pytest.mark.usefixtures("without_report")
def test_changing_augmentations_do_not_reach_held_out_pictures(base: Path, pictures: Path, tmp_path: Path) -> None:
    held = ["--validation-split", 0.34, "--steps", 1]
    run(base, pictures, tmp_path / "plain", *held, "--no-cache-latents")
    run(base, pictures, tmp_path / "augmented", *held, "--color", "--flip", "--random-crop", "--shuffle-caption",
        "--caption-dropout", 1)  # fmt: skip
    assert logged(tmp_path / "plain")[0] == logged(tmp_path / "augmented")[0]


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--validation-split", "1"], "expected a number at least 0 and below 1"),
        (["--validation-split", "0.95"], "validation_split = 0.95 of 6 different pictures in data set 1 leaves none"),
        (["--validation-seed", "3"], "validation_split, their share, is missing"),
        (["--validate-every-steps", "3"], "validation_split, their share, is missing"),
        (["--keep-best", "2", "--stop-early", "3"], "keep_best and stop_early are for held-out pictures"),
    ],
)
def test_mistakes(
    base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    words = ["train", "--base", str(base), "--images", str(pictures), "--output", str(tmp_path / "out"), *options]
    assert main([*words, "--dry-run"]) == 2
    assert expected in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_each_picture_is_logged_and_shown(base: Path, pictures: Path, tmp_path: Path) -> None:
    """Their mean is the loss, since each is measured equally often; each stands in the report with its losses."""
    run(base, pictures, tmp_path / "out", "--validation-split", 0.5, "--steps", 4, "--batch-size", 2)
    plan = run(base, pictures, tmp_path / "dry", "--validation-split", 0.5, "--dry-run")
    names = set(plan.partition("3 of 6 (")[2].partition(")")[0].replace("\n", " ").split(", "))
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    assert (tmp_path / "out" / "report" / "held-out.png").is_file()
    for line in map(json.loads, (tmp_path / "out" / "logs" / "validation.jsonl").read_text().splitlines()):
        assert set(line["pictures"]) == {name.strip() for name in names}
        assert sum(line["pictures"].values()) / 3 == pytest.approx(line["loss"], rel=1e-6)
        assert len(set(line["pictures"].values())) == 3
        last = line["pictures"]
    assert all(f"<code>{name}</code>" in page and f"{loss:.4f} at last" in page for name, loss in last.items())


def test_the_best_are_kept_and_the_others_go(base: Path, pictures: Path, tmp_path: Path) -> None:
    held = ["--validation-split", 0.34, "--validate-every-steps", 1, "--steps", 5, "--save-precision", "float",
            "--learning-rate", 0.05]  # fmt: skip
    printed = run(base, pictures, tmp_path / "best", *held, "--keep-best", 2)
    run(base, pictures, tmp_path / "all", *held[:2], *held[4:], "--save-every-steps", 1)
    losses = {step: loss for step, loss in logged(tmp_path / "best").items() if step}
    wanted = sorted(losses, key=lambda step: losses[step])[:2]
    kept = sorted((tmp_path / "best").glob("best-*"))
    assert [path.name for path in kept] == [f"best-{step:08d}.safetensors" for step in sorted(wanted)]
    for step, path in zip(sorted(wanted), kept, strict=True):
        ours = load_file(path)
        theirs = load_file(tmp_path / "all" / ("last.safetensors" if step == 5 else f"step-{step:08d}.safetensors"))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    best = f"{losses[wanted[0]]:.4f} after step {wanted[0]}"
    assert f"the lowest loss of held-out pictures, {best}" in printed
    assert best in (tmp_path / "best" / "report" / "index.html").read_text()


def test_a_run_stops_early_and_a_resumed_one_where_it_would_have(base: Path, pictures: Path, tmp_path: Path) -> None:
    """With a learning rate that changes nothing, the untrained model is never bettered."""
    held = ["--validation-split", 0.34, "--validate-every-steps", 1, "--learning-rate", 1e-30, "--state-every-steps", 1,
            "--keep-states", 9, "--keep-best", 1, "--no-progress"]  # fmt: skip
    printed = run(base, pictures, tmp_path / "out", *held, "--steps", 9, "--stop-early", 3)
    assert list(logged(tmp_path / "out")) == [0, 1, 2, 3]
    assert "stopped after step 3 of 9" in printed and (tmp_path / "out" / "report" / "index.html").is_file()
    last, best = (next((tmp_path / "out").glob(f"{name}*.safetensors")) for name in ("last", "best"))
    first = load_file(last), load_file(best)

    def resume(*words: str) -> str:
        with contextlib.redirect_stdout(printed := io.StringIO()):
            assert main(["train", "--resume", *words]) == 0
        return printed.getvalue()

    last.unlink()
    assert "stopped after step 3 of 9" in resume(str(tmp_path / "out" / "states" / "step-00000001"))
    for old, path in zip(first, (last, best), strict=True):
        assert all(torch.equal(old[name], tensor) for name, tensor in load_file(path).items())
    assert "stopped after step 3 of 9" in resume(str(tmp_path / "out"))  # it is over, and stays so
    assert "stopped after step 5 of 9" in resume(str(tmp_path / "out"), "--stop-early", "5")
    assert list(logged(tmp_path / "out")) == [0, 1, 2, 3, 4, 5]


def test_train_writes_no_validation_log_unasked(base: Path, pictures: Path, tmp_path: Path) -> None:
    run(base, pictures, tmp_path / "out", "--steps", 1)
    assert not (tmp_path / "out" / "logs" / "validation.jsonl").exists()
