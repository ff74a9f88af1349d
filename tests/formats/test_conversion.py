"""Any LoRA through any two dialects is the same change, or is refused, or what is left out is named."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorasmith.config import ConvertConfig
from lorasmith.errors import UserError
from lorasmith.formats import conversion
from lorasmith.formats.dialects import DIALECTS, AnyLora, read_any
from tests.formats import writers

FORMS = [(to, suffix) for to, target in conversion.TARGETS.items() for suffix in target.suffixes if suffix != ".ckpt"]
NOT_IN_LISTS = re.compile(r"proj_(in|out)$|ff_net_2$|mlp|resnets|norm")
MORE = {  # what LyCORIS goes on besides
    "lora_unet_up_blocks_1_resnets_0_conv1": (6, 4, 3, 3), "lora_unet_down_blocks_0_downsamplers_0_conv": (4, 4, 3, 3),
    "lora_unet_mid_block_resnets_0_time_emb_proj": (4, 8), "lora_unet_conv_in": (8, 4, 3, 3),
}  # fmt: skip


def random_lora(seed: int) -> writers.Layers:
    """Layers of any ranks, alphas and number, of either family; half of them with all that a list needs."""
    dice = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: writers.narrow(family, name) for family in (dice.choice(["sd1", "sd2"]),)
              for name in writers.layer_shapes(family)} | MORE  # fmt: skip
    is_whole, share, has_alpha = dice.random() < 0.5, dice.random(), dice.random()
    layers: writers.Layers = {}
    for name, (out, into, *kernel) in shapes.items():
        if not (is_whole and not NOT_IN_LISTS.search(name)) and dice.random() > 0.1 + 0.5 * share:
            continue
        rank = dice.choice([1, 2, 3])
        layers[name] = {
            "lora_down.weight": torch.randn((rank, into, *kernel), generator=generator),
            "lora_up.weight": torch.randn((out, rank, *[1] * len(kernel)), generator=generator),
        }
        if dice.random() < has_alpha:
            layers[name]["alpha"] = torch.tensor(dice.choice([1.0, rank, 0.3, 16.0, -2.0]))
    return layers


def effects(layers: writers.Layers) -> dict[str, Tensor]:
    """Return what each layer's change makes of a random input, from the definition."""
    found = {}
    for name, own in sorted(layers.items()):
        up, down = own["lora_up.weight"].flatten(1).double(), own["lora_down.weight"].flatten(1).double()
        alpha = own["alpha"].double() if "alpha" in own else len(down)
        inputs = torch.randn(down.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found[name] = up @ (down @ inputs) * alpha / len(down)
    return found


def convert(lora: AnyLora, folder: Path, to: str, suffix: str) -> tuple[AnyLora, dict[str, str]] | None:
    """Return what was written, as read, and what was left out; None: it was refused, and nothing was written."""
    path = folder / f"{to}{suffix}"
    try:
        ready = conversion.prepare(lora, to, suffix, "float")
    except UserError as error:
        assert re.search(r"needs all of \d+ layers", str(error)) and not folder.exists(), error
        return None
    folder.mkdir()
    return conversion.write(path, to, ready), ready.left_out


def assert_same(found: AnyLora, expected: writers.Layers, left_out: dict[str, str]) -> None:
    assert not left_out.keys() & found.layers().keys()
    assert left_out.keys() | found.layers().keys() == expected.keys()
    made, wanted = effects(found.layers()), effects({name: expected[name] for name in found.layers()})
    torch.testing.assert_close(torch.cat([*made.values()]), torch.cat([*wanted.values()]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("first", FORMS)
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
def test_any_lora_through_any_two_dialects(
    tmp_path_factory: pytest.TempPathFactory, first: tuple[str, str], seed: int
) -> None:
    place, layers = tmp_path_factory.mktemp("any"), random_lora(seed)
    start = read_any(writers.kohya(place / "start.safetensors", layers))
    between = convert(start, place / "first", *first)
    if between is None:
        return
    assert_same(between[0], layers, between[1])
    second = random.Random(seed).sample(FORMS, 4)
    for number, form in enumerate(second):
        if (end := convert(between[0], place / str(number), *form)) is not None:
            assert_same(end[0], between[0].layers(), end[1])


def test_every_dialect_is_written_or_only_read() -> None:
    """What is not written are older spellings of forms that are."""
    assert {*conversion.TARGETS, "checkpoint"} == set(_choices(ConvertConfig.model_json_schema()))
    assert DIALECTS.keys() - conversion.TARGETS.keys() == {"diffusers-0.21", "diffusers-0.14", "list"}


def _choices(schema: dict[str, Any]) -> list[str]:
    return schema["properties"]["to"]["enum"]
