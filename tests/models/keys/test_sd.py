"""The tables name every tensor of a full-size model once, and undo each other."""

from pathlib import Path

import pytest
import torch

from lorasmith.models.keys import sd as keys
from lorasmith.models.keys.sd import Family
from tests.tiny import build_tiny, make_empty, openclip_rest

GOLDEN = Path(__file__).parents[2] / "golden"
FULL = ((320, 640, 1280, 1280), (128, 256, 512, 512))
FULL_TEXT_WIDTH = {"sd1": 768, "sd2": 1024}
FAMILIES: list[Family] = ["sd1", "sd2"]


def golden_tensors(family: str) -> dict[str, str]:
    """Return name -> shape as printed, of a real sd-scripts LoRA."""
    lines = (GOLDEN / f"lora_tensors_{family}.txt").read_text().splitlines()
    return dict(line.split("\t") for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_names_and_shapes_are_those_of_sd_scripts(family: Family) -> None:
    unet, _, text = make_empty(family, *FULL, FULL_TEXT_WIDTH[family])
    weights = {name: unet.get_parameter(f"{module}.weight") for name, module in keys.unet_targets().items()}
    weights |= {name: text.get_parameter(f"{module}.weight") for name, module in keys.text_targets(family).items()}
    rank, expected = 4, {}
    for name, weight in weights.items():
        outs, ins, *kernel = weight.shape
        expected[f"{name}.lora_down.weight"] = str((rank, ins, *kernel))
        expected[f"{name}.lora_up.weight"] = str((outs, rank, *kernel))
        expected[f"{name}.alpha"] = "()"
    assert len(weights) == {"sd1": 264, "sd2": 330}[family]
    assert expected == golden_tensors(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_tables_name_every_tensor_of_the_modules_and_none_twice(family: Family) -> None:
    tables = {
        "ldm": (keys.ldm_unet(), keys.ldm_vae(), keys.text_table(family, [])),
        "ema": (keys.ldm_unet(is_ema=True), keys.ldm_vae(""), keys.clip_text("", keys.NUM_TEXT_LAYERS[family])),
        "diffusers": (keys.diffusers_unet(), keys.diffusers_vae(), keys.diffusers_vae(is_old=True)),
    }
    unet, vae, text = make_empty(family, *FULL, FULL_TEXT_WIDTH[family])
    modules = {"ldm": (unet, vae, text), "ema": (unet, vae, text), "diffusers": (unet, vae, vae)}
    for kind, parts in tables.items():
        for table, module in zip(parts, modules[kind], strict=True):
            assert module.state_dict().keys() <= table.keys()
        places = [(source.name, source.part) for table in parts[:2] for source in table.values()]
        assert len(set(places)) == len(places)


@pytest.mark.parametrize("family, count", [("sd1", 1131), ("sd2", 1228)])
def test_a_file_taken_apart_and_put_together_is_the_same(family: Family, count: int) -> None:
    parts = [part.state_dict() for part in build_tiny(family)]
    stored = keys.to_ldm(*parts, kept=openclip_rest(family) | {"alphas_cumprod": torch.ones(3)})
    assert len(stored) == count + 1
    apart = keys.from_ldm(stored)
    for ours, original in zip((apart.unet, apart.vae, apart.text), parts, strict=True):
        assert ours.keys() == original.keys()
        assert all(torch.equal(ours[name], original[name]) for name in ours)
    again = keys.to_ldm(apart.unet, apart.vae, apart.text, apart.kept)
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) for name in stored)


def test_names_in_a_file_are_ldms_where_they_are_known_by_heart() -> None:
    unet = {module: source.name.removeprefix(keys.UNET) for module, source in keys.ldm_unet().items()}
    assert unet["down_blocks.1.attentions.0.proj_in.weight"] == "input_blocks.4.1.proj_in.weight"
    assert unet["down_blocks.2.downsamplers.0.conv.bias"] == "input_blocks.9.0.op.bias"
    assert unet["up_blocks.0.upsamplers.0.conv.weight"] == "output_blocks.2.1.conv.weight"
    assert unet["up_blocks.1.upsamplers.0.conv.weight"] == "output_blocks.5.2.conv.weight"
    assert keys.ema_name("model.diffusion_model.input_blocks.0.0.weight") == (
        "model_ema.diffusion_modelinput_blocks00weight"
    )
    vae = keys.ldm_vae()
    assert (
        vae["decoder.up_blocks.0.upsamplers.0.conv.weight"].name
        == "first_stage_model.decoder.up.3.upsample.conv.weight"
    )
    assert keys.text_targets("sd1")["lora_te_text_model_encoder_layers_11_mlp_fc1"] == "encoder.layers.11.mlp.fc1"
