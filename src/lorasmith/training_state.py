"""States: everything a stopped run needs to go on with the same bytes.

A state is a folder `states/step-00000120` with the adapter's weights, the optimizer, the gradient scaler and a small
JSON. Because batches are a pure function of the step (law 1), there is no generator and no data position to keep. It is
written beside its place and renamed, so a state is whole or not there.
"""

import hashlib
import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasmith.checkpoint import file_sha256, synced_folder
from lorasmith.errors import UserError

NETWORK_FILE = "network.safetensors"  # a LoRA like those that are saved, in fp32
_FACTS, _OPTIMIZER = "state.json", "optimizer.pt"
_FILES = _FACTS, NETWORK_FILE, _OPTIMIZER
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class StateFacts:
    """What a state says of its run.

    step: optimizer steps done. data_fingerprint: see `data_fingerprint`. started_at: Unix time of the first start.
    unit_sizes: pictures that all processes worked on at once, of each data set. optimizer: the one that was used.
    """

    step: int
    data_fingerprint: str
    started_at: float
    unit_sizes: tuple[int, ...]
    optimizer: str


@dataclass(frozen=True)
class State:
    """One state on disk, read; `average` is that of the weights, if one is kept."""

    facts: StateFacts
    network: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    average: dict[str, Tensor] | None


def save_state(
    states: Path,
    facts: StateFacts,
    network: dict[str, Tensor],
    optimizer: dict[str, Any],
    scaler: dict[str, Any],
    average: dict[str, Tensor] | None = None,
    *,
    keep: int,
) -> Path:
    """Write a state, then remove all but the newest `keep`; return its folder.

    Also removed are states of later steps, which are of a run that was gone back on, and what a killed run left half
    written.

    Raises:
        UserError: NaN or infinity in a weight, or the disk is full; older states are still there.
    """
    if broken := [name for name, tensor in network.items() if not torch.isfinite(tensor).all()]:
        raise UserError(
            f"the weights became NaN or infinite at step {facts.step} (first: {broken[0]}), so no state was saved; "
            "what was saved before is whole. Try a learning rate ten times lower (--learning-rate), or "
            "--max-grad-norm 1."
        )
    target = states / f"step-{facts.step:08d}"
    with synced_folder(target) as folder:
        save_file({name: tensor.contiguous() for name, tensor in network.items()}, folder / NETWORK_FILE)
        torch.save({"optimizer": optimizer, "scaler": scaler, "average": average}, folder / _OPTIMIZER)
        hashes = {name: file_sha256(folder / name) for name in (NETWORK_FILE, _OPTIMIZER)}
        (folder / _FACTS).write_text(json.dumps({**asdict(facts), "sha256": hashes}, indent=1), encoding="utf-8")
    listed = list_states(states)
    reached = listed.index(target) + 1
    for unwanted in [*listed[: max(0, reached - keep)], *listed[reached:], *states.glob(".step-*")]:
        shutil.rmtree(unwanted)
    return target


def list_states(states: Path) -> list[Path]:
    """Return the complete states in a run's `states` folder, oldest first; copies under other names are the user's."""
    named = [path for path in states.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in named if all((path / name).is_file() for name in _FILES)), key=step_of)


def step_of(state: Path) -> int:
    """Return the steps that were done at one of the listed states."""
    return int(state.name.partition("-")[2])


def find_state(path: Path) -> Path:
    """Return the state meant by `--resume PATH`: the path itself, or the newest of a run's output folder.

    Raises:
        UserError: nothing there to go on from.
    """
    if (path / _FACTS).is_file():
        return path.resolve()  # the run's folder is found from it, also when it is "."
    for folder in (path / "states", path.resolve()):
        if found := list_states(folder):
            return found[-1]
    if not path.exists():
        raise UserError(f"--resume {path}: there is no such folder; give the output folder of the stopped run.")
    raise UserError(
        f"--resume {path}: no state in it. States are in OUTPUT/states/step-...; a run stopped before its first state "
        "(see --state-every-steps) has to be started again."
    )


def load_state(folder: Path) -> State:
    """Read a state and check that it is whole.

    Raises:
        UserError: a file is missing or was changed.
    """
    try:
        stored = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        stored_hashes = stored.pop("sha256")
        hashes = {name: stored_hashes[name] for name in (NETWORK_FILE, _OPTIMIZER)}
        facts = StateFacts(**{**stored, "unit_sizes": tuple(stored["unit_sizes"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder / _FACTS) from error
    for name, expected in hashes.items():
        if not (folder / name).is_file() or file_sha256(folder / name) != expected:
            raise _damaged(folder / name)
    rest = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
    return State(facts, load_file(folder / NETWORK_FILE), rest["optimizer"], rest["scaler"], rest.get("average"))


def _damaged(file: Path) -> UserError:
    return UserError(
        f"{file} is missing or damaged, so this state cannot be used; "
        f"resume from another one in {file.parent.parent} or start the run again."
    )


def data_fingerprint(parts: list[str]) -> str:
    """Return a hash of what the run trains on (pictures, captions, repeats), so that a resume can tell a change."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
