"""The files of the first LoRA programs, cloneofsimo/lora and d8ahazard's: factors without names, known by their place.

A `.pt` is a list up, down, up, down ... of one component, with the text encoder's in a second file beside it; a
`.safetensors` numbers the same pairs (`unet:0:up`). There is no alpha: the change is up @ down.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.checkpoint import atomic_file
from lorasmith.errors import UserError
from lorasmith.models.keys import sd as keys

SIDECARS = {"cloneofsimo": ".text_encoder.pt", "d8ahazard": "_txt.pt"}
Pair = tuple[Tensor, Tensor]  # up, down

_TEXT = {
    len(keys.first_lora_text_layers(family)): keys.first_lora_text_layers(family) for family in keys.NUM_TEXT_LAYERS
}
_NUM_UNET = len(keys.first_lora_layers(is_old_order=True))
_COUNTS = f"{_NUM_UNET} of the U-Net, or {' or '.join(map(str, _TEXT))} of the text encoder"
_OLD_PLACE, _NEW_PLACE = 4, 8  # of the feed-forward layer among a block's nine


def sidecar(path: Path, program: str) -> Path:
    """Return where the text encoder's list lies beside the U-Net's."""
    return path.with_name(path.stem + SIDECARS[program])


def find_sidecar(path: Path) -> Path | None:
    """Return the text encoder's list that lies beside the U-Net's.

    Raises:
        UserError: there are two.
    """
    found = [file for program in SIDECARS if (file := sidecar(path, program)).is_file()]
    if len(found) > 1:
        raise UserError(
            f"{path}: beside it lie {found[0].name} and {found[1].name}; move away the one that is not its."
        )
    return found[0] if found else None


def paired(path: Path, tensors: Sequence[Tensor]) -> list[Pair]:
    """Return the list's pairs.

    Raises:
        UserError: an odd number.
    """
    if len(tensors) % 2:
        raise UserError(
            f"{path} is a list of {len(tensors)} tensors, an odd number; expected are pairs, an up and a down for each "
            "layer. The file is damaged: get it again."
        )
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def pairs(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, list[Pair]]:
    """Return the pairs of `unet:0:up` and the like by component, in order.

    Raises:
        UserError: a number or a half of a pair is missing.
    """
    found: dict[str, list[Pair]] = {}
    for part in ("unet", "text_encoder"):
        count = len({int(name.split(":")[1]) for name in tensors if name.startswith(f"{part}:")})
        own = []
        for number in range(count):
            names = [f"{part}:{number}:{tail}" for tail in ("up", "down")]
            if missing := [name for name in names if name not in tensors]:
                raise UserError(f"{path} is incomplete: {missing[0]} is missing; get the file again.")
            own.append((tensors[names[0]], tensors[names[1]]))
        if own:
            found[part] = own
    return found


def part_of(path: Path, own: Sequence[Pair]) -> str:
    """Return which component a list is of, by its number of pairs."""
    if len(own) in _TEXT:
        return "text_encoder"
    if len(own) == _NUM_UNET:
        return "unet"
    raise UserError(f"{path} is a list of {len(own)} pairs; expected are {_COUNTS}. Extended lists are not read.")


def layers(path: Path, part: str, own: Sequence[Pair]) -> list[str]:
    """Return the layers' saved names of a component's pairs.

    Old and new files differ in the feed-forward layer's place in each block; its output is eight times as wide.

    Raises:
        UserError: not as many pairs as the component has layers, or widths that are none of a block's.
    """
    if part_of(path, own) != part:
        raise UserError(f"{path} holds {len(own)} pairs of the {part}; expected are {_COUNTS}.")
    if part == "text_encoder":
        return _TEXT[len(own)]
    heights = [up.shape[0] if up.dim() else 0 for up, _ in own]
    fits = [
        place
        for place in (_OLD_PLACE, _NEW_PLACE)
        if all(heights[first + place] == 8 * heights[first] for first in range(0, len(heights), 9))
    ]
    if len(fits) != 1:
        raise UserError(
            f"{path}: the layers' widths ({', '.join(map(str, heights[:9]))}, ...) are not those of a block of Stable "
            "Diffusion in either order; the file is damaged, or of another program."
        )
    return keys.first_lora_layers(is_old_order=fits == [_OLD_PLACE])


def place_of(names: Sequence[str], *, is_old_order: bool) -> dict[str, list[str]]:
    """Return by component the layers that a file needs for these layers, in their order.

    Args:
        is_old_order: of published files, from diffusers of 2022; else that of later ones.
    """
    text = [name for name in names if name.startswith("lora_te_")]
    parts = {}
    if len(text) < len(names):
        parts["unet"] = keys.first_lora_layers(is_old_order=is_old_order)
    if text:
        is_deep = any("_layers_12_" in name for name in text)
        parts["text_encoder"] = keys.first_lora_text_layers("sd2" if is_deep else "sd1")
    return parts


def write_list(path: Path, own: Sequence[Pair]) -> None:
    """Write a list of pairs, atomically."""
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        torch.save([tensor for pair in own for tensor in pair], file)


def numbered(parts: Mapping[str, Sequence[Pair]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a `.safetensors` and what its header says of them."""
    tensors, header = {}, {}
    for part, own in parts.items():
        header[part] = json.dumps(_ANCESTORS[part])
        for number, (up, down) in enumerate(own):
            tensors[f"{part}:{number}:up"], tensors[f"{part}:{number}:down"] = up, down
            header[f"{part}:{number}:rank"] = str(down.shape[0])
    return tensors, header


_ANCESTORS = {"unet": ["CrossAttention", "Attention", "GEGLU"], "text_encoder": ["CLIPAttention"]}
