"""What a run says of the file that it saves: in its metadata, and to the person who made it."""

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lorasmith
from lorasmith import metadata, model_families
from lorasmith.adapters.lora import LoRA
from lorasmith.command_line import quoted
from lorasmith.config import TrainConfig
from lorasmith.data import captions, dataset_metadata
from lorasmith.data.plan import Plan
from lorasmith.data.records import ImageRecord
from lorasmith.data.subsets import Subset
from lorasmith.network import adapter_class
from lorasmith.output_folder import OutputFolder
from lorasmith.training_run.preparation import Preparation

_EMBEDDINGS_KEY = "lorasmith.embeddings"  # the names of those that captions used, a JSON list
_BASE_LORAS_KEY = "lorasmith.base_loras"  # names and ratios of the LoRAs that were a part of the base model, JSON
_SMALLEST_REAL_WIDTH = 320  # channels of the U-Net in every SD 1 and 2


def now() -> float:
    """Return the Unix time, or SOURCE_DATE_EPOCH where that is set, so that files can be made equal to the byte."""
    return float(os.environ.get("SOURCE_DATE_EPOCH") or time.time())


def file_metadata(cfg: TrainConfig, ready: Preparation, step: int, started_at: float) -> dict[str, str]:
    """Return what the file says of itself."""
    data, training, optimizer, save, facts, plan = (
        cfg.data, cfg.training, cfg.optimizer, cfg.save, ready.facts, ready.plan
    )  # fmt: skip
    loss = cfg.loss
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
        **_network_module(cfg),
        "output_name": name,
        "learning_rate": ready.rates.learning_rate,
        "unet_lr": optimizer.unet_lr,
        "text_encoder_lr": optimizer.text_encoder_lr,
        "optimizer": f"{ready.rates.optimizer.name}({', '.join(optimizer.optimizer_args)})",
        "lr_scheduler": optimizer.lr_schedule,
        "lr_warmup_steps": ready.schedule.warmup_steps,
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
        "network_dropout": cfg.network.neuron_dropout or None,
        "scale_weight_norms": cfg.network.max_norm,
        "loss_type": loss.loss_type,
        "huber_c": loss.huber_c,
        "huber_scale": loss.huber_scale,
        "huber_schedule": loss.huber_schedule,
        "min_snr_gamma": loss.min_snr_gamma,
        "debiased_estimation": loss.debiased_estimation,
        "zero_terminal_snr": loss.zero_terminal_snr,
        "noise_offset": loss.noise_offset,
        "noise_offset_random_strength": loss.noise_offset_random,
        "adaptive_noise_scale": loss.noise_offset_adaptive,
        "multires_noise_iterations": loss.pyramid_noise_levels,
        "multires_noise_discount": loss.pyramid_noise_discount,
        "ip_noise_gamma": loss.input_perturbation,
        "ip_noise_gamma_random_strength": loss.input_perturbation_random,
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
        usage_hint=save.usage_hint,
        merged_from=save.merged_from,
        preprocessor=save.preprocessor,
        thumbnail=ready.thumbnail,
    )
    if data.dataset_config is not None:
        values |= dataset_metadata.describe(ready.datasets, ready.records, plan, shares_captions=save.share_captions)
    full = metadata.training(values)
    if save.share_captions and ready.words.num_captions:
        full[_EMBEDDINGS_KEY] = json.dumps(sorted(ready.words.num_captions))
    if folded := ready.base_loras.names():
        full[_BASE_LORAS_KEY] = json.dumps(folded)
    return {**(full if save.metadata == "full" else metadata.minimal(full)), **spec}


def _network_module(cfg: TrainConfig) -> dict[str, Any]:
    """Return what trains such a network elsewhere: sd-scripts, LyCORIS with these arguments, or nothing known."""
    network = cfg.network
    if network.network_module is not None:
        args = dict(word.split("=", 1) for word in network.network_args)
        return {"network_module": network.network_module, **({"network_args": args} if args else {})}
    kind = adapter_class(network.adapter)
    layers = _network_args(cfg)
    if kind is LoRA and not network.adapter_options:
        return {"network_args": layers} if layers else {}
    if not kind.lycoris_args:
        return {"network_module": network.adapter}
    options = kind.parse_options(network.adapter_options)
    args = dict(word.split("=") for word in kind.lycoris_args.split())
    args |= {option: str(value) for option, value in options.items()} | layers
    if kind.alpha_means == "constraint" and network.alpha:
        args["constraint"] = str(network.alpha)
    if network.neuron_dropout:
        args["dropout"] = str(network.neuron_dropout)
    return {"network_module": "lycoris.kohya", "network_args": args}


def _network_args(cfg: TrainConfig) -> dict[str, str]:
    """Return what sd-scripts has in --network_args: of convolutions, blocks, dropout and LoRA+."""
    network, optimizer = cfg.network, cfg.optimizer
    single = {
        "rank_dropout": network.rank_dropout,
        "module_dropout": network.module_dropout,
        "loraplus_lr_ratio": optimizer.lora_plus_ratio,
        "loraplus_unet_lr_ratio": optimizer.unet_lora_plus_ratio,
        "loraplus_text_encoder_lr_ratio": optimizer.text_encoder_lora_plus_ratio,
    }
    numbers = {
        **{name: [number] if number else [] for name, number in single.items()},
        "conv_dim": network.conv_rank and [network.conv_rank],
        "conv_alpha": network.conv_alpha and [network.conv_alpha],
        "block_dims": network.block_ranks,
        "block_alphas": network.block_alphas,
        "conv_block_dims": network.conv_block_ranks,
        "conv_block_alphas": network.conv_block_alphas,
        "down_lr_weight": optimizer.block_lr[:12],
        "mid_lr_weight": optimizer.block_lr[12:13],
        "up_lr_weight": optimizer.block_lr[13:],
    }
    return {name: ",".join(map(str, own)) for name, own in numbers.items() if own}


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


def file_advice(path: Path, folder: OutputFolder, facts: model_families.ModelFacts) -> list[tuple[str, str]]:
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
    others = path, *folder.saved_best().values()
    earlier = [other for other in folder.path.glob(f"*{path.suffix}") if other not in others]
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
