"""The best LoRAs by the score of their samples: kept, told and stopped by, and the same after a kill."""

import contextlib
import io
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lorasmith import picture_judges, picture_scores, report, validation
from lorasmith.cli import main
from lorasmith.training_run.resuming import with_whole_paths
from lorasmith.training_run.session import Session
from tests.tiny import write_tiny
from tests.tiny_judges import write_clip, write_dino

WORDS = [
    "--resolution", "64", "--rank", "2", "--learning-rate", "0.05", "--no-tensorboard", "--caption", "sks thing",
    "--sample-steps", "1", "--prompts", "sks thing", "a thing", "--device", "cpu", "--save-precision", "float",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def without_charts() -> Iterator[None]:
    """The report is written without its charts, which take long and are not looked at here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_draw_losses", "draw_norms"):
            patch.setattr(report, name, lambda *_: None)
        yield


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("given")
    (place / "photos").mkdir()
    for number in range(3):
        Image.frombytes("RGB", (64, 64), random.Random(number).randbytes(64 * 64 * 3)).save(
            place / "photos" / f"{number}.png"
        )
    return {
        "base": write_tiny(place / "sd1.safetensors", width=8), "photos": place / "photos",
        "clip": write_clip(place / "clip"), "dino": write_dino(place / "dino"),
    }  # fmt: skip


def train(given: dict[str, Path], output: Path, *options: object) -> str:
    words = ["--base", given["base"], "--images", given["photos"], "--output", output, *WORDS, *options]
    return said("train", *words)


def said(*words: object) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([str(word) for word in words]) == 0
    return printed.getvalue()


def logged(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "logs" / "pictures.jsonl").read_text().splitlines()]


def scores_of(line: dict[str, Any]) -> picture_scores.Scores:
    return picture_scores.Scores(
        line["likeness"], line.get("adherence"), line.get("diversity"), line.get("copying"), line.get("damage")
    )


def kept(output: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("best-")) for path in output.glob("best-*.safetensors"))


def by_pictures(given: dict[str, Path], judge: str) -> list[object]:
    return ["--best-by", "pictures", "--judge", given.get(judge, judge), "--no-before-after", "--at-first"]


OPTIONS = ["--keep-best", 2, "--steps", 3, "--sample-every-steps", 1, "--state-every-steps", 1]


@pytest.fixture(scope="module")
def straight(given: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stops."""
    output = tmp_path_factory.mktemp("straight") / "out"
    (output.parent / "printed").write_text(train(given, output, *by_pictures(given, "clip"), *OPTIONS))
    return output


@pytest.mark.parametrize(
    "judge", [pytest.param("dino", marks=pytest.mark.slow), "clip", pytest.param("demo", marks=pytest.mark.slow)]
)
def test_the_best_by_their_samples_are_kept_and_told(
    given: dict[str, Path], straight: Path, tmp_path: Path, judge: str
) -> None:
    output, prompts = tmp_path / "out", ["--prompts", "a red car", "a sks robot"] if judge == "demo" else []
    if judge == "clip":
        output, printed = straight, (straight.parent / "printed").read_text()
    else:
        printed = train(given, output, *by_pictures(given, judge), *prompts, *OPTIONS)

    lines = logged(output)
    assert [line["step"] for line in lines] == list(range(4))
    assert lines[0]["score"] == 0
    assert ("adherence" in lines[0]) == (judge != "dino")
    base = scores_of(lines[0])
    for line in lines:
        shares = picture_scores.shares(scores_of(line), picture_scores.Reference(base, lines[0]["variety"]))
        assert line["score"] == pytest.approx(math.prod(shares.values()))
    best = sorted(lines[1:], key=lambda line: (-line["score"], line["step"]))[:2]
    assert kept(output) == sorted(line["step"] for line in best)
    file = f"best-{best[0]['step']:08d}.safetensors"
    told = f"the highest score of samples, {best[0]['score']:.4f} after step {best[0]['step']}"
    assert told in printed and file in printed
    page = (output / "report" / "index.html").read_text()
    assert told in page and "Scores of the samples" in page and f"score {lines[3]['score']:.3f}" in page


def test_the_logged_likeness_is_that_of_the_samples_on_disk(given: dict[str, Path], straight: Path) -> None:
    judge = picture_judges.load(picture_judges.find(str(given["clip"]), "--judge"), torch.device("cpu"))

    def features(folder: Path) -> Any:
        return judge.embed([Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))])

    for line in logged(straight):
        drawn = features(straight / "samples" / f"step-{line['step']:08d}")
        assert line["likeness"] == pytest.approx((drawn @ features(given["photos"]).T).mean().item(), abs=1e-5)


def test_scoring_changes_nothing_of_the_training(given: dict[str, Path], straight: Path, tmp_path: Path) -> None:
    train(given, tmp_path / "plain", "--steps", 3, "--no-before-after", "--at-first")

    ours, theirs = (load_file(folder / "last.safetensors") for folder in (tmp_path / "plain", straight))
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert not (tmp_path / "plain" / "logs" / "pictures.jsonl").exists()


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("_draw", marks=pytest.mark.slow),
        "_judge_samples",
        pytest.param("_keep_best", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_to_the_same_scores_and_files(
    given: dict[str, Path], straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Killed before the samples of step 2 are drawn, before they are scored, or before the LoRA is kept."""
    with monkeypatch.context() as patch:
        original = getattr(Session, moment)

        def killed(self: Session, *arguments: Any) -> Any:
            if self.done == 2:
                raise KeyboardInterrupt
            return original(self, *arguments)

        patch.setattr(Session, moment, killed)
        words = ["--base", given["base"], "--images", given["photos"], "--output", tmp_path / "killed", *WORDS]
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(["train", *map(str, [*words, *by_pictures(given, "clip"), *OPTIONS])]) == 130
    assert [line["step"] for line in logged(tmp_path / "killed")] == ([0, 1, 2] if moment == "_keep_best" else [0, 1])

    said("train", "--resume", tmp_path / "killed")

    assert logged(tmp_path / "killed") == logged(straight)
    assert kept(tmp_path / "killed") == kept(straight)
    for path in straight.glob("*.safetensors"):
        ours, theirs = load_file(path), load_file(tmp_path / "killed" / path.name)
        assert all(ours[name].equal(theirs[name]) for name in ours)


def test_it_stops_when_no_score_has_gone_up(
    given: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.0, 0.3, 0.3, 0.4])
    monkeypatch.setattr("lorasmith.training_run.scoring.overall", lambda *_: next(scores))

    printed = train(
        given, tmp_path / "out", *by_pictures(given, "dino"), "--stop-early", 1, "--steps", 9,
        "--sample-every-steps", 1,
    )  # fmt: skip

    assert [line["score"] for line in logged(tmp_path / "out")] == [0.0, 0.3, 0.3]
    assert "stopped after step 2 of 9: no score has gone up in the last 1" in printed
    assert "stopped after step 2 of 9" in said("train", "--resume", tmp_path / "out")  # it is over, and stays so


def test_the_held_out_loss_is_still_measured_and_keeps_nothing(
    given: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "_NUM_DRAWS", 2)  # 32 take long
    train(
        given, tmp_path / "out", *by_pictures(given, "dino"), "--keep-best", 1, "--steps", 2, "--sample-every-steps", 2,
        "--validation-split", 0.34, "--validate-every-steps", 1,
    )  # fmt: skip

    assert kept(tmp_path / "out") == [2]
    assert len((tmp_path / "out" / "logs" / "validation.jsonl").read_text().splitlines()) == 3


def test_the_plan_tells_of_the_judge(given: dict[str, Path], tmp_path: Path) -> None:
    options = [*by_pictures(given, "dino"), "--keep-best", 2, "--stop-early", 3, "--sample-every-steps", 5]

    plan = " ".join(train(given, tmp_path / "out", *options, "--dry-run").split())

    assert f"scored by {given['dino']} (dinov2, which sees pictures alone)" in plan
    assert "the best 2 LoRAs are kept; the run ends after 3 samplings without a better one" in plan


PICTURES = ["--best-by", "pictures", "--judge", "demo"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--judge", "demo"], "judge scores the samples for best_by = pictures, which is left out"),
        (["--best-by", "pictures", "--keep-best", "1", "--sample-every-steps", "1"], "best_by = pictures needs judge"),
        ([*PICTURES, "--sample-every-steps", "1"], "what keep_best and stop_early go by"),
        ([*PICTURES, "--keep-best", "1"], "sample_every_steps and sample_every_epochs"),
        (
            [*PICTURES, "--keep-best", "1", "--sample-every-steps", "1", "--no-before-after"],
            "before_after and at_first are off",
        ),
        (
            ["--best-by", "pictures", "--judge", "nowhere", "--keep-best", "1", "--sample-every-steps", "1"],
            "--judge nowhere: there is no such folder",
        ),
        (
            [*PICTURES, "--keep-best", "1", "--sample-every-steps", "1", "--validate-every-steps", "3"],
            "validate_every_steps is for held-out pictures",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_a_model_is_loaded(
    given: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    words = ["--base", given["base"], "--images", given["photos"], "--output", tmp_path / "out", "--caption", "a thing"]

    assert main(["train", *map(str, words), *options, "--dry-run"]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--prompts", "something else"], "these are others than the run began with"),
        (["--judge", "{dino}"], "otherwise than the run's own judge"),
        (["--best-by", "loss"], "validation.best_by was pictures, now loss"),
    ],
)
def test_a_resumed_run_is_scored_as_it_was(
    given: dict[str, Path], straight: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    words = [word.replace("{dino}", str(given["dino"])) for word in options]

    assert main(["train", "--resume", str(straight), "--steps", "4", *words]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_the_embedded_judge_is_kept_by_its_name_also_beside_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "dino"):
        (tmp_path / name).mkdir()

    kept_as = [with_whole_paths({"validation": {"judge": name}})["validation"]["judge"] for name in ("demo", "dino")]

    assert kept_as == ["demo", str(tmp_path / "dino")]


@pytest.mark.slow
def test_a_judge_that_was_moved_is_given_its_new_place(given: dict[str, Path], tmp_path: Path) -> None:
    old, new = write_dino(tmp_path / "old"), tmp_path / "new"
    options = ["--best-by", "pictures", "--judge", old, "--keep-best", 1, "--sample-every-steps", 1]
    train(given, tmp_path / "out", *options, "--steps", 1)
    old.rename(new)

    said("train", "--resume", tmp_path / "out", "--steps", 2, "--judge", new)

    assert [line["step"] for line in logged(tmp_path / "out")] == [0, 1, 2]
