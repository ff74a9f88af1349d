"""`lorasmith extract`: a LoRA of what was changed in a model.

    lorasmith extract --tuned tuned.safetensors --base base.safetensors --rank 32 --output lora.safetensors
    lorasmith extract --tuned tuned.safetensors --base base.safetensors --quality 0.99 --output lora.safetensors

Both models are read tensor by tensor. All of U-Net and text encoder is compared, to say how much of the change lies
where a LoRA has no place.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

import lorasmith
from lorasmith import metadata, model_families
from lorasmith.checkpoint import Checkpoint, open_checkpoint
from lorasmith.config import ExtractConfig
from lorasmith.errors import UserError
from lorasmith.lora_files import Kept, Layer, check_output, dim_metadata, report, save
from lorasmith.lowrank import decompose, rank_for_energy
from lorasmith.models.base import AdapterPlace, ModelFacts
from lorasmith.network import part_of
from lorasmith.progress import counted

_NUM_SHOWN = 3
Places = Mapping[str, AdapterPlace]
Shape = tuple[int, ...]


def run(cfg: ExtractConfig) -> int:
    """Extract; return the exit code, 0."""
    if cfg.tuned is None or cfg.base is None:
        raise UserError(f"missing: --{'tuned, the changed model' if cfg.tuned is None else 'base, the model before'}")
    if cfg.rank is None and cfg.quality is None:
        raise UserError("missing: --rank, such as --rank 32, or --quality, such as --quality 0.99")
    output = check_output(cfg.output, [Path(cfg.tuned), Path(cfg.base)], overwrite=cfg.overwrite)
    with open_checkpoint(cfg.tuned) as tuned, open_checkpoint(cfg.base) as base:
        changed, old = _check_models(tuned, base, with_convolutions=cfg.conv_rank is not None)
        facts = model_families.describe(base, to_run=False)
        wanted = sorted(name for name, place in old.items() if _is_wanted(name, place, cfg.conv_rank is not None))
        layers, kept = _extract(tuned, base, {name: (changed[name], old[name]) for name in wanted}, _rank_rule(cfg))
        rest = _rest(tuned, base, changed, old, wanted)
    if not layers:
        hint = " They differ elsewhere; --conv-rank extracts convolutions too." if any(map(sum, rest.values())) else ""
        raise UserError(
            f"{cfg.tuned} and {cfg.base} are the same in all {len(wanted)} layers that a LoRA goes on, so there is "
            f"nothing to extract.{hint} Is --base really the model from before?"
        )
    print("\n".join(report(kept)))
    if same := set(wanted) - layers.keys():
        print(f"left out: {_count_parts(same)}, the same in both models")
    print("\n".join(_told_rest(sum(one.total for one in kept.values()), rest)))
    if cfg.quality is not None:
        missed = [name for name, one in kept.items() if one.kept < cfg.quality * one.total]
        print(
            f"quality {cfg.quality:g} is met by {len(kept) - len(missed)} of {len(kept)} layers{_limited(cfg, missed)}"
        )
    print(save(output, layers, _metadata(cfg, facts, output, layers), cfg.save_precision))
    return 0


def _rank_rule(cfg: ExtractConfig) -> Callable[[Shape, Tensor], int]:
    """Return what chooses a layer's rank by the shape of its weight and its singular values."""

    def choose(shape: Shape, values: Tensor) -> int:
        is_spatial = len(shape) == 4 and shape[2:] != (1, 1)
        if cfg.quality is None:
            rank = cfg.conv_rank if is_spatial else cfg.rank
            assert rank is not None, "one of rank and quality is given, and conv_rank where convolutions are wanted"
            return min(rank, len(values))
        limit = (cfg.conv_rank if is_spatial else cfg.max_rank) or len(values)
        return min(rank_for_energy(values, cfg.quality), limit)

    return choose


def _count_parts(names: Iterable[str]) -> str:
    counts = Counter(part_of(name) for name in names)
    return " and ".join(f"{count} layers of the {part.replace('_', ' ')}" for part, count in sorted(counts.items()))


def _limited(cfg: ExtractConfig, missed: Sequence[str]) -> str:
    limits = [("--max-rank", cfg.max_rank), ("--conv-rank", cfg.conv_rank)]
    given = " or ".join(f"{option} {value}" for option, value in limits if value)
    return f"; the others would need a higher rank than {given}" if missed else ""


def _check_models(tuned: Checkpoint, base: Checkpoint, *, with_convolutions: bool) -> tuple[Places, Places]:
    """Return where the layers are in both, after checking from the headers that both fit.

    Raises:
        UserError: one is no base model, or they are of other families or shapes.
    """
    tuned_family, changed, _ = model_families.adapter_places(tuned)
    base_family, old, _ = model_families.adapter_places(base)
    again = "Give the model that the changed one was made from as --base."
    if tuned_family != base_family:
        raise UserError(
            f"--tuned {tuned.path} is of the family {tuned_family}, --base {base.path} of {base_family}: nothing can "
            f"be extracted from models of different families. {again}"
        )
    wanted = [name for name, place in sorted(old.items()) if _is_wanted(name, place, with_convolutions)]
    wrong = [name for name in wanted if changed[name].shape != old[name].shape]
    if wrong:
        shown = ", ".join(f"{name} is {changed[name].shape} and {old[name].shape}" for name in wrong[:_NUM_SHOWN])
        raise UserError(
            f"--tuned {tuned.path} and --base {base.path} have {len(wrong)} of {len(wanted)} layers of different "
            f"shapes ({shown}). {again}"
        )
    return changed, old


def _is_wanted(name: str, place: AdapterPlace, with_convolutions: bool) -> bool:
    return place.is_target or (with_convolutions and _group(name, place) == _CONVOLUTIONS)


def _group(name: str, place: AdapterPlace) -> str:
    if len(place.shape) < 2:
        return _NORMS
    return _EMBEDDINGS if "_embeddings_" in name else _TARGETS if place.is_target else _CONVOLUTIONS


_TARGETS, _CONVOLUTIONS = "layers that a plain LoRA goes on", "other convolutions and time layers"
_NORMS, _EMBEDDINGS, _BIASES = "norms", "embeddings", "biases"


def _rest(
    tuned: Checkpoint, base: Checkpoint, changed: Places, old: Places, wanted: Sequence[str]
) -> dict[str, list[float]]:
    """Return the squared norms of what is different in each tensor that is not extracted, by group."""
    found: dict[str, list[float]] = {}
    for name in counted(sorted(old), len(old), "comparing the rest", unit="layer", is_shown=True):
        place, other = old[name], changed.get(name)
        group = _group(name, place)
        ends = [] if name in wanted else [(group, place.source, other and other.source)]
        if place.bias:
            ends.append((_NORMS if group == _NORMS else _BIASES, place.bias, other and other.bias))
        for kind, theirs, ours in ends:
            if ours and tuned.shape(ours.name) == base.shape(theirs.name):
                delta = ours.take(tuned.tensor(ours.name)).double() - theirs.take(base.tensor(theirs.name)).double()
                _check_finite(delta, name, tuned, base)
                found.setdefault(kind, []).append(delta.square().sum().item())
    return found


def _told_rest(extracted: float, rest: Mapping[str, Sequence[float]]) -> list[str]:
    """Say how the change of U-Net and text encoder is spread, in shares of its squared norm."""
    whole = extracted + sum(map(sum, rest.values()))
    lines = [
        f"of the whole change of U-Net and text encoder, {extracted / whole:.4%} of the energy lies in these layers"
    ]
    for group, squares in rest.items():
        if any(squares):
            way = "--conv-rank extracts it" if group == _CONVOLUTIONS else "a LoRA has no place for it"
            lines.append(f"left out: {sum(squares) / whole:.4%} in {group} ({len(squares)} tensors): {way}")
    return lines


def _extract(
    tuned: Checkpoint,
    base: Checkpoint,
    places: Mapping[str, tuple[AdapterPlace, AdapterPlace]],
    choose: Callable[[Shape, Tensor], int],
) -> tuple[dict[str, Layer], dict[str, Kept]]:
    """Return the layers that differ, each with the rank that `choose` finds by its singular values."""
    layers: dict[str, Layer] = {}
    kept: dict[str, Kept] = {}
    for name in counted(places, len(places), "comparing layers", unit="layer", is_shown=True):
        changed, old = places[name]
        delta = (_read(tuned, changed) - _read(base, old)).flatten(1)
        _check_finite(delta, name, tuned, base)
        if not delta.any():
            continue
        found = decompose(delta)
        factors = found.cut(choose(old.shape, found.values))
        layers[name] = Layer(old.shape, factors, float(factors.rank))
        kept[name] = Kept(factors.rank, found.energy(factors.rank), found.energy())
    return layers, kept


def _check_finite(delta: Tensor, name: str, tuned: Checkpoint, base: Checkpoint) -> None:
    if not torch.isfinite(delta).all():
        raise UserError(
            f"{name} holds NaN or infinity in {tuned.path} or {base.path}: that model is broken, get it anew."
        )


def _read(checkpoint: Checkpoint, place: AdapterPlace) -> Tensor:
    return place.source.take(checkpoint.tensor(place.source.name)).float()


def _metadata(cfg: ExtractConfig, facts: ModelFacts, output: Path, layers: Mapping[str, Layer]) -> dict[str, str]:
    assert cfg.tuned is not None and cfg.base is not None
    rank = f"rank {cfg.rank}" if cfg.quality is None else f"quality {cfg.quality:g}"
    spec = metadata.model_spec(
        architecture=facts.architecture,
        title=output.stem,
        resolution=facts.resolution,
        time=time.time(),
        prediction=facts.prediction,
        implementation_version=lorasmith.__version__,
    )
    return {
        **dim_metadata(layers.values()),
        "ss_v2": str(facts.is_v2),
        "ss_base_model_version": facts.base_model_version,
        "ss_sd_model_name": Path(cfg.base).name,
        "ss_output_name": output.stem,
        "ss_training_comment": f"extracted from {Path(cfg.tuned).name} with {rank}",
        **spec,
    }
