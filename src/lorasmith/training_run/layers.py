"""Which layers of the base model get an adapter, and of which rank: the options of a run as rules for `Network`."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

from lorasmith.config import NetworkSection, TrainConfig
from lorasmith.errors import UserError
from lorasmith.model_families import AdapterPlace
from lorasmith.models.keys.sd_blocks import LISTS
from lorasmith.network import Rule, adapter_class, part_of

Number = TypeVar("Number")
_PATTERNS = {"both": "", "unet": "lora_unet_", "text_encoder": "lora_te"}
_RESNET_LAYERS = re.compile(r"lora_unet_\w+_(resnets|downsamplers|upsamplers)_\w+")
_BLOCKS = LISTS[25]


def trained_places(
    cfg: TrainConfig, places: Mapping[str, AdapterPlace], in_weights: Collection[str]
) -> dict[str, AdapterPlace]:
    """Return the places that get an adapter: a LoRA's targets, and where asked convolutions and time projections.

    Args:
        in_weights: names of the layers in starting weights, which have convolutions or not.

    Raises:
        UserError: none is left.
    """
    network, start = cfg.network, _PATTERNS[cfg.network.train]
    asks_for_convolutions = network.conv_rank is not None or bool(network.conv_block_ranks)
    has_convolutions = asks_for_convolutions or any(map(is_convolutional, in_weights))
    found = {
        name: place
        for name, place in sorted(places.items())
        if name.startswith(start)
        and (place.is_target or (has_convolutions and len(place.shape) > 1 and is_convolutional(name)))
        and _rank(network, name, place) > 0
        and _rate(cfg, name, place) > 0
    }
    if not found:
        raise UserError(
            "block_ranks and block_lr leave no layer that is trained: all numbers are 0; give one of them another."
        )
    return found


def is_convolutional(name: str) -> bool:
    """Return whether a saved name is of the layers that LoCon adds: those of resnets and samplers."""
    return bool(_RESNET_LAYERS.fullmatch(name))


def layer_rules(cfg: TrainConfig, places: Mapping[str, AdapterPlace]) -> dict[str, Rule]:
    """Return what each of the layers gets."""
    network = cfg.network
    options = adapter_class(network.adapter).parse_options(network.adapter_options)
    return {
        name: Rule(
            name,
            network.adapter,
            _rank(network, name, place),
            _alpha(network, name, place),
            _rate(cfg, name, place),
            options,
        )
        for name, place in places.items()
    }


def _is_spatial(place: AdapterPlace) -> bool:
    return len(place.shape) == 4 and place.shape[2:] != (1, 1)


def _rank(network: NetworkSection, name: str, place: AdapterPlace) -> int:
    if _is_spatial(place):
        return _of_block(network.conv_block_ranks, name, place, network.conv_rank or network.rank)
    return _of_block(network.block_ranks, name, place, network.rank)


def _alpha(network: NetworkSection, name: str, place: AdapterPlace) -> float | None:
    if _is_spatial(place):
        return _of_block(network.conv_block_alphas, name, place, network.conv_alpha)
    return _of_block(network.block_alphas, name, place, network.alpha)


def _rate(cfg: TrainConfig, name: str, place: AdapterPlace) -> float:
    return _of_block(cfg.optimizer.block_lr, name, place, 1.0)


def _of_block(numbers: Sequence[Number], name: str, place: AdapterPlace, otherwise: Number) -> Number:
    """Return the number of a layer's block; where none are given, and for the text encoder, another."""
    if not numbers or part_of(name) != "unet":
        return otherwise
    return numbers[_BLOCKS.index(place.block)]
