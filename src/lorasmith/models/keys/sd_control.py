"""Names in files of ControlNets for Stable Diffusion 1 and 2, as data.

A ControlNet is a copy of the U-Net's way down and middle, under the U-Net's names, with layers of its own.
"""

from lorasmith.models.keys import sd as keys
from lorasmith.models.keys.sd import Source, Table

PREFIXES = ("control_model.", "")  # of original files: beside the whole model or cut out of it, and without one
_SHARED = ("time_embedding.", "conv_in.", "down_blocks.", "mid_block.")
_NUM_BLOCKS = 6  # of the picture's encoder, between the first layer and the last
_NUM_DOWN = keys.NUM_LEVELS * (keys.NUM_LAYERS + 1)  # what the U-Net hands over on the way down

_OWN = {
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    **{f"controlnet_cond_embedding.blocks.{n}": f"input_hint_block.{2 * n + 2}" for n in range(_NUM_BLOCKS)},
    "controlnet_cond_embedding.conv_out": f"input_hint_block.{2 * _NUM_BLOCKS + 2}",
    **{f"controlnet_down_blocks.{n}": f"zero_convs.{n}.0" for n in range(_NUM_DOWN)},
    "controlnet_mid_block": "middle_block_out.0",
}
PICTURE_LAYERS = ("conv_in", *(f"blocks.{n}" for n in range(1, _NUM_BLOCKS, 2)))  # where its channels become more


def original(prefix: str) -> Table:
    """Return the table for files that name layers as lllyasviel's do, below one of `PREFIXES`."""
    shared = {module: source.name.removeprefix(keys.UNET) for module, source in keys.ldm_unet().items()}
    names = {module: name for module, name in shared.items() if module.startswith(_SHARED)}
    names |= {f"{ours}.{end}": f"{theirs}.{end}" for ours, theirs in _OWN.items() for end in ("weight", "bias")}
    return {module: Source(prefix + name) for module, name in names.items()}


def diffusers() -> Table:
    """Return the table for diffusers' folders and files."""
    return {module: Source(module) for module in original("")}
