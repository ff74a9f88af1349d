"""Random LoRA files for tests of the tools, and what they do by the definition, read with nobody's help."""

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

TE = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
TO_K = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
PROJ_IN = "lora_unet_down_blocks_0_attentions_0_proj_in"
CONV = "lora_unet_up_blocks_1_resnets_0_conv1"
SHAPES: dict[str, tuple[int, ...]] = {TE: (24, 24), TO_K: (16, 24), PROJ_IN: (12, 12, 1, 1), CONV: (10, 8, 3, 3)}


def make_lora(
    shapes: Mapping[str, tuple[int, ...]] = SHAPES, *, rank: int = 4, alpha: float | None = 2.0, seed: int = 0
) -> dict[str, Tensor]:
    """Return random tensors as sd-scripts names them; without an alpha where it is None."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (out, width, *kernel) in shapes.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, width, *kernel, generator=generator) / 10
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, rank, *(1 for _ in kernel), generator=generator) / 10
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def write_lora(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write a foreign file."""
    safetensors.torch.save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    return path


def deltas_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return alpha / rank * up @ down of each layer as a matrix in fp64, from the definition."""
    found = {}
    for key, down in tensors.items():
        name, _, tail = key.partition(".")
        if tail == "lora_down.weight":
            up = tensors[f"{name}.lora_up.weight"].double().flatten(1)
            alpha = tensors.get(f"{name}.alpha", torch.tensor(float(len(down))))
            found[name] = alpha.double() / len(down) * (up @ down.double().flatten(1))
    return found


def ranks_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {key.partition(".")[0]: len(tensor) for key, tensor in tensors.items() if key.endswith("lora_down.weight")}


def read_lora(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safetensors.safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
