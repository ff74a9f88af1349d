"""Which options a resumed run may change: those that cannot change its result, and where things lie.

Works on plain nested dictionaries, section -> option -> value, as they stand in a run's `run.toml`: defaults are left
out there.
"""

from collections.abc import Mapping
from typing import Any

from lorasmith import config
from lorasmith.errors import UserError

# Where things lie now (what lies there is checked by its content), how long, how often, what is shown.
CHANGEABLE = {
    "resume", "dry_run", "base", "vae", "embeddings", "base_loras", "images", "regularization", "captions",
    "masks", "weights", "output", "source", "image_column", "caption_column", "dataset_split",
    "steps", "epochs", "workers", "device", "batch_size", "cache_latents", "skip_unreadable", "max_megapixels",
    "disk_cache", "cache_dir", "npz_dir",
    "gradient_checkpointing", "shard_base", "dataset_config", "dataset_root",
    "save_every_epochs", "save_every_steps", "saves", "keep_last_epochs", "keep_last_steps",
    "state_every_steps", "keep_states", "format", "save_precision",
    "title", "author", "description", "license", "tags", "trigger_phrase", "usage_hint", "merged_from",
    "preprocessor", "thumbnail", "comment", "metadata", "share_captions",
    "prompts", "at_first", "sampler",
    "sample_every_steps", "sample_every_epochs", "before_after", "negative", "sample_size", "sample_steps",
    "guidance", "sample_seed", "tensorboard", "progress", "validate_every_epochs", "validate_every_steps",
    "keep_best", "stop_early", "judge", "trackers", "project", "run_name", "upload", "upload_public",
    "upload_folder", "upload_saves", "upload_states",
}  # fmt: skip


def merge_options(stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stopped run's options with those given now laid over them.

    Raises:
        UserError: an option is given that would make another run of it.
    """
    defaults = {option.place: option.default for option in config.options(config.TrainConfig)}
    merged = {name: dict(value) if isinstance(value, Mapping) else value for name, value in stored.items()}
    refused = []
    for name, value in given.items():
        if not isinstance(value, Mapping):
            merged[name] = value
            continue
        section = merged.setdefault(name, {})
        for option, new in value.items():
            if option not in CHANGEABLE and section.get(option, defaults.get((name, option))) != new:
                old = section.get(option, defaults.get((name, option)))
                refused.append(f"{name}.{option} was {'left out' if old is None else old}, now {new}")
            section[option] = new
    if "steps" in given.get("training", {}):
        merged.get("training", {}).pop("epochs", None)
    if "epochs" in given.get("training", {}):
        merged.get("training", {}).pop("steps", None)
    if refused:
        raise UserError(
            f"a resumed run keeps its options, but {'; '.join(refused)}. Leave these out, "
            "or start a new run from the saved LoRA with --weights."
        )
    return merged
