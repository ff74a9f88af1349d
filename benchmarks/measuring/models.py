"""Random Stable Diffusion v1 models in single files: of a chosen width, or of full size."""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the tests build such models too

from lorasmith.models.keys import sd as keys
from tests.clients import full_size_sd1
from tests.tiny import make_empty


def write_model(path: Path, width: int, *, is_full: bool) -> Path:
    """Write a model with `width` channels, a multiple of 32, at the finest level; 320 is the real one's."""
    if is_full:
        full_size_sd1.write(path)
        return path
    widths = (width, 2 * width, 4 * width, 4 * width)
    first = max(1, round(width * 128 / 320 / 32)) * 32  # the VAE's proportion in the real model, in whole norm groups
    vae_widths = (first, 2 * first, 4 * first, 4 * first)
    parts: tuple[Any, ...] = make_empty("sd1", widths, vae_widths, text_width=width * 768 // 320 // 12 * 12)
    generator = torch.Generator().manual_seed(0)
    for part in parts:
        part.to_empty(device="cpu")
        for name, tensor in part.named_parameters():
            if tensor.dim() > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
            else:
                tensor.fill_(float(name.endswith("weight")))
        for name, buffer in part.named_buffers():
            buffer.copy_(torch.arange(77)[None] if name.endswith("position_ids") else torch.zeros_like(buffer))
    tensors = keys.to_ldm(*(part.state_dict() for part in parts), kept={})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    return path
