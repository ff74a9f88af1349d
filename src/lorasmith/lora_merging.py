"""Merging LoRAs without a base model: the sum of ratio * alpha / rank * up @ down over the files, layer by layer.

The products are added, never the factors (as kohya-ss/sd-scripts' merge_lora.py does, where a ratio r acts as r^2 and
the factors of different files meet each other): so a ratio means what it says, also a negative one, and files of any
rank and alpha can be merged. A layer that a file does not have is not changed by it, which counts as zero.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.adapters.lora import product_norm
from lorasmith.errors import UserError
from lorasmith.formats.dialects import AnyLora
from lorasmith.formats.kohya import LoraFile
from lorasmith.lora_files import Contents, Kept, Layer, Whole, dim_metadata
from lorasmith.lowrank import Factors, concatenate, decompose_product
from lorasmith.models.keys.sd import TITLES
from lorasmith.network import part_of
from lorasmith.progress import counted

Ratios = Mapping[str, float]  # by the model's part: `unet` and `text_encoder`
Files = Sequence[LoraFile] | Sequence[AnyLora]

MERGED_KEY = "lorasmith.merged"
_VERSIONS = {"sd1": {"ss_v2": "False", "ss_base_model_version": "sd_v1"}, "sd2": {"ss_v2": "True"}}


@dataclass(frozen=True)
class Merged:
    """The layers of the sum by saved name, what of each was kept, and the changes that are no low-rank matrices."""

    layers: dict[str, Layer]
    kept: dict[str, Kept]
    wholes: dict[str, Whole]


def merge(files: Files, contents: Sequence[Contents], ratios: Sequence[Ratios], *, rank: int | None = None) -> Merged:
    """Return the sum of the files, each times its ratios.

    A layer that one of them changes as a whole (norms, embeddings, weight and bias) stays whole.

    Args:
        contents: what is in the files.
        rank: cut each layer to this rank, to the nearest there is; None: the exact sum, whose rank is the sum of ranks.

    Raises:
        UserError: the files are for different model families, a layer has different shapes in them, a file's ratios
            leave nothing of it, or the files cancel each other.
    """
    check_families(files)
    sources = [_scaled(file, own, ratio) for file, own, ratio in zip(files, contents, ratios, strict=True)]
    shapes = _common_shapes(files, sources)
    whole = sorted({name for source in sources for name in source.wholes})
    wholes = {name: _sum_whole([source for source in sources if name in source], name) for name in whole}
    layers: dict[str, Layer] = {}
    kept: dict[str, Kept] = {}
    names = sorted(shapes.keys() - wholes.keys())
    for name in counted(names, len(names), "merging layers", unit="layer", is_shown=True):
        parts = [source.layers[name].factors for source in sources if name in source.layers]
        factors, kept[name] = _sum(parts, rank)
        layers[name] = Layer(shapes[name], factors, float(factors.rank))
    if not wholes and _is_rounding(layers, sources, sum(one.total for one in kept.values())):
        raise UserError(
            "the LoRAs cancel each other at these ratios, so that nothing is left to save; give other ones."
        )
    return Merged(layers, kept, wholes)


def _scaled(file: LoraFile | AnyLora, contents: Contents, ratios: Ratios) -> Contents:
    """Return the layers of a file that its ratios leave, with ratio * alpha / rank in their factors."""
    layers = {
        name: Layer(layer.shape, layer.factors.scaled(ratio * layer.scale), float(layer.factors.rank))
        for name, layer in contents.layers.items()
        if (ratio := ratios[part_of(name)])
    }
    wholes = {name: own.scaled(ratio) for name, own in contents.wholes.items() if (ratio := ratios[part_of(name)])}
    if not layers and not wholes:
        raise UserError(f"{file.path} would add nothing: its ratio is 0. Give another ratio, or leave the file out.")
    return replace(contents, layers=layers, wholes=wholes)


def _is_rounding(layers: Mapping[str, Layer], sources: Sequence[Contents], square: float) -> bool:
    """Return whether what is left of the sources, whose squared norm is about `square`, is their sum's rounding."""
    factors = [layer.factors for source in sources for layer in source.layers.values()]
    given = sum(product_norm(one.down, one.up).item() ** 2 for one in factors)
    if square > 1e-3 * given:
        return False
    found = [layer.factors.up.double() @ layer.factors.down.double() for layer in layers.values()]
    return given > 0 and sum(delta.square().sum().item() for delta in found) <= 1e-10 * given


def _sum_whole(sources: Sequence[Contents], name: str) -> Whole:
    """Return the sum of a layer's changes, of which at least one is whole."""
    weights, biases = [], []
    for source in sources:
        if name in source.layers:
            layer = source.layers[name]
            weights.append((layer.factors.up @ layer.factors.down).view(layer.shape))
        else:
            weights.append(source.wholes[name].weight)
            biases.append(source.wholes[name].bias)
    return Whole(_total(weights), _total(biases))


def _total(parts: Sequence[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    shape = max((part.shape for part in given), key=len, default=None)
    return None if shape is None else sum((part.view(shape) for part in given), torch.zeros(shape))


def _sum(parts: Sequence[Factors], rank: int | None) -> tuple[Factors, Kept]:
    whole = concatenate(parts)
    if rank is None:
        total = product_norm(whole.down, whole.up).item() ** 2
        return whole, Kept(whole.rank, total, total)
    found = decompose_product(whole)
    factors = found.cut(rank)
    return factors, Kept(factors.rank, found.energy(rank), found.energy())


def check_families(files: Files) -> None:
    """Refuse LoRAs for different model families (a UserError)."""
    known = {file.family: file for file in files if file.family != "unknown"}
    if len(known) > 1:
        named = " and ".join(f"{file.path} is for {TITLES[family]}" for family, file in sorted(known.items()))
        raise UserError(
            f"{named}: these have text encoders of different width (768 and 1024) and depth, so that a change of one "
            "fits no layer of the other. Merge LoRAs of one family."
        )


def _common_shapes(files: Files, sources: Sequence[Contents]) -> dict[str, tuple[int, ...]]:
    """Return each layer's shape: a 1x1 convolution may be stored with 2 or 4 dimensions, and gets 4."""
    found: dict[str, tuple[int, ...]] = {}
    owners: dict[str, Path] = {}
    for file, source in zip(files, sources, strict=True):
        for name, shape in source.shapes().items():
            other = found.setdefault(name, shape)
            owner = owners.setdefault(name, file.path)
            longer, shorter = sorted((shape, other), key=len, reverse=True)
            if longer != shorter + (1,) * (len(longer) - len(shorter)):
                raise UserError(
                    f"{name} has weights of {_show(other)} in {owner} but of {_show(shape)} in {file.path}: they "
                    "were trained on models of different structure and cannot be added. Merge LoRAs of one family."
                )
            found[name] = longer
    return found


def _show(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def metadata(
    files: Files, ratios: Sequence[Ratios], layers: Mapping[str, Layer], *, title: str, time: float
) -> dict[str, str]:
    """Return what the merged file says of itself: `ss_*` and `modelspec.*` on which all files agree, and their origin.

    Args:
        time: when it was made, unix seconds.
    """
    first, *others = [file.metadata for file in files]
    agreed = {
        key: value
        for key, value in first.items()
        if key.startswith(("ss_", "modelspec.")) and all(other.get(key) == value for other in others)
    }
    families = {file.family for file in files} - {"unknown"}
    version = _VERSIONS[families.pop()] if families else {}
    origin = [
        {"file": file.path.name, "ratios": dict(own), "sshs_model_hash": file.metadata.get("sshs_model_hash")}
        for file, own in zip(files, ratios, strict=True)
    ]
    date = datetime.fromtimestamp(int(time), timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
    return {
        **version,
        **agreed,
        **dim_metadata(layers.values()),
        "ss_output_name": title,
        "modelspec.title": title,
        "modelspec.date": date,
        "modelspec.merged_from": ", ".join(file.metadata.get("modelspec.title", file.path.stem) for file in files),
        MERGED_KEY: json.dumps(origin, ensure_ascii=False),
    }
