"""The table of programs: whole, and where a program is installed, true."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorasmith.formats import clients
from lorasmith.formats.dialects import DIALECTS, read_any
from tests.clients.test_diffusers import make_pipeline
from tests.formats import writers

LAYERS = writers.make_layers(only="unet_mid.*attn1|te.*layers_0_.*self_attn")
LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def test_every_row_speaks_of_every_program() -> None:
    assert {len(row) for row in clients._TABLE.values()} == {len(clients.CLIENTS)}
    assert set("".join(clients._TABLE.values())) <= clients._SHORT.keys()
    assert set(clients._SHORT.values()) == clients.VERDICTS.keys()
    assert clients._DIALECT_TRAITS.keys() == DIALECTS.keys()
    assert {*clients._DIALECT_TRAITS.values(), *clients._TRAITS} <= clients._TABLE.keys()


def test_the_worst_trait_decides(tmp_path: Path) -> None:
    path = writers.renamed(tmp_path / "a.safetensors", LAYERS, "_te_text_model_", "_te_")
    found = clients.verdicts(read_any(path))
    assert found["diffusers"] == clients.Verdict("ok", ())
    assert found["ComfyUI"] == clients.Verdict("part", ("text encoder without text_model",))


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_magnitudes_count_with_any_kind(tmp_path: Path, kind: str) -> None:
    own = {**KINDS[kind], "dora_scale": torch.rand(32, 1)}
    found = clients.verdicts(read_any(writers.kohya(tmp_path / "a.safetensors", {LAYER: own})))
    assert found["stable-diffusion.cpp"] == clients.Verdict("wrong", ("DoRA",))
    assert found["ComfyUI"] == clients.Verdict("ok", ())


def factors(**tensors: tuple[int, ...]) -> dict[str, Tensor]:
    return {name.replace("__", "."): torch.rand(shape) for name, shape in tensors.items()}


LORA = {"lora_down__weight": (2, 32), "lora_up__weight": (32, 2)}
KINDS = {
    "LoRA": factors(**LORA, alpha=()),
    "Tucker LoCon": factors(**LORA, lora_mid__weight=(2, 2), alpha=()),
    "DoRA": factors(**LORA, dora_scale=(32, 1), alpha=()),
    "LoHa": factors(hada_w1_a=(32, 2), hada_w1_b=(2, 32), hada_w2_a=(32, 2), hada_w2_b=(2, 32), alpha=()),
    "LoKr": factors(lokr_w1=(4, 4), lokr_w2=(8, 8), alpha=()),
    "full": factors(diff=(32, 32)),
    "OFT": factors(oft_blocks=(4, 8, 8), alpha=()),
    "BOFT": factors(oft_blocks=(2, 4, 8, 8), alpha=()),
    "IA3": factors(weight=(32,), on_input=()),
    "GLoRA": factors(a1__weight=(2, 32), a2__weight=(32, 2), b1__weight=(2, 32), b2__weight=(32, 2), alpha=()),
    "norm": factors(w_norm=(32,), b_norm=(32,)),
}


@pytest.fixture(scope="module")
def pipeline() -> object:
    return make_pipeline("sd1")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [LAYER, "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"])
def test_diffusers_refuses_what_the_table_says(tmp_path: Path, pipeline: object, kind: str, layer: str) -> None:
    path = writers.kohya(tmp_path / "a.safetensors", {layer: KINDS[kind]})
    verdict = clients.verdicts(read_any(path))["diffusers"].verdict
    try:
        pipeline.load_lora_weights(path, adapter_name="x")  # type: ignore[attr-defined]
    except Exception:
        assert verdict == "refused"
    else:
        pipeline.unload_lora_weights()  # type: ignore[attr-defined]
        assert verdict in ("ok", "wrong")
