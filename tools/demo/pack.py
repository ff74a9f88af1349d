"""Packs the three parts into one file in Stable Diffusion v1's layout, in fp16.

python tools/demo/pack.py --unet unet-2.pt --text text.pt --vae vae.pt --output sd1-mini.safetensors
"""

import argparse
import json
from pathlib import Path

import recipe
import torch
from draw import SIZE
from torch import Tensor
from unet import unet_average

from lorasmith.checkpoint import write_safetensors
from lorasmith.models.keys.sd import to_ldm

_ARCHITECTURE = {
    "unet_heads": recipe.HEADS,
    "unet_norm_groups": recipe.NORM_GROUPS,
    "vae_norm_groups": recipe.NORM_GROUPS,
    "text_heads": recipe.HEADS,
    "resolution": SIZE,
}
METADATA = {
    "lorasmith.architecture": json.dumps(_ARCHITECTURE),
    "license": "Apache-2.0",
    "modelspec.title": "lorasmith embedded miniature of Stable Diffusion v1",
}


def pack(unet: Path, text: Path, vae: Path, output: Path) -> None:
    """Write the model.

    Args:
        unet: a checkpoint of `unet.py`, of which the moving average is taken.
        text, vae: weights as `text.py` and `vae.py` write them.
    """
    parts = (unet_average(unet), torch.load(vae), torch.load(text))
    write_safetensors(output, to_ldm(*(_half(part) for part in parts)), METADATA)


def _half(part: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.half() for name, tensor in part.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for part in ("unet", "text", "vae", "output"):
        parser.add_argument(f"--{part}", type=Path, required=True)
    pack(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
