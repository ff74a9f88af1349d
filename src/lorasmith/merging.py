"""Merges LoRAs into the weights of a base model: W + factor * delta(W) for every layer, with the adapters' own `delta`.

No model is built. `verify` does build two, to show that the merged one computes what the base with its LoRAs does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorasmith import model_families
from lorasmith.adapters.base import Adapter
from lorasmith.checkpoint import Checkpoint
from lorasmith.errors import UserError
from lorasmith.formats import kohya
from lorasmith.model_families import AdapterPlace
from lorasmith.models.base import LatentDiffusion
from lorasmith.network import group_by_module, part_of, recognise

PRECISIONS = kohya.PRECISIONS
_FAMILIES = {"sd1": "SD 1.x", "sd2": "SD 2.x"}
_NUM_SHOWN = 3
_ROWS = 256  # of a weight that are added at once


@dataclass(frozen=True)
class Strength:
    """How strongly a LoRA is added: its parts, and the blocks, whose weights multiply these."""

    unet: float = 1.0
    text_encoder: float = 1.0
    blocks: Mapping[str, float] | None = None

    def factor(self, name: str, place: AdapterPlace) -> float:
        ratio = self.unet if part_of(name) == "unet" else self.text_encoder
        return ratio if self.blocks is None else ratio * self.blocks[place.block]


@dataclass(frozen=True)
class Addition:
    """A LoRA as it will be added.

    Args:
        tensors: as the file has them, by layer, of the layers that are added.
        factors: of these layers; none is 0.
        ignored: layers that the model has, but whose factor is 0.
        unknown: layers that the model does not have.
    """

    path: Path
    tensors: Mapping[str, Mapping[str, Tensor]]
    factors: Mapping[str, float]
    ignored: Sequence[str]
    unknown: Sequence[str]

    def adapter(self, name: str, shape: Sequence[int]) -> Adapter:
        return recognise(self.tensors[name]).from_tensors(shape, self.tensors[name])


def plan(path: Path, family: str, places: Mapping[str, AdapterPlace], strength: Strength) -> Addition:
    """Read a LoRA and check that it fits the model.

    Raises:
        UserError: it is for another family, does not fit, holds NaN or infinity, or changes nothing.
    """
    file = kohya.read(path)
    if file.family in _FAMILIES and file.family != family:
        raise UserError(
            f"{path} is a LoRA for {_FAMILIES[file.family]}, and the model is {_FAMILIES[family]}: their layers differ "
            "in width. Give a LoRA that was trained for the model's family."
        )
    if broken := [name for name, tensor in file.tensors.items() if not torch.isfinite(tensor.float()).all()]:
        raise UserError(
            f"{path} holds NaN or infinity ({_shorten(broken)}): its training broke down. Nothing was merged; "
            "use an earlier save of it."
        )
    layers = group_by_module(file.tensors)
    known = {name: tensors for name, tensors in layers.items() if name in places}
    factors = {name: strength.factor(name, places[name]) for name in known}
    addition = Addition(
        path,
        {name: tensors for name, tensors in known.items() if factors[name]},
        {name: factor for name, factor in factors.items() if factor},
        sorted(name for name, factor in factors.items() if not factor),
        sorted(layers.keys() - places.keys()),
    )
    _check_fits(addition, places)
    if not addition.factors:
        raise UserError(_nothing_applied(addition))
    return addition


def _check_fits(addition: Addition, places: Mapping[str, AdapterPlace]) -> None:
    problems: list[str] = []
    for name in addition.tensors:
        try:
            addition.adapter(name, places[name].shape)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise UserError(
            f"{addition.path} does not fit the model: {len(problems)} of {len(addition.tensors)} layers are of another "
            f"shape or incomplete ({_shorten(problems)}). Give a LoRA that was trained for this kind of model."
        )


def _nothing_applied(addition: Addition) -> str:
    if addition.ignored:
        return (
            f"{addition.path} would change nothing: all of its {len(addition.ignored)} layers have the factor 0. Give "
            "a ratio or block weights other than 0, or leave the LoRA out."
        )
    return (
        f"{addition.path} would change nothing: none of its {len(addition.unknown)} layers is in the model (they are "
        f"named like {_shorten(addition.unknown)}). Give a LoRA that was trained for this kind of model."
    )


def dtypes(
    checkpoint: Checkpoint,
    places: Mapping[str, AdapterPlace],
    additions: Sequence[Addition],
    save_precision: str | None,
) -> dict[str, torch.dtype]:
    """Return which tensors of the checkpoint change, and of which type they will be."""
    names = {places[layer].source.name for addition in additions for layer in addition.factors}
    return {
        name: checkpoint.dtype(name) if save_precision is None else PRECISIONS[save_precision]
        for name in checkpoint.names()
        if name in names
    }


def changing(
    places: Mapping[str, AdapterPlace],
    additions: Sequence[Addition],
    types: Mapping[str, torch.dtype],
    precision: str,
) -> Callable[[str, Tensor], Tensor]:
    """Return what makes the merged tensor from the checkpoint's, in its place where the type stays.

    Args:
        types: of the tensors in the new file.
        precision: of the sum, which is rounded to it after every LoRA; a delta itself is computed in fp32.
    """
    dtype = PRECISIONS[precision]
    layers: dict[str, list[str]] = {}
    for name, place in places.items():
        if any(name in addition.factors for addition in additions):
            layers.setdefault(place.source.name, []).append(name)

    @torch.no_grad()
    def change(name: str, stored: Tensor) -> Tensor:
        if not stored.is_floating_point():
            raise UserError(f"the model's {name} holds whole numbers; merging needs a model in fp32, fp16 or bf16.")
        merged = stored if types[name] == stored.dtype else torch.empty_like(stored, dtype=types[name]).copy_(stored)
        for layer in layers[name]:  # several where a file has query, key and value in one tensor
            source = places[layer].source
            weight, result = source.take(stored), source.take(merged)  # views
            deltas = [
                addition.adapter(layer, weight.shape).delta(weight).mul_(addition.factors[layer]).to(dtype)
                for addition in additions
                if layer in addition.factors
            ]
            for start in range(0, len(weight), _ROWS):  # in pieces, so that no second copy of it is in memory
                rows = slice(start, start + _ROWS)
                total = weight[rows].to(dtype, copy=True)
                for delta in deltas:
                    total.add_(delta[rows])
                narrow = total.to(types[name])
                if not _is_finite(narrow):
                    raise UserError(_not_finite(name, is_sound=_is_finite(weight[rows]), dtype=types[name]))
                result[rows] = narrow
        return merged

    return change


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor if tensor.dtype.itemsize > 1 else tensor.float()).all())


def _not_finite(name: str, *, is_sound: bool, dtype: torch.dtype) -> str:
    if not is_sound:
        return f"the model's {name} holds NaN or infinity, so nothing was merged; get the model anew."
    return (
        f"merging makes {name} larger than {str(dtype).removeprefix('torch.')} or the precision of the sum can hold "
        f"(at most {torch.finfo(dtype).max:g}), so nothing was saved; give smaller ratios, or --precision float "
        "--save-precision float."
    )


# --- is it the same model? --------------------------------------------------------------------------------------------

_CAPTION = "a photo of a cat sitting on a red chair"
_TIMESTEP = 500
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Difference:
    """Norms of one result, in shares of the norm that the base with its LoRAs gives.

    Args:
        merged: the merged model's difference from the base with its LoRAs.
        lora: what the LoRAs change.
        tolerance: how much `merged` may be.
    """

    name: str
    merged: float
    lora: float
    tolerance: float

    @property
    def is_same(self) -> bool:
        """Whether the difference is below the tolerance, and clearly smaller than what the LoRAs do."""
        return self.merged <= self.tolerance and (self.merged <= self.lora / 2 or self.lora < _NOISE)


_NOISE = 1e-5  # share that the order of fp32 additions alone makes


def verify(
    base: Checkpoint,
    merged: Checkpoint,
    places: Mapping[str, AdapterPlace],
    additions: Sequence[Addition],
    types: Mapping[str, torch.dtype],
) -> list[Difference]:
    """Return how far a text encoding and a U-Net step of the merged model are from the base's with LoRAs attached.

    Both models compute in fp32 on the CPU, one after the other.
    """
    plain, attached = _results_with_loras(base, places, additions)
    found = _results(_load(merged))
    tolerance = max(_TOLERANCES.get(dtype, 0.1) for dtype in types.values())
    return [
        Difference(name, _share(found[name] - result, result), _share(plain[name] - result, result), tolerance)
        for name, result in attached.items()
    ]


def _results_with_loras(
    base: Checkpoint, places: Mapping[str, AdapterPlace], additions: Sequence[Addition]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the results of the base alone, and with the LoRAs attached."""
    model = _load(base)
    plain = _results(model)
    targets = model.adapter_targets()
    for addition in additions:
        for name, factor in addition.factors.items():
            adapter = addition.adapter(name, places[name].shape)
            adapter.multiplier = factor
            targets[name].register_forward_hook(lambda layer, args, out, own=adapter: own(layer, args[0], out))
    return plain, _results(model)


def _load(checkpoint: Checkpoint) -> LatentDiffusion:
    return model_families.load(checkpoint, dtype=torch.float32, device=torch.device("cpu"))


@torch.no_grad()
def _results(model: LatentDiffusion) -> dict[str, Tensor]:
    cond = model.encode_text([_CAPTION])
    x_t = torch.randn(1, model.latent_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    step = model(x_t, torch.tensor([_TIMESTEP]), cond)
    return {"text encoding": torch.cat([part.flatten() for part in cond.values()]), "U-Net step": step}


def _share(difference: Tensor, result: Tensor) -> float:
    return float(difference.norm() / result.norm())


def _shorten(items: Sequence[str]) -> str:
    rest = len(items) - _NUM_SHOWN
    return ", ".join(items[:_NUM_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
