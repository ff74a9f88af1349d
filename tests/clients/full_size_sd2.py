"""A random Stable Diffusion v2 of full size in the original single-file layout, for clients that take no miniature.

U-Net and VAE are diffusers' own modules of the published widths, under the names of our key tables.
"""

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from lorasmith.models.keys import sd as keys
from tests.tiny import make_empty

WIDTH = 1024  # of OpenCLIP's text encoder
LAST = f"{keys.OPENCLIP}transformer.resblocks.{keys.NUM_OPENCLIP_LAYERS - 1}."


def write(path: Path) -> None:
    """Write the checkpoint, 2.6 GB of fp16: weights as torch draws them, norms that change nothing."""
    generator = torch.Generator().manual_seed(0)
    empty = make_empty("sd2", (320, 640, 1280, 1280), (128, 256, 512, 512), WIDTH)
    parts = [{name: _random(name, t.shape, generator) for name, t in part.state_dict().items()} for part in empty]
    tensors = keys.to_ldm(*parts)
    before = LAST.replace(".23.", ".22.")
    tensors |= {name.replace(before, LAST): t.clone() for name, t in tensors.items() if name.startswith(before)}
    tensors[f"{keys.OPENCLIP}text_projection"] = torch.eye(WIDTH).half()
    tensors[f"{keys.OPENCLIP}logit_scale"] = torch.tensor(4.6).half()
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.full(shape, float(name.endswith("weight")), dtype=torch.float16)
    return (torch.randn(shape, generator=generator) * shape[1:].numel() ** -0.5).half()
