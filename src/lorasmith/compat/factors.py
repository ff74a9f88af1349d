"""Merging LoRAs as sd-scripts' merge_lora.py does without a base model: their matrices are added, not their products.

(r_1 up_1 + r_2 up_2) (r_1 down_1 + r_2 down_2) has r_1^2 up_1 down_1 and r_2^2 up_2 down_2 in it, and what the up of
one and the down of the other make together, which nobody trained. `lora_merging` adds the products instead.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorasmith.network import group_by_module

_DOWN, _UP, _ALPHA = "lora_down.weight", "lora_up.weight", "alpha"


def add_factors(
    loras: Sequence[Mapping[str, Tensor]], ratios: Sequence[float], *, concat: bool = False
) -> dict[str, Tensor]:
    """Return the sum of the factors of several LoRAs by saved name, with each layer's alpha as the first has it.

    Each factor is multiplied by ratio * sqrt(alpha / first alpha); where the ratio is below 0, only the down becomes
    negative. A layer that only some have is the sum over these. An alpha that is not there is the rank.

    Args:
        loras: tensors by sd-scripts' names, in the type to compute in.
        concat: put the factors side by side instead of adding them, at the sum of the ranks.

    Raises:
        ValueError: a layer's factors do not fit, or its alphas have no ratio with a root; the message says why.
    """
    merged: dict[str, Tensor] = {}
    for tensors, ratio in zip(loras, ratios, strict=True):
        for name, layer in group_by_module(tensors).items():
            down, up = layer[_DOWN], layer[_UP]
            alpha = float(layer.get(_ALPHA, len(down)))
            first = merged.setdefault(f"{name}.{_ALPHA}", torch.tensor(alpha)).item()
            if alpha * first <= 0:
                raise ValueError(f"{name} has alpha {first:g} and {alpha:g}, and sqrt({alpha:g} / {first:g}) is needed")
            scale = ratio * math.sqrt(alpha / first)
            down, up = down * scale, up * abs(scale)
            if f"{name}.{_DOWN}" in merged:
                down, up = _together(name, merged[f"{name}.{_DOWN}"], merged[f"{name}.{_UP}"], down, up, concat=concat)
            merged[f"{name}.{_DOWN}"], merged[f"{name}.{_UP}"] = down, up
    return merged


def _together(
    name: str, first_down: Tensor, first_up: Tensor, down: Tensor, up: Tensor, *, concat: bool
) -> tuple[Tensor, Tensor]:
    if first_down.shape[1:] != down.shape[1:] or len(first_up) != len(up):
        raise ValueError(
            f"{name} changes weights of different shape, so the LoRAs were trained on models of different structure, "
            "such as v1 and v2"
        )
    if concat:
        return torch.cat([first_down, down]), torch.cat([first_up, up], dim=1)
    if len(first_down) != len(down):
        raise ValueError(
            f"{name} has rank {len(first_down)} and rank {len(down)}: matrices of different size cannot be added; "
            "--concat puts them side by side"
        )
    return first_down + down, first_up + up


def shuffle_ranks(tensors: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Return a LoRA with the ranks of each layer in another order, which changes no product."""
    shuffled = dict(tensors)
    for name, layer in group_by_module(tensors).items():
        order = torch.randperm(len(layer[_DOWN]), generator=generator)
        shuffled[f"{name}.{_DOWN}"], shuffled[f"{name}.{_UP}"] = layer[_DOWN][order], layer[_UP][:, order]
    return shuffled
