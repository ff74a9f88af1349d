"""diffusers loads our file and gets our delta for every one of the modules.

The models here are diffusers' and transformers' own, and the layers are found by their own paths, so this shares
nothing with the key tables of ours but the golden names.
"""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from transformers import CLIPTextConfig, CLIPTextModel

from lorasmith.formats import kohya
from lorasmith.network import Network, Rule
from tests.clients.golden import layer_shapes, tensor_shapes

NUM_MODULES = {"sd1": 264, "sd2": 330}
TEXT_WIDTH = 24


def make_unet(family: str) -> Any:
    """A U-Net with all of the family's blocks, narrow."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 16, 32, 32), norm_num_groups=8, attention_head_dim=4, cross_attention_dim=TEXT_WIDTH,
        use_linear_projection=family == "sd2",
    )  # fmt: skip
    return unet.eval().requires_grad_(False)


def make_text_encoder(family: str) -> Any:
    """A text encoder as deep as the family's, narrow."""
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=100, hidden_size=TEXT_WIDTH, intermediate_size=48, num_attention_heads=4,
        num_hidden_layers={"sd1": 12, "sd2": 23}[family], bos_token_id=98, eos_token_id=99,
    )  # fmt: skip
    return CLIPTextModel(config).eval().requires_grad_(False)


def make_pipeline(family: str) -> Any:
    """diffusers' pipeline of both."""
    make: Any = StableDiffusionPipeline
    return make(
        unet=make_unet(family), text_encoder=make_text_encoder(family), vae=None, tokenizer=None,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def saved_name(part: str, path: str) -> str:
    """Spell a module's path as sd-scripts does, whether or not transformers still has `text_model` in it."""
    path = path if part == "unet" else f"text_model.{path.removeprefix('text_model.')}"
    return f"lora_{'te' if part == 'text_encoder' else part}_{path.replace('.', '_')}"


def find_targets(family: str, unet: Any, text_encoder: Any) -> dict[str, Any]:
    parts = {"unet": unet, "text_encoder": text_encoder}
    every = {saved_name(part, path): module for part, model in parts.items() for path, module in model.named_modules()}
    return {name: every[name] for name in layer_shapes(family)}


@pytest.fixture(scope="module", params=NUM_MODULES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def ours(family: str) -> Network:
    """A trained-looking network on models of ours, not attached."""
    network = Network.create(
        find_targets(family, make_unet(family), make_text_encoder(family)), [Rule(rank=4, alpha=3.0)], seed=5
    )
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network


@pytest.fixture(scope="module")
def file(ours: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "last.safetensors"
    kohya.write(path, ours.state_dict(), {"ss_network_dim": "4"}, precision="float")
    return path


@pytest.fixture(scope="module")
def theirs(family: str, file: Path) -> Any:
    """diffusers' pipeline with our file loaded."""
    pipeline = make_pipeline(family)
    pipeline.load_lora_weights(file, adapter_name="ours")
    return pipeline


def test_the_file_has_the_golden_names_and_numbers_of_dimensions(family: str, file: Path) -> None:
    found = {key: value.dim() for key, value in safetensors.torch.load_file(file).items()}
    golden = {key: len(shape) for key, shape in tensor_shapes(family).items()}
    assert found == golden
    assert len(golden) == 3 * NUM_MODULES[family]


def test_every_module_gets_our_delta(family: str, ours: Network, theirs: Any) -> None:
    deltas = {
        saved_name(part, path): module.get_delta_weight("ours")
        for part in ("unet", "text_encoder")
        for path, module in getattr(theirs, part).named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert deltas.keys() == ours.adapters.keys() and len(deltas) == NUM_MODULES[family]
    for name, adapter in ours.adapters.items():
        expected = adapter.delta(deltas[name])
        torch.testing.assert_close(
            deltas[name], expected, atol=1e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
        assert expected.abs().max() > 0.01


def test_the_models_give_the_same_results(family: str, file: Path, theirs: Any) -> None:
    unet, text_encoder = make_unet(family), make_text_encoder(family)
    tokens = torch.arange(1, 13)[None]
    plain = text_encoder(tokens).last_hidden_state
    network = Network.load(find_targets(family, unet, text_encoder), kohya.read(file).tensors)
    network.attach()
    text = text_encoder(tokens).last_hidden_state
    torch.testing.assert_close(theirs.text_encoder(tokens).last_hidden_state, text, atol=1e-4, rtol=1e-4)
    assert (text - plain).abs().max() > 0.1
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    prediction = unet(x, t, text).sample
    torch.testing.assert_close(theirs.unet(x, t, text).sample, prediction, atol=1e-3, rtol=1e-3)
