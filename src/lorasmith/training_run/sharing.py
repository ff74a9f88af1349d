"""What a run tells to others: its options without the places on this computer, and an id that does not change."""

import hashlib
import os
import re
from typing import Any

from lorasmith import config
from lorasmith.config import TrainConfig
from lorasmith.training_run.preparation import Preparation


def shared_options(cfg: TrainConfig) -> dict[str, Any]:
    """Return the options by `section.option`: of files and folders only the last name."""
    found = {}
    for option in config.options(TrainConfig):
        if len(option.place) == 2 and option.section != "save":
            value = getattr(getattr(cfg, option.section), option.name)
            if value is not None:
                found[".".join(option.place)] = _without_place(value, is_place=option.kind == "path")
    return found


def _without_place(value: Any, *, is_place: bool) -> Any:
    if isinstance(value, (list, tuple)):
        return ", ".join(str(_without_place(one, is_place=is_place)) for one in value)
    if not isinstance(value, (str, os.PathLike)):
        return value
    text = os.fspath(value)
    if is_place or os.path.exists(text) or re.match(r"[\\/~]|[A-Za-z]:[\\/]", text):
        return re.split(r"[\\/]", text.rstrip("\\/"))[-1]
    return text


def run_id(cfg: TrainConfig, ready: Preparation, started_at: float) -> str:
    """Return what a run is known by to trackers, also after it was resumed."""
    assert cfg.save.output is not None
    facts = f"{ready.fingerprint} {started_at} {cfg.save.output.resolve()}"
    return hashlib.sha256(facts.encode()).hexdigest()[:16]
