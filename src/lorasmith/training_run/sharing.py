"""What a run tells to others: its options without the places on this computer, and an id that does not change."""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from lorasmith import config
from lorasmith.config import TrainConfig
from lorasmith.model_card import Card
from lorasmith.training_run.preparation import Preparation

_IN_CARD = (
    "network.network_module", "network.adapter", "network.rank", "network.alpha", "optimizer.optimizer",
    "optimizer.learning_rate", "optimizer.lr_schedule", "training.batch_size", "training.seed", "data.resolution",
)  # fmt: skip


def shared_options(cfg: TrainConfig) -> dict[str, Any]:
    """Return the options by `section.option`: of files and folders only the last name."""
    found = {}
    for option in config.options(TrainConfig):
        if len(option.place) == 2 and option.section != "save":
            value = getattr(getattr(cfg, option.section), option.name)
            if value is not None:
                found[".".join(option.place)] = _without_place(value, is_place=option.kind == "path")
    if cfg.network.network_module is not None:
        del found["network.adapter"]
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


def model_card_of(
    cfg: TrainConfig,
    ready: Preparation,
    step: int,
    samples: Sequence[tuple[str, Image.Image]],
    options: Mapping[str, Any],
) -> Card:
    """Return what the page about the LoRA says; how the pictures look is said by samples of it alone."""
    facts = {"steps": step, "pictures": sum(not record.is_prior for record in ready.records)}
    base = str(options["model.base"])
    return Card(
        title=cfg.save.title or cfg.save.name or "LoRA",
        base=base,
        is_on_hub="/" in base,
        description=cfg.save.description or "",
        license=cfg.save.license,
        trigger_phrase=cfg.save.trigger_phrase,
        samples=samples,
        facts={**facts, **{name: options[name] for name in _IN_CARD if name in options}},
    )
