"""stable-diffusion.cpp applies every tensor of our file and draws another picture with it (full size: 2 GB, slow)."""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lorasmith.adapters.lora import LoRA
from lorasmith.cli import main
from lorasmith.formats import kohya
from tests.clients import full_size_sd1
from tests.clients.golden import layer_shapes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("cyllama") is None,
        reason="stable-diffusion.cpp is not installed: pip install cyllama==0.2.18 (extra `clients`)",
    ),
]

DRAW = Path(__file__).parent / "sdcpp_draw.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("sd1") / "full.safetensors"
    full_size_sd1.write(path)
    yield path
    path.unlink()  # pytest keeps the folders of three runs


def make_lora() -> dict[str, Tensor]:
    """A LoRA of all 264 layers, strong enough to be seen."""
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for name, shape in layer_shapes("sd1").items():
        adapter = LoRA(shape, rank=4, alpha=2)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        tensors |= {f"{name}.{key}": value for key, value in adapter.state_dict().items()}
    return tensors


def draw(checkpoint: Path, picture: Path, *lora: Path) -> tuple[np.ndarray, str]:
    """Return the picture, (64, 64, 3) in grey levels, and the client's log."""
    command = [sys.executable, str(DRAW), str(checkpoint), str(picture), *map(str, lora)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=900, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return np.asarray(Image.open(picture).convert("RGB")).astype(int), result.stdout


def applied(log: str) -> tuple[int, int]:
    """Return the client's own count: (tensors applied, tensors in the file)."""
    found = re.findall(r"\((\d+) / (\d+)\) LoRA tensors have been applied", log)
    assert len(found) == 1, log[-2000:]
    return int(found[0][0]), int(found[0][1])


def test_every_tensor_is_applied_and_the_picture_changes(checkpoint: Path, tmp_path: Path) -> None:
    tensors = make_lora()
    kohya.write(tmp_path / "ours.safetensors", tensors, {"ss_output_name": "ours"})
    base, log = draw(checkpoint, tmp_path / "base.png")
    assert "LoRA tensors have been applied" not in log
    assert base.std() > 5  # a picture, not one colour: NaN would be black
    adapted, log = draw(checkpoint, tmp_path / "lora.png", tmp_path / "ours.safetensors")
    assert applied(log) == (792, 792)
    assert np.abs(adapted - base).mean() > 1

    misspelt = {key.replace("_text_model_encoder_", "_encoder_"): value for key, value in tensors.items()}
    kohya.write(tmp_path / "misspelt.safetensors", misspelt, {})
    _, log = draw(checkpoint, tmp_path / "misspelt.png", tmp_path / "misspelt.safetensors")
    assert (
        applied(log)[0] == 3 * 192
    )  # the count does notice: names as transformers >= 5.6 has them reach the U-Net only


def test_a_merged_checkpoint_draws_what_the_lora_draws(checkpoint: Path, tmp_path: Path) -> None:
    lora, merged = tmp_path / "ours.safetensors", tmp_path / "merged.safetensors"
    kohya.write(lora, make_lora(), {})
    assert main(["merge", "--model", str(checkpoint), "--lora", str(lora), "--output", str(merged)]) == 0
    attached, _ = draw(checkpoint, tmp_path / "attached.png", lora)
    found, log = draw(merged, tmp_path / "merged.png")
    merged.unlink()
    assert "LoRA tensors have been applied" not in log
    base, _ = draw(checkpoint, tmp_path / "base.png")
    assert np.abs(attached - base).mean() > 1
    difference = np.abs(found - attached)
    assert difference.max() <= 2 and difference.mean() < 0.1, (difference.max(), difference.mean())  # of 255 levels


def test_a_model_written_back_from_a_diffusers_folder_draws_the_same(checkpoint: Path, tmp_path: Path) -> None:
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    assert main(["convert", str(checkpoint), "--to", "diffusers", "--output", str(folder)]) == 0
    assert main(["convert", str(folder), "--to", "checkpoint", "--output", str(back)]) == 0
    shutil.rmtree(folder)  # 2 GB
    before, _ = draw(checkpoint, tmp_path / "before.png")
    after, _ = draw(back, tmp_path / "after.png")
    back.unlink()
    assert before.std() > 5 and np.array_equal(before, after)
