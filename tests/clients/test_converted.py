"""What `lorasmith convert` writes for diffusers and PEFT is applied by them, layer for layer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from lorasmith.cli import main
from lorasmith.formats import kohya
from lorasmith.network import Network, Rule
from tests.clients.test_diffusers import find_targets, make_pipeline, make_text_encoder, make_unet, saved_name


@pytest.fixture(scope="module")
def ours() -> Network:
    network = Network.create(
        find_targets("sd1", make_unet("sd1"), make_text_encoder("sd1")), [Rule(rank=4, alpha=3.0)], seed=5
    )
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network


@pytest.fixture(scope="module")
def lora(ours: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "last.safetensors"
    kohya.write(path, ours.state_dict(), {"ss_base_model_version": "sd_v1"}, precision="float")
    return path


def deltas(part: str, model: Any, adapter: str) -> dict[str, torch.Tensor]:
    return {
        saved_name(part, path.removeprefix("base_model.model.")): module.get_delta_weight(adapter)
        for path, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def assert_ours(found: dict[str, torch.Tensor], ours: Network) -> None:
    assert found.keys() == ours.adapters.keys()
    for name, adapter in ours.adapters.items():
        torch.testing.assert_close(found[name], adapter.delta(found[name]), atol=1e-6, rtol=1e-5)


def test_diffusers_applies_its_form(ours: Network, lora: Path, tmp_path: Path) -> None:
    file = tmp_path / "b.safetensors"
    assert main(["convert", str(lora), "--to", "diffusers", "--output", str(file)]) == 0
    pipeline = make_pipeline("sd1")
    pipeline.load_lora_weights(file, adapter_name="ours")
    parts = {part: getattr(pipeline, part) for part in ("unet", "text_encoder")}
    assert_ours({k: v for part, model in parts.items() for k, v in deltas(part, model, "ours").items()}, ours)


def test_peft_applies_its_form(ours: Network, lora: Path, tmp_path: Path) -> None:
    assert main(["convert", str(lora), "--to", "peft", "--output", str(tmp_path / "b")]) == 0
    found = {}
    for part, model in (("unet", make_unet("sd1")), ("text_encoder", make_text_encoder("sd1"))):
        found |= deltas(part, PeftModel.from_pretrained(model, str(tmp_path / "b" / part)), "default")
    assert_ours(found, ours)
