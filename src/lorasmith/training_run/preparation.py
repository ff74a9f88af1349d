"""What is found out and decided about a run before a model is loaded: from headers, pictures and a state."""

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import cast

import torch
from tqdm import tqdm

from lorasmith import config, foreign_network, lr, model_families, picture_judges
from lorasmith.adapters.base import Adapter
from lorasmith.cache_folder import Say, default_place, open_cache
from lorasmith.checkpoint import open_checkpoint
from lorasmith.config import TrainConfig
from lorasmith.data import captions, dataset_config, npz_latents
from lorasmith.data.buckets import Buckets, CropPlan, Size
from lorasmith.data.captions import CaptionOptions
from lorasmith.data.gathering import Gathered, gather
from lorasmith.data.images import remembering, set_pixel_limit, thumbnail_url
from lorasmith.data.plan import Plan, build_plan, validation_plan
from lorasmith.data.records import ImageRecord
from lorasmith.data.subsets import Augmentation, DatasetRules, Subset
from lorasmith.devices import choose_precision
from lorasmith.errors import UserError
from lorasmith.formats import embeddings
from lorasmith.formats.dialects import AnyLora, read_any
from lorasmith.hub import check_upload
from lorasmith.memory import check_compiler
from lorasmith.models.keys.sd import TITLES
from lorasmith.network import Network, Rule, adapter_class, check_ranks, group_by_module, part_of
from lorasmith.output_folder import OutputFolder, check_free
from lorasmith.picture_judges import Choice
from lorasmith.processes import Processes
from lorasmith.sampling import Drawing
from lorasmith.trackers import require_trackers
from lorasmith.training_run import base_loras
from lorasmith.training_run.base_loras import BaseLoras
from lorasmith.training_run.layers import is_convolutional, layer_rules, trained_places
from lorasmith.training_run.objective import check_prediction
from lorasmith.training_run.own_words import OwnWords, own_words
from lorasmith.training_run.rates import Rates, decide_rates
from lorasmith.training_run.regularizing import check_adapters
from lorasmith.training_run.resuming import run_folder
from lorasmith.training_run.samples import drawings
from lorasmith.training_run.shared_base import check_shareable, is_shared
from lorasmith.training_state import (
    State,
    data_fingerprint,
)

_DEFAULT_STEPS = 1600  # the document's scripts' own


@dataclass(frozen=True)
class Preparation:
    """Everything found out and decided before a model is loaded."""

    facts: model_families.ModelFacts
    is_base_shared: bool  # each process holds a part of it
    precision: str
    shapes: dict[str, tuple[int, ...]]  # of the layers to train, by saved name
    rules: dict[str, Rule]  # what each of them gets
    foreign: foreign_network.Request | None  # what puts other adapters on the parts of these layers
    base_loras: BaseLoras
    rank: int  # the largest, where starting weights bring several
    alpha: float
    resolution: Size
    datasets: list[DatasetRules]
    records: list[ImageRecord]
    crops: list[CropPlan]
    subsets: list[Subset]
    notes: list[str]
    plan: Plan
    validation: Plan | None
    total_steps: int
    schedule: lr.Schedule
    rates: Rates
    drawings: list[Drawing]
    words: OwnWords
    cached: list[bool]  # of each data set, whether its latents are
    npz: "NpzFiles"
    fingerprint: str
    state: State | None
    cache: Path | None
    say: Say
    thumbnail: str | None  # a `data:` URL
    judge: Choice | None  # of the samples

    @property
    def prompts(self) -> list[str]:
        """What is drawn, without options."""
        return [drawing.prompt for drawing in self.drawings]


@dataclass(frozen=True)
class NpzFiles:
    """Whose latents come from .npz files, by record index, with a hash of these; which pictures lack one, and why.

    masked: pictures whose file holds a mask.
    """

    found: dict[int, tuple[npz_latents.Wish, str]]
    lacking: list[str]
    masked: list[str]


def prepare(cfg: TrainConfig, processes: Processes, state: State | None) -> Preparation:
    """Look at all that was given: the model's header, the output folder, every picture; decide, load nothing."""
    require_trackers(cfg.log.trackers)
    if cfg.save.upload is not None:
        check_upload(cfg.save.upload)
    precision = choose_precision(cfg.training.precision, processes.device)
    if cfg.training.compile is not None:
        check_compiler(cfg.training.compile, processes.device)
    with open_checkpoint(cfg.model.base) as checkpoint:
        facts = model_families.describe(checkpoint, v2=cfg.model.v2, prediction=cfg.model.prediction, vae=cfg.model.vae)
        family, places, _ = model_families.adapter_places(checkpoint)
    check_prediction(cfg.loss, facts.prediction)
    folded = base_loras.read(cfg.model, family, places)
    found = embeddings.read(cfg.model.embeddings, width=facts.text_width)
    foreign = _foreign_request(cfg.network)
    check_shareable(cfg, processes)
    weights = None if foreign or cfg.network.weights is None else read_any(cfg.network.weights)
    places = trained_places(cfg, places, group_by_module(weights.tensors) if weights else ())
    shapes, rules = {name: place.shape for name, place in places.items()}, layer_rules(cfg, places)
    if weights is None:
        (rank, alpha), weight_notes = _new_rank(cfg.network), []
    else:
        rank, alpha, weight_notes = _check_weights(cfg.network, weights, facts, shapes)
    if foreign is None:
        check_adapters(cfg.network, shapes, list(rules.values())[:1])  # all are of one type
        if weights is None:
            check_ranks(shapes, list(rules.values()))
    if cfg.resume is None or output_folder(cfg).path.resolve() != run_folder(cfg.resume).resolve():
        check_free(output_folder(cfg), overwrite=cfg.save.overwrite)
    set_pixel_limit(cfg.data.max_megapixels)
    datasets, notes = _datasets(cfg, cfg.data.resolution or facts.resolution)
    notes = [*weight_notes, *notes]
    _check_mask_options(cfg.data, datasets)
    say = _teller(processes)
    cache_place = _cache(cfg, say)
    with remembering(cache_place, say):
        gathered = gather(datasets, processes)
    plan = build_plan(
        gathered.records,
        [crop.shape for crop in gathered.crops],
        batch_sizes=[dataset.batch_size for dataset in datasets],
        num_processes=processes.count,
        gradient_accumulation=cfg.training.gradient_accumulation,
        seed=cfg.training.seed,
    )
    total_steps = cfg.training.steps or (cfg.training.epochs or 0) * plan.steps_per_epoch or _DEFAULT_STEPS
    schedule = _schedule(cfg.optimizer, total_steps)
    rates = decide_rates(cfg, {part_of(name) for name in shapes}, schedule, processes.device)
    cached = [_caches_latents(cfg, dataset) for dataset in datasets]
    npz = _npz_files(cfg, facts, gathered, cached, processes)
    words = own_words(*found, gathered.records, gathered.subsets)
    own_facts = [*words.facts(), *folded.identities]
    fingerprint = _fingerprint(gathered, npz, own_facts, plan.num_processes)
    if state is not None:
        _check_processes_of_shards(state, gathered, plan, npz, own_facts)
        _check_resumable(state, fingerprint, plan, total_steps)
        _check_optimizer(state, rates.optimizer.name)
    return Preparation(
        facts, is_shared(cfg.training, processes), precision, shapes, rules, foreign, folded, rank, alpha,
        datasets[0].resolution, datasets,
        gathered.records, gathered.crops,
        [subset.for_run_of(total_steps) for subset in gathered.subsets],
        [*notes, *gathered.notes, *_cut_notes(cfg, gathered, words), *plan.notes],
        plan, validation_plan(plan, gathered.records, seed=_validation_seed(cfg)), total_steps, schedule,
        rates,
        drawings(cfg.samples, gathered.records, gathered.subsets, datasets[0].resolution),
        words, cached, npz, fingerprint, state, cache_place, say,
        thumbnail_url(cfg.save.thumbnail) if cfg.save.thumbnail else None,
        picture_judges.find(cfg.validation.judge, "--judge") if cfg.validation.judge else None,
    )  # fmt: skip


def _schedule(optimizer: config.OptimizerSection, total_steps: int) -> lr.Schedule:
    return lr.resolve(
        optimizer.lr_schedule,
        total_steps,
        warmup_steps=optimizer.lr_warmup_steps,
        decay_steps=optimizer.lr_decay_steps,
        cycles=optimizer.lr_cycles,
        power=optimizer.lr_power,
        timescale=optimizer.lr_timescale,
        floor=optimizer.lr_min_ratio,
        table=optimizer.lr_table,
    )


def _validation_seed(cfg: TrainConfig) -> int:
    seed = cfg.validation.validation_seed
    return cfg.training.seed if seed is None else seed


def _caches_latents(cfg: TrainConfig, dataset: DatasetRules) -> bool:
    if cfg.data.cache_latents and dataset.changing_augmentations:
        raise UserError(
            f"cache_latents keeps each picture as it is, but {' and '.join(dataset.changing_augmentations)} in "
            f"{cfg.data.dataset_config} would change it every time; leave out one or the other."
        )
    return not dataset.changing_augmentations if cfg.data.cache_latents is None else cfg.data.cache_latents


def _npz_files(
    cfg: TrainConfig,
    facts: model_families.ModelFacts,
    gathered: Gathered,
    cached: Sequence[bool],
    processes: Processes,
) -> NpzFiles:
    """Look for latents in .npz files, if these are asked for.

    Raises:
        UserError: the processes do not see the same files.
    """
    files = NpzFiles({}, [], [])
    if not cfg.data.npz:
        return files
    for index, (record, crop) in enumerate(zip(gathered.records, gathered.crops, strict=True)):
        subset, (width, height) = gathered.subsets[record.subset], crop.shape
        shape = (facts.latent_channels, height // facts.latent_factor, width // facts.latent_factor)
        try:
            if record.data is not None or not cached[record.dataset]:
                raise npz_latents.Unfit("it changes each time" if record.data is None else "it is no file of its own")
            stem = npz_latents.stem_of(record.path, Path(subset.place), cfg.data.npz_dir)
            wish = npz_latents.Wish(stem, record.size, crop, shape, subset.augmentation.flip)
            found = npz_latents.find(wish)
        except npz_latents.Unfit as error:
            files.lacking.append(f"{record.path.name} ({error})")
            continue
        files.found[index] = wish, found.content_hash
        if found.has_mask:
            files.masked.append(record.path.name)
    if len({str(other) for other in processes.gather(_npz_facts(files))}) > 1:
        raise UserError("the processes see different .npz files; give all machines the same, or leave npz out.")
    return files


def _npz_facts(files: NpzFiles) -> list[str]:
    return [f"{index} {content_hash}" for index, (_, content_hash) in files.found.items()]


def _fingerprint(gathered: Gathered, npz: NpzFiles, more: list[str], num_processes: int) -> str:
    """Return what stands for the data in a state: nothing in it says where they lie, unless processes share shards."""
    facts = [f"{record.identity} {crop}" for record, crop in zip(gathered.records, gathered.crops, strict=True)] + [
        str(subset.placeless) for subset in gathered.subsets
    ]
    shards = [record.shard for record in gathered.records]
    if num_processes > 1 and any(shard is not None for shard in shards):
        facts += [f"{num_processes} processes", str(shards)]
    return data_fingerprint(facts + _npz_facts(npz) + more)


def require_options(cfg: TrainConfig) -> None:
    """Ask for what cannot be guessed, all at once."""
    needed = {
        "--base (the model to train for)": cfg.model.base,
        "--images (the folder of pictures)": cfg.data.images or cfg.data.dataset_config,
        "--output (the folder for the LoRA)": cfg.save.output,
    }
    missing = [name for name, value in needed.items() if not value]
    if missing:
        raise UserError(
            f"missing: {', '.join(missing)}. For example: "
            "lorasmith train --base model.safetensors --images photos --output my-lora"
        )


def _check_processes_of_shards(state: State, gathered: Gathered, plan: Plan, npz: NpzFiles, more: list[str]) -> None:
    """Refuse to go on with shards that were shared among another number of processes."""
    counts = range(1, max(state.facts.unit_sizes) + 1)
    fingerprint = partial(_fingerprint, gathered, npz, more)
    before = next((count for count in counts if state.facts.data_fingerprint == fingerprint(count)), None)
    if before is not None and fingerprint(before) != fingerprint(plan.num_processes):
        raise UserError(
            f"the run was started with {before} process{'es' * (before > 1)}, and {plan.num_processes} are given now; "
            "its pictures lie in tar shards, each read by one process alone, so the number of processes decides which "
            f"pictures meet in a step. Go on with {before}, or start a new run from the saved LoRA with --weights."
        )


def _check_resumable(state: State, fingerprint: str, plan: Plan, total_steps: int) -> None:
    """Refuse to go on with other data, another global batch, or a run that is over."""
    if state.facts.data_fingerprint != fingerprint:
        raise UserError(
            "the pictures, captions or masks are not those that the run was started with, or base LoRAs are others, or "
            "embeddings, the dataset file or .npz files say something else of them, so it cannot go on as it was. Put "
            "them back, or start a new run from the saved LoRA with --weights."
        )
    if state.facts.unit_sizes != plan.unit_sizes:
        raise UserError(
            f"the run works on {one_or_each(state.facts.unit_sizes)} pictures at once, but "
            f"{one_or_each(plan.batch_sizes)} on each of "
            f"{plan.num_processes} processes are given now; make --batch-size times processes the same."
        )
    if state.facts.step >= total_steps:
        raise UserError(
            f"this run is complete: {state.facts.step} of {total_steps} steps are done. To train longer, give more "
            "--steps; with a constant learning rate that equals one longer run."
        )


def _new_rank(network: config.NetworkSection) -> tuple[int, float]:
    """Return rank and alpha of new adapters.

    Raises:
        UserError: one is given for a type for which both mean nothing.
    """
    means = adapter_class(network.adapter).alpha_means
    if means == "nothing" and (given := sorted({"rank", "alpha"} & network.model_fields_set)):
        raise UserError(
            f"--{given[0]} means nothing for --adapter {network.adapter}, which has no rank and no alpha; leave it out."
        )
    return network.rank, network.alpha or (float(network.rank) if means == "scale" else 0.0)


def _foreign_request(network: config.NetworkSection) -> foreign_network.Request | None:
    """Return the network module that is asked for, if one is, and what it will be called with."""
    if network.network_module is None:
        return None
    if network.weights is not None:
        with open_checkpoint(network.weights):  # what is in it is compared with what the module makes
            pass
    rank, alpha = _new_rank(network)
    return foreign_network.find(
        network.network_module, network.network_args, rank=rank, alpha=alpha, dropout=network.neuron_dropout
    )


def _check_optimizer(state: State, name: str) -> None:
    """Refuse to go on with another optimizer, where the run's own cannot be used on this machine."""
    if state.facts.optimizer != name:
        raise UserError(
            f"the run was trained with {state.facts.optimizer}, but here that would be {name}; go on with a machine "
            "and packages where the first works, or start a new run from the saved LoRA with --weights."
        )


def _check_weights(
    network: config.NetworkSection,
    lora: AnyLora,
    facts: model_families.ModelFacts,
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[int, float, list[str]]:
    """Return the largest rank in starting weights, convolutions aside, with its alpha, and notes on them.

    Raises:
        UserError: they are broken, for another family, not for exactly these layers, or of another type, rank or alpha
            than is asked for.
    """
    path = network.weights
    if lora.family not in (facts.family, "unknown"):
        title = TITLES.get(lora.family, lora.family.upper())
        raise UserError(
            f"--weights {path} is a LoRA for {title}, but the base model is {facts.title}; "
            "give a LoRA that was trained for this base model, or the base model that it was trained for."
        )
    broken = [name for name, tensor in lora.tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(
            f"--weights {path} holds NaN or infinity in {len(broken)} tensors (first: {broken[0]}): the training that "
            "made it had broken down; give an earlier save of it."
        )
    try:
        adapters = Network.check(shapes, lora.tensors)
    except UserError as error:
        raise UserError(f"--weights {path}: {error}") from error
    types = Counter(type(adapter).__module__.rpartition(".")[2] for adapter in adapters.values())
    if any(type(adapter) is not adapter_class(network.adapter) for adapter in adapters.values()):
        told = ", ".join(f"{count} {name}" for name, count in types.most_common())
        wanted = f"give --adapter {next(iter(types))}" if len(types) == 1 else "give weights of one type"
        raise UserError(f"--weights {path} brings adapters of another type than {network.adapter} ({told}); {wanted}.")
    others = {name: adapter for name, adapter in adapters.items() if not is_convolutional(name)}
    rank, alpha = _stored_rank(network, others or adapters)
    given_rank = network.rank if "rank" in network.model_fields_set else None
    for name, asked, value in (("rank", given_rank, rank), ("alpha", network.alpha, alpha)):
        if asked is not None and not math.isclose(asked, value, rel_tol=1e-3):  # a file may hold alpha in fp16
            raise UserError(
                f"--weights {path} brings rank {rank} and alpha {alpha:g}, but --{name} {asked:g} is given; "
                "leave it out."
            )
    unused = [f"{count} tensors are not used: {what}" for what, count in Counter(lora.extras.values()).items()]
    return rank, alpha, [f"--weights {path}: {note}" for note in (*lora.notes, *unused)]


def _stored_rank(network: config.NetworkSection, adapters: Mapping[str, Adapter]) -> tuple[int, float]:
    """Return the largest rank of adapters from a file, with its alpha; for rotations the largest block."""
    match adapter_class(network.adapter).alpha_means:
        case "nothing":
            return _new_rank(network)
        case "constraint":
            ranks = {name: adapter.get_parameter("oft_blocks").shape[-1] for name, adapter in adapters.items()}
        case "scale":
            ranks = {name: cast(int, adapter.rank) for name, adapter in adapters.items()}
    widest = max(ranks, key=lambda name: ranks[name])
    return ranks[widest], adapters[widest].get_buffer("alpha").item()


def output_folder(cfg: TrainConfig) -> OutputFolder:
    """Return where the run's results go."""
    assert cfg.save.output is not None
    return OutputFolder(cfg.save.output, cfg.save.name, cfg.save.format)


def _datasets(cfg: TrainConfig, resolution: Size) -> tuple[list[DatasetRules], list[str]]:
    """Return what is trained on, as rules, and notes on it: what the dataset file says, or pictures as options say it.

    In the latter case the regularization pictures are beside the others.
    """
    data = cfg.data
    subset = Subset(
        place=str(data.images or ""),
        source=data.source,
        metadata=data.captions,
        image_column=data.image_column,
        caption_column=data.caption_column,
        dataset_split=data.dataset_split,
        repeats=data.repeats,
        caption=data.caption,
        caption_extension=data.caption_extension,
        recursive=data.recursive,
        skip_unreadable=data.skip_unreadable,
        alpha_color=data.alpha_color,
        masks=data.masks,
        alpha_mask=data.alpha_mask,
        captions=_caption_options(data),
        augmentation=Augmentation(data.flip, data.color, data.random_crop, data.face_crop_aug_range),
    )
    subsets = [subset]
    if data.regularization is not None:
        subsets.append(
            replace(
                subset, place=str(data.regularization), source="folder", metadata=None, is_prior=True, repeats=1,
                image_column=None, caption_column=None, dataset_split="train",
                caption=None, masks=None, alpha_mask=False, keeps_output=cfg.loss.diff_output_preservation,
            )
        )  # fmt: skip
    buckets = Buckets(
        resolution,
        data.bucket_min,
        data.bucket_max,
        data.bucket_step,
        data.bucket_rule == "sd-scripts",
        data.bucket_no_upscale,
    )
    rules = DatasetRules(
        tuple(subsets),
        resolution,
        buckets if data.buckets else None,
        cfg.training.batch_size,
        cfg.validation.validation_split,
        _validation_seed(cfg),
    )
    if data.dataset_config is None:
        return [rules], []
    defaults = replace(rules, subsets=(replace(subset, keeps_output=cfg.loss.diff_output_preservation),))
    file = dataset_config.read(data.dataset_config, defaults, buckets=buckets, root=data.dataset_root or Path())
    given = {
        "prior_loss_weight": data.prior_loss_weight != 1,
        "diff_output_preservation": cfg.loss.diff_output_preservation,
    }
    names = [name for name, is_given in given.items() if is_given]
    if names and not any(subset.is_prior for one in file.datasets for subset in one.subsets):
        raise UserError(
            f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} for regularization pictures, but no subset of "
            f"{data.dataset_config} says is_reg = true; write that, or leave the other out."
        )
    given = list(cfg.validation.model_dump(exclude_defaults=True, include={"validation_split"}))
    given += config.options_of_held_out(cfg.validation)
    if given and not any(one.validation_split for one in file.datasets):
        raise UserError(
            f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} for held-out pictures, but "
            f"validation_split, their share, is missing in {data.dataset_config}; write it, or leave the other out."
        )
    return file.datasets, file.notes


def _check_mask_options(data: config.DataSection, datasets: Sequence[DatasetRules]) -> None:
    """Refuse options of masks where there are none."""
    has_masks = any(subset.masks is not None or subset.alpha_mask for dataset in datasets for subset in dataset.subsets)
    given = {"mask_loss": data.mask_loss != "area", "mask_background": data.mask_background != 0}
    names = [name for name, is_given in given.items() if is_given]
    if names and not has_masks:
        raise UserError(
            f"{' and '.join(names)} say{'s' * (len(names) == 1)} what masks do to the loss, but there are no masks; "
            "give their folder with --masks, or --alpha-mask to take the pictures' transparency, or leave it out."
        )


def _caption_options(data: config.DataSection) -> CaptionOptions:
    return CaptionOptions(
        shuffle=data.shuffle_caption,
        keep_tokens=data.keep_tokens,
        separator=data.caption_separator,
        keep_separator=data.keep_tokens_separator,
        secondary_separator=data.secondary_separator,
        prefix=data.caption_prefix,
        suffix=data.caption_suffix,
        dropout=data.caption_dropout,
        dropout_every_epochs=data.caption_dropout_every_epochs,
        tag_dropout=data.tag_dropout,
        token_warmup_steps=data.token_warmup_steps,
        token_warmup_min=data.token_warmup_min,
        wildcards=data.wildcards,
    )


def _cut_notes(cfg: TrainConfig, gathered: Gathered, words: OwnWords) -> list[str]:
    """Name the pictures whose captions are longer than the text encoder is given."""
    data, subsets = cfg.data, gathered.subsets
    texts = [
        (record.path.name, captions.longest(record.caption, subsets[record.subset].captions))
        for record in gathered.records
    ]
    with open_checkpoint(cfg.model.base) as checkpoint:
        cut = model_families.cut_captions(
            checkpoint,
            (text for _, several in texts for text in several),
            max_token_length=data.max_token_length,
            weighted_captions=data.weighted_captions,
            embeddings=words.embeddings,
        )
    names = [name for name, several in texts if cut & set(several)]
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    advice = "" if data.max_token_length == 225 else "; a larger --max-token-length (up to 225) would keep more of them"
    return [
        f"{len(names)} {'caption is' if len(names) == 1 else 'captions are'} longer than {data.max_token_length} "
        "tokens, and the last words are not used: "
        f"{', '.join(names[:3])}{more}{advice}"
    ]


def _cache(cfg: TrainConfig, say: Say) -> Path | None:
    """Return the cache folder; None if none is wanted, or it cannot be used."""
    if not cfg.data.disk_cache:
        return None
    return open_cache(cfg.data.cache_dir or default_place(), say)


def _teller(processes: Processes) -> Say:
    """Return what tells a person of trouble with the cache: by process 0 alone, and the same thing once."""

    @cache
    def say(text: str) -> None:
        if processes.is_main:
            tqdm.write(text, file=sys.stderr)

    return say


def one_or_each(numbers: Iterable[int]) -> str:
    """Return a number of all data sets: once if it is the same, else in their order."""
    return " or ".join(map(str, dict.fromkeys(numbers)))
