"""The options of a stopped run: kept so that it can be gone on with from anywhere, and read again."""

import os
from pathlib import Path
from typing import Any

from lorasmith import config, prompts
from lorasmith.config import TrainConfig
from lorasmith.data.places import is_shards
from lorasmith.errors import UserError
from lorasmith.output_folder import RUN_FILE
from lorasmith.picture_judges import DEMO
from lorasmith.resume import merge_options
from lorasmith.training_state import find_state

OF_ONE_START: Any = {"resume": True, "save": {"overwrite"}}  # options that a resumed run does not take over
_PLACES = (  # options of a run that name something on the disk, so that it can be gone on with from anywhere
    ("model", "base"), ("model", "vae"), ("model", "embeddings"), ("model", "base_loras"), ("network", "weights"),
    ("data", "images"), ("data", "regularization"), ("data", "captions"), ("data", "masks"),
    ("data", "dataset_config"), ("data", "npz_dir"), ("save", "thumbnail"), ("validation", "judge"),
)  # fmt: skip


def run_folder(resumed: Path) -> Path:
    """Return the output folder of the run that is gone on with, given as itself or by one of its states."""
    return find_state(resumed).parent.parent


def merged_options(given: TrainConfig, run_folder: Path) -> TrainConfig:
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
        for value in _listed(merged.get(section, {}).get(option)):
            if os.path.isabs(value) and not (os.path.exists(value) or is_shards(value)):
                raise UserError(
                    f"--resume: {value}, the run's {option}, is not there any more; give its new place with --{option}."
                )
    return config.build(TrainConfig, merged)


def with_whole_paths(options: dict[str, Any]) -> dict[str, Any]:
    """Return a run's options with whole paths; what is no file or folder here (a hub id) stays as it is."""
    if "dataset_config" in options.get("data", {}):
        options["data"]["dataset_root"] = os.path.abspath(options["data"].get("dataset_root", "."))
    if prompts.is_file(given := options.get("samples", {}).get("prompts", [])):
        options["samples"]["prompts"] = [os.path.abspath(given[0])]
    for section, option in _PLACES:
        value = options.get(section, {}).get(option)
        whole = [os.path.abspath(one) if os.path.exists(one) or is_shards(one) else one for one in _listed(value)]
        if whole and (option, value) != ("judge", DEMO):
            options[section][option] = whole if isinstance(value, list) else whole[0]
    return options


def _listed(value: str | list[str] | None) -> list[str]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
