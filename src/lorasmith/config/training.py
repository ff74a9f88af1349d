"""The configurations of `lorasmith train` and of the demo, and which options of a run cannot both be meant."""

import os.path
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, PositiveInt, model_validator

from lorasmith.config.sections import (
    DataSection,
    LogSection,
    LossSection,
    ModelSection,
    NetworkSection,
    OptimizerSection,
    SampleSection,
    SaveSection,
    TrainingSection,
    ValidationSection,
    options_of_held_out,
)
from lorasmith.config.values import BUCKET_OPTIONS, Place, Section, is_changed

if TYPE_CHECKING:
    from lorasmith.config.pictures import PrepareConfig


class TrainConfig(Section):
    """Train a LoRA on pictures."""

    dry_run: bool = Field(
        default=False, description="Print the plan and stop before a model is loaded or the output written."
    )
    resume: Place | None = Field(
        default=None,
        description="Go on with a stopped run: its output folder or one of its states; options come from it.",
    )
    model: ModelSection = Field(default_factory=ModelSection)
    network: NetworkSection = Field(default_factory=NetworkSection)
    data: DataSection = Field(default_factory=DataSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    loss: LossSection = Field(default_factory=LossSection)
    validation: ValidationSection = Field(default_factory=ValidationSection)
    save: SaveSection = Field(default_factory=SaveSection)
    samples: SampleSection = Field(default_factory=SampleSection)
    log: LogSection = Field(default_factory=LogSection)

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> "TrainConfig":
        for message in contradictions(self):
            raise ValueError(message)
        return self


def changing_augmentations(data: DataSection) -> list[str]:
    """Return the names of the augmentations that are on and give other pixels each time, so that none can be cached."""
    ends = data.face_crop_aug_range
    names = [name for name in ("color", "random_crop") if getattr(data, name)]
    return names + (["face_crop_aug_range"] if ends is not None and ends[0] != ends[1] else [])


_OF_ADAPTERS = {  # what a network module of another program is told in its own way
    "adapter", "adapter_options", "conv_rank", "conv_alpha", "block_ranks", "block_alphas", "conv_block_ranks",
    "conv_block_alphas", "rank_dropout", "module_dropout", "product_decay",
}  # fmt: skip
_OF_ADAPTERS_RATES = {"block_lr", "lora_plus_ratio", "unet_lora_plus_ratio", "text_encoder_lora_plus_ratio"}


def contradictions(cfg: TrainConfig) -> list[str]:
    """Return one sentence for each pair of options that cannot both be meant."""
    data, training, network, optimizer = cfg.data, cfg.training, cfg.network, cfg.optimizer
    blocks = network.block_ranks, network.block_alphas, network.conv_block_ranks, network.conv_block_alphas
    augmentations = changing_augmentations(data)
    in_file = [name for name in ("images", "regularization", "captions", "caption") if getattr(data, name) is not None]
    of_adapters = [
        *network.model_dump(exclude_defaults=True, include=_OF_ADAPTERS),
        *optimizer.model_dump(exclude_defaults=True, include=_OF_ADAPTERS_RATES),
    ]
    changing = _changed(network, "neuron_dropout", "rank_dropout", "module_dropout", "network_module")
    uploads = _changed(cfg.save, "upload_public", "upload_folder", "upload_saves", "upload_states")
    of_held_out, samples = options_of_held_out(cfg.validation), cfg.samples
    is_by_pictures = cfg.validation.best_by == "pictures"
    checks = {
        f"dataset_config names folders and captions by itself, but {' and '.join(in_file)} "
        f"{'is' if len(in_file) == 1 else 'are'} given too; leave out one or the other": data.dataset_config
        and in_file,
        "steps and epochs are both given; give one of them": training.steps and training.epochs,
        "masks and alpha_mask both say which places are learned; leave out one of them": data.masks and data.alpha_mask,
        f"cache_latents keeps each picture as it is, but {' and '.join(augmentations)} would change it every time; "
        "leave out one or the other": data.cache_latents and augmentations,
        f"npz files hold pictures as they were cut, but {' and '.join(augmentations)} would change them every time; "
        "leave out one or the other": data.npz and augmentations,
        "npz takes latents that were encoded once, but cache_latents is off, to encode them for every step; leave out "
        "one of them": data.npz and data.cache_latents is False,
        "npz_dir says where npz files are, but npz, to use them, is missing; add it, or leave the other out": (
            data.npz_dir and not data.npz and not cfg.resume
        ),
        "prompts are given, but nothing draws them: before_after is off, and sample_every_steps and "
        "sample_every_epochs are left out; give one of these, or leave out prompts": cfg.samples.prompts
        and not (
            cfg.samples.before_after
            or cfg.samples.at_first
            or cfg.samples.sample_every_steps
            or cfg.samples.sample_every_epochs
        ),
        "text_encoder_lr is given, but train = unet leaves the text encoder alone; leave out one of them": (
            optimizer.text_encoder_lr and network.train == "unet"
        ),
        "ranks, alphas and rates of the U-Net's blocks and convolutions are given, but train = text_encoder leaves the "
        "U-Net alone; leave out one or the other": network.train == "text_encoder"
        and any((*blocks, optimizer.block_lr, network.conv_rank)),
        "conv_alpha is for convolutions, but conv_rank and conv_block_ranks are left out; give one of these, or leave "
        "it out": network.conv_alpha and not (network.conv_rank or network.conv_block_ranks),
        "conv_block_alphas are for convolutions, but conv_rank and conv_block_ranks are left out; give one of them, or "
        "leave it out": network.conv_block_alphas and not (network.conv_rank or network.conv_block_ranks),
        "starting weights bring their ranks and alphas, so those of blocks and convolutions cannot be given too; leave "
        "out one or the other": network.weights and any((*blocks, network.conv_rank, network.conv_alpha)),
        "unet_lr is given, but train = text_encoder leaves the U-Net alone; leave out one of them": (
            optimizer.unet_lr and network.train == "text_encoder"
        ),
        "text_encoder_lora_plus_ratio is given, but train = unet leaves the text encoder alone; leave out one of "
        "them": optimizer.text_encoder_lora_plus_ratio and network.train == "unet",
        "unet_lora_plus_ratio is given, but train = text_encoder leaves the U-Net alone; leave out one of them": (
            optimizer.unet_lora_plus_ratio and network.train == "text_encoder"
        ),
        f"network_module = {network.network_module} makes its own adapters, so {' and '.join(of_adapters)} cannot be "
        "meant; leave out one or the other, and say in network_args what the module can do of it": (
            network.network_module and of_adapters
        ),
        f"compile makes fixed code of the model, but {' and '.join(changing)} would change it at every step; leave out "
        "one or the other": training.compile and changing,
        "network_args are for network_module, which is missing; give it, or leave them out": network.network_args
        and not network.network_module,
        **dict.fromkeys(bucket_contradictions(data, are_in_file=data.dataset_config is not None), True),
        "saves and save_every_epochs both say after which epochs to save; leave out one of them": cfg.save.saves
        and cfg.save.save_every_epochs,
        "keep_last_epochs is for LoRAs saved after epochs, but save_every_epochs and saves are left out; give one of "
        "them, or leave it out": (
            cfg.save.keep_last_epochs and not (cfg.save.save_every_epochs or cfg.save.saves) and not cfg.resume
        ),
        "keep_last_steps is for LoRAs saved after steps, but save_every_steps is left out; give it, or leave the other "
        "out": cfg.save.keep_last_steps and not cfg.save.save_every_steps and not cfg.resume,
        **dict.fromkeys(_schedule_contradictions(optimizer), True),
        f"lr_warmup_steps = {optimizer.lr_warmup_steps:g} is not below steps = {training.steps}; "
        "lower the first or raise the second": training.steps and optimizer.lr_warmup_steps >= training.steps,
        f"captions names a metadata JSON, but source = {data.source} has captions of its own; leave out one of them": (
            data.captions and data.source not in ("auto", "metadata_json") and "." not in data.source
        ),
        "caption_extension is for caption files beside the pictures, but captions names a metadata JSON; "
        "leave out one of them": data.captions and data.caption_extension,
        "captions names a metadata JSON, but images, the folder of its pictures, is missing": (
            data.captions and not data.images and not cfg.resume
        ),
        "dataset_root is for the paths in a dataset file, but dataset_config, the file, is missing; give it, or leave "
        "the other out": data.dataset_root and not data.dataset_config and not cfg.resume,
        **dict.fromkeys(
            separator_contradictions(
                data.keep_tokens, data.keep_tokens_separator, data.caption_separator, data.secondary_separator
            ),
            True,
        ),
        "token_warmup_min says with how many parts the growth begins, but token_warmup_steps, how long it takes, is "
        "missing; give it, or leave the other out": (
            is_changed(data, "token_warmup_min") and not data.token_warmup_steps and not cfg.resume
        ),
        "prior_pictures are drawn into the folder of regularization pictures, but regularization, that folder, is "
        "missing; give a place for them": data.prior_pictures and not data.regularization and not cfg.resume,
        "prior_prompt is for prior_pictures, how many are to be drawn; give that too, or leave the prompt out": (
            data.prior_prompt and not data.prior_pictures and not cfg.resume
        ),
        "cache_dir says where the cache folder is, but disk_cache is off; leave out one of them": (
            data.cache_dir and not data.disk_cache
        ),
        "prior_loss_weight is for regularization pictures, but regularization, their folder, is missing; "
        "give it, or leave the weight out": (
            not data.regularization and not data.dataset_config and is_changed(data, "prior_loss_weight")
        ),
        f"images and regularization are the same folder, {data.images}; give regularization pictures of the class, "
        "not of the thing itself, in a folder of their own": (
            data.images
            and data.regularization
            and os.path.realpath(data.images) == os.path.realpath(data.regularization)
        ),
        f"{' and '.join(of_held_out)} {'is' if len(of_held_out) == 1 else 'are'} for held-out pictures, but "
        "validation_split, their share, is missing; give it, or leave the other out": (
            of_held_out and not cfg.validation.validation_split and not data.dataset_config and not cfg.resume
        ),
        f"{' and '.join(uploads)} {'is' if len(uploads) == 1 else 'are'} for upload, where to; give that too, or leave "
        f"{'it' if len(uploads) == 1 else 'them'} out": (uploads and not cfg.save.upload and not cfg.resume),
        "project and run_name are for trackers, but trackers, which of them, is missing; give it, or leave the other "
        "out": ((cfg.log.run_name or is_changed(cfg.log, "project")) and not cfg.log.trackers and not cfg.resume),
        "judge scores the samples for best_by = pictures, which is left out; give both, or leave judge out": (
            cfg.validation.judge and not is_by_pictures and not cfg.resume
        ),
        "best_by = pictures needs judge, what scores them; give a CLIP or DINO with it": (
            is_by_pictures and cfg.validation.judge is None and not cfg.resume
        ),
        "best_by says what keep_best and stop_early go by; give one of these, or leave it out": (
            is_by_pictures and not (cfg.validation.keep_best or cfg.validation.stop_early) and not cfg.resume
        ),
        "best_by = pictures scores the samples, but sample_every_steps and sample_every_epochs are left out; give one "
        "of them": (
            is_by_pictures and not (samples.sample_every_steps or samples.sample_every_epochs) and not cfg.resume
        ),
        "best_by = pictures compares with samples of the untrained model, but before_after and at_first are off; give "
        "one of them": is_by_pictures and not (samples.before_after or samples.at_first) and not cfg.resume,
        "resume goes on with a run, but overwrite starts afresh; leave out one of them": (
            cfg.resume and cfg.save.overwrite
        ),
        **dict.fromkeys(_loss_contradictions(cfg.loss), True),
        "diff_output_preservation is for regularization pictures, but regularization, their folder, is missing; "
        "give it, or leave the other out": (
            cfg.loss.diff_output_preservation and not data.regularization and not data.dataset_config
        ),
    }
    return [message for message, is_wrong in checks.items() if is_wrong]


def _loss_contradictions(loss: LossSection) -> list[str]:
    huber = _changed(loss, "huber_c", "huber_scale", "huber_schedule")
    logit = _changed(loss, "timestep_logit_mean", "timestep_logit_std")
    offset = _changed(loss, "noise_offset_random", "noise_offset_adaptive")
    checks = {
        f"{' and '.join(huber)} shape{'s' * (len(huber) == 1)} the losses huber and smooth_l1, but loss_type = "
        f"{loss.loss_type}; change that, or leave the other out": huber and loss.loss_type in ("l2", "l1"),
        "huber_scale has no part in huber_schedule = snr; give another schedule, or leave the scale out": (
            _changed(loss, "huber_scale") and loss.huber_schedule == "snr"
        ),
        f"min_timestep = {loss.min_timestep} is not below max_timestep = {loss.max_timestep}; lower the first or "
        "raise the second": loss.min_timestep >= loss.max_timestep,
        f"{' and '.join(logit)} shape{'s' * (len(logit) == 1)} timestep_density = logit_normal, but it is "
        f"{loss.timestep_density}; change that, or leave the other out": logit
        and loss.timestep_density != "logit_normal",
        f"{' and '.join(offset)} change{'s' * (len(offset) == 1)} noise_offset, which is missing; give it, or leave "
        "the other out": offset and loss.noise_offset is None,
        "pyramid_noise_discount is for pyramid_noise_levels, how many there are; give that, or leave the other out": (
            _changed(loss, "pyramid_noise_discount") and loss.pyramid_noise_levels is None
        ),
        "input_perturbation_random is for input_perturbation, how strong it is at most; give that, or leave the other "
        "out": loss.input_perturbation_random and loss.input_perturbation is None,
    }
    return [message for message, is_wrong in checks.items() if is_wrong]


def _changed(section: Section, *names: str) -> list[str]:
    return [name for name in names if is_changed(section, name)]


def separator_contradictions(
    keep_tokens: int, keep_tokens_separator: str, caption_separator: str, secondary_separator: str
) -> list[str]:
    """Return one sentence for each thing about the separators of captions that cannot be meant."""
    checks = {
        f"keep_tokens = {keep_tokens} and keep_tokens_separator = {keep_tokens_separator} both say which "
        "parts stay in place; leave out one of them": keep_tokens and keep_tokens_separator,
        f"secondary_separator = {secondary_separator} cannot be told from the other separators, "
        f"{caption_separator} {keep_tokens_separator}: one is in the other; give one of other characters": (
            secondary_separator
            and any(
                other and (other in secondary_separator or secondary_separator in other)
                for other in (caption_separator, keep_tokens_separator)
            )
        ),
        f"keep_tokens_separator = {keep_tokens_separator} is part of caption_separator = "
        f"{caption_separator}; give one that is not": keep_tokens_separator
        and keep_tokens_separator in caption_separator,
    }
    return [message for message, is_wrong in checks.items() if is_wrong]


def bucket_contradictions(given: "DataSection | PrepareConfig", *, are_in_file: bool = False) -> list[str]:
    limits = [name for name in ("bucket_min", "bucket_max") if is_changed(given, name)]
    changed = [name for name in BUCKET_OPTIONS if is_changed(given, name)]
    checks = {
        f"bucket_min = {given.bucket_min} is larger than bucket_max = {given.bucket_max}; swap them": (
            given.buckets and given.bucket_min > given.bucket_max
        ),
        f"bucket_step = {given.bucket_step} is not a multiple of 8; use 64, or 8 for the finest buckets": (
            given.bucket_step % 8
        ),
        f"{' and '.join(changed)} would change the buckets, but they are off; "
        "add buckets, or leave out the other": not given.buckets and not are_in_file and changed,
        f"bucket_no_upscale takes the buckets from the pictures' own sizes, so {' and '.join(limits)} would "
        "have no effect; leave out one or the other": given.bucket_no_upscale and limits,
    }
    return [message for message, is_wrong in checks.items() if is_wrong]


_SHAPED_BY = {  # option -> the schedules that it shapes
    "lr_decay_steps": ["warmup_stable_decay"],
    "lr_cycles": ["cosine_restarts"],
    "lr_power": ["polynomial"],
    "lr_timescale": ["inverse_sqrt"],
    "lr_min_ratio": ["linear", "cosine", "cosine_restarts", "polynomial", "warmup_stable_decay"],
    "lr_table": ["piecewise"],
}


def _schedule_contradictions(optimizer: OptimizerSection) -> list[str]:
    name = optimizer.lr_schedule
    messages = [
        f"{option} shapes lr_schedule = {' or '.join(names)}, but it is {name}; change that, or leave {option} out"
        for option, names in _SHAPED_BY.items()
        if name not in names and is_changed(optimizer, option)
    ]
    if name == "piecewise" and optimizer.lr_table is None:
        messages.append(
            "lr_schedule = piecewise needs lr_table, its multipliers, such as 1:100,0.1:150,0.01; give that too"
        )
    return messages


class DemoConfig(Section):
    """Train a LoRA on the embedded model and show what it learned."""

    output: Place = Field(default=Path("lorasmith-demo"), description="Folder for the demo's results.")
    steps: PositiveInt = Field(default=400, description="Optimizer steps.")
    seed: Annotated[int, Field(ge=0)] = Field(
        default=42, description="Everything random in the demo follows from this number."
    )
