"""The LoRA files that are given as such or as folders, such as a run's output, in the order of their training."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from lorasmith.checkpoint import open_checkpoint
from lorasmith.errors import UserError
from lorasmith.formats import kohya, peft

_STEPS = re.compile(r"\d{1,18}")
_LAST_NUMBER = re.compile(r"(\d+)\D*$")


def lora_files(given: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Return the files, and a line for each that is left out.

    Of a folder these are all LoRAs in it, but not in the folders in it, in the order of their steps; one that is the
    same as another, as `last` is as the last epoch, is left out. A folder of PEFT's is one LoRA.

    Raises:
        UserError: one is not there or given twice, or a folder has none.
    """
    found: list[Path] = []
    notes: list[str] = []
    for path in given:
        if not path.exists():
            raise UserError(f"{path}: there is no such LoRA file or folder; check the path.")
        files, left_out = ([path], []) if path.is_file() or peft.adapter_files(path) else _in_order(path)
        notes += left_out
        for one in files:
            if any(one.samefile(other) for other in found):
                raise UserError(f"{one} is given twice; leave it out once.")
            found.append(one)
    return found, notes


def _in_order(folder: Path) -> tuple[list[Path], list[str]]:
    files = sorted(path for path in folder.iterdir() if path.suffix in kohya.SUFFIXES and not path.name.startswith("."))
    if not files:
        raise UserError(f"{folder}: no LoRA lies in this folder; give the output folder of a run, or LoRA files.")
    metadata = {path: _metadata(path) for path in files}
    # Numbers in names may count epochs in one file and steps in another, so they are compared only where files tell
    # no steps.
    has_steps = all(_STEPS.fullmatch(facts.get("ss_steps", "")) for facts in metadata.values())

    def place(path: Path) -> tuple[float, float]:
        number = _LAST_NUMBER.search(path.stem)
        in_name = int(number[1]) if number else math.inf
        return (int(metadata[path]["ss_steps"]) if has_steps else in_name), in_name

    kept: dict[str, Path] = {}
    notes: list[str] = []
    for path in sorted(files, key=place):
        same = kept.setdefault(metadata[path].get("sshs_model_hash") or str(path), path)
        if same != path:
            notes.append(f"{path} is left out, as it is the same as {same.name}")
    return list(kept.values()), notes


def _metadata(path: Path) -> dict[str, str]:
    if path.suffix != ".safetensors":
        return {}
    with open_checkpoint(path) as file:
        return file.metadata
