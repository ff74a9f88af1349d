"""--trackers through the command, with stand-ins for Weights & Biases and trackio that note what they are told."""

import contextlib
import io
import random
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from lorasmith.cli import main
from lorasmith.training_run import session

from ..tiny import write_tiny

WORDS = ["--no-tensorboard", "--no-progress", "--no-before-after", "--resolution", "64", "--rank", "2", "--workers",
         "0", "--train", "text_encoder"]  # fmt: skip


class Service(ModuleType):
    """What accelerate's trackers call of `wandb` and of `trackio`."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int | None, dict[str, Any]]] = []
        self.num_finished = 0
        self.Settings, self.Image = dict, lambda picture: picture.size

    def init(self, **arguments: Any) -> Any:
        self.started.append(arguments)
        return self

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.num_finished += 1


@pytest.fixture(params=["wandb", "trackio"])
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Service:
    service = Service(request.param)
    monkeypatch.setitem(sys.modules, request.param, service)
    return service


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("base") / "sd1.safetensors", width=8)


@pytest.fixture(autouse=True)
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "write_report", lambda folder, contents: folder)  # takes long


def run(base: Path, folder: Path, *options: str) -> int:
    if not (folder / "pictures").is_dir():
        (folder / "pictures").mkdir()
        for number in range(3):
            pixels = random.Random(number).randbytes(64 * 64 * 3)
            Image.frombytes("RGB", (64, 64), pixels).save(folder / "pictures" / f"{number}.png")
    words = ["train", "--base", str(base), "--images", str(folder / "pictures"), "--caption", "sks thing"]
    with contextlib.redirect_stdout(io.StringIO()):
        return main([*words, *WORDS, "--output", str(folder / "dog"), *options])


def test_a_tracker_is_told_all_numbers_and_no_places(service: Service, base: Path, tmp_path: Path) -> None:
    held = ["--validation-split", "0.34", "--sample-every-steps", "2", "--prompts", "a cat", "--sample-steps", "1"]
    assert run(base, tmp_path, "--steps", "2", *held, "--trackers", service.__name__, "--project", "dogs") == 0
    (started,) = service.started
    assert started["project"] == "dogs" and started["name"] == "dog" and started["resume"] == "allow"
    numbers = {(step, name) for step, values in service.logged for name in values}
    pictures = {(2, "samples")} if service.__name__ == "wandb" else set()
    assert numbers == {
        (0, "loss/validation"), (2, "loss/validation"), (1, "loss"), (2, "loss"), (1, "lr/text_encoder"),
        (2, "lr/text_encoder"), *pictures,
    }  # fmt: skip
    lines = (tmp_path / "dog" / "logs" / "loss.jsonl").read_text()
    assert all(f'"loss": {values["loss"]}' in lines for _, values in service.logged if "loss" in values)
    options = started["config"]
    assert options["network.rank"] == 2 and options["data.images"] == "pictures"
    assert options["model.base"] == "sd1.safetensors" and service.num_finished == 1
    told = str({**started, "dir": ""})
    assert str(tmp_path) not in told and str(base.parent) not in told


def test_a_resumed_run_goes_on_in_the_same_place(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service("wandb")
    monkeypatch.setitem(sys.modules, "wandb", service)
    assert run(base, tmp_path, "--steps", "1", "--trackers", "wandb", "--run-name", "mine") == 0
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["train", "--resume", str(tmp_path / "dog"), "--steps", "2"]) == 0
    first, second = service.started
    assert first["id"] == second["id"] and first["name"] == second["name"] == "mine"
    assert [step for step, values in service.logged if "loss" in values] == [1, 2]
    assert all(first["settings"][name] for name in ("disable_git", "disable_code", "x_disable_meta"))


def test_one_that_cannot_start_is_told(
    service: Service, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**arguments: Any) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setattr(service, "init", fail)
    assert run(base, tmp_path, "--steps", "1", "--trackers", service.__name__) == 2
    error = capsys.readouterr().err
    assert f"--trackers {service.__name__} cannot be started: no API key" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--trackers", "wandb"], 'pip install "lorasmith[wandb]"'),
        (["--trackers", "tensorboard"], "give wandb, trackio or both"),
        (["--project", "dogs"], "trackers, which of them, is missing"),
    ],
)
def test_mistakes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    options: list[str], expected: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(base, tmp_path, "--dry-run", *options) == 2
    assert expected in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "dog").exists()
