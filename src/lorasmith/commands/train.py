"""`lorasmith train`: pictures in, a LoRA out.

    lorasmith train --base model.safetensors --images photos --output my-lora

Reads top to bottom: look at everything that was given, print the plan, load, loop, save, report. The only reader of the
training configuration.
"""

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

import lorasmith
from lorasmith import config, metadata, model_families, prior_pictures
from lorasmith.cache_folder import Say, Store, default_place, in_words, open_cache
from lorasmith.caching import (
    Encoded,
    LatentKey,
    Maker,
    Wanted,
    cached_encoder,
    cached_posteriors,
    caption_name,
    count_cached,
    lasting_captions,
    latents_maker,
    open_store,
)
from lorasmith.checkpoint import atomic_file, open_checkpoint
from lorasmith.command_line import quoted
from lorasmith.config import TrainConfig
from lorasmith.data import captions, dataset_config, dataset_metadata, npz_latents
from lorasmith.data.buckets import Buckets, CropPlan, Size
from lorasmith.data.captions import CaptionOptions
from lorasmith.data.dataset import Dataset, Posteriors
from lorasmith.data.gathering import Gathered, gather
from lorasmith.data.images import remembering, require_folder, set_pixel_limit
from lorasmith.data.places import is_shards, source_of
from lorasmith.data.plan import Plan, build_plan, validation_plan
from lorasmith.data.records import ImageRecord
from lorasmith.data.subsets import Augmentation, DatasetRules, Subset
from lorasmith.errors import UserError
from lorasmith.formats import kohya
from lorasmith.interrupt import StopRequest
from lorasmith.loss_log import LossLog
from lorasmith.lr import multiplier
from lorasmith.memory import estimate_training_memory, lent, set_attention, set_gradient_checkpointing, vae_home
from lorasmith.models.base import LatentDiffusion
from lorasmith.network import Network, Rule, check_ranks, match, part_of
from lorasmith.optimizers.base import builder
from lorasmith.output_folder import RUN_FILE, OutputFolder, check_free, move_aside
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
from lorasmith.processes import Processes, make_deterministic
from lorasmith.progress import Progress, counted, memory_free
from lorasmith.report import ReportContents, write_report
from lorasmith.resume import merge_options
from lorasmith.samples_folder import SamplesFolder
from lorasmith.sampling import generate
from lorasmith.training import LossNotFiniteError, Stepper
from lorasmith.training_state import (
    NETWORK_FILE,
    State,
    StateFacts,
    data_fingerprint,
    find_state,
    list_states,
    load_state,
    save_state,
    step_of,
)
from lorasmith.validation import validation_loss

_DEFAULT_STEPS = 1600  # the document's scripts' own
_NUM_DEFAULT_PROMPTS = 2
_OF_ONE_START: Any = {"resume": True, "save": {"overwrite"}}  # options that a resumed run does not take over
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FAMILY_TITLES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x"}
_SMALLEST_REAL_WIDTH = 320  # channels of the U-Net in every SD 1 and 2
_STOPPING = "stopping after this step, then saving; once more ends at once, without saving"
_PLACES = (  # options of a run that name something on the disk, so that it can be gone on with from anywhere
    ("model", "base"), ("model", "vae"), ("network", "weights"),
    ("data", "images"), ("data", "regularization"), ("data", "captions"), ("data", "masks"),
    ("data", "dataset_config"), ("data", "npz_dir"),
)  # fmt: skip
_ENCODED_TITLES: dict[Encoded, str] = {"latents": "latents", "text": "text embeddings"}
_PART_TITLES = {"text_encoder": "text encoder", "unet": "U-Net"}
_PATTERNS = {"both": "*", "unet": "lora_unet_*", "text_encoder": "lora_te*"}


@dataclass(frozen=True)
class Preparation:
    """Everything found out and decided before a model is loaded."""

    facts: model_families.ModelFacts
    precision: str
    shapes: dict[str, tuple[int, ...]]  # of the layers to train, by saved name
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
    prompts: list[str]
    cached: list[bool]  # of each data set, whether its latents are
    npz: "NpzFiles"
    fingerprint: str
    state: State | None
    cache: Path | None
    say: Say


@dataclass(frozen=True)
class NpzFiles:
    """Whose latents come from .npz files, by record index, with a hash of these; which pictures lack one, and why.

    masked: pictures whose file holds a mask.
    """

    found: dict[int, tuple[npz_latents.Wish, str]]
    lacking: list[str]
    masked: list[str]


def run(cfg: TrainConfig) -> int:
    """Train as configured; return the exit code: 0, or 130 / 143 when stopped by Ctrl+C / SIGTERM."""
    state = None
    if cfg.resume is not None:
        cfg, state = _merged(cfg, _run_folder(cfg.resume)), load_state(find_state(cfg.resume))
    _require(cfg)
    check_device(cfg.training.device)
    processes = Processes(cfg.training.device)
    try:
        with processes.together():
            to_draw = _missing_prior_pictures(cfg)
            ready = prepare(_before_drawing(cfg) if to_draw else cfg, processes, state)
        if to_draw:
            ready = replace(ready, notes=[*ready.notes, _to_draw_note(to_draw)])
        if processes.is_main:
            print(_page(cfg, ready, processes), flush=True)
        if cfg.dry_run:
            return 0
        if to_draw:
            with processes.together():
                _draw_prior_pictures(cfg, ready, to_draw, processes)
            with processes.together():
                ready = prepare(cfg, processes, state)
            if processes.is_main:
                print(_page(cfg, ready, processes), flush=True)
        return train(cfg, ready, processes)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UserError(
            f"{processes.device} has too little memory for this. What to try, in this order: --gradient-checkpointing; "
            "--batch-size 1 with --gradient-accumulation; --precision bf16; a lower --resolution; closing other "
            f"programs. ({str(error).strip().partition(chr(10))[0] or type(error).__name__})"
        ) from error
    finally:
        processes.close()


def prepare(cfg: TrainConfig, processes: Processes, state: State | None) -> Preparation:
    """Look at all that was given: the model's header, the output folder, every picture; decide, load nothing."""
    precision = choose_precision(cfg.training.precision, processes.device)
    builder(cfg.optimizer.optimizer)  # told now if there is none
    with open_checkpoint(cfg.model.base) as checkpoint:
        facts = model_families.describe(checkpoint, v2=cfg.model.v2, prediction=cfg.model.prediction, vae=cfg.model.vae)
        shapes = model_families.target_shapes(checkpoint)
    rules = _rules(cfg)
    shapes = {name: shapes[name] for name in match(shapes, rules)}
    if cfg.network.weights is None:
        check_ranks(shapes, rules)
        rank, alpha = cfg.network.rank, cfg.network.alpha or float(cfg.network.rank)
    else:
        rank, alpha = _check_weights(cfg.network, facts, shapes)
    if cfg.resume is None or _folder(cfg).path.resolve() != _run_folder(cfg.resume).resolve():
        check_free(_folder(cfg), overwrite=cfg.save.overwrite)
    set_pixel_limit(cfg.data.max_megapixels)
    datasets, notes = _datasets(cfg, cfg.data.resolution or facts.resolution)
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
    if cfg.optimizer.lr_warmup_steps >= total_steps:
        raise UserError(
            f"lr_warmup_steps = {cfg.optimizer.lr_warmup_steps} is not below the run's {total_steps} steps; "
            "lower the first, or train longer with --steps or --epochs."
        )
    cached = [_caches_latents(cfg, dataset) for dataset in datasets]
    npz = _npz_files(cfg, facts, gathered, cached, processes)
    fingerprint = _fingerprint(gathered, npz, plan.num_processes)
    if state is not None:
        _check_processes_of_shards(state, gathered, plan, npz)
        _check_resumable(state, fingerprint, plan, total_steps)
    return Preparation(
        facts, precision, shapes, rank, alpha, datasets[0].resolution, datasets, gathered.records, gathered.crops,
        [subset.for_run_of(total_steps) for subset in gathered.subsets],
        [*notes, *gathered.notes, *_cut_notes(cfg, gathered), *plan.notes],
        plan, validation_plan(plan, gathered.records, seed=_validation_seed(cfg)), total_steps, _prompts(cfg, gathered),
        cached, npz, fingerprint, state, cache_place, say,
    )  # fmt: skip


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


def _fingerprint(gathered: Gathered, npz: NpzFiles, num_processes: int) -> str:
    """Return what stands for the data in a state: nothing in it says where they lie, unless processes share shards."""
    facts = [f"{record.identity} {crop}" for record, crop in zip(gathered.records, gathered.crops, strict=True)] + [
        str(subset.placeless) for subset in gathered.subsets
    ]
    shards = [record.shard for record in gathered.records]
    if num_processes > 1 and any(shard is not None for shard in shards):
        facts += [f"{num_processes} processes", str(shards)]
    return data_fingerprint(facts + _npz_facts(npz))


def _missing_prior_pictures(cfg: TrainConfig) -> prior_pictures.Missing | None:
    """Return the regularization pictures that the base model is to draw first; None if there are enough, or none asked.

    Raises:
        UserError: which class to draw is not said by the folders' names either.
    """
    data = cfg.data
    if not data.prior_pictures:
        return None
    assert data.regularization is not None
    assert data.images is not None
    has_folders = source_of(str(data.images)) == "folder" and data.source in ("auto", "folder", "metadata_json")
    if has_folders:
        require_folder(data.images)
    if data.regularization.exists():
        require_folder(data.regularization)
    named = prior_pictures.class_words(data.images) if has_folders else []
    classes = [data.prior_prompt] if data.prior_prompt else named
    if len(classes) != 1:
        found = f"the folders in {data.images} name {', '.join(classes)}" if classes else "no folder's name says it"
        raise UserError(
            f"prior_pictures: which class is to be drawn? {found}; give it with --prior-prompt, such as "
            '--prior-prompt "a photo of a dog" for pictures of your own dog.'
        )
    missing = prior_pictures.missing(data.regularization, classes[0], data.prior_pictures)
    return missing if missing.numbers else None


def _before_drawing(cfg: TrainConfig) -> TrainConfig:
    """Return the run without regularization pictures, to find all other mistakes before an hour of drawing."""
    unset = {"regularization": None, "prior_pictures": None, "prior_prompt": None}
    return cfg.model_copy(update={"data": cfg.data.model_copy(update=unset)})


def _to_draw_note(to_draw: prior_pictures.Missing) -> str:
    return (
        f'regularization: the base model first draws {len(to_draw.numbers)} pictures of "{to_draw.prompt}" into '
        f"{to_draw.folder}; they are kept, and not drawn again"
    )


def _draw_prior_pictures(
    cfg: TrainConfig, ready: Preparation, to_draw: prior_pictures.Missing, processes: Processes
) -> None:
    """Draw this process's share of the regularization pictures that are missing."""
    model, samples = _load_model(cfg, ready, processes.device), cfg.samples

    def draw_one(prompt: str, seed: int) -> Image.Image:
        settings: Any = {
            "negative": samples.negative, "steps": samples.sample_steps, "guidance": samples.guidance
        }  # fmt: skip
        return generate(model, [prompt], seeds=[seed], size=ready.resolution, **settings)[0]

    is_shown = cfg.log.progress and processes.is_main
    numbers = to_draw.numbers[processes.index :: processes.count]
    shown = counted(numbers, len(numbers), "drawing regularization pictures", is_shown=is_shown)
    prior_pictures.draw(to_draw, shown, draw_one, seed=cfg.training.seed)


def train(cfg: TrainConfig, ready: Preparation, processes: Processes) -> int:
    """Load the model, train to the last step or until asked to stop, save and report."""
    with processes.together():
        session = _session(cfg, ready, processes)
    return session.run(_dataset(cfg, ready, session.model, processes, session.stores.get("latents")))


def _session(cfg: TrainConfig, ready: Preparation, processes: Processes) -> "_Session":
    """Load the model, and put network, optimizer and stepper on it, as a state left them if there is one."""
    device, state = processes.device, ready.state
    make_deterministic(device)
    if processes.is_main and cfg.log.progress:
        print(f"loading {cfg.model.base}", flush=True)
    model = _load_model(cfg, ready, device)
    model.vae.to(vae_home(device, caches_latents=all(ready.cached)))
    network = _network(cfg, model)
    network.attach()
    set_attention(model, cfg.training.attention)
    set_gradient_checkpointing(model, cfg.training.gradient_checkpointing)
    optimizer = builder(cfg.optimizer.optimizer)(
        network.param_groups(
            learning_rate=cfg.optimizer.learning_rate,
            unet_lr=cfg.optimizer.unet_lr,
            text_encoder_lr=cfg.optimizer.text_encoder_lr,
        ),
        weight_decay=cfg.optimizer.weight_decay,
    )
    stores: dict[Encoded, Store] = {
        kind: open_store(kind, ready.cache, model, maker, ready.say)
        for kind, maker in _makers(cfg, ready, device).items()
        if (any(ready.cached) if kind == "latents" else not _trains_text_encoder(ready))
    }
    stepper = Stepper(
        model,
        list(network.parameters()),
        optimizer,
        processes,
        cached_encoder(model, stores["text"], _lasting_captions(ready)) if "text" in stores else model.encode_text,
        max_grad_norm=cfg.optimizer.max_grad_norm,
        is_fp16=ready.precision == "fp16",
    )
    if state is not None:
        network.load_state_dict(state.network)
        optimizer.load_state_dict(state.optimizer)
        stepper.scaler.load_state_dict(state.scaler)
    return _Session(cfg, ready, processes, model, network, optimizer, stepper, stores)


def _load_model(cfg: TrainConfig, ready: Preparation, device: torch.device) -> LatentDiffusion:
    with open_checkpoint(cfg.model.base) as checkpoint:
        return model_families.load(
            checkpoint,
            dtype=_DTYPES[ready.precision],
            device=device,
            vae=cfg.model.vae,
            prediction=ready.facts.prediction,
            clip_skip=cfg.model.clip_skip,
            ema=cfg.model.ema,
            max_token_length=cfg.data.max_token_length,
            weighted_captions=cfg.data.weighted_captions,
        )


class _Session:
    """One start of a run: the loop and what is written on the way. Process 0 alone prints and writes."""

    def __init__(
        self,
        cfg: TrainConfig,
        ready: Preparation,
        processes: Processes,
        model: LatentDiffusion,
        network: Network,
        optimizer: torch.optim.Optimizer,
        stepper: Stepper,
        stores: Mapping[Encoded, Store],
    ) -> None:
        self.cfg, self.ready, self.processes, self.model = cfg, ready, processes, model
        self.network, self.optimizer, self.stepper, self.stores = network, optimizer, stepper, stores
        self.folder, self.state = _folder(cfg), ready.state
        self.started_at = now() if self.state is None else self.state.facts.started_at
        self.done = 0 if self.state is None else self.state.facts.step
        self.losses: LossLog | None = None
        self.validation_losses: LossLog | None = None
        self.samples: SamplesFolder | None = None
        self.board: Any = None

    def run(self, dataset: Dataset) -> int:
        """Train; return the exit code."""
        together, is_main = self.processes.together, self.processes.is_main
        with ExitStack() as stack:
            for store in self.stores.values():
                stack.callback(store.flush)
            with together():
                if is_main:
                    self._open_folder(stack)
                if self.done == 0 and self.cfg.samples.before_after:
                    self._draw()
            if self.done == 0 or self._is_validation_due():  # maybe stopped before it could be measured
                self._validate(dataset)
            stop = stack.enter_context(StopRequest(_STOPPING if is_main else ""))
            try:
                is_stopped = self._loop(dataset, stop)
            except LossNotFiniteError as error:
                raise LossNotFiniteError(f"{error}{self._way_on()}") from error
            if is_stopped:
                with together():  # a launcher ends the others as soon as one has ended, but process 0 is saving
                    return self._leave(stop)
            with together():
                if is_main:
                    self._finish()
        return 0

    def _loop(self, dataset: Dataset, stop: StopRequest) -> bool:
        """Take steps to the end, or until any process was asked to stop; return whether that was so."""
        total, optimizer, processes = self.ready.total_steps, self.cfg.optimizer, self.processes
        is_shown = self.cfg.log.progress and processes.is_main
        with Progress(total, self.done, processes.device, is_shown=is_shown) as progress:
            prepared = dataset.prefetch(range(self.done, total), processes.index, self.cfg.data.workers)
            while self.done < total:
                with processes.together():
                    batches = next(prepared)
                rate = multiplier(
                    optimizer.lr_schedule, self.done, warmup_steps=optimizer.lr_warmup_steps, total_steps=total
                )
                result = self.stepper.step(batches, rate, step=self.done, stop_signal=lambda: stop.signal_number)
                self.done += 1
                with processes.together():
                    if processes.is_main:
                        self._log(result.loss, rate)
                    progress.advance(result.loss)
                if result.stop_signal is None and self._is_validation_due():
                    progress.say(self._validate(dataset))
                with processes.together():
                    if result.stop_signal is None:
                        self._save_and_draw_when_due(progress.say)
                if result.stop_signal is not None:
                    stop.signal_number = result.stop_signal  # maybe another process's
                    return self.done < total
        return False

    def _is_validation_due(self) -> bool:
        if self.ready.validation is None:
            return False
        validation, done = self.cfg.validation, self.done
        periods = [
            validation.validate_every_steps,
            validation.validate_every_epochs and validation.validate_every_epochs * self.ready.plan.steps_per_epoch,
        ]
        if not any(periods):
            periods = [self.ready.plan.steps_per_epoch]
        return done == self.ready.total_steps or any(period and done % period == 0 for period in periods)

    def _validate(self, dataset: Dataset) -> str:
        """Measure and log the loss of the held-out pictures, if there are any; return what to say of it."""
        plan = self.ready.validation
        if plan is None:
            return ""
        loss = validation_loss(
            self.model, plan, dataset.held_out(plan), self.processes, self.stepper.encode,
            workers=self.cfg.data.workers,
        )  # fmt: skip
        if (log := self.validation_losses) is not None and self.done not in dict(log.losses):
            log.append(self.done, loss)
            if self.board is not None:
                self.board.add_scalar("loss/validation", loss, self.done)
        return f"held-out pictures after step {self.done}: loss {loss:.4f}"

    def _way_on(self) -> str:
        """Name the last whole state and the command that goes on from it more carefully; "" if there is none.

        Resuming would come to the same step with the same loss, so it is a new run that starts from these weights.
        """
        states = [state for state in list_states(self.folder.states) if step_of(state) <= self.done]
        if not states:
            return ""
        optimizer, output = self.cfg.optimizer, self.folder.path.resolve()
        rates = {
            "--learning-rate": optimizer.learning_rate,
            "--unet-lr": optimizer.unet_lr,
            "--text-encoder-lr": optimizer.text_encoder_lr,
        }
        words = [
            "lorasmith", "train", "--config", output / RUN_FILE, "--weights", states[-1].resolve() / NETWORK_FILE,
            *(word for flag, rate in rates.items() if rate is not None for word in (flag, f"{rate / 10:g}")),
            "--output", f"{output}-2",
        ]  # fmt: skip
        return (
            f" The last whole state is that of step {step_of(states[-1])}; from there with a tenth of the learning "
            f"rate: {' '.join(map(quoted, words))}"
        )

    def _save_and_draw_when_due(self, say: Callable[[str], None]) -> None:
        save, samples, done = self.cfg.save, self.cfg.samples, self.done
        steps_per_epoch = self.ready.plan.steps_per_epoch
        epoch = done // steps_per_epoch if done % steps_per_epoch == 0 else 0
        if done == self.ready.total_steps:
            return
        paths = []
        if epoch and save.save_every_epochs and epoch % save.save_every_epochs == 0:
            paths.append(self.folder.epoch(epoch))
        if save.save_every_steps and done % save.save_every_steps == 0:
            paths.append(self.folder.step(done))
        is_state_due = bool(save.state_every_steps) and done % save.state_every_steps == 0
        if self.processes.is_main:
            for path in paths:
                self._save_lora(path)
                say(f"saved {path}")
            if paths or is_state_due:
                self._save_state()
        if (samples.sample_every_steps and done % samples.sample_every_steps == 0) or (
            epoch and samples.sample_every_epochs and epoch % samples.sample_every_epochs == 0
        ):
            self._draw()

    def _leave(self, stop: StopRequest) -> int:
        """Save what was reached after a request to stop, and say how to go on."""
        if self.processes.is_main:
            path = self.folder.step(self.done)
            self._save_lora(path)
            self._save_state()
            print(
                f"\nstopped after step {self.done} of {self.ready.total_steps}; saved {path}\n"
                f"to go on: lorasmith train --resume {quoted(self.folder.path)}",
                flush=True,
            )
        return stop.exit_code

    def _finish(self) -> None:
        """Save the last LoRA and state, draw, and write the report."""
        path = self.folder.last()
        norms = self._save_lora(path)
        self._save_state()
        if self.cfg.samples.before_after:
            self._draw()
        page = write_report(self.folder.report, self._report(path, norms))
        print(f"\nthe LoRA: {path}\nthe report: {page}", flush=True)

    def _open_folder(self, stack: ExitStack) -> None:
        if self.state is None and (aside := move_aside(self.folder)) is not None:
            print(f"the older run was moved to {aside}")
        self.folder.path.mkdir(parents=True, exist_ok=True)
        stored = self.cfg.model_dump(mode="json", exclude_none=True, exclude_defaults=True, exclude=_OF_ONE_START)
        with atomic_file(self.folder.run_file) as path:
            path.write_text(config.dump_toml(_anywhere(stored)), encoding="utf-8")
        self.losses = LossLog(self.folder.loss_log, done=self.done)
        stack.callback(self.losses.close)
        if self.ready.validation is not None:
            self.validation_losses = LossLog(self.folder.validation_log, done=self.done)
            stack.callback(self.validation_losses.close)
        samples = self.cfg.samples
        self.samples = SamplesFolder(
            self.folder.samples,
            self.ready.prompts,
            {
                "size": samples.sample_size or self.ready.resolution,
                **samples.model_dump(include={"negative", "sample_steps", "guidance", "sample_seed"}),
            },
            done=self.done,
        )
        if self.cfg.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes a second, and not everyone wants it

            self.board = SummaryWriter(str(self.folder.tensorboard), purge_step=self.done + 1)
            stack.callback(self.board.close)

    def _log(self, loss: float, rate: float) -> None:
        assert self.losses is not None
        rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        self.losses.append(self.done, loss, lr=max(rates.values()))
        if self.board is not None:
            self.board.add_scalar("loss", loss, self.done)
            for name, value in rates.items():
                self.board.add_scalar(f"lr/{name}", value, self.done)

    def _save_lora(self, path: Path) -> dict[str, float]:
        """Write the LoRA, read it back and compare; return the norm of each module's update."""
        precision, tensors = self.cfg.save.save_precision, self.network.state_dict()
        kohya.write(path, tensors, _metadata(self.cfg, self.ready, self.done, self.started_at), precision=precision)
        return kohya.check(path, tensors, precision=precision)

    def _save_state(self) -> None:
        facts = StateFacts(self.done, self.ready.fingerprint, self.started_at, self.ready.plan.unit_sizes)
        save_state(
            self.folder.states,
            facts,
            self.network.state_dict(),
            self.optimizer.state_dict(),
            self.stepper.scaler.state_dict(),
            keep=self.cfg.save.keep_states,
        )

    def _draw(self) -> None:
        """Draw the prompts as the model is now, and the sheet of all moments so far."""
        samples = self.cfg.samples
        if not self.processes.is_main or not self.ready.prompts:
            return
        assert self.samples is not None
        size = samples.sample_size or self.ready.resolution
        if self.cfg.log.progress:
            tqdm.write(f"drawing {len(self.ready.prompts)} samples, {size[0]}x{size[1]}", file=sys.stdout)
        seeds = [samples.sample_seed + i for i in range(len(self.ready.prompts))]
        with lent(self.model.vae, self.model.device):
            pictures = generate(
                self.model,
                self.ready.prompts,
                seeds=seeds,
                size=size,
                negative=samples.negative,
                steps=samples.sample_steps,
                guidance=samples.guidance,
            )
        self.samples.add(self.done, pictures)

    def _report(self, path: Path, norms: Mapping[str, float]) -> ReportContents:
        assert self.losses is not None
        assert self.samples is not None
        before, after = (self.samples.pictures(step) for step in (0, self.done))
        settings = self.cfg.model_dump(mode="json", exclude_none=True, exclude={"resume", "dry_run"})
        return ReportContents(
            title=f"{self.cfg.save.title or self.cfg.save.name or self.folder.path.name}: a LoRA",
            summary=[
                f"{self.done} steps on {len(self.ready.records)} pictures for {Path(self.cfg.model.base).name}, "
                f"{self.ready.facts.title}. The largest update is in {max(norms, key=lambda name: norms[name])}.",
            ],
            settings=settings,
            losses=self.losses.losses,
            validation=[] if self.validation_losses is None else self.validation_losses.losses,
            norms=norms,
            files=_file_advice(path, self.folder, self.ready.facts),
            prompts=self.ready.prompts if after else [],
            before=before,
            after=after,
        )


def choose_precision(name: str, device: torch.device) -> str:
    """Return the precision that `auto` means on this device.

    Raises:
        UserError: fp16 without a GPU.
    """
    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU, and training runs on the CPU here; use bf16 or fp32.")
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def check_device(name: str) -> None:
    """Refuse a device that is not here.

    Raises:
        UserError: lists those that are.
    """
    here = ["auto", "cpu", *(["mps"] if torch.backends.mps.is_available() else [])]
    if torch.cuda.is_available():
        here += ["cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if name not in here:
        raise UserError(f"--device {name}: not here; on this computer there are {', '.join(here)}.")


def now() -> float:
    """Return the Unix time, or SOURCE_DATE_EPOCH where that is set, so that files can be made equal to the byte."""
    return float(os.environ.get("SOURCE_DATE_EPOCH") or time.time())


def _require(cfg: TrainConfig) -> None:
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


def _run_folder(resumed: Path) -> Path:
    """Return the output folder of the run that is gone on with, given as itself or by one of its states."""
    return find_state(resumed).parent.parent


def _merged(given: TrainConfig, run_folder: Path) -> TrainConfig:
    """Return a stopped run's options, with those given now where they may be changed.

    It goes on where it lies now, which need not be where it began.
    """
    run_file = run_folder / RUN_FILE
    if not run_file.is_file():
        raise UserError(f"--resume: {run_file} is missing, so the run's options are unknown; start the run again.")
    stored = config.load_toml(run_file)
    stored.setdefault("save", {})["output"] = str(run_folder)
    merged = merge_options(stored, given.model_dump(exclude_unset=True, mode="json"))
    for section, option in _PLACES:
        value = merged.get(section, {}).get(option)
        if value is not None and os.path.isabs(value) and not (os.path.exists(value) or is_shards(value)):
            raise UserError(
                f"--resume: {value}, the run's {option}, is not there any more; give its new place with --{option}."
            )
    return config.build(TrainConfig, merged)


def _anywhere(options: dict[str, Any]) -> dict[str, Any]:
    """Return a run's options with whole paths; what is no file or folder here (a hub id) stays as it is."""
    if "dataset_config" in options.get("data", {}):
        options["data"]["dataset_root"] = os.path.abspath(options["data"].get("dataset_root", "."))
    for section, option in _PLACES:
        value = options.get(section, {}).get(option)
        if value is not None and (os.path.exists(value) or is_shards(value)):
            options[section][option] = os.path.abspath(value)
    return options


def _check_processes_of_shards(state: State, gathered: Gathered, plan: Plan, npz: NpzFiles) -> None:
    """Refuse to go on with shards that were shared among another number of processes."""
    counts = range(1, max(state.facts.unit_sizes) + 1)
    fingerprint = partial(_fingerprint, gathered, npz)
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
            "the pictures, captions or masks are not those that the run was started with, or the dataset file or .npz "
            "files say something else of them, so it cannot go on as it was. Put them back, or start a new run from "
            "the saved LoRA with --weights."
        )
    if state.facts.unit_sizes != plan.unit_sizes:
        raise UserError(
            f"the run works on {_one_or_each(state.facts.unit_sizes)} pictures at once, but "
            f"{_one_or_each(plan.batch_sizes)} on each of "
            f"{plan.num_processes} processes are given now; make --batch-size times processes the same."
        )
    if state.facts.step >= total_steps:
        raise UserError(
            f"this run is complete: {state.facts.step} of {total_steps} steps are done. To train longer, give more "
            "--steps; with a constant learning rate that equals one longer run."
        )


def _check_weights(
    network: config.NetworkSection, facts: model_families.ModelFacts, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, float]:
    """Return the largest rank in starting weights, with its alpha.

    Raises:
        UserError: they are broken, for another family, not for exactly these layers, or of another rank or alpha than
            is asked for.
    """
    path = network.weights
    assert path is not None
    lora = kohya.read(path)
    if lora.family not in (facts.family, "unknown"):
        raise UserError(
            f"--weights {path} is a LoRA for {_FAMILY_TITLES[lora.family]}, but the base model is {facts.title}; "
            "give a LoRA that was trained for this base model, or the base model that it was trained for."
        )
    broken = [name for name, tensor in lora.tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(
            f"--weights {path} holds NaN or infinity in {len(broken)} tensors (first: {broken[0]}): the training that "
            "made it had broken down; give an earlier save of it."
        )
    try:
        Network.check(shapes, lora.tensors)
    except UserError as error:
        raise UserError(f"--weights {path}: {error}") from error
    ranks = {name: tensor.shape[0] for name, tensor in lora.tensors.items() if name.endswith(".lora_down.weight")}
    widest = max(ranks, key=lambda name: ranks[name])
    stored = lora.tensors.get(f"{widest.removesuffix('.lora_down.weight')}.alpha")
    rank, alpha = ranks[widest], float(ranks[widest] if stored is None else stored)
    given_rank = network.rank if "rank" in network.model_fields_set else None
    for name, asked, value in (("rank", given_rank, rank), ("alpha", network.alpha, alpha)):
        if asked is not None and not math.isclose(asked, value, rel_tol=1e-3):  # a file may hold alpha in fp16
            raise UserError(
                f"--weights {path} brings rank {rank} and alpha {alpha:g}, but --{name} {asked:g} is given; "
                "leave it out."
            )
    return rank, alpha


def _folder(cfg: TrainConfig) -> OutputFolder:
    assert cfg.save.output is not None
    return OutputFolder(cfg.save.output, cfg.save.name, cfg.save.format)


def _rules(cfg: TrainConfig) -> list[Rule]:
    network = cfg.network
    return [Rule(_PATTERNS[network.train], network.adapter, network.rank, network.alpha)]


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
                caption=None, masks=None, alpha_mask=False,
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
    file = dataset_config.read(data.dataset_config, rules, buckets=buckets, root=data.dataset_root or Path())
    if data.prior_loss_weight != 1 and not any(subset.is_prior for one in file.datasets for subset in one.subsets):
        raise UserError(
            f"prior_loss_weight is for regularization pictures, but no subset of {data.dataset_config} says is_reg = "
            "true; write that, or leave the weight out."
        )
    if not any(one.validation_split for one in file.datasets) and cfg.validation != config.ValidationSection():
        raise UserError(
            "validation_seed, validate_every_epochs and validate_every_steps are for held-out pictures, but "
            f"validation_split, their share, is missing in {data.dataset_config}; write it, or leave the others out."
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


def _cut_notes(cfg: TrainConfig, gathered: Gathered) -> list[str]:
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


def _prompts(cfg: TrainConfig, gathered: Gathered) -> list[str]:
    """Return the prompts to draw: those given, those of a text file, or captions of the training pictures."""
    samples = cfg.samples
    if not (samples.before_after or samples.sample_every_steps or samples.sample_every_epochs):
        return []
    if len(samples.prompts) == 1 and samples.prompts[0].endswith(".txt"):
        return _prompts_in(Path(samples.prompts[0]))
    if samples.prompts:
        return list(samples.prompts)
    texts = dict.fromkeys(
        captions.plain(record.caption, gathered.subsets[record.subset].captions)
        for record in gathered.records
        if not record.is_prior
    )
    return list(texts)[:_NUM_DEFAULT_PROMPTS]


def _prompts_in(path: Path) -> list[str]:
    """Return a text file's lines; empty ones and those that start with # are left out."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--prompts {path}: {error}; give a text file in UTF-8 with a prompt a line, or the prompts themselves."
        ) from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise UserError(f"--prompts {path}: no prompt in it; write one a line.")
    return prompts


def _network(cfg: TrainConfig, model: LatentDiffusion) -> Network:
    """Return the network to train: new, or from the given weights with all of them used."""
    rules, targets = _rules(cfg), model.adapter_targets()
    if cfg.network.weights is None:
        return Network.create(targets, rules, seed=cfg.training.seed)
    return Network.load(
        {name: targets[name] for name in match(targets, rules)}, kohya.read(cfg.network.weights).tensors
    )


def _dataset(
    cfg: TrainConfig, ready: Preparation, model: LatentDiffusion, processes: Processes, store: Store | None
) -> Dataset:
    return Dataset(
        ready.plan,
        ready.records,
        ready.crops,
        ready.subsets,
        seed=cfg.training.seed,
        sample_t=model.schedule.sample_t,
        latent_channels=model.latent_channels,
        latent_factor=model.latent_factor,
        latents={} if store is None else _posteriors(cfg, ready, model, processes, store),
        prior_loss_weight=cfg.data.prior_loss_weight,
        mask_background=cfg.data.mask_background,
        mask_by_area=cfg.data.mask_loss == "area",
    )


def _posteriors(
    cfg: TrainConfig, ready: Preparation, model: LatentDiffusion, processes: Processes, store: Store
) -> Posteriors:
    """Return the latents of all pictures of cached data sets that this process may need."""
    wanted = {key: one for key, one in _wanted(ready).items() if ready.plan.reads(key[0], processes.index)}
    is_shown = cfg.log.progress and processes.is_main
    encoded = cached_posteriors(model, wanted, store, processes, workers=cfg.data.workers, is_shown=is_shown)
    return npz_latents.WithFiles(ready.npz.found, model.latent_scale, encoded) if ready.npz.found else encoded


def _wanted(ready: Preparation) -> dict[LatentKey, Wanted]:
    """Return what is cached of the pictures: those that are used, and their mirror images where these are drawn."""
    wanted = {}
    for index in _used(ready):
        record = ready.records[index]
        if ready.cached[record.dataset] and index not in ready.npz.found:
            subset = ready.subsets[record.subset]
            for is_mirrored in (False, True) if subset.augmentation.flip else (False,):
                wanted[index, is_mirrored] = Wanted(record, ready.crops[index], subset, is_mirrored)
    return wanted


def _used(ready: Preparation) -> list[int]:
    plans = [ready.plan, *([ready.validation] if ready.validation else [])]
    return [index for index in range(len(ready.records)) if any(plan.repeats[index] for plan in plans)]


def _lasting_captions(ready: Preparation) -> set[str]:
    return lasting_captions((ready.records[index] for index in _used(ready)), ready.subsets)


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


def _makers(cfg: TrainConfig, ready: Preparation, device: torch.device) -> dict[Encoded, Maker]:
    """Return what encodes pictures and captions: files, and options that decide the result."""
    base = _place(cfg.model.base)
    vae = base if cfg.model.vae is None else _place(cfg.model.vae)
    options = cfg.model.clip_skip, cfg.data.max_token_length, cfg.data.weighted_captions, cfg.training.attention
    return {
        "latents": latents_maker(vae, device),
        "text": Maker(base, (device.type, ready.precision, *options)),
    }


def _place(name: str) -> Path:
    """Return where a model lies that may be given by its hub id."""
    with open_checkpoint(name) as checkpoint:
        return checkpoint.path


def _cache_lines(cfg: TrainConfig, ready: Preparation, processes: Processes) -> list[str]:
    """Say where the cache folder is, what of this run is in it, and how much will be added."""
    if ready.cache is None:
        return ["none: what is encoded stays in memory"]
    facts = ready.facts
    num_values = {
        one.name: 2 * facts.latent_channels * math.prod(one.crop.shape) // facts.latent_factor**2
        for one in _wanted(ready).values()
    }
    sizes: dict[Encoded, dict[str, int]] = {"latents": {name: 4 * number for name, number in num_values.items()}}
    if not _trains_text_encoder(ready):
        num_positions = cfg.data.max_token_length + 2
        size = num_positions * facts.text_width * _DTYPES[ready.precision].itemsize
        sizes["text"] = {caption_name(caption): size for caption in _lasting_captions(ready)}
    makers = _makers(cfg, ready, processes.device)
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


def _trains_text_encoder(ready: Preparation) -> bool:
    return any(part_of(name) == "text_encoder" for name in ready.shapes)


def _page(cfg: TrainConfig, ready: Preparation, processes: Processes) -> str:
    """Return the plan as text."""
    network, optimizer, facts, plan = cfg.network, cfg.optimizer, ready.facts, ready.plan
    parts = Counter(part_of(name) for name in ready.shapes)
    num_values = sum(ready.rank * (shape[0] + math.prod(shape[1:])) for shape in ready.shapes.values())
    rates = {"text_encoder": optimizer.text_encoder_lr, "unet": optimizer.unet_lr}
    training_records = [record for record in ready.records if not record.is_prior]
    paragraphs = {
        "model": [f"{cfg.model.base}: {facts.title}, {facts.prediction} prediction", *facts.notes],
        "network": [
            f"{network.adapter}, rank {ready.rank}, alpha {ready.alpha:g}, effective scale "
            f"{ready.alpha / ready.rank:g}: {len(ready.shapes)} modules "
            f"({', '.join(f'{count} {_PART_TITLES[part]}' for part, count in parts.items())}), "
            f"{num_values / 1e6:.2f} M values"
            + (f", starting from {network.weights}, which fits" if network.weights else "")
        ],
        "data sets": dataset_lines(ready.datasets, ready.records, plan.repeats) if cfg.data.dataset_config else [],
        "pictures": ready.notes,
        "captions": caption_lines(training_records) + _caption_rules(ready),
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
            f"effective batch {_one_or_each(size * plan.gradient_accumulation for size in plan.unit_sizes)} = "
            f"{_one_or_each(plan.batch_sizes)} on each of {plan.num_processes} process"
            f"{'es' * (plan.num_processes > 1)} x {plan.gradient_accumulation} accumulated",
        ],
        "rates": [
            ", ".join(
                f"{_PART_TITLES[part]} {rate or optimizer.learning_rate:g}"
                for part, rate in rates.items()
                if parts[part]
            )
            + f", {optimizer.optimizer}, {optimizer.lr_schedule} after {optimizer.lr_warmup_steps} steps of warm-up"
        ],
        "memory": [
            f"{ready.precision} on {processes.device}; "
            f"{memory_line(_memory(cfg, ready, num_values, processes.device))}; "
            f"{memory_free(processes.device) / 2**30:.1f} GiB are free"
        ],
        "output": [f"{_folder(cfg).last()}{f' (going on from step {ready.state.facts.step})' if ready.state else ''}"],
        "samples": [f'"{prompt}"' for prompt in ready.prompts] or ["none"],
    }
    return plan_page(f"lorasmith {lorasmith.__version__}: the plan", paragraphs)


def _one_or_each(numbers: Iterable[int]) -> str:
    """Return a number of all data sets: once if it is the same, else in their order."""
    return " or ".join(map(str, dict.fromkeys(numbers)))


def _caption_rules(ready: Preparation) -> list[str]:
    """Say how the captions of each subset with training pictures vary."""
    lines: dict[str, None] = {}
    for index, subset in enumerate(ready.subsets):
        records = [record for record in ready.records if record.subset == index]
        if records and not subset.is_prior:
            lines.update(dict.fromkeys(caption_rule_lines(records, subset.captions)))
    return list(lines)


def _memory(cfg: TrainConfig, ready: Preparation, num_adapter_values: int, device: torch.device) -> dict[str, int]:
    """Return the estimated bytes on the device while training, by part."""
    facts = ready.facts
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
        trains_text_encoder=_trains_text_encoder(ready),
        num_adapter_values=num_adapter_values,
        attention=cfg.training.attention,
    )


def _file_advice(path: Path, folder: OutputFolder, facts: model_families.ModelFacts) -> list[tuple[str, str]]:
    """Say which file goes where."""
    going_on = ("states/", f"to go on training: lorasmith train --resume {quoted(folder.path)} --steps MORE")
    if path.suffix != ".safetensors":
        kind = "sd-scripts and older tools; other UIs want .safetensors (--format safetensors)"
        return [(path.name, kind), going_on]
    stem = folder.name or folder.path.resolve().name  # many a run's file is called "last"
    diffusers = ("diffusers", f'pipeline.load_lora_weights("{folder.path}", weight_name="{path.name}")')
    if facts.width < _SMALLEST_REAL_WIDTH:
        return [
            (path.name, "the LoRA; it fits the miniature that it was trained on, no other model"),
            diffusers,
            going_on,
        ]
    earlier = [other for other in folder.path.glob(f"*{path.suffix}") if other != path]
    return [
        (path.name, "the LoRA; every program below reads this one file"),
        ("A1111 / Forge", f"copy to models/Lora as {stem}.safetensors, prompt <lora:{stem}:1>"),
        ("ComfyUI", f"copy to models/loras as {stem}.safetensors, node Load LoRA"),
        ("InvokeAI", "Model Manager, add the file"),
        diffusers,
        *([(", ".join(sorted(other.name for other in earlier)[:3]), "the same after fewer steps: try these when the "
            "last one looks overdone")] if earlier else []),
        going_on,
    ]  # fmt: skip


def _metadata(cfg: TrainConfig, ready: Preparation, step: int, started_at: float) -> dict[str, str]:
    """Return what the file says of itself."""
    data, training, optimizer, save, facts, plan = (
        cfg.data, cfg.training, cfg.optimizer, cfg.save, ready.facts, ready.plan
    )  # fmt: skip
    own = [record for record in ready.records if not record.is_prior]
    prior = [record for record in ready.records if record.is_prior]
    name = save.name or "last"
    finished_at = now()
    values = {
        "base_model_version": facts.base_model_version,
        "v2": facts.is_v2,
        "sd_model_name": Path(cfg.model.base).name,
        "vae_name": Path(cfg.model.vae).name if cfg.model.vae else None,
        "clip_skip": cfg.model.clip_skip if cfg.model.clip_skip > 1 else None,
        "max_token_length": data.max_token_length if data.max_token_length > 75 else None,
        "network_dim": ready.rank,
        "network_alpha": ready.alpha,
        "output_name": name,
        "learning_rate": optimizer.learning_rate,
        "unet_lr": optimizer.unet_lr,
        "text_encoder_lr": optimizer.text_encoder_lr,
        "optimizer": optimizer.optimizer,
        "lr_scheduler": optimizer.lr_schedule,
        "lr_warmup_steps": optimizer.lr_warmup_steps,
        "max_grad_norm": optimizer.max_grad_norm,
        "max_train_steps": ready.total_steps,
        "steps": step,
        "epoch": plan.epoch_of(max(step - 1, 0)) + 1,
        "num_epochs": plan.epoch_of(ready.total_steps - 1) + 1,
        "num_batches_per_epoch": plan.units_per_epoch,
        "num_train_images": sum(plan.repeats[i] for i, record in enumerate(ready.records) if not record.is_prior),
        "num_reg_images": sum(plan.repeats[i] for i, record in enumerate(ready.records) if record.is_prior),
        "batch_size_per_device": plan.batch_sizes[0],
        "total_batch_size": plan.unit_sizes[0] * plan.gradient_accumulation,
        "gradient_accumulation_steps": plan.gradient_accumulation,
        "gradient_checkpointing": training.gradient_checkpointing,
        "mixed_precision": {"fp32": "no"}.get(ready.precision, ready.precision),
        "seed": training.seed,
        "prior_loss_weight": data.prior_loss_weight,
        "resolution": ready.resolution,
        "enable_bucket": data.buckets,
        "min_bucket_reso": data.bucket_min if data.buckets else None,
        "max_bucket_reso": data.bucket_max if data.buckets else None,
        "bucket_no_upscale": data.bucket_no_upscale,
        "cache_latents": all(ready.cached),
        "color_aug": data.color,
        "flip_aug": data.flip,
        "random_crop": data.random_crop,
        "face_crop_aug_range": data.face_crop_aug_range,
        "shuffle_caption": data.shuffle_caption,
        "keep_tokens": data.keep_tokens,
        "caption_dropout_rate": data.caption_dropout,
        "caption_dropout_every_n_epochs": data.caption_dropout_every_epochs,
        "caption_tag_dropout_rate": data.tag_dropout,
        "dataset_dirs": _folders(own) if save.share_captions else {},
        "reg_dataset_dirs": _folders(prior) if save.share_captions else {},
        "tag_frequency": _tag_frequency(own, ready.subsets) if save.share_captions else {},
        "bucket_info": _bucket_info(plan) if data.buckets else None,
        "training_comment": save.comment,
        "training_started_at": started_at,
        "training_finished_at": finished_at,
        "session_id": int(ready.fingerprint[:8], 16),
    }
    spec = metadata.model_spec(
        architecture=facts.architecture,
        title=save.title or name,
        resolution=ready.resolution,
        time=finished_at,
        prediction=facts.prediction,
        implementation_version=lorasmith.__version__,
        author=save.author,
        description=save.description,
        license=save.license,
        tags=save.tags,
        trigger_phrase=save.trigger_phrase,
    )
    if data.dataset_config is not None:
        values |= dataset_metadata.describe(ready.datasets, ready.records, plan, shares_captions=save.share_captions)
    return {**metadata.training(values), **spec}


def _folders(records: list[ImageRecord]) -> dict[str, dict[str, int]]:
    """Return per folder its repeats and number of pictures, as UIs show them."""
    return {
        group: {"n_repeats": records_[0].repeats, "img_count": len(records_)}
        for group in dict.fromkeys(record.group for record in records)
        if (records_ := [record for record in records if record.group == group])
    }


def _tag_frequency(records: list[ImageRecord], subsets: Sequence[Subset]) -> dict[str, dict[str, int]]:
    """Return per folder how often each part of the captions occurs."""
    counts: dict[str, Counter[str]] = {}
    for record in records:
        counts.setdefault(record.group, Counter()).update(
            captions.tags(record.caption, subsets[record.subset].captions)
        )
    return {group: dict(count) for group, count in counts.items()}


def _bucket_info(plan: Plan) -> dict[str, Any]:
    counts = plan.samples_per_shape()
    return {"buckets": {str(i): {"resolution": shape, "count": n} for i, (shape, n) in enumerate(counts.items())}}
