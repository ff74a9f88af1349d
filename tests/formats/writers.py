"""Files as other programs write them, made in code with nobody's help: the golden files of every dialect.

The layers are Stable Diffusion's own in number and kind, and narrow.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from tests.clients.golden import layer_shapes

Layers = dict[str, dict[str, Tensor]]
C, TEXT = 8, 768


def narrow(family: str, name: str) -> tuple[int, ...]:
    """Return a small weight shape for a layer, of the full layer's proportions where a reader looks at them."""
    text = {"sd1": 768, "sd2": 1024}[family]
    if name.startswith("lora_te"):
        return {"mlp_fc1": (16, text), "mlp_fc2": (text, 16)}.get(name[-7:], (text, text))
    kernel = (1, 1) if family == "sd1" and name.endswith(("proj_in", "proj_out")) else ()
    if name.endswith("ff_net_0_proj"):
        return (8 * C, C)
    if name.endswith("ff_net_2"):
        return (C, 4 * C)
    return (C, text if re.search("attn2_to_[kv]$", name) else C, *kernel)


def make_layers(family: str = "sd1", *, rank: int = 2, alpha: float | None = 1.0, only: str = "") -> Layers:
    """Return every LoRA layer of a family under sd-scripts' names, with random factors in fp16."""
    generator = torch.Generator().manual_seed(3)
    layers: Layers = {}
    for name in sorted(layer_shapes(family)):
        if not re.search(only, name):
            continue
        out, into, *kernel = narrow(family, name)
        layers[name] = {
            "lora_down.weight": torch.randn((rank, into, *kernel), generator=generator).half(),
            "lora_up.weight": torch.randn((out, rank, *kernel), generator=generator).half(),
        }
        if alpha is not None:
            layers[name]["alpha"] = torch.tensor(alpha).half()
    return layers


def flat(layers: Layers) -> dict[str, Tensor]:
    return {f"{name}.{tail}": tensor for name, own in layers.items() for tail, tensor in own.items()}


def dotted(name: str) -> str:
    """Spell a saved name with dots, by its words: an oracle of its own beside the key tables."""
    name = re.sub(r"^lora_te_text_model_", "text_encoder.text_model_", name)
    name = re.sub(r"^lora_unet_", "unet.", name)
    name = re.sub(
        r"(down_blocks|up_blocks|attentions|transformer_blocks|layers|net|to_out|resnets|samplers)_(\d+)",
        r"\1.\2",
        name,
    )
    return re.sub(r"(\d|blocks|text_model|attn[12]|ff|self_attn|mlp|encoder|mid_block)_(?=[a-z])", r"\1.", name)


def save(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({k: v.clone().contiguous() for k, v in tensors.items()}, str(path), dict(header or {}))
    return path


def kohya(path: Path, layers: Layers, header: Mapping[str, str] | None = None) -> Path:
    return save(path, flat(layers), header)


def renamed(path: Path, layers: Layers, pattern: str, replacement: str) -> Path:
    return save(path, {re.sub(pattern, replacement, key): value for key, value in flat(layers).items()})


def diffusers(path: Path, layers: Layers, header: Mapping[str, str] | None = None) -> Path:
    return save(path, two_factors(layers, "{}.lora_A.weight", "{}.lora_B.weight"), header)


def diffusers_021(path: Path, layers: Layers) -> Path:
    tensors = {}
    for name, own in layers.items():
        form = "lora_linear_layer" if name.startswith("lora_te") else "lora"
        tensors |= two_factors({name: own}, f"{{}}.{form}.down.weight", f"{{}}.{form}.up.weight")
    return save(path, tensors)


def diffusers_014(path: Path, layers: Layers) -> Path:
    tensors = {}
    for name, own in layers.items():
        found = re.fullmatch(r"(unet\..*attn\d)\.(to_q|to_k|to_v|to_out)(\.0)?", dotted(name))
        assert found, name
        form = f"{found[1]}.processor.{found[2]}_lora"
        tensors |= {f"{form}.down.weight": own["lora_down.weight"], f"{form}.up.weight": own["lora_up.weight"]}
    return save(path, tensors)


def peft(folder: Path, layers: Layers, config: Mapping[str, Any]) -> Path:
    tensors = two_factors(layers, "{}.lora_A.weight", "{}.lora_B.weight")
    save(
        folder / "adapter_model.safetensors", {"base_model.model." + k.partition(".")[2]: v for k, v in tensors.items()}
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder / "adapter_model.safetensors"


def two_factors(layers: Layers, down: str, up: str) -> dict[str, Tensor]:
    return {
        key: tensor
        for name, own in layers.items()
        for key, tensor in (
            (down.format(dotted(name)), own["lora_down.weight"]),
            (up.format(dotted(name)), own["lora_up.weight"]),
        )
    }


ATTN = ["to_q", "to_k", "to_v", "to_out_0"]


def first_programs_names(part: str, *, new_order: bool = False, depth: int = 12) -> list[str]:
    """Return the order in which cloneofsimo's program met the layers, spelled out here once more."""
    if part == "text_encoder":
        return [
            f"lora_te_text_model_encoder_layers_{n}_self_attn_{x}_proj"
            for n in range(depth)
            for x in ("k", "v", "q", "out")
        ]
    blocks = [f"down_blocks_{i}_attentions_{j}" for i in range(3) for j in range(2)]
    blocks += [f"up_blocks_{i}_attentions_{j}" for i in (1, 2, 3) for j in range(3)] + ["mid_block_attentions_0"]
    one, two, middle = [f"attn1_{x}" for x in ATTN], [f"attn2_{x}" for x in ATTN], ["ff_net_0_proj"]
    order = [*one, *two, *middle] if new_order else [*one, *middle, *two]
    return [f"lora_unet_{block}_transformer_blocks_0_{x}" for block in blocks for x in order]


def cloneofsimo_list(path: Path, layers: Layers, part: str, *, new_order: bool = False) -> Path:
    names = first_programs_names(part, new_order=new_order)
    factors = [layers[name][f"lora_{half}.weight"] for name in names for half in ("up", "down")]
    torch.save(factors, path)
    return path


def cloneofsimo_colons(path: Path, layers: Layers, *, new_order: bool = False) -> Path:
    tensors, header = {}, {}
    for part in ("unet", "text_encoder"):
        header[part] = json.dumps(["CrossAttention", "GEGLU"])
        for number, name in enumerate(first_programs_names(part, new_order=new_order)):
            tensors |= {f"{part}:{number}:{half}": layers[name][f"lora_{half}.weight"] for half in ("up", "down")}
            header[f"{part}:{number}:rank"] = "2"
    return save(path, tensors, header)
