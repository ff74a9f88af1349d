"""What a saved LoRA says of itself: plain values in, the strings of a safetensors header out.

Three groups: `ss_*`, what sd-scripts writes of a training and UIs show; `modelspec.*`, Stability's ModelSpec 1.0.1;
`sshs_*`, hashes by which model sites know a file. Nothing here reads a clock or a file, so equal values
give equal bytes.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any

MAX_BYTES = 750_000  # with the tensors' own entries (about 120 bytes each) the header stays under 1 MB
TRUNCATED_KEY = "lorasmith.truncated"

# Every ss_* name that sd-scripts writes for an SD LoRA, with what it writes when the feature is not used. Names that
# `training` must be given stand with `...`; a None that sd-scripts leaves out altogether is in _ONLY_WHEN_GIVEN.
_TRAINING: dict[str, Any] = {
    "adaptive_noise_scale": None,
    "base_model_version": ...,
    "batch_size_per_device": ...,
    "bucket_info": None,
    "bucket_no_upscale": False,
    "cache_latents": ...,
    "caption_dropout_every_n_epochs": 0,
    "caption_dropout_rate": 0.0,
    "caption_tag_dropout_rate": 0.0,
    "clip_skip": None,
    "color_aug": False,
    "dataset_dirs": ...,
    "datasets": None,
    "debiased_estimation": False,
    "enable_bucket": ...,
    "epoch": ...,
    "face_crop_aug_range": None,
    "flip_aug": False,
    "fp8_base": False,
    "fp8_base_unet": False,
    "full_fp16": False,
    "gradient_accumulation_steps": ...,
    "gradient_checkpointing": ...,
    "huber_c": 0.1,
    "huber_scale": 1.0,
    "huber_schedule": "snr",
    "ip_noise_gamma": None,
    "ip_noise_gamma_random_strength": False,
    "keep_tokens": 0,
    "learning_rate": ...,
    "loss_type": "l2",
    "lowram": False,
    "lr_scheduler": ...,
    "lr_warmup_steps": ...,
    "max_bucket_reso": None,
    "max_grad_norm": ...,
    "max_token_length": None,
    "max_train_steps": ...,
    "max_validation_steps": None,
    "min_bucket_reso": None,
    "min_snr_gamma": None,
    "mixed_precision": ...,
    "multires_noise_discount": 0.3,
    "multires_noise_iterations": None,
    "network_alpha": ...,
    "network_args": None,
    "network_dim": ...,
    "network_dropout": None,
    "network_module": "networks.lora",
    "new_sd_model_hash": None,
    "new_vae_hash": None,
    "noise_offset": None,
    "noise_offset_random_strength": False,
    "num_batches_per_epoch": ...,
    "num_epochs": ...,
    "num_reg_images": ...,
    "num_train_images": ...,
    "num_validation_images": 0,
    "optimizer": ...,
    "output_name": ...,
    "prior_loss_weight": 1.0,
    "random_crop": False,
    "reg_dataset_dirs": {},
    "resize_interpolation": None,
    "resolution": ...,
    "scale_weight_norms": None,
    "sd_model_hash": None,
    "sd_model_name": ...,
    "sd_scripts_commit_hash": "(unknown)",
    "seed": ...,
    "session_id": ...,
    "shuffle_caption": False,
    "steps": ...,
    "tag_frequency": ...,
    "text_encoder_lr": None,
    "total_batch_size": ...,
    "training_comment": None,
    "training_finished_at": ...,
    "training_started_at": ...,
    "unet_lr": None,
    "v2": ...,
    "vae_hash": None,
    "vae_name": None,
    "validate_every_n_epochs": None,
    "validate_every_n_steps": None,
    "validation_seed": None,
    "validation_split": 0.0,
    "zero_terminal_snr": False,
}
_AS_JSON = {"bucket_info", "dataset_dirs", "datasets", "network_args", "reg_dataset_dirs", "tag_frequency"}
_WITHOUT_DATASET_FILE = {  # each data set has its own of these in `datasets`
    "batch_size_per_device", "bucket_info", "bucket_no_upscale", "color_aug", "enable_bucket", "flip_aug",
    "keep_tokens", "max_bucket_reso", "min_bucket_reso", "random_crop", "reg_dataset_dirs", "resolution",
    "shuffle_caption", "total_batch_size",
}  # fmt: skip
_ONLY_WHEN_GIVEN = {
    "datasets",
    "network_args",
    "sd_model_hash",
    "new_sd_model_hash",
    "vae_name",
    "vae_hash",
    "new_vae_hash",
}


def minimal(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what programs need to load a file, out of its `ss_*` metadata; sd-scripts keeps it with --no_metadata."""
    return {name: value for name, value in metadata.items() if name in _MINIMAL}


_MINIMAL = {
    "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args",
}  # fmt: skip


def training(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the `ss_*` metadata of a training.

    Args:
        values: by sd-scripts' name without `ss_`, as plain values (True, 1e-4, None, (512, 512), dicts).
            Times are unix seconds. What is left out gets what sd-scripts writes when the feature is off. With
            `datasets`, what each of them has of its own is left out.

    Raises:
        KeyError: a name that sd-scripts does not have, or one that every file needs is missing.
    """
    if unknown := sorted(values.keys() - _TRAINING.keys()):
        raise KeyError(f"no such ss_ metadata: {', '.join(unknown)}")
    merged = {**_TRAINING, **values}
    if missing := [name for name, value in merged.items() if value is ...]:
        raise KeyError(f"ss_ metadata without a value: {', '.join(missing)}")
    return {
        f"ss_{name}": _to_json(value) if name in _AS_JSON else str(value)
        for name, value in merged.items()
        if not (value is None and name in _ONLY_WHEN_GIVEN)
        and not (merged["datasets"] is not None and name in _WITHOUT_DATASET_FILE)
    }


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def model_spec(
    *,
    architecture: str,
    title: str,
    resolution: tuple[int, int],
    time: float,
    prediction: str,
    implementation_version: str,
    author: str | None = None,
    description: str | None = None,
    license: str | None = None,
    tags: str | None = None,
    trigger_phrase: str | None = None,
    usage_hint: str | None = None,
    merged_from: str | None = None,
    preprocessor: str | None = None,
    thumbnail: str | None = None,
) -> dict[str, str]:
    """Return the `modelspec.*` metadata (ModelSpec 1.0.1); what is None is left out.

    Args:
        architecture: the base model's, e.g. `stable-diffusion-v1`; `/lora` is added.
        resolution: training size, pixels (w, h).
        time: when it was made, unix seconds; written as UTC.
        prediction: `epsilon` or `v_prediction`.
        thumbnail: a picture as a `data:` URL.
    """
    values = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{architecture}/lora",
        "implementation": "diffusers",  # how the names in the file are spelled
        "implementation_version": implementation_version,
        "title": title,
        "resolution": f"{resolution[0]}x{resolution[1]}",
        "date": datetime.fromtimestamp(int(time), timezone.utc).strftime("%Y-%m-%dT%H:%M:%S"),
        "prediction_type": {"v_prediction": "v"}.get(prediction, prediction),
        "author": author,
        "description": description,
        "license": license,
        "tags": tags,
        "trigger_phrase": trigger_phrase,
        "usage_hint": usage_hint,
        "merged_from": merged_from,
        "preprocessor": preprocessor,
        "thumbnail": thumbnail,
    }
    return {f"modelspec.{name}": value for name, value in values.items() if value is not None}


def model_hash(serialized: bytes) -> str:
    """Return `sshs_model_hash`: SHA-256 of a safetensors file's tensors, without its header."""
    return hashlib.sha256(memoryview(serialized)[8 + int.from_bytes(serialized[:8], "little") :]).hexdigest()


def legacy_hash(serialized: bytes) -> str:
    """Return `sshs_legacy_hash`: 8 hex digits of the SHA-256 of 64 KiB at 1 MiB; empty, so e3b0c442, in small files."""
    return hashlib.sha256(memoryview(serialized)[0x100000:0x110000]).hexdigest()[:8]


def fit(metadata: Mapping[str, str], max_bytes: int = MAX_BYTES) -> dict[str, str]:
    """Return the metadata, shortened to `max_bytes` of JSON if it is longer: UIs read every header when they start.

    The largest of `ss_tag_frequency`, `ss_bucket_info` and `ss_datasets`, which holds such too, is halved until it
    fits: rare tags and small buckets go first. What was shortened is named under `lorasmith.truncated`.
    """
    fitted = dict(metadata)
    while _size(fitted) > max_bytes and (name := _largest_that_shortens(fitted)):
        fitted[name] = _shorten(name, fitted[name])
        fitted[TRUNCATED_KEY] = " ".join(sorted({*fitted.get(TRUNCATED_KEY, "").split(), name}))
    return fitted


def _size(metadata: Mapping[str, str]) -> int:
    return len(json.dumps(metadata, ensure_ascii=False).encode())


def _largest_that_shortens(metadata: Mapping[str, str]) -> str | None:
    names = sorted(_SHORTENERS.keys() & metadata.keys(), key=lambda name: -len(metadata[name]))
    return next((name for name in names if len(_shorten(name, metadata[name])) < len(metadata[name])), None)


def _shorten(name: str, text: str) -> str:
    return _to_json(_SHORTENERS[name](json.loads(text)))


def _halve_tags(frequency: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Keep the more frequent half of the tags, counted over the fullest folder, and no folder without tags."""
    keep = max(map(len, frequency.values()), default=0) // 2
    return {folder: _most(tags, keep, lambda count: count) for folder, tags in frequency.items() if keep}


def _halve_buckets(info: dict[str, Any] | None) -> dict[str, Any]:
    """Keep the fuller half of the buckets."""
    info = info or {}
    buckets = info.get("buckets", {})
    return {**info, "buckets": _most(buckets, len(buckets) // 2, lambda bucket: bucket["count"])}


def _most(items: dict[str, Any], keep: int, count: Callable[[Any], int]) -> dict[str, Any]:
    chosen = set(sorted(items, key=lambda name: (-count(items[name]), name))[:keep])
    return {name: value for name, value in items.items() if name in chosen}


def _halve_datasets(datasets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Halve tags and buckets of each data set."""
    return [
        {
            **dataset,
            "tag_frequency": _halve_tags(dataset["tag_frequency"]),
            "bucket_info": dataset["bucket_info"] and _halve_buckets(dataset["bucket_info"]),
        }
        for dataset in datasets
    ]


_SHORTENERS: dict[str, Callable[[Any], Any]] = {
    "ss_tag_frequency": _halve_tags, "ss_bucket_info": _halve_buckets, "ss_datasets": _halve_datasets,
}  # fmt: skip
