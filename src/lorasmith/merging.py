"""Merges LoRAs into the weights of a base model: W + factor * delta(W) for every layer, with the adapters' own `delta`.

Several are added in order, each to what the ones before it left: that is W for those kinds of change whose delta
depends on it (DoRA, OFT, IA3 ...). No model is built. `verify` does build two, to show that the merged one computes
what the base with its LoRAs does.
"""

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith import model_families
from lorasmith.adapters.base import Adapter
from lorasmith.adapters.lora import LoRA
from lorasmith.checkpoint import Checkpoint
from lorasmith.errors import UserError
from lorasmith.formats import kohya
from lorasmith.formats.dialects import FAMILIES, AnyLora, kind_of, read_any
from lorasmith.model_families import AdapterPlace
from lorasmith.models.base import LatentDiffusion
from lorasmith.network import part_of, recognise
from lorasmith.regions import Regions

PRECISIONS = kohya.PRECISIONS
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
        biases: those of these layers whose bias changes too.
        ignored: layers that the model has, but whose factor is 0.
        unknown: layers that the model does not have.
    """

    file: AnyLora
    tensors: Mapping[str, Mapping[str, Tensor]]
    factors: Mapping[str, float]
    biases: frozenset[str]
    ignored: Sequence[str]
    unknown: Sequence[str]

    def adapter(self, name: str, shape: Sequence[int]) -> Adapter:
        """Return the layer's adapter, which applies at the layer's factor."""
        adapter = recognise(self.tensors[name]).from_tensors(shape, self.tensors[name])
        adapter.multiplier = self.factors[name]
        return adapter

    def at(self, strength: Strength, places: Mapping[str, AdapterPlace]) -> "Addition":
        """Return the same LoRA at another strength; where a factor is 0 now, it has none."""
        factors = {name: strength.factor(name, places[name]) for name in self.factors}
        return self._only([name for name, factor in factors.items() if factor], factors)

    def _only(self, names: Collection[str], factors: Mapping[str, float]) -> "Addition":
        return replace(
            self,
            tensors={name: self.tensors[name] for name in names},
            factors={name: factors[name] for name in names},
            biases=self.biases & set(names),
            ignored=sorted({*self.ignored, *(self.factors.keys() - set(names))}),
        )

    def on(self, names: Collection[str]) -> "Addition":
        """Return what it does to these layers."""
        return self._only([name for name in self.factors if name in names], self.factors)

    def kinds(self) -> Counter[str]:
        """Return how many of the layers that are added are of which kind of change."""
        return Counter(str(kind_of(tensors)) for tensors in self.tensors.values())


def plan(path: Path, family: str, places: Mapping[str, AdapterPlace], strength: Strength) -> Addition:
    """Read a LoRA of any dialect and kind, and check that it fits the model.

    Raises:
        UserError: it is for another family, does not fit, holds NaN or infinity, or changes nothing.
    """
    file = read_any(path)
    if file.family not in ("unknown", family):
        raise UserError(
            f"{path} is a LoRA for {FAMILIES[file.family]}, and the model is {FAMILIES[family]}, which has other "
            "layers. Give a LoRA that was trained for the model's family."
        )
    if broken := [name for name, tensor in file.tensors.items() if not torch.isfinite(tensor.float()).all()]:
        raise UserError(
            f"{path} holds NaN or infinity ({_shorten(broken)}): its training broke down. Nothing was merged; "
            "use an earlier save of it."
        )
    layers = file.layers()
    known = {name: tensors for name, tensors in layers.items() if name in places}
    factors = {name: strength.factor(name, places[name]) for name in known}
    addition = Addition(
        file,
        {name: tensors for name, tensors in known.items() if factors[name]},
        {name: factor for name, factor in factors.items() if factor},
        frozenset(),
        sorted(name for name, factor in factors.items() if not factor),
        sorted(layers.keys() - places.keys()),
    )
    addition = replace(addition, biases=_check_fits(addition, places))
    if not addition.factors:
        raise UserError(_nothing_applied(addition))
    return addition


def _check_fits(addition: Addition, places: Mapping[str, AdapterPlace]) -> frozenset[str]:
    """Return the layers whose bias changes, after checking that all layers fit."""
    biases: set[str] = set()
    problems: list[str] = []
    for name in addition.tensors:
        place = places[name]
        try:
            adapter = addition.adapter(name, place.shape)
            if place.bias is None and adapter.delta_bias(None) is not None:
                raise ValueError("a change of the bias in the file; the model's layer has none")
            if place.bias is not None and adapter.delta_bias(torch.zeros(place.shape[0])) is not None:
                biases.add(name)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise UserError(
            f"{addition.file.path} does not fit the model: {len(problems)} of {len(addition.tensors)} layers are of "
            f"another shape or incomplete ({_shorten(problems)}). Give a LoRA that was trained for this kind of model."
        )
    return frozenset(biases)


def _nothing_applied(addition: Addition) -> str:
    path = addition.file.path
    if addition.ignored:
        return (
            f"{path} would change nothing: all of its {len(addition.ignored)} layers have the factor 0. Give "
            "a ratio or block weights other than 0, or leave the LoRA out."
        )
    return (
        f"{path} would change nothing: none of its {len(addition.unknown)} layers is in the model (they are "
        f"named like {_shorten(addition.unknown)}). Give a LoRA that was trained for this kind of model."
    )


def _changes(places: Mapping[str, AdapterPlace], additions: Sequence[Addition]) -> dict[str, list[tuple[str, str]]]:
    """Return the layers whose weight or bias (layer, end) changes, by the model's tensor that it is in.

    Several where one tensor holds query, key and value.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for name, place in places.items():
        if any(name in addition.factors for addition in additions):
            found.setdefault(place.source.name, []).append((name, "weight"))
        if place.bias is not None and any(name in addition.biases for addition in additions):
            found.setdefault(place.bias.name, []).append((name, "bias"))
    return found


def dtypes(
    checkpoint: Checkpoint,
    places: Mapping[str, AdapterPlace],
    additions: Sequence[Addition],
    save_precision: str | None,
) -> dict[str, torch.dtype]:
    """Return which tensors of the checkpoint change, and of which type they will be."""
    names = _changes(places, additions)
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
    changes = _changes(places, additions)

    @torch.no_grad()
    def change(name: str, stored: Tensor) -> Tensor:
        if not stored.is_floating_point():
            raise UserError(f"the model's {name} holds whole numbers; merging needs a model in fp32, fp16 or bf16.")
        if not _is_finite(stored):
            raise UserError(f"the model's {name} holds NaN or infinity, so nothing was merged; get the model anew.")
        merged = stored if types[name] == stored.dtype else torch.empty_like(stored, dtype=types[name]).copy_(stored)
        for layer, end in changes[name]:
            place = places[layer]
            source = place.source if end == "weight" else place.bias
            assert source is not None, "a tensor of it has a name"
            value, result = source.take(stored), source.take(merged)  # views
            adapters = _adapters(additions, layer, place)
            _add(value, adapters, end, PRECISIONS[precision], result)
        if not _is_finite(merged):
            raise UserError(
                f"merging makes {name} larger than {str(types[name]).removeprefix('torch.')} or the precision of the "
                f"sum can hold (at most {torch.finfo(types[name]).max:g}), so nothing was saved; give smaller ratios, "
                "or --precision float --save-precision float."
            )
        return merged

    return change


def _adapters(additions: Sequence[Addition], layer: str, place: AdapterPlace) -> list[Adapter]:
    return [addition.adapter(layer, place.shape) for addition in additions if layer in addition.factors]


def _add(value: Tensor, adapters: Sequence[Adapter], end: str, dtype: torch.dtype, result: Tensor) -> None:
    """Put the value with all changes of it, each of what the ones before left, into `result`, which may be `value`.

    Args:
        end: `weight` or `bias`.
        dtype: of the sums.
    """
    if end == "bias":
        adapters = [adapter for adapter in adapters if adapter.delta_bias(value) is not None]
    if not adapters:
        result.copy_(value)
    sums = torch.empty_like(value, dtype=dtype) if len(adapters) > 1 else result
    for number, adapter in enumerate(adapters, start=1):
        delta = adapter.delta(value) if end == "weight" else adapter.delta_bias(value)
        assert delta is not None, "only those that change it are left"
        total = result if number == len(adapters) else sums
        for start in range(0, len(value), _ROWS):  # in pieces, so that no second copy of it is in memory
            rows = slice(start, start + _ROWS)
            total[rows] = value[rows].to(dtype) + (adapter.multiplier * delta[rows]).to(dtype)
        value = total


@torch.no_grad()
def fold(model: LatentDiffusion, additions: Sequence[Addition]) -> None:
    """Add LoRAs to the weights of a loaded model, in order; sums are in fp32 and rounded to the layers' types.

    Raises:
        UserError: a sum is larger than its layer's type can hold.
    """
    layers = model.adaptable_layers()
    for name in sorted({name for addition in additions for name in addition.factors}):
        layer, own = layers[name], [addition for addition in additions if name in addition.factors]
        adapters = [one.adapter(name, layer.get_parameter("weight").shape).to(model.device) for one in own]
        for end in ("weight", "bias"):
            value = getattr(layer, end, None)
            if value is None:
                continue
            _add(value, adapters, end, torch.float32, value)
            if not _is_finite(value):
                raise UserError(
                    f"{name} gets larger than {str(value.dtype).removeprefix('torch.')} can hold with what is folded "
                    "in; give lower ratios, or compute in fp32 (--precision fp32)."
                )


@contextmanager
def applied(
    model: LatentDiffusion, additions: Sequence[Addition], *, is_folded: bool, regions: Regions | None = None
) -> Iterator[None]:
    """While entered, the model is the base with these LoRAs, in order; afterwards it is bit for bit what it was.

    They are attached to the layers, or folded into the weights. Both are the same but for rounding. What has no forward
    of its own, changes of embeddings and several of which a later one depends on the weight, is folded always.

    Args:
        regions: where each of them acts; only for LoRAs that are attached.

    Raises:
        UserError: a sum is larger than its layer's type can hold, or what is to act in a region alone has to be folded.
    """
    layers = model.adaptable_layers()
    hooked: dict[str, list[tuple[int, Adapter]]] = {}
    if not is_folded:
        plain = [name for name, layer in layers.items() if not isinstance(layer, nn.Embedding)]
        hooked = _sums(additions, {name: layers[name].get_parameter("weight").shape for name in plain})
    rest = [addition.on(addition.factors.keys() - hooked.keys()) for addition in additions]
    if regions is not None:
        _check_attached([one for number, one in enumerate(rest) if regions.has(number)])
    parameters = {
        parameter: parameter.detach().to("cpu", copy=True)
        for name in {name for addition in rest for name in addition.factors}
        for parameter in layers[name].parameters(recurse=False)
    }
    handles = [
        layers[name].register_forward_hook(
            regions.hook(number, name, adapter.to(model.device))
            if regions is not None and regions.has(number)
            else partial(_adapted, adapter.to(model.device))
        )
        for name, own in hooked.items()
        for number, adapter in own
    ]
    try:
        fold(model, rest)
        with nullcontext() if regions is None else regions.attached(model):
            yield
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for parameter, value in parameters.items():
                parameter.copy_(value)


def check_regions(additions: Sequence[Addition], places: Mapping[str, AdapterPlace], masked: Collection[int]) -> None:
    """Check, without the model, that LoRAs of these numbers can act in a region alone, as far as headers tell.

    Raises:
        UserError: one has to be folded.
    """
    sums = _sums(additions, {name: place.shape for name, place in places.items()})
    _check_attached([additions[number].on(additions[number].factors.keys() - sums.keys()) for number in masked])


def _sums(additions: Sequence[Addition], shapes: Mapping[str, Sequence[int]]) -> dict[str, list[tuple[int, Adapter]]]:
    """Return, of the layers with these shapes, the numbered adapters of each where none depends on another."""
    found: dict[str, list[tuple[int, Adapter]]] = {}
    for name in sorted({name for addition in additions for name in addition.factors if name in shapes}):
        own = [(number, one.adapter(name, shapes[name])) for number, one in enumerate(additions) if name in one.factors]
        if len(own) == 1 or all(type(adapter) is LoRA for _, adapter in own):
            found[name] = own
    return found


def _check_attached(rest: Sequence[Addition]) -> None:
    """Refuse what would have to be folded of LoRAs that are to act in a region alone."""
    for addition in rest:
        if addition.factors:
            raise UserError(
                f"{addition.file.path} changes {_shorten(sorted(addition.factors))} in a way that has to be folded "
                "into the weights, which are the same everywhere: it cannot have a mask, alone or beside other LoRAs."
            )


def _adapted(adapter: Adapter, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return adapter(layer, args[0], output)


def _is_finite(tensor: Tensor) -> bool:
    parts = tensor.split(_ROWS)
    return all(bool(torch.isfinite(part if part.dtype.itemsize > 1 else part.float()).all()) for part in parts)


# --- is it the same model? --------------------------------------------------------------------------------------------

_CAPTION = "a photo of a cat sitting on a red chair"
_TIMESTEP = 500
_NOISE = 1e-5  # share of a result that the order of fp32 additions alone makes
_LIMIT = 1e-4


@dataclass(frozen=True)
class Difference:
    """Norms of differences between what models make of the same input, in shares of what the base with LoRAs makes.

    Args:
        total: between the merged model and the base with its LoRAs attached.
        rounding: of it, what rounding the exact sums to the precisions of sum and file makes.
        computed: between the LoRAs attached and the exact sums W + factor * delta(W) in the base's layers.
        written: between the merged model and the base with these sums rounded as in the file.
        lora: what the LoRAs change.
    """

    name: str
    total: float
    rounding: float
    computed: float
    written: float
    lora: float

    @property
    def unexplained(self) -> float:
        """What neither the LoRAs nor rounding explain."""
        return max(self.computed, self.written)

    @property
    def limit(self) -> float:
        """How much may be unexplained: far less than what the LoRAs do, where this is above the noise of fp32."""
        return min(_LIMIT, max(self.lora / 10, _NOISE))

    @property
    def is_same(self) -> bool:
        return self.unexplained <= self.limit

    @property
    def is_noise(self) -> bool:
        """Whether the LoRAs do so little that nothing can be told from it."""
        return 0 < self.lora <= _NOISE

    @property
    def is_hidden(self) -> bool:
        """Whether rounding takes the place of a good part of what the LoRAs do."""
        return self.rounding > self.lora / 2


def verify(
    base: Checkpoint,
    merged: Checkpoint,
    places: Mapping[str, AdapterPlace],
    additions: Sequence[Addition],
    types: Mapping[str, torch.dtype],
    precision: str,
) -> list[Difference]:
    """Return how far a text encoding and a U-Net step of the merged model are from the base's with LoRAs attached.

    Both models compute in fp32 on the CPU, one after the other.
    """
    plain, attached, exact, rounded = _results_of_base(base, places, additions, types, PRECISIONS[precision])
    found = _results(_load(merged))

    def share(name: str, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
        return float((one[name] - other[name]).norm() / attached[name].norm())

    return [
        Difference(
            name,
            total=share(name, found, attached),
            rounding=share(name, rounded, exact),
            computed=share(name, exact, attached),
            written=share(name, found, rounded),
            lora=share(name, plain, attached),
        )
        for name in attached
    ]


def _results_of_base(
    base: Checkpoint,
    places: Mapping[str, AdapterPlace],
    additions: Sequence[Addition],
    types: Mapping[str, torch.dtype],
    dtype: torch.dtype,
) -> list[dict[str, Tensor]]:
    """Return the results of the base alone, with the LoRAs attached, with the exact sums, and with the rounded ones."""
    model = _load(base)
    layers = model.adaptable_layers()
    names = {name for addition in additions for name in addition.factors}
    adapters = {name: _adapters(additions, name, places[name]) for name in sorted(names)}
    found = [_results(model)]
    for run in (_attached, partial(_merged, dtype=torch.float32, types={}), partial(_merged, dtype=dtype, types=types)):
        hooks = [
            layers[name].register_forward_hook(partial(_replace_output, run, places[name], own))
            for name, own in adapters.items()
        ]
        found.append(_results(model))
        for hook in hooks:
            hook.remove()
    return found


def _replace_output(
    run: Callable[..., Tensor],
    place: AdapterPlace,
    adapters: Sequence[Adapter],
    layer: nn.Module,
    args: tuple[Any, ...],
    output: Tensor,
) -> Tensor:
    return run(layer, place, adapters, args[0], output)


def _attached(layer: nn.Module, place: AdapterPlace, adapters: Sequence[Adapter], x: Tensor, output: Tensor) -> Tensor:
    """Return what the layer makes of `x` with the adapters on it, each as it computes in training."""
    if isinstance(layer, nn.Embedding):  # no adapter computes there: it is changed by merging alone
        return _merged(layer, place, adapters, x, output, dtype=torch.float32, types={})
    for number, adapter in enumerate(adapters):
        output = adapter(_changed(layer, place, adapters[:number], torch.float32, {}), x, output)
    return output


def _merged(
    layer: nn.Module,
    place: AdapterPlace,
    adapters: Sequence[Adapter],
    x: Tensor,
    _: Tensor,
    *,
    dtype: torch.dtype,
    types: Mapping[str, torch.dtype],
) -> Tensor:
    """Return what the layer makes of `x` with the changes in its weight and bias."""
    return _changed(layer, place, adapters, dtype, types).forward(x)


def _changed(
    layer: nn.Module,
    place: AdapterPlace,
    adapters: Sequence[Adapter],
    dtype: torch.dtype,
    types: Mapping[str, torch.dtype],
) -> nn.Module:
    """Return a copy of the layer with all changes in its weight and bias, rounded to their types in the file."""
    changed = copy.copy(layer)
    changed._parameters = dict(layer._parameters)
    for end, source in (("weight", place.source), ("bias", place.bias)):
        if source is not None and adapters:
            value = layer.get_parameter(end)
            result = torch.empty_like(value, dtype=types.get(source.name, torch.float32))
            _add(value, adapters, end, dtype, result)
            changed._parameters[end] = nn.Parameter(result.float(), requires_grad=False)
    return changed


def _load(checkpoint: Checkpoint) -> LatentDiffusion:
    return model_families.load(checkpoint, dtype=torch.float32, device=torch.device("cpu"))


@torch.no_grad()
def _results(model: LatentDiffusion) -> dict[str, Tensor]:
    cond = model.encode_text([_CAPTION])
    x_t = torch.randn(1, model.latent_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    step = model(x_t, torch.tensor([_TIMESTEP]), cond)
    return {"text encoding": torch.cat([part.flatten() for part in cond.values()]), "U-Net step": step}


def _shorten(items: Sequence[str]) -> str:
    rest = len(items) - _NUM_SHOWN
    return ", ".join(items[:_NUM_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
