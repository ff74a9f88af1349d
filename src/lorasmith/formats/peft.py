"""What PEFT and diffusers say of a LoRA beside its tensors: `adapter_config.json`, or the header's
`lora_adapter_metadata`, where alpha is; and the layout of the folders that PEFT reads.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasmith.checkpoint import atomic_file
from lorasmith.errors import UserError
from lorasmith.models.keys import sd as keys

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PARTS = ("unet", "text_encoder")
HEADER_KEY = "lora_adapter_metadata"


def adapter_files(folder: Path) -> dict[str, Path]:
    """Return the files of PEFT's weights in a folder: its own, or one for each component."""
    found = {part: folder / part / WEIGHTS for part in PARTS if (folder / part / WEIGHTS).is_file()}
    return found or ({"": folder / WEIGHTS} if (folder / WEIGHTS).is_file() else {})


def config_beside(path: Path) -> tuple[dict[str, Any], str]:
    """Return what `adapter_config.json` beside a file says, and a note where there is none.

    Raises:
        UserError: it is no such configuration, or of another kind of change than LoRA.
    """
    file = path.with_name(CONFIG)
    if not file.is_file():
        return {}, f"there is no {CONFIG} beside it, which says alpha; alpha = rank is assumed"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}); get the folder again.") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no JSON object; get the folder again.")
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise UserError(f"{file} says {kind}; of PEFT's kinds, LORA is read.")
    return config, ""


def configs_in_header(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the configuration of each component as diffusers writes it: `{"unet.lora_alpha": 8, ...}`.

    Raises:
        UserError: it is not JSON.
    """
    try:
        flat = json.loads(metadata.get(HEADER_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the header's {HEADER_KEY} is not JSON ({error}); get the file again.") from error
    configs: dict[str, dict[str, Any]] = {}
    for name, value in flat.items() if isinstance(flat, dict) else ():
        part, _, option = name.partition(".")
        configs.setdefault(part, {})[option] = value
    return configs


def alpha_of(path: Path, config: Mapping[str, Any], layer: str, rank: int) -> float | None:
    """Return a layer's alpha for the scale alpha / rank, or None where the configuration says none.

    Patterns are matched as names, not as expressions: from the end, at a word's border.

    Raises:
        UserError: alpha is no number.
    """
    module = _MODULES.get(layer, "").partition(".")[2].removeprefix("text_model.")
    patterns = config.get("alpha_pattern")
    named = [
        value
        for name, value in (patterns.items() if isinstance(patterns, dict) else ())
        if f".{module}".endswith("." + name.strip("^$").replace("\\.", ".").removeprefix("text_model."))
    ]
    alpha = named[0] if named else config.get("lora_alpha")
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise UserError(f"{path}: alpha of {layer} is {alpha!r} in {CONFIG} or the header; expected is a number.")
    return alpha * math.sqrt(rank) if config.get("use_rslora") is True else float(alpha)


_MODULES = keys.adapter_modules()


def write_config(path: Path, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> None:
    """Write the `adapter_config.json` of a component, atomically.

    Args:
        ranks: module -> rank. alphas: module -> alpha.
    """
    rank, alpha = _most_frequent(ranks), _most_frequent(alphas)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
        "target_modules": sorted(ranks),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _most_frequent(values: Mapping[str, Any]) -> Any:
    counted = list(values.values())
    return max(counted, key=counted.count)
