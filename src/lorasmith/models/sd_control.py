"""ControlNets (Zhang et al. 2023, arXiv:2302.05543) for Stable Diffusion 1 and 2: checked against the base, and loaded.

They come as diffusers' folders and files, and as lllyasviel's, alone or with a whole model beside them. A ControlNet is
a copy of a U-Net's way down, so what its shapes do not tell, heads and norm groups, is as the base model has it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorasmith.checkpoint import Checkpoint
from lorasmith.errors import UserError
from lorasmith.models import sd
from lorasmith.models.base import Conditioning, ControlNet, ModelFacts, Residuals
from lorasmith.models.keys import sd as keys
from lorasmith.models.keys import sd_control
from lorasmith.models.keys.sd import Family, Shape, Table

if TYPE_CHECKING:
    from diffusers.models.controlnets.controlnet import ControlNetModel

_CONTEXT = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
_PROJECTION = "down_blocks.0.attentions.0.proj_in.weight"
_FIRST = "conv_in.weight"
_DIFFERENCE = "difference"  # a tensor that marks a file of differences from a model's U-Net (extracted by kohya-ss)
_PICTURE = "controlnet_cond_embedding.conv_in.weight"


class StableDiffusionControl(ControlNet):
    """A ControlNet for Stable Diffusion 1 or 2."""

    def __init__(self, net: "ControlNetModel") -> None:
        super().__init__()
        self.net: Any = net
        self.is_conditional_only = bool(net.config["global_pool_conditions"])

    @torch.no_grad()
    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning, picture: Tensor) -> Residuals:
        """Return what is to be added on the way down, and last in the middle, each (B, C, h, w) in the net's dtype."""
        dtype, device = self.net.dtype, self.net.device
        down, middle = self.net(
            x_t.to(device, dtype),
            t.to(device),
            encoder_hidden_states=cond["text"].to(device, dtype),
            controlnet_cond=picture.to(device, dtype),
            return_dict=False,
        )
        return [*down, middle]


def check(checkpoint: Checkpoint, base: Path, facts: ModelFacts) -> None:
    """Check from the header that this is a ControlNet for the base model.

    Raises:
        UserError: it is none, or for another model.
    """
    shapes = _shapes(checkpoint)
    table = _find_table(shapes)
    if table is None:
        raise UserError(
            f"{checkpoint.path} is no ControlNet for Stable Diffusion 1.x or 2.x; give one as lllyasviel's file or "
            "diffusers' folder. (T2I adapters, ControlNet-LLLite, and ControlNets of other models are not.)"
        )
    own = keys.shapes(table, shapes)
    family: Family = "sd2" if len(own[_PROJECTION]) == 2 else "sd1"
    if family != facts.family:
        raise UserError(
            f"{checkpoint.path} is a ControlNet for {keys.TITLES[family]} (its cross-attention is {own[_CONTEXT][1]} "
            f"wide), and {base} is {facts.title} ({facts.text_width}); give the one for the base model's family."
        )
    widths, expected = (own[_FIRST][0], own[_CONTEXT][1]), (facts.width, facts.text_width)
    if widths != expected:
        raise UserError(
            f"{checkpoint.path} is a ControlNet for another model than {base}: its first layer is {widths[0]} wide and "
            f"its cross-attention {widths[1]}, the model's are {expected[0]} and {expected[1]}."
        )


def load(checkpoint: Checkpoint, base: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> ControlNet:
    """Load a ControlNet that `check` let pass, frozen.

    Raises:
        UserError: tensors are missing, unexpected or of another shape.
    """
    from diffusers.models.controlnets.controlnet import ControlNetModel

    loader = sd.Loader(checkpoint, device)
    table = _find_table(loader.shapes)
    assert table is not None, "check first"
    picture_layers = [f"controlnet_cond_embedding.{layer}.weight" for layer in sd_control.PICTURE_LAYERS]
    build: Any = ControlNetModel
    with torch.device("meta"):
        empty = build(
            **sd.encoder_settings(base),
            in_channels=loader.shape(table, _FIRST)[1],
            conditioning_channels=loader.shape(table, _PICTURE)[1],
            conditioning_embedding_out_channels=[loader.shape(table, layer)[0] for layer in picture_layers],
            **_said(checkpoint.path),
        )
    net = loader.load("ControlNet", empty, table, torch.float32)
    if _DIFFERENCE in loader.shapes:
        _add_base(net, base)
    nn.Module.to(net, dtype)  # not diffusers' own method, which warns of layers that there are not
    return StableDiffusionControl(net)


@torch.no_grad()
def _add_base(net: nn.Module, base: Checkpoint) -> None:
    """Add the model to a ControlNet that is a difference from one; of an inpainting model, what its latents go to."""
    own = net.state_dict()
    for name, tensor in sd.unet_tensors(base):
        if name in own:
            part = tensor[:, : own[name].shape[1]] if name == _FIRST else tensor
            own[name] += part.to(own[name])


def _said(path: Path) -> dict[str, Any]:
    """Return what shapes do not tell of a ControlNet itself.

    Shuffle's residuals are averaged over the picture and given to the conditional prediction alone; of files, only the
    name says that they are such.
    """
    config = path / "config.json"
    if not config.is_file():
        return {"global_pool_conditions": path.is_file() and "shuffle" in path.name.lower()}
    try:
        said = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config} is not JSON ({error}); get the ControlNet anew.") from error
    names = ("global_pool_conditions", "controlnet_conditioning_channel_order")
    return {name: said[name] for name in names if name in said}


def _shapes(checkpoint: Checkpoint) -> dict[str, Shape]:
    return {name: tuple(checkpoint.shape(name)) for name in checkpoint.names()}


def _find_table(shapes: Mapping[str, Shape]) -> Table | None:
    """Return where the layers are, or None for what is no ControlNet for Stable Diffusion."""
    tables = [*(sd_control.original(prefix) for prefix in sd_control.PREFIXES), sd_control.diffusers()]
    wanted = (_FIRST, _PICTURE, _PROJECTION, _CONTEXT)
    return next((table for table in tables if all(table[module].name in shapes for module in wanted)), None)
