"""Alpha as PEFT's configuration and diffusers' header say it, beside PEFT's own arithmetic."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lorasmith.errors import UserError
from lorasmith.formats import peft
from lorasmith.formats.dialects import read_any
from tests.formats import writers

LAYERS = writers.make_layers(alpha=None, only="unet_mid.*(attn1|ff_net_2|proj_in)|te.*layers_1_.*k_proj")


class Tree(nn.Module):
    """Modules at any dotted place."""

    def put(self, name: str, module: nn.Module) -> None:
        first, _, rest = name.partition(".")
        if not rest:
            self.add_module(first, module)
            return
        if first not in self._modules:
            self.add_module(first, Tree())
        self.get_submodule(first).put(rest, module)  # type: ignore[operator]


@pytest.mark.parametrize("options", [
    {"r": 2, "lora_alpha": 8},
    {"r": 2, "lora_alpha": 8, "use_rslora": True},
    {"r": 2, "lora_alpha": 1, "alpha_pattern": {"to_q": 4, "ff.net.2": 6}},
    {"r": 2, "lora_alpha": 1, "alpha_pattern": {"mid_block.attentions.0.proj_in": 4, "k_proj": 3}},
])  # fmt: skip
def test_alpha_is_what_peft_takes(tmp_path: Path, options: dict[str, Any]) -> None:
    tree = Tree()
    for name in LAYERS:
        tree.put(writers.dotted(name).partition(".")[2], nn.Linear(4, 4))
    targets = [writers.dotted(name).partition(".")[2] for name in LAYERS]
    theirs = get_peft_model(tree, LoraConfig(target_modules=targets, **options))  # type: ignore[arg-type]
    wanted = {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in theirs.named_modules()
        if hasattr(module, "scaling")
    }
    read = read_any(writers.peft(tmp_path, LAYERS, options)).layers()
    header = {f"{part}.{name}": value for part in peft.PARTS for name, value in options.items()}
    told = read_any(
        writers.diffusers(tmp_path / "b.safetensors", LAYERS, {peft.HEADER_KEY: json.dumps(header)})
    ).layers()
    assert len(wanted) == len(LAYERS)
    for name, own in read.items():
        alpha = own.get("alpha", torch.tensor(2.0)).item()
        assert math.isclose(alpha / 2, wanted[writers.dotted(name).partition(".")[2]], rel_tol=1e-6), name
        assert told[name].keys() == own.keys() and told[name].get("alpha") == own.get("alpha")


def test_without_a_configuration_alpha_is_the_rank_and_that_is_said(tmp_path: Path) -> None:
    path = writers.peft(tmp_path, LAYERS, {})
    (tmp_path / "adapter_config.json").unlink()
    lora = read_any(path)
    assert not any(name.endswith(".alpha") for name in lora.tensors)
    assert "alpha = rank is assumed" in lora.notes[0]


@pytest.mark.parametrize("alpha", ["8", True, float("nan")])
def test_an_alpha_that_is_no_number_is_told(alpha: object) -> None:
    with pytest.raises(UserError, match="expected is a number"):
        peft.alpha_of(Path("a"), {"lora_alpha": alpha}, "lora_unet_x", 4)
