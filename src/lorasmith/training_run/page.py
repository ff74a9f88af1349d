"""The plan of a run, as it is printed before training."""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch

import lorasmith
from lorasmith.cache_folder import in_words
from lorasmith.caching import Encoded, caption_name, count_cached
from lorasmith.config import TrainConfig
from lorasmith.data.subsets import DatasetRules
from lorasmith.devices import DTYPES
from lorasmith.memory import estimate_training_memory, vae_home
from lorasmith.network import adapter_class, part_of
from lorasmith.plan_page import (
    caption_lines,
    caption_rule_lines,
    dataset_lines,
    mask_lines,
    memory_line,
    npz_lines,
    plan_page,
    shape_lines,
)
from lorasmith.processes import Processes
from lorasmith.progress import memory_free
from lorasmith.training_run.encoding import kept_captions, makers_of, trains_text_encoder, wanted_latents
from lorasmith.training_run.objective import objective_line
from lorasmith.training_run.own_words import own_word_lines
from lorasmith.training_run.preparation import Preparation, one_or_each, output_folder
from lorasmith.training_run.rates import PART_TITLES, average_lines, rate_lines
from lorasmith.training_run.samples import sample_lines
from lorasmith.training_run.scoring import judge_lines
from lorasmith.training_run.shared_base import sharing_lines
from lorasmith.training_run.uploading import upload_lines

_ENCODED_TITLES: dict[Encoded, str] = {"latents": "latents", "text": "text embeddings"}


def describe_plan(cfg: TrainConfig, ready: Preparation, processes: Processes) -> str:
    """Return the plan as text."""
    network, facts, plan = cfg.network, ready.facts, ready.plan
    parts = Counter(part_of(name) for name in ready.shapes)
    num_values = _num_adapter_values(cfg, ready)
    training_records = [record for record in ready.records if not record.is_prior]
    paragraphs = {
        "model": [
            f"{cfg.model.base}: {facts.title}, {facts.prediction} prediction",
            *ready.base_loras.lines(),
            *facts.notes,
        ],
        "network": [
            f"{', '.join([network.adapter, *network.adapter_options, *_rank_words(cfg, ready)])}: "
            f"{len(ready.shapes)} modules "
            f"({', '.join(f'{count} {PART_TITLES[part]}' for part, count in parts.items())}), "
            f"{num_values / 1e6:.2f} M values"
            + (f", starting from {network.weights}, which fits" if network.weights else "")
            if ready.foreign is None
            else f"{', '.join([ready.foreign.module, *network.network_args, *_rank_words(cfg, ready)])}: it decides "
            f"itself what it puts on {' and '.join(PART_TITLES[part] for part in parts)}; memory is reckoned for a LoRA"
            + (f", starting from {network.weights}" if network.weights else "")
        ],
        "data sets": dataset_lines(ready.datasets, ready.records, plan.repeats) if cfg.data.dataset_config else [],
        "pictures": ready.notes,
        "captions": caption_lines(training_records) + _caption_rules(ready),
        "embeddings": own_word_lines(ready.words, len(ready.records), [*ready.prompts, cfg.samples.negative]),
        "shapes": shape_lines(ready.records, ready.crops),
        "masks": mask_lines(ready.records, cfg.data.mask_background, by_area=cfg.data.mask_loss == "area"),
        "latents": [
            _latents_line(cfg, ready.datasets, ready.cached),
            *(npz_lines(len(ready.npz.found), ready.npz.lacking, ready.npz.masked) if cfg.data.npz else []),
        ],
        "cache": _cache_lines(cfg, ready, processes),
        "steps": [
            f"{ready.total_steps} steps = {ready.total_steps / plan.steps_per_epoch:.4g} epochs of "
            f"{plan.num_samples_per_epoch} samples in {plan.steps_per_epoch} steps",
            f"effective batch {one_or_each(size * plan.gradient_accumulation for size in plan.unit_sizes)} = "
            f"{one_or_each(plan.batch_sizes)} on each of {plan.num_processes} process"
            f"{'es' * (plan.num_processes > 1)} x {plan.gradient_accumulation} accumulated",
        ],
        "rates": rate_lines(ready.rates, cfg.optimizer, ready.schedule),
        "average": average_lines(cfg.training.ema_decay),
        "loss": [line] if (line := objective_line(cfg)) else [],
        "memory": [
            f"{ready.precision} on {processes.device}; "
            f"{memory_line(_memory(cfg, ready, num_values, processes))}; "
            f"{memory_free(processes.device) / 2**30:.1f} GiB are free",
            *sharing_lines(cfg.training, processes),
            *_compiled_lines(cfg, ready),
        ],
        "output": [
            f"{output_folder(cfg).last()}{f' (going on from step {ready.state.facts.step})' if ready.state else ''}",
            *upload_lines(cfg.save),
        ],
        "samples": [
            *sample_lines(ready.drawings),
            *judge_lines(ready.judge, cfg.validation.stop_early, cfg.validation.keep_best),
        ],
    }
    return plan_page(f"lorasmith {lorasmith.__version__}: the plan", paragraphs)


def _compiled_lines(cfg: TrainConfig, ready: Preparation) -> list[str]:
    if cfg.training.compile is None:
        return []
    batches = (batch for step in range(ready.plan.steps_per_epoch) for batch in ready.plan.step(step, 0))
    shapes = len({(batch.shape, len(batch.samples)) for batch in batches})
    many = f"{shapes} shape{'s' * (shapes > 1)} of batch"
    return [f"compiled by {cfg.training.compile} for {many}, minutes each before its first step; samples are not"]


def _latents_line(cfg: TrainConfig, datasets: Sequence[DatasetRules], cached: Sequence[bool]) -> str:
    """Say which data sets' latents are cached, and why the others' are not; which augmentations work with that."""
    lines = [_latents_of(cfg, *pair) for pair in zip(datasets, cached, strict=True)]
    if len(set(lines)) == 1:
        return lines[0]
    return "; ".join(f"data set {number}: {line}" for number, line in enumerate(lines, start=1))


def _latents_of(cfg: TrainConfig, dataset: DatasetRules, is_cached: bool) -> str:
    augmentations = [subset.augmentation for subset in dataset.subsets]
    if is_cached:
        mirrored = ", mirrored ones too, for flip" if any(one.flip for one in augmentations) else ""
        has_still_faces = any(one.has_still_faces for one in augmentations)
        still = "; face_crop_aug_range works with that, as its two ends are equal" if has_still_faces else ""
        return f"cached{mirrored}{still}"
    changing = dataset.changing_augmentations
    reason = f"{' and '.join(changing)} give other pixels each time" if changing else "cache_latents is off"
    return f"encoded anew for every step, since {reason}"


def _cache_lines(cfg: TrainConfig, ready: Preparation, processes: Processes) -> list[str]:
    """Say where the cache folder is, what of this run is in it, and how much will be added."""
    if ready.cache is None:
        return ["none: what is encoded stays in memory"]
    facts = ready.facts
    num_values = {
        one.name: 2 * facts.latent_channels * math.prod(one.crop.shape) // facts.latent_factor**2
        for one in wanted_latents(ready).values()
    }
    sizes: dict[Encoded, dict[str, int]] = {"latents": {name: 4 * number for name, number in num_values.items()}}
    if not trains_text_encoder(ready):
        num_positions = cfg.data.max_token_length + 2
        size = num_positions * facts.text_width * DTYPES[ready.precision].itemsize
        sizes["text"] = {caption_name(caption): size for caption in kept_captions(ready)}
    makers = makers_of(cfg, ready, processes.device)
    found = {kind: count_cached(kind, ready.cache, makers[kind], own, ready.say) for kind, own in sizes.items()}
    return [
        str(ready.cache),
        *(f"{_ENCODED_TITLES[kind]}: {_found_in_cache(own, found[kind])}" for kind, own in sizes.items() if own),
    ]


def _found_in_cache(sizes: Mapping[str, int], found: Collection[str] | None) -> str:
    if found is None:
        return f"not looked for yet, as the model's files are new to the cache; at most {in_words(sum(sizes.values()))}"
    missing = sum(size for name, size in sizes.items() if name not in found)
    return f"{len(found):,} of {len(sizes):,} are there" + (f", {in_words(missing)} to add" if missing else "")


def _caption_rules(ready: Preparation) -> list[str]:
    """Say how the captions of each subset with training pictures vary."""
    lines: dict[str, None] = {}
    for index, subset in enumerate(ready.subsets):
        records = [record for record in ready.records if record.subset == index]
        if records and not subset.is_prior:
            lines.update(dict.fromkeys(caption_rule_lines(records, subset.captions)))
    return list(lines)


def _num_adapter_values(cfg: TrainConfig, ready: Preparation) -> int:
    with torch.device("meta"):  # so none is built
        adapters = [
            adapter_class(rule.adapter)(
                ready.shapes[name], ready.rank if cfg.network.weights else rule.rank, rule.alpha, **rule.options
            )
            for name, rule in ready.rules.items()
        ]
    return sum(parameter.numel() for adapter in adapters for parameter in adapter.parameters())


def _rank_words(cfg: TrainConfig, ready: Preparation) -> list[str]:
    """Return how large and how strong the adapters are, as far as their type knows rank and alpha."""
    match adapter_class(cfg.network.adapter).alpha_means:
        case "scale":
            return [f"rank {ready.rank}", f"alpha {ready.alpha:g}", f"effective scale {ready.alpha / ready.rank:g}"]
        case "constraint":
            return [f"rank {ready.rank}", f"constraint {ready.alpha:g}" if ready.alpha else "no constraint"]
        case "nothing":
            return []


def _memory(cfg: TrainConfig, ready: Preparation, num_adapter_values: int, processes: Processes) -> dict[str, int]:
    """Return the estimated bytes on the device while training, by part."""
    facts, device = ready.facts, processes.device
    has_vae = vae_home(device, caches_latents=all(ready.cached)) == device
    return estimate_training_memory(
        num_values=facts.num_values if has_vae else {**facts.num_values, "vae": 0},
        width=facts.width,
        text_width=facts.text_width,
        num_text_layers=facts.num_text_layers,
        precision=ready.precision,  # type: ignore[arg-type]  # one of the three by now
        batch=max(ready.plan.batch_sizes),
        resolution=max((crop.shape for crop in ready.crops), key=math.prod),
        gradient_checkpointing=cfg.training.gradient_checkpointing,
        trains_text_encoder=trains_text_encoder(ready),
        num_adapter_values=num_adapter_values,
        attention=cfg.training.attention,
        num_holders=processes.count if ready.is_base_shared else 1,
    )
