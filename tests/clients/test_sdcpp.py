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
from lorasmith.formats.dialects import by_layer
from tests.clients import full_size_sd1, full_size_sd2
from tests.clients.golden import layer_shapes
from tests.formats import writers
from tests.formats.test_dialects import ldm

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


def make_lora(family: str = "sd1") -> dict[str, Tensor]:
    """A LoRA of all of the family's layers, strong enough to be seen."""
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for name, shape in layer_shapes(family).items():
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


def spell(name: str, path: Path, layers: writers.Layers) -> Path:
    """Write the layers as another program spells them."""
    if name == "peft":
        for part, start in (("unet", "lora_unet_"), ("text_encoder", "lora_te_")):
            own = {layer: tensors for layer, tensors in layers.items() if layer.startswith(start)}
            writers.peft(path / part, own, {"lora_alpha": 4, "r": 4})
        return path
    write = {
        "diffusers": writers.diffusers,
        "0.21": writers.diffusers_021,
        "ldm": ldm,
        "lycoris": lambda file, own: writers.renamed(file, own, "^lora_(unet|te)_", "lycoris_"),
        "broken names": lambda file, own: writers.renamed(file, own, "_te_text_model_", "_te_"),
        "cloneofsimo": writers.cloneofsimo_colons,
    }[name]
    return write(path.with_suffix(".safetensors"), layers)


def test_what_is_converted_from_every_dialect_draws_what_its_merged_checkpoint_draws(
    checkpoint: Path, tmp_path: Path
) -> None:
    layers = {
        name: {tail: tensor.half() for tail, tensor in own.items() if tail != "alpha"}  # alpha = rank in all of them
        for name, own in by_layer(make_lora()).items()
    }
    listed = {name for part in ("unet", "text_encoder") for name in writers.first_programs_names(part)}
    few = {name: own for name, own in layers.items() if name in listed}
    for own, spellings in ((layers, ["diffusers", "0.21", "peft", "ldm", "lycoris", "broken names"]),
                           (few, ["cloneofsimo"])):  # fmt: skip
        lora, merged = writers.kohya(tmp_path / "lora.safetensors", own), tmp_path / "merged.safetensors"
        assert main(["merge", "--model", str(checkpoint), "--lora", str(lora), "--output", str(merged)]) == 0
        expected, _ = draw(merged, tmp_path / "merged.png")
        merged.unlink()
        for name in spellings:
            source, mended = spell(name, tmp_path / name, own), tmp_path / f"{name}-kohya.safetensors"
            assert main(["convert", str(source), "--output", str(mended)]) == 0
            found, log = draw(checkpoint, tmp_path / "found.png", mended)
            assert applied(log) == (3 * len(own), 3 * len(own)), name
            assert np.abs(found - expected).max() <= 2, name


def test_sd2_of_full_size(tmp_path: Path) -> None:
    """SD2 in the original form, written back from a folder: OpenCLIP's names and the 24th layer; and a LoRA on it."""
    one, folder, back = tmp_path / "sd2.safetensors", tmp_path / "folder", tmp_path / "back.safetensors"
    full_size_sd2.write(one)
    before, _ = draw(one, tmp_path / "before.png")
    predicts = ["--prediction", "v_prediction"]
    assert main(["convert", str(one), "--to", "diffusers", "--output", str(folder), *predicts]) == 0
    one.unlink()  # 2.6 GB
    assert main(["convert", str(folder), "--to", "checkpoint", "--output", str(back)]) == 0
    shutil.rmtree(folder)
    after, _ = draw(back, tmp_path / "after.png")
    assert before.std() > 5 and np.array_equal(before, after)
    lora = tmp_path / "lora.safetensors"
    kohya.write(lora, make_lora("sd2"), {})
    attached, log = draw(back, tmp_path / "attached.png", lora)
    back.unlink()
    assert applied(log) == (990 - 3 * 69, 990)  # it keeps OpenCLIP's query, key and value in one, and leaves these out
    assert np.abs(attached - before).mean() > 1
