"""`lorasmith demo` where it is not about learning (tests/demo/test_learning.py): its folder, its prompts, its stop."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lorasmith.cli import main
from lorasmith.commands import demo
from lorasmith.config import DemoConfig
from lorasmith.demo import COLORS, THINGS


def test_a_second_demo_takes_the_next_free_folder(tmp_path: Path) -> None:
    wanted = tmp_path / "demo"
    for expected in ("demo", "demo-2", "demo-3"):
        folder = demo.free_folder(wanted)
        assert folder == tmp_path / expected
        folder.mkdir()
        assert demo.free_folder(wanted) == folder  # empty: a demo that was stopped early
        (folder / "before-after.png").touch()


def test_a_file_in_the_folders_place_is_a_mistake_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    assert main(["demo", "--output", str(tmp_path / "file")]) == 2
    assert "is a file; give a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_wishes_go_round_the_things_with_two_different_colours() -> None:
    wishes = demo.wishes(range(1440))
    assert [wish.thing for wish in wishes[:16]] == list(THINGS)
    assert all(wish.color != wish.ground for wish in wishes)
    assert len(set(wishes)) == 1440
    assert {wish.color for wish in wishes[:48]} == {wish.ground for wish in wishes[:48]} == set(COLORS)


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 400])
def test_any_number_of_steps_makes_a_command_that_train_takes(tmp_path: Path, steps: int) -> None:
    own = tmp_path / "regularization" / "1_thing"
    own.mkdir(parents=True)
    demo.Image.new("RGB", (128, 128)).save(own / "0.png")
    command = demo.train_command(tmp_path, DemoConfig(steps=steps))
    assert main([*command, "--dry-run"]) == 0


def test_nothing_that_is_scored_was_drawn_as_regularization(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        demo, "draw", lambda _, prompts, *rest, **options: [demo.Image.new("RGB", (8, 8))] * len(prompts)
    )
    demo.write_regularization(demo.load_base(), tmp_path, 0)
    captions = {path.read_text(encoding="utf-8").strip() for path in tmp_path.glob("*/*.txt")}
    assert len(captions) == 96
    assert not captions & {wish.prompt for wish in demo.wishes(range(900))}


@pytest.mark.skipif(sys.platform == "win32", reason="the console tells both processes there")
def test_a_stop_reaches_the_training_once_and_its_exit_code_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child stands in for the training: it asks its parent to be stopped, and ends as the training does."""
    program = tmp_path / "child.py"
    program.write_text(
        "import os, signal, sys, time\n"
        "def end(number, frame):\n"
        "    print('stopped', file=open('stops', 'a'))\n"
        "    time.sleep(1.5)\n"  # a second signal would be noted in this time
        "    sys.exit(128 + number)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    start = subprocess.Popen
    monkeypatch.setattr(demo.subprocess, "Popen", lambda _, **options: start([sys.executable, str(program)], **options))
    assert demo.run_training(["train"]) == 128 + signal.SIGTERM
    assert (tmp_path / "stops").read_text(encoding="utf-8") == "stopped\n"
