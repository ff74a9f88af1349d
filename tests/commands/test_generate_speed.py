"""`lorasmith generate` compiled and with channels last: the same pictures, whichever LoRAs come and go between them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from lorasmith import merging, model_families, speed
from lorasmith.cli import main
from lorasmith.config import GenerateConfig
from lorasmith.models.embeddings import NO_EMBEDDINGS
from lorasmith.picture_run import drawing
from tests.commands.test_generate import write_lora
from tests.tiny import write_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "mini.safetensors", resolution=64)


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(tmp_path_factory.mktemp("loras") / "robot.safetensors", base)


def draw(base: Path, lora: Path, output: Path, *options: str) -> list[Any]:
    """Draw without the LoRA, with it, and without it again."""
    prompts = ["a cat <lora:robot:0>", "a cat", "a cat <lora:robot:0>"]
    common = ["--base", str(base), "--output", str(output), "--steps", "1", "--seed", "7", "--device", "cpu"]
    assert main(["generate", *prompts, "--lora", str(lora), *common, *options]) == 0
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(output.iterdir())]


def difference(one: list[Any], other: list[Any]) -> int:
    """Largest difference in grey levels."""
    return max(int(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


@pytest.mark.slow
def test_compiled_pictures_are_the_same_and_loras_come_and_go(
    base: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch records is run as it is recorded: making code of it would take many minutes."""
    expected = draw(base, lora, tmp_path / "expected")
    monkeypatch.setattr(speed, "BACKEND", "eager")
    torch.compiler.reset()
    compiled = draw(base, lora, tmp_path / "compiled", "--compile")
    assert difference(expected, compiled) <= 1
    assert difference(expected[:1], expected[2:]) == 0 and difference(compiled[:1], compiled[2:]) == 0
    assert difference(expected[:1], expected[1:2]) > 5


def test_what_is_compiled_and_how(base: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRAs are folded then: compiled code does not notice the hooks of attached ones."""
    compiled, folded, applied = list[Any](), list[bool](), merging.applied

    def watch(*args: Any, is_folded: bool, **options: Any) -> Any:
        folded.append(is_folded)
        return applied(*args, is_folded=is_folded, **options)

    monkeypatch.setattr(merging, "applied", watch)
    expected = draw(base, lora, tmp_path / "expected")
    assert not any(folded)
    monkeypatch.setattr(nn.Module, "compile", lambda part, **options: compiled.append((type(part).__name__, options)))
    found = draw(base, lora, tmp_path / "compiled", "--compile")
    assert compiled == [("UNet2DConditionModel", {"backend": "inductor", "mode": None})]
    assert all(folded[3:]) and difference(expected, found) <= 1


def test_where_nothing_can_be_compiled_it_is_told(
    base: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise TorchDynamoException("InvalidCxxCompiler: No working C++ compiler found\nand more")

    monkeypatch.setattr(nn.Module, "compile", lambda part, **_: part.register_forward_pre_hook(fail))
    command = ["generate", "a cat", "--base", str(base), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*command, "--compile"]) == 2
    error = capsys.readouterr().err
    assert "--compile: torch cannot compile the U-Net here" in error and "No working C++ compiler found)" in error
    assert "Traceback" not in error


def test_channels_last_draws_the_same(base: Path, lora: Path, tmp_path: Path) -> None:
    expected = draw(base, lora, tmp_path / "expected")
    for number, options in enumerate([("--channels-last",), ("--channels-last", "--fold")]):
        assert difference(expected, draw(base, lora, tmp_path / f"last{number}", *options)) <= 1


@pytest.mark.parametrize(
    "device, asked, expected",
    [("cuda", None, True), ("cpu", None, False), ("mps", None, False), ("cuda", False, False), ("cpu", True, True)],
)
def test_channels_are_last_on_a_gpu_unless_said_otherwise(
    device: str, asked: bool | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = nn.Module()
    model.denoiser, model.vae = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    monkeypatch.setattr(model_families, "load", lambda *_, **__: model)
    monkeypatch.setattr(drawing, "set_attention", lambda *_: None)
    net = nn.Conv2d(4, 4, 3)
    facts: Any = SimpleNamespace(prediction="epsilon")
    checkpoint: Any = None
    loaded = drawing.Base(checkpoint, facts, NO_EMBEDDINGS, [], "fp32", torch.device(device))
    drawing.load(GenerateConfig(channels_last=asked), loaded, [net])
    for part in (model.denoiser, model.vae, net):
        assert part.weight.is_contiguous(memory_format=torch.channels_last) == expected
