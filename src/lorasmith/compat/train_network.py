"""train_network.py: LoRA training, by `lorasmith train`. All options that it has today, and so all of December 2022."""

from collections.abc import Sequence
from typing import Any

from lorasmith.compat import network_args
from lorasmith.compat.table import Flag, Script, Values
from lorasmith.errors import UserError

_OTHER_MODELS = "it is for models other than SD 1.x and 2.x, which this script trains; leave it out."
_DEEPSPEED = (
    "only a LoRA is trained, of which gradients and optimizer take a few megabytes, so these need no splitting; "
    "leave it out, and start the processes with accelerate launch or torchrun. A base model too large for one card is "
    "split by accelerate launch --use_fsdp (docs/processes.md)."
)
_DDP = "nothing needs doing: the adapter's gradients are averaged in one message, and nothing is wrapped"
_CONSOLE = "nothing needs doing: messages are few; redirect the output to keep them"
_LOGS = "nothing needs doing: logs are in --output_dir, in the folder logs"
_STATES = "nothing needs doing: a state to go on from is saved with every LoRA and at the end"
_EXACT = "nothing needs doing: a resumed run goes on with the very sample at which it stopped"
_MEMORY = "nothing needs doing: weights are read straight to where they are used, tensor by tensor"
_SECRET = "a command line is seen by everyone on the machine, and kept in its history; "
_FUSED = "torch's own fused attention, which is as fast and needs no further package"
_BASE = (
    "nothing needs doing: the base model stays in the precision of --mixed_precision, which is more exact; in 16 bits "
    "it takes 2 GB"
)
_HALF = "nothing needs doing: the LoRA's own weights, a few megabytes, are always trained in fp32, which learns better"

_SCHEDULES = {
    "constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine",
    "cosine_with_restarts": "cosine_restarts", "polynomial": "polynomial", "inverse_sqrt": "inverse_sqrt",
    "cosine_with_min_lr": "cosine", "warmup_stable_decay": "warmup_stable_decay",
}  # fmt: skip
_SCHEDULES_NUMBERS = (
    "lr_decay_steps", "lr_scheduler_num_cycles", "lr_scheduler_power", "lr_scheduler_timescale",
    "lr_scheduler_min_lr_ratio",
)  # fmt: skip
_OPTIMIZERS = {  # in lower case -> here
    "adamw": "adamw", "adamw8bit": "adamw8bit", "pagedadamw": "paged_adamw32bit", "pagedadamw8bit": "paged_adamw8bit",
    "pagedadamw32bit": "paged_adamw32bit", "lion": "lion", "lion8bit": "lion8bit", "pagedlion8bit": "paged_lion8bit",
    "sgdnesterov": "sgd", "sgdnesterov8bit": "sgd_nesterov8bit", "dadaptation": "dadapt_adam",
    "dadaptadam": "dadapt_adam", "dadaptadampreprint": "dadaptation.experimental.DAdaptAdamPreprint",
    "dadaptadagrad": "dadapt_adagrad",
    "dadaptadan": "dadapt_adan", "dadaptadanip": "dadaptation.experimental.DAdaptAdanIP", "dadaptlion": "dadapt_lion",
    "dadaptsgd": "dadapt_sgd", "prodigy": "prodigy", "adafactor": "adafactor",
    "adamwschedulefree": "schedule_free_adamw", "radamschedulefree": "schedule_free_radam",
    "sgdschedulefree": "schedule_free_sgd",
}  # fmt: skip
_PACKAGES_OWN = {  # what an argument is there if it is left out, where lorasmith has something else
    "adafactor": {"relative_step": True, "scale_parameter": True},
    "dadapt_adam": {"decouple": False},
}  # fmt: skip
_SAMPLERS = (
    "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
    "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
)  # fmt: skip


# ---- what takes more than one option to say -------------------------------------------------------------------------


def _complete(given: Values) -> dict[str, Any]:
    return {
        **_length(given),
        **_precision(given),
        **network_args.values(given),
        **_parts(given),
        **_optimizer(given),
        **_rates(given),
        **_schedule(given),
        **_data(given),
        **_samples(given),
        **_compiled(given),
        **({"save.upload_saves": True} if given.get("huggingface_repo_id") else {}),
    }


def _compiled(given: Values) -> dict[str, Any]:
    backend = given.get("dynamo_backend", "inductor")
    return {"training.compile": backend} if given.get("torch_compile") and backend != "no" else {}


def _idle(given: Values) -> dict[str, str]:
    return network_args.idle(given) | _idle_rates(given)


def _idle_rates(given: Values) -> dict[str, str]:
    """Return what Adafactor takes no notice of where it makes its own learning rate."""
    is_adafactor = str(given.get("optimizer_type")).lower() == "adafactor"
    words = {word.replace(" ", "").lower() for word in given.get("optimizer_args") or []}
    if not is_adafactor or "relative_step=false" in words:
        return {}
    names = ("learning_rate", "unet_lr", "text_encoder_lr", "lr_scheduler", "lr_warmup_steps", *_SCHEDULES_NUMBERS)
    return {name: "with Adafactor's relative_step" for name in names if name in given}


def _length(given: Values) -> dict[str, Any]:
    if "max_train_epochs" in given:  # wins over steps
        return {"training.epochs": given["max_train_epochs"]}
    return _taken(given, max_train_steps="training.steps")


def _precision(given: Values) -> dict[str, Any]:
    asked = given.get("mixed_precision", "no")
    return {"training.precision": "fp32" if asked == "no" or (asked == "fp16" and _lacks_fp16()) else asked}


def _lacks_fp16() -> bool:
    import torch  # takes seconds, which --help does not need

    return not torch.cuda.is_available()


def _parts(given: Values) -> dict[str, Any]:
    chosen = [part for part in ("unet", "text_encoder") if f"network_train_{part}_only" in given]
    if len(chosen) > 1:
        raise UserError(
            "--network_train_unet_only and --network_train_text_encoder_only leave nothing to train; leave out one."
        )
    return {"network.train": chosen[0]} if chosen else {}


def _optimizer(given: Values) -> dict[str, Any]:
    shortcuts = {"use_8bit_adam": "AdamW8bit", "use_lion_optimizer": "Lion"}
    named = [*(name for flag, name in shortcuts.items() if flag in given), *_words(given.get("optimizer_type"))]
    if len({name.lower() for name in named}) > 1:
        raise UserError(
            f"{' and '.join(named)} are asked for as the optimizer; leave out all but one of --optimizer_type, "
            "--use_8bit_adam and --use_lion_optimizer."
        )
    name = _OPTIMIZERS.get(named[0].lower(), named[0]) if named else "adamw"
    args = {word.partition("=")[0].strip(): word for word in given.get("optimizer_args") or []}
    values: dict[str, Any] = {"optimizer.optimizer": name} if named else {}
    if decay := args.pop("weight_decay", None):
        values["optimizer.weight_decay"] = _decay(decay)
    elif name in _OPTIMIZERS.values() and not name.startswith(("adamw", "paged_adamw")):
        values["optimizer.weight_decay"] = 0.0  # as in the packages; AdamW's is 0.01
    for argument, value in _PACKAGES_OWN.get(name, {}).items():
        if argument != "decouple" or values["optimizer.weight_decay"]:
            args.setdefault(argument, f"{argument}={value}")
    return values | ({"optimizer.optimizer_args": list(args.values())} if args else {})


def _decay(word: str) -> float:
    try:
        return float(word.partition("=")[2])
    except ValueError as error:
        raise UserError(f"--optimizer_args {word}: expected a number.") from error


def _words(value: str | None) -> list[str]:
    return [value] if value else []


def _rates(given: Values) -> dict[str, Any]:
    """Return the rate of parts that have none of their own, where that is 0, which the others' cannot be."""
    parts = ("unet_lr", "text_encoder_lr")
    return {f"optimizer.{part}": 0.0 for part in parts if given.get("learning_rate") == 0 and not given.get(part)}


def _schedule(given: Values) -> dict[str, Any]:
    """Return the schedule with those of its numbers that are other than lorasmith's where they are left out."""
    name = given.get("lr_scheduler", "constant")
    if name.startswith("adafactor"):
        return {}
    if name not in _SCHEDULES:
        near = ", ".join(_SCHEDULES)
        raise UserError(f"--lr_scheduler {name}: expected one of {near}; piecewise is `--lr-schedule piecewise` here.")
    values: dict[str, Any] = {"optimizer.lr_schedule": _SCHEDULES[name]} if "lr_scheduler" in given else {}
    values |= _taken(
        given, lr_scheduler_timescale="optimizer.lr_timescale", lr_scheduler_min_lr_ratio="optimizer.lr_min_ratio"
    )
    if name == "cosine_with_restarts":
        values["optimizer.lr_cycles"] = given.get("lr_scheduler_num_cycles", 1)
    if name == "polynomial":
        values["optimizer.lr_power"] = given.get("lr_scheduler_power", 1.0)
    if name == "warmup_stable_decay":
        values["optimizer.lr_decay_steps"] = given.get("lr_decay_steps", 0)
    return values


def _data(given: Values) -> dict[str, Any]:
    values: dict[str, Any] = {"data.bucket_rule": "sd-scripts"} if "enable_bucket" in given else {}
    extensions = {given[name] for name in ("caption_extension", "caption_extention") if name in given}
    if len(extensions) > 1:
        raise UserError("--caption_extension and its old misspelling say different things; leave out one of them.")
    if extensions and "in_json" not in given:
        values["data.caption_extension"] = extensions.pop()
    if "masked_loss" in given or "alpha_mask" in given:
        values["data.mask_loss"] = "all"
    return values


def _samples(given: Values) -> dict[str, Any]:
    """Draw when sd-scripts would: not before and after training unless that is asked for."""
    is_periodic = bool(given.get("sample_every_n_steps") or given.get("sample_every_n_epochs"))
    values: dict[str, Any] = {"samples.before_after": "sample_prompts" in given and not is_periodic}
    if epochs := given.get("sample_every_n_epochs"):  # wins over steps
        return values | {"samples.sample_every_epochs": epochs}
    return values | {"samples.sample_every_steps": given.get("sample_every_n_steps") or None}


def _taken(given: Values, **places: str) -> dict[str, Any]:
    """Return the values of those old options that are given, by place."""
    return {place: given[name] for name, place in places.items() if given.get(name) is not None}


def _notes(given: Values) -> list[str]:
    notes = []
    if "network_alpha" not in given and "network_weights" not in given:
        notes.append(
            "--network_alpha is left out: alpha = --network_dim, scale 1, as in the document of 2022; today's "
            "sd-scripts takes 1, with which a rank of 8 learns 8 times more weakly at the same rate."
        )
    optimizer = str(given.get("optimizer_type")).lower()
    if "learning_rate" not in given and optimizer.startswith(("dadapt", "prodigy")):
        notes.append("--learning_rate is left out: 1, by which the rate that is found is multiplied.")
    elif "learning_rate" not in given and not _idle_rates({**given, "learning_rate": None}):
        notes.append("--learning_rate is left out: 1e-4, which the document advises, where sd-scripts takes 2e-6.")
    if given.get("mixed_precision") == "fp16" and _lacks_fp16():
        notes.append("--mixed_precision fp16 needs a GPU, and there is none here: fp32 is taken.")
    if "max_train_epochs" in given and "max_train_steps" in given:
        notes.append("--max_train_epochs is taken, and --max_train_steps left out, as in sd-scripts.")
    if given.get("lr_scheduler", "").startswith("adafactor"):
        notes.append("--lr_scheduler adafactor: nothing needs doing: Adafactor has its own rates, or those given.")
    return notes


def _unless_zero(number: float) -> float | None:
    """Return the number, and nothing for the 0 that sd-scripts takes for left out."""
    return number or None


def _first(values: Sequence[float]) -> float | None:
    return values[0] if values else None


def _one(prompts: str) -> list[str]:
    return [prompts]


# ---- the table ------------------------------------------------------------------------------------------------------

_MODEL = (
    Flag("--pretrained_model_name_or_path", "model.base", kind="path"),
    Flag("--v2", "model.v2", kind="switch"),
    Flag("--v_parameterization", "model.prediction", kind="switch", value="v_prediction"),
    Flag("--vae", "model.vae", kind="path"),
    Flag("--tokenizer_cache_dir", kind="path", note="nothing needs doing: the tokenizer is a part of lorasmith"),
    Flag("--clip_skip", "model.clip_skip", kind="integer"),
    Flag("--max_token_length", "data.max_token_length", kind="integer"),
    Flag("--lowram", kind="switch", note=_MEMORY),
    Flag("--highvram", kind="switch", note="nothing needs doing: caches are not emptied between steps"),
    Flag("--no_half_vae", kind="switch", note="nothing needs doing: the VAE is always in fp32"),
    Flag("--base_weights", "model.base_loras", kind="path", many=True),
    Flag("--base_weights_multiplier", "model.base_lora_ratios", kind="number", many=True, needs=("base_weights",)),
)

_NETWORK = (
    Flag(
        "--network_module",
        becomes="`--adapter`: networks.lora, or lycoris.kohya with its algorithms; `--network-module`: other people's",
    ),
    Flag("--network_dim", "network.rank", kind="integer"),
    Flag("--network_alpha", "network.alpha", kind="number", convert=_unless_zero),
    Flag("--network_args", many=True, becomes="the arguments below"),
    Flag("--network_weights", "network.weights", kind="path"),
    Flag("--dim_from_weights", kind="switch", note="nothing needs doing: starting weights bring their ranks"),
    Flag("--network_dropout", "network.neuron_dropout", kind="number"),
    Flag("--scale_weight_norms", "network.max_norm", kind="number", convert=_unless_zero),
    Flag("--network_train_unet_only", kind="switch", becomes="`--train unet`"),
    Flag("--network_train_text_encoder_only", kind="switch", becomes="`--train text_encoder`"),
)

_DATA = (
    Flag("--train_data_dir", "data.images", kind="path"),
    Flag("--reg_data_dir", "data.regularization", kind="path"),
    Flag("--in_json", "data.captions", kind="path"),
    Flag("--dataset_repeats", "data.repeats", kind="integer"),
    Flag("--dataset_config", "data.dataset_config", kind="path"),
    Flag(
        "--dataset_class",
        refusal="a class of sd-scripts' own kind cannot be used; write a source (`--source my.module`), which is a "
        "function that lists pictures.",
    ),
    Flag("--conditioning_data_dir", "data.masks", kind="path"),
    Flag("--prior_loss_weight", "data.prior_loss_weight", kind="number", needs=("reg_data_dir", "dataset_config")),
    Flag("--caption_extension", becomes="`--caption-extension`; left out: .caption, and then .txt"),
    Flag("--caption_extention", becomes="the same, misspelt as it was in 2022"),
    Flag("--cache_info", kind="switch", note="nothing needs doing: facts of pictures are kept in the cache folder"),
    Flag("--debug_dataset", "dry_run", kind="switch", note="the plan is printed; `lorasmith check --preview` draws it"),
    Flag("--shuffle_caption", "data.shuffle_caption", kind="switch"),
    Flag("--caption_separator", "data.caption_separator"),
    Flag("--keep_tokens", "data.keep_tokens", kind="integer"),
    Flag("--keep_tokens_separator", "data.keep_tokens_separator"),
    Flag("--secondary_separator", "data.secondary_separator"),
    Flag("--enable_wildcard", "data.wildcards", kind="switch"),
    Flag("--caption_prefix", "data.caption_prefix"),
    Flag("--caption_suffix", "data.caption_suffix"),
    Flag("--caption_dropout_rate", "data.caption_dropout", kind="number"),
    Flag("--caption_dropout_every_n_epochs", "data.caption_dropout_every_epochs", kind="integer"),
    Flag("--caption_tag_dropout_rate", "data.tag_dropout", kind="number"),
    Flag("--token_warmup_min", "data.token_warmup_min", kind="integer", needs=("token_warmup_step",)),
    Flag("--token_warmup_step", "data.token_warmup_steps", kind="number"),
    Flag("--weighted_captions", "data.weighted_captions", kind="switch"),
    Flag("--resolution", "data.resolution"),
    Flag("--train_batch_size", "training.batch_size", kind="integer"),
    Flag("--enable_bucket", "data.buckets", kind="switch", becomes="with `--bucket-rule sd-scripts`"),
    Flag("--min_bucket_reso", "data.bucket_min", kind="integer", needs=("enable_bucket", "dataset_config")),
    Flag("--max_bucket_reso", "data.bucket_max", kind="integer", needs=("enable_bucket", "dataset_config")),
    Flag("--bucket_reso_steps", "data.bucket_step", kind="integer", needs=("enable_bucket", "dataset_config")),
    Flag("--bucket_no_upscale", "data.bucket_no_upscale", kind="switch", needs=("enable_bucket", "dataset_config")),
    Flag("--resize_interpolation", note="nothing needs doing: pictures are always scaled by an antialiasing Lanczos"),
    Flag("--color_aug", "data.color", kind="switch"),
    Flag("--flip_aug", "data.flip", kind="switch"),
    Flag("--random_crop", "data.random_crop", kind="switch"),
    Flag("--face_crop_aug_range", "data.face_crop_aug_range"),
    Flag("--alpha_mask", "data.alpha_mask", kind="switch", becomes="with `--mask-loss all`"),
    Flag("--masked_loss", kind="switch", becomes="`--mask-loss all`"),
    Flag("--cache_latents", "data.cache_latents", kind="switch"),
    Flag(
        "--cache_latents_to_disk",
        "data.cache_latents",
        kind="switch",
        note="they go into the cache folder, docs/caches.md",
    ),
    Flag(
        "--vae_batch_size",
        kind="integer",
        note="nothing needs doing: pictures are encoded one by one, which costs little",
    ),
    Flag(
        "--skip_cache_check", kind="switch", note="nothing needs doing: the check takes little, and finds what changed"
    ),
    Flag("--max_data_loader_n_workers", "data.workers", kind="integer"),
    Flag("--persistent_data_loader_workers", kind="switch", note="nothing needs doing: they live as long as the run"),
)

_OPTIMIZER = (
    Flag("--optimizer_type", becomes="`--optimizer`"),
    Flag(
        "--optimizer_args",
        many=True,
        becomes="`--optimizer-args`, and `--weight-decay`; what is left out is what it is there: Adafactor has "
        "relative_step=True, others than AdamW no weight decay, and those by a dotted name 0.01",
    ),
    Flag("--use_8bit_adam", kind="switch", becomes="`--optimizer adamw8bit`"),
    Flag("--use_lion_optimizer", kind="switch", becomes="`--optimizer lion`"),
    Flag("--learning_rate", "optimizer.learning_rate", kind="number", convert=_unless_zero),
    Flag("--unet_lr", "optimizer.unet_lr", kind="number"),
    Flag("--text_encoder_lr", "optimizer.text_encoder_lr", kind="number", many=True, convert=_first),
    Flag("--max_grad_norm", "optimizer.max_grad_norm", kind="number"),
    Flag("--lr_scheduler", becomes="`--lr-schedule`"),
    Flag("--lr_warmup_steps", "optimizer.lr_warmup_steps", kind="number"),
    Flag("--lr_decay_steps", kind="number", becomes="`--lr-decay-steps`, for warmup_stable_decay"),
    Flag("--lr_scheduler_num_cycles", kind="integer", becomes="`--lr-cycles`"),
    Flag("--lr_scheduler_power", kind="number", becomes="`--lr-power`"),
    Flag("--lr_scheduler_timescale", kind="integer", becomes="`--lr-timescale`"),
    Flag("--lr_scheduler_min_lr_ratio", kind="number", becomes="`--lr-min-ratio`"),
    Flag(
        "--lr_scheduler_type",
        refusal="a scheduler of one's own keeps what a resumed run would have to know; take one of --lr_scheduler, or "
        "`--lr-schedule piecewise --lr-table` for any other shape.",
    ),
    Flag(
        "--lr_scheduler_args", many=True, refusal="they are for --lr_scheduler_type, which is refused; leave them out."
    ),
    Flag("--fused_backward_pass", kind="switch", refusal=_OTHER_MODELS),
)

_LOSS = (
    Flag("--loss_type", "loss.loss_type", choices=("l1", "l2", "huber", "smooth_l1")),
    Flag("--huber_schedule", "loss.huber_schedule", choices=("constant", "exponential", "snr"), needs=("loss_type",)),
    Flag("--huber_c", "loss.huber_c", kind="number", needs=("loss_type",)),
    Flag("--huber_scale", "loss.huber_scale", kind="number", needs=("huber_schedule",)),
    Flag("--min_snr_gamma", "loss.min_snr_gamma", kind="number", convert=_unless_zero),
    Flag("--debiased_estimation_loss", "loss.debiased_estimation", kind="switch"),
    Flag("--scale_v_pred_loss_like_noise_pred", "loss.scale_v_pred_loss", kind="switch"),
    Flag("--v_pred_like_loss", "loss.v_pred_like_loss", kind="number", convert=_unless_zero),
    Flag("--zero_terminal_snr", "loss.zero_terminal_snr", kind="switch"),
    Flag("--min_timestep", "loss.min_timestep", kind="integer"),
    Flag("--max_timestep", "loss.max_timestep", kind="integer"),
    Flag("--noise_offset", "loss.noise_offset", kind="number", convert=_unless_zero),
    Flag("--noise_offset_random_strength", "loss.noise_offset_random", kind="switch", needs=("noise_offset",)),
    Flag("--adaptive_noise_scale", "loss.noise_offset_adaptive", kind="number", needs=("noise_offset",)),
    Flag("--multires_noise_iterations", "loss.pyramid_noise_levels", kind="integer", convert=_unless_zero),
    Flag(
        "--multires_noise_discount", "loss.pyramid_noise_discount", kind="number", needs=("multires_noise_iterations",)
    ),
    Flag("--ip_noise_gamma", "loss.input_perturbation", kind="number", convert=_unless_zero),
    Flag(
        "--ip_noise_gamma_random_strength", "loss.input_perturbation_random", kind="switch", needs=("ip_noise_gamma",)
    ),
)

_MACHINE = (
    Flag("--mixed_precision", choices=("no", "fp16", "bf16"), becomes="`--precision`; left out or no: fp32"),
    Flag("--full_fp16", kind="switch", note=_HALF),
    Flag("--full_bf16", kind="switch", note=_HALF),
    Flag("--fp8_base", kind="switch", note=_BASE),
    Flag("--fp8_base_unet", kind="switch", note=_BASE),
    Flag("--gradient_checkpointing", "training.gradient_checkpointing", kind="switch"),
    Flag(
        "--cpu_offload_checkpointing",
        "training.gradient_checkpointing",
        kind="switch",
        note="what is kept stays on the GPU, where it takes 0.2 GB for a picture of 512 x 512",
    ),
    Flag("--gradient_accumulation_steps", "training.gradient_accumulation", kind="integer"),
    Flag("--mem_eff_attn", "training.attention", kind="switch", value="sdpa", note=_FUSED),
    Flag("--xformers", "training.attention", kind="switch", value="sdpa", note=_FUSED),
    Flag("--sdpa", "training.attention", kind="switch", value="sdpa"),
    Flag("--torch_compile", kind="switch", becomes="`--compile`"),
    Flag(
        "--dynamo_backend",
        choices=("no", "inductor", "aot_eager", "eager"),
        becomes="the backend of `--compile`; left out: inductor; those of other packages are refused",
        needs=("torch_compile",),
    ),
    Flag(
        "--ddp_timeout", kind="integer", note="nothing needs doing: processes wait a day, and notice at once who ended"
    ),
    Flag("--ddp_gradient_as_bucket_view", kind="switch", note=_DDP),
    Flag("--ddp_static_graph", kind="switch", note=_DDP),
    Flag("--deepspeed", kind="switch", refusal=_DEEPSPEED),
    Flag("--zero_stage", kind="integer", refusal=_DEEPSPEED),
    Flag("--offload_optimizer_device", refusal=_DEEPSPEED),
    Flag("--offload_optimizer_nvme_path", refusal=_DEEPSPEED),
    Flag("--offload_param_device", refusal=_DEEPSPEED),
    Flag("--offload_param_nvme_path", refusal=_DEEPSPEED),
    Flag("--zero3_init_flag", kind="switch", refusal=_DEEPSPEED),
    Flag("--zero3_save_16bit_model", kind="switch", refusal=_DEEPSPEED),
    Flag("--fp16_master_weights_and_gradients", kind="switch", refusal=_DEEPSPEED),
)

_SAVE = (
    Flag("--max_train_steps", kind="integer", becomes="`--steps`; left out: 1600"),
    Flag("--max_train_epochs", kind="integer", becomes="`--epochs`"),
    Flag("--seed", "training.seed", kind="integer"),
    Flag("--output_dir", "save.output", kind="path"),
    Flag("--output_name", "save.name"),
    Flag("--save_model_as", "save.format", choices=("ckpt", "pt", "safetensors")),
    Flag("--save_precision", "save.save_precision", choices=("float", "fp16", "bf16")),
    Flag("--save_every_n_epochs", "save.save_every_epochs", kind="integer"),
    Flag("--save_every_n_steps", "save.save_every_steps", kind="integer"),
    Flag("--save_n_epoch_ratio", "save.saves", kind="integer", convert=_unless_zero),
    Flag(
        "--save_last_n_epochs",
        "save.keep_last_epochs",
        kind="integer",
        needs=("save_every_n_epochs", "save_n_epoch_ratio"),
    ),
    Flag("--save_last_n_epochs_state", "save.keep_states", kind="integer"),
    Flag("--save_last_n_steps", "save.keep_last_steps", kind="integer", needs=("save_every_n_steps",)),
    Flag(
        "--save_last_n_steps_state",
        kind="integer",
        note="the newest state is kept, or --save_last_n_epochs_state of them",
    ),
    Flag("--save_state", kind="switch", note=_STATES),
    Flag("--save_state_on_train_end", kind="switch", note=_STATES),
    Flag("--resume", "resume", kind="path"),
    Flag("--initial_epoch", kind="integer", note=_EXACT),
    Flag("--initial_step", kind="integer", note=_EXACT),
    Flag("--skip_until_initial_step", kind="switch", note=_EXACT),
    Flag("--no_metadata", "save.metadata", kind="switch", value="minimal"),
    Flag("--training_comment", "save.comment"),
    Flag("--metadata_title", "save.title"),
    Flag("--metadata_author", "save.author"),
    Flag("--metadata_description", "save.description"),
    Flag("--metadata_license", "save.license"),
    Flag("--metadata_tags", "save.tags"),
    Flag("--metadata_usage_hint", "save.usage_hint"),
    Flag("--metadata_thumbnail", "save.thumbnail", kind="path"),
    Flag("--metadata_merged_from", "save.merged_from"),
    Flag("--metadata_trigger_phrase", "save.trigger_phrase"),
    Flag("--metadata_preprocessor", "save.preprocessor"),
    Flag("--metadata_is_negative_embedding", refusal="a LoRA is no embedding; leave it out."),
    Flag("--output_config", "dry_run", kind="switch", note="the TOML is printed; put it into a file"),
)

_HUB = (
    Flag("--huggingface_repo_id", "save.upload", becomes="and `--upload-saves`"),
    Flag("--huggingface_repo_type", note="nothing needs doing: a LoRA goes into a repository of the type model"),
    Flag(
        "--huggingface_path_in_repo",
        "save.upload_folder",
        convert=lambda folder: folder.strip("/") or None,
        needs=("huggingface_repo_id",),
    ),
    Flag(
        "--huggingface_token", refusal=_SECRET + "set HF_TOKEN in the environment, or log in once with `hf auth login`."
    ),
    Flag(
        "--huggingface_repo_visibility",
        "save.upload_public",
        choices=("public", "private"),
        convert=lambda visibility: visibility == "public",
        needs=("huggingface_repo_id",),
    ),
    Flag(
        "--save_state_to_huggingface",
        "save.upload_states",
        kind="switch",
        needs=("huggingface_repo_id",),
    ),
    Flag(
        "--resume_from_huggingface",
        kind="switch",
        refusal="fetch the states first, `hf download your-name/my-lora --local-dir run`, and give --resume run.",
    ),
    Flag("--async_upload", kind="switch", note="nothing needs doing: training never waits for an upload"),
)

_LOOK = (
    Flag("--sample_every_n_steps", kind="integer", becomes="`--sample-every-steps`"),
    Flag("--sample_every_n_epochs", kind="integer", becomes="`--sample-every-epochs`"),
    Flag("--sample_at_first", "samples.at_first", kind="switch"),
    Flag("--sample_prompts", "samples.prompts", kind="path", convert=_one),
    Flag("--sample_sampler", "samples.sampler", choices=_SAMPLERS),
    Flag("--logging_dir", kind="path", note=_LOGS),
    Flag("--log_prefix", note=_LOGS),
    Flag(
        "--log_with",
        "log.trackers",
        choices=("tensorboard", "wandb", "all"),
        convert=lambda name: [] if name == "tensorboard" else ["wandb"],
        becomes="TensorBoard's logs are always written",
    ),
    Flag("--log_tracker_name", "log.project", needs=("log_with",)),
    Flag(
        "--log_tracker_config",
        kind="path",
        refusal="trackers take what they need from the environment, such as WANDB_ENTITY and WANDB_MODE; leave it out.",
    ),
    Flag("--log_config", kind="switch", note="nothing needs doing: run.toml in --output_dir holds all options"),
    Flag("--wandb_run_name", "log.run_name", needs=("log_with",)),
    Flag(
        "--wandb_api_key", refusal=_SECRET + "set WANDB_API_KEY in the environment, or log in once with `wandb login`."
    ),
    Flag("--console_log_level", note=_CONSOLE),
    Flag("--console_log_file", kind="path", note=_CONSOLE),
    Flag("--console_log_simple", kind="switch", note=_CONSOLE),
    Flag("--validation_split", "validation.validation_split", kind="number"),
    Flag(
        "--validation_seed", "validation.validation_seed", kind="integer", needs=("validation_split", "dataset_config")
    ),
    Flag(
        "--validate_every_n_steps",
        "validation.validate_every_steps",
        kind="integer",
        needs=("validation_split", "dataset_config"),
    ),
    Flag(
        "--validate_every_n_epochs",
        "validation.validate_every_epochs",
        kind="integer",
        needs=("validation_split", "dataset_config"),
    ),
    Flag(
        "--max_validation_steps",
        kind="integer",
        note="nothing needs doing: all held-out pictures are measured, at the same noise each time",
    ),
)

SCRIPT = Script(
    "train_network.py",
    "train",
    (*_MODEL, *_NETWORK, *_DATA, *_OPTIMIZER, *_LOSS, *_MACHINE, *_SAVE, *_HUB, *_LOOK),
    complete=_complete,
    idle=_idle,
    notes=_notes,
    has_config_file=True,
    differences=(
        "`--network_alpha` left out is `--network_dim`, as in the document of 2022; today's sd-scripts takes 1.",
        "`--learning_rate` left out is 1e-4, which the document advises; sd-scripts takes 2e-6, which teaches a LoRA "
        "next to nothing.",
        "`--save_precision` left out is fp16; sd-scripts saves fp32, twice the size.",
        "`--seed` left out is 42, so that a run can be repeated; sd-scripts draws one.",
        "Captions are looked for in .caption and then in .txt files; sd-scripts looks for .caption alone, and trains "
        "on the folder's name without a word where only .txt files are there.",
        "The prior loss of regularization pictures, buckets and masks are sd-scripts'; a caption of 150 or 225 tokens "
        "is not cut in the middle of a word.",
        "`--color_aug` varies colours as weakly as in December 2022.",
        "What is in `--output_dir` already is not written over.",
    ),
)
