"""The embedded model's scripts: the whole chain makes a file like the shipped one, and goes on where it was stopped."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lorasmith
from lorasmith.checkpoint import open_checkpoint

BUILD = Path(__file__).parents[2] / "tools" / "demo" / "build.py"
SHIPPED = Path(lorasmith.__file__).parent / "demo" / "sd1-mini.safetensors"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    build(folder)
    return folder


def build(work: Path, *more: str) -> str:
    command = [sys.executable, str(BUILD), "--quick", "--work", str(work), "--output", str(work / "mini.safetensors")]
    done = subprocess.run([*command, "--threads", "1", *more], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def inside(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    with open_checkpoint(path) as checkpoint:
        return {name: (checkpoint.shape(name), checkpoint.dtype(name)) for name in checkpoint.names()}


def metadata(path: Path) -> dict[str, str]:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.metadata


def test_the_chain_makes_a_file_of_the_shipped_ones_names_shapes_and_types(work: Path) -> None:
    assert inside(work / "mini.safetensors") == inside(SHIPPED)
    assert metadata(work / "mini.safetensors") == metadata(SHIPPED)


@pytest.mark.slow
def test_only_what_is_missing_is_made_again_and_comes_out_the_same(work: Path) -> None:
    before = (work / "mini.safetensors").read_bytes()
    for name in ("latents-001.pt", "text.pt", "unet-2.pt", "mini.safetensors"):
        (work / name).unlink()
    output = build(work)
    assert [line for line in output.splitlines() if line.startswith("making")] == [
        "making latents-001.pt",
        "making text.pt",
        "making unet-2.pt",
    ]
    assert (work / "mini.safetensors").read_bytes() == before


@pytest.mark.slow
def test_a_unet_stopped_and_gone_on_with_is_the_one_trained_straight(work: Path, tmp_path: Path) -> None:
    stopped, straight = (Path(shutil.copytree(work, tmp_path / name)) for name in ("stopped", "straight"))
    (stopped / "unet-2.pt").unlink()
    (straight / "unet-2.pt").unlink()
    for steps in ("1", "2"):
        build(stopped, "--unet-steps", steps, "--unet-decay-from", "9")
    build(straight, "--unet-steps", "2", "--unet-decay-from", "9")
    assert torch.load(stopped / "unet-2.pt")["step"] == 2
    assert (stopped / "mini.safetensors").read_bytes() == (straight / "mini.safetensors").read_bytes()
    assert (stopped / "mini.safetensors").read_bytes() != (work / "mini.safetensors").read_bytes()
