"""`lorasmith extract`: a LoRA of what was changed in a model.

    lorasmith extract --tuned tuned.safetensors --base base.safetensors --rank 32 --output lora.safetensors
    lorasmith extract --tuned tuned.safetensors --base base.safetensors --quality 0.99 --output lora.safetensors

Both models are read tensor by tensor. Only the layers that a LoRA goes on are compared.
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


def run(cfg: ExtractConfig) -> int:
    """Extract; return the exit code, 0."""
    if cfg.tuned is None or cfg.base is None:
        raise UserError(f"missing: --{'tuned, the changed model' if cfg.tuned is None else 'base, the model before'}")
    if cfg.rank is None and cfg.quality is None:
        raise UserError("missing: --rank, such as --rank 32, or --quality, such as --quality 0.99")
    output = check_output(cfg.output, [Path(cfg.tuned), Path(cfg.base)], overwrite=cfg.overwrite)
    with open_checkpoint(cfg.tuned) as tuned, open_checkpoint(cfg.base) as base:
        places = _check_models(tuned, base)
        facts = model_families.describe(base)
        layers, kept = _extract(tuned, base, places, _rank_rule(cfg))
    if not layers:
        raise UserError(
            f"{cfg.tuned} and {cfg.base} are the same in all {len(places[1])} layers that a LoRA goes on, so there is "
            "nothing to extract. Is --base really the model from before?"
        )
    print("\n".join(report(kept)))
    if same := places[1].keys() - layers.keys():
        print(f"left out: {_count_parts(same)}, the same in both models")
    if cfg.quality is not None:
        missed = [name for name, one in kept.items() if one.kept < cfg.quality * one.total]
        print(
            f"quality {cfg.quality:g} is met by {len(kept) - len(missed)} of {len(kept)} layers{_limited(cfg, missed)}"
        )
    print(save(output, layers, _metadata(cfg, facts, output, layers), cfg.save_precision))
    return 0


def _rank_rule(cfg: ExtractConfig) -> Callable[[Tensor], int]:
    if cfg.quality is not None:
        quality, limit = cfg.quality, cfg.max_rank
        return lambda values: min(rank_for_energy(values, quality), limit or len(values))
    rank = cfg.rank
    assert rank is not None, "one of both is given"
    return lambda values: min(rank, len(values))


def _count_parts(names: Iterable[str]) -> str:
    counts = Counter(part_of(name) for name in names)
    return " and ".join(f"{count} layers of the {part.replace('_', ' ')}" for part, count in sorted(counts.items()))


def _limited(cfg: ExtractConfig, missed: Sequence[str]) -> str:
    return f"; the others would need a higher rank than --max-rank {cfg.max_rank}" if missed else ""


def _check_models(tuned: Checkpoint, base: Checkpoint) -> tuple[Places, Places]:
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
    wrong = [name for name in sorted(old) if changed[name].shape != old[name].shape]
    if wrong:
        shown = ", ".join(f"{name} is {changed[name].shape} and {old[name].shape}" for name in wrong[:_NUM_SHOWN])
        raise UserError(
            f"--tuned {tuned.path} and --base {base.path} have {len(wrong)} of {len(old)} layers of different "
            f"shapes ({shown}). {again}"
        )
    return changed, {name: place for name, place in old.items() if place.is_target}


def _extract(
    tuned: Checkpoint, base: Checkpoint, places: tuple[Places, Places], choose: Callable[[Tensor], int]
) -> tuple[dict[str, Layer], dict[str, Kept]]:
    """Return the layers that differ, each with the rank that `choose` finds by its singular values."""
    changed, old = places
    layers: dict[str, Layer] = {}
    kept: dict[str, Kept] = {}
    for name in counted(sorted(old), len(old), "comparing layers", unit="layer", is_shown=True):
        delta = (_read(tuned, changed[name]) - _read(base, old[name])).flatten(1)
        if not torch.isfinite(delta).all():
            raise UserError(
                f"{name} holds NaN or infinity in {tuned.path} or {base.path}: that model is broken, get it anew."
            )
        if not delta.any():
            continue
        found = decompose(delta)
        factors = found.cut(choose(found.values))
        layers[name] = Layer(old[name].shape, factors, float(factors.rank))
        kept[name] = Kept(factors.rank, found.energy(factors.rank), found.energy())
    return layers, kept


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
