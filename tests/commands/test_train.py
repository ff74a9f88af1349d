"""`lorasmith train` through its front door, on the miniature models: results, resume, and mistakes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open

from lorasmith.cli import main
from lorasmith.training_run import session
from tests.tiny import write_tiny

CLOCK = "1700000000"
COMMON = ["--resolution", "64", "--no-before-after", "--no-tensorboard", "--rank", "2", "--learning-rate", "0.001"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("base") / "tiny.safetensors", "sd1", width=8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("pictures")
    folder = parent / "2_sks thing"
    folder.mkdir()
    for number in range(3):
        Image.effect_noise((80, 64), 40 + 20 * number).convert("RGB").save(folder / f"{number}.png")
    return parent


def command(base: Path, pictures: Path, output: Path, *more: str) -> list[str]:
    return ["train", "--base", str(base), "--images", str(pictures), "--output", str(output), *COMMON, *more]


@pytest.fixture(autouse=True)
def fixed_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", CLOCK)


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes half of a run's time where it is not looked at."""
    monkeypatch.setattr(session, "write_report", lambda folder, contents: folder)


def test_a_run_saves_what_it_says_and_every_name_is_there(base: Path, pictures: Path, tmp_path: Path) -> None:
    assert main(command(base, pictures, tmp_path, "--epochs", "2", "--save-every-epochs", "1")) == 0
    assert (tmp_path / "epoch-000001.safetensors").is_file() and not (tmp_path / "epoch-000002.safetensors").exists()
    assert (tmp_path / "report" / "index.html").is_file() and (tmp_path / "report" / "loss.png").is_file()
    with safe_open(tmp_path / "last.safetensors", "pt") as file:
        assert len(file.keys()) == 3 * 264
        assert file.metadata()["ss_network_dim"] == "2" and file.metadata()["ss_steps"] == "12"
    assert len((tmp_path / "logs" / "loss.jsonl").read_text().splitlines()) == 12


@pytest.fixture(scope="module")
def whole(base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps of two pictures each, which are changed anew each time, with a state after each step."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    options = ["--lr-schedule", "cosine", "--gradient-accumulation", "2", "--flip", "--color", "--random-crop"]
    states = ["--state-every-steps", "1", "--keep-states", "9"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SOURCE_DATE_EPOCH", CLOCK)
        assert main(command(base, pictures, folder, "--steps", "5", *options, *states)) == 0
    return folder


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("stopped_after", [1, 3])
@pytest.mark.parametrize("workers", ["0", "3"])
def test_a_run_stopped_at_any_step_gives_the_same_bytes(
    whole: Path, tmp_path: Path, stopped_after: int, workers: str
) -> None:
    """tests/commands/test_train_killed.py has runs that are really killed."""
    cut = shutil.copytree(whole, tmp_path / "cut")
    (cut / "last.safetensors").unlink()
    assert main(["train", "--resume", str(cut / f"states/step-{stopped_after:08d}"), "--workers", workers]) == 0
    assert (whole / "last.safetensors").read_bytes() == (cut / "last.safetensors").read_bytes()
    assert (whole / "logs" / "loss.jsonl").read_bytes() == (cut / "logs" / "loss.jsonl").read_bytes()
    steps = [json.loads(line)["step"] for line in (cut / "logs" / "loss.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]


@pytest.mark.usefixtures("no_report")
def test_a_folder_with_a_run_is_not_overwritten(
    base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(base, pictures, tmp_path, "--steps", "1")) == 0
    before = (tmp_path / "last.safetensors").read_bytes()
    assert main(command(base, pictures, tmp_path, "--steps", "2")) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "last.safetensors").read_bytes() == before
    assert main(command(base, pictures, tmp_path, "--steps", "2", "--overwrite")) == 0
    assert (tmp_path / "old-1" / "last.safetensors").read_bytes() == before


def test_the_first_loss_that_is_not_finite_stops_the_run(
    base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(base, pictures, tmp_path, "--steps", "40", "--max-grad-norm", "0")[:-6], "--learning-rate",
                 "1e30", "--steps", "40"]) == 2  # fmt: skip
    assert "the loss became" in capsys.readouterr().err
    assert not (tmp_path / "last.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--base", "nowhere.safetensors"], "no such file"),
        (["--rank", "4000"], "rank 4000 is larger"),
        (["--v2"], "is Stable Diffusion 1.x"),
        (["--precision", "fp16"], "needs a GPU"),
        (["--resolution", "100"], "multiple of 8"),
        (["--steps", "1", "--epochs", "1"], "steps and epochs"),
        (["--cache-latents", "--color"], "cache_latents"),
        (["--output", "/proc/nowhere"], "cannot be written"),
        (["--resume", "nowhere"], "no such folder"),
        (["--rnak", "3"], "did you mean"),
    ],
)
def test_mistakes_end_with_one_message_and_nothing_written(
    base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main([*command(base, pictures, tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_sample_pictures_keep_their_captions_when_a_resumed_run_asks_for_others(
    base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorasmith import samples_folder

    drawn, draw = [], samples_folder.sheet

    def sheet(columns: Any, rows: Any) -> Image.Image:
        drawn.append((list(columns), [label for label, _ in rows]))
        return draw(columns, rows)

    monkeypatch.setattr(samples_folder, "sheet", sheet)
    drawing = ["--before-after", "--sample-every-steps", "1", "--sample-steps", "1", "--train", "text_encoder"]
    first = ["--prompts", "a cat", "a dog", "--steps", "3", "--state-every-steps", "1", "--keep-states", "9"]
    assert main(command(base, pictures, tmp_path, *drawing, *first)) == 0
    assert drawn[-1] == (["a cat", "a dog"], ["before", "step 1", "step 2", "step 3"])
    back = ["train", "--resume", str(tmp_path / "states" / "step-00000001")]
    assert main([*back, "--steps", "2"]) == 0  # step 3 belongs to the course that was left
    assert drawn[-1] == (["a cat", "a dog"], ["before", "step 1", "step 2"])
    assert (tmp_path / "report" / "samples.png").is_file()
    assert main([*back, "--steps", "2", "--prompts", "a cow"]) == 0
    assert drawn[-1] == (["a cow"], ["step 2"])


@pytest.mark.usefixtures("no_report")
def test_starting_weights_bring_their_rank_and_alpha(
    base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = command(base, pictures, tmp_path / "first", "--steps", "1", "--rank", "3", "--alpha", "1.5")
    assert main(first) == 0
    more = command(base, pictures, tmp_path / "more", "--steps", "1")
    more = [*more[: more.index("--rank")], *more[more.index("--rank") + 2 :]]
    assert main([*more, "--weights", str(tmp_path / "first" / "last.safetensors")]) == 0
    assert "rank 3, alpha 1.5, effective scale 0.5" in capsys.readouterr().out.partition("starting from")[0]
    with safe_open(tmp_path / "more" / "last.safetensors", "pt") as file:
        assert (file.metadata()["ss_network_dim"], file.metadata()["ss_network_alpha"]) == ("3", "1.5")


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(base, pictures, tmp_path / "out", "--dry-run", "--steps", "12")) == 0
    plan = capsys.readouterr().out
    assert "264 modules" in plan and "12 steps = 2 epochs" in plan and "effective scale 1" in plan
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_report")
def test_a_run_begun_with_relative_paths_goes_on_from_anywhere(
    base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "place").mkdir()
    shutil.copytree(pictures, tmp_path / "place" / "photos")
    shutil.copy(base, tmp_path / "place" / "model.safetensors")
    monkeypatch.chdir(tmp_path / "place")
    assert main(command(Path("model.safetensors"), Path("photos"), Path("out"), "--steps", "1")) == 0
    monkeypatch.chdir("/")
    assert main(["train", "--resume", str(tmp_path / "place" / "out"), "--steps", "2"]) == 0
    (tmp_path / "place" / "photos").rename(tmp_path / "elsewhere")
    again = ["train", "--resume", str(tmp_path / "place" / "out"), "--steps", "3"]
    assert main(again) == 2
    assert "is not there any more; give its new place with --images" in capsys.readouterr().err
    assert main([*again, "--images", str(tmp_path / "elsewhere")]) == 0


@pytest.mark.usefixtures("no_report")
def test_a_file_of_prompts_is_found_from_anywhere(
    base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.txt").write_text("a cat --w 72\n")
    drawing = ["--prompts", "mine.txt", "--sample-every-steps", "1", "--sample-steps", "1", "--train", "text_encoder"]
    monkeypatch.chdir(tmp_path)
    assert main(command(base, pictures, tmp_path / "out", *drawing, "--steps", "1")) == 0
    monkeypatch.chdir("/")
    assert main(["train", "--resume", str(tmp_path / "out"), "--steps", "2"]) == 0
    assert Image.open(tmp_path / "out" / "samples" / "step-00000002" / "00.png").size == (72, 64)


@pytest.mark.usefixtures("no_report")
def test_a_run_that_ended_before_it_saved_is_simply_started_again(
    base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = command(base, pictures, tmp_path / "out", "--steps", "9")
    wrong = ["1e30" if word == "0.001" else word for word in right]
    assert main([*wrong, "--max-grad-norm", "0"]) == 2
    assert "the loss became" in capsys.readouterr().err
    assert main(right) == 0
    assert "the older run was moved to" in capsys.readouterr().out
    assert (tmp_path / "out" / "last.safetensors").is_file()
