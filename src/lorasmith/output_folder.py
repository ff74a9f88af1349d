"""The folder of a run: who owns it, how its files are called, and that nothing in it is overwritten in silence."""

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lorasmith.errors import UserError

RUN_FILE = "run.toml"
_BEGINNINGS = {RUN_FILE, "logs", "samples"}  # written before there is anything to go on from


@dataclass(frozen=True)
class OutputFolder:
    """Paths of one run's results.

    LoRA files are called as in the 2022 document, `last`, `epoch-000001`, unless the run has a name.
    """

    path: Path
    name: str | None
    extension: str

    @property
    def run_file(self) -> Path:
        return self.path / RUN_FILE

    @property
    def loss_log(self) -> Path:
        return self.path / "logs" / "loss.jsonl"

    @property
    def validation_log(self) -> Path:
        return self.path / "logs" / "validation.jsonl"

    @property
    def picture_log(self) -> Path:
        return self.path / "logs" / "pictures.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "logs" / "tensorboard"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def hub(self) -> Path:
        return self.path / "hub"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def states(self) -> Path:
        return self.path / "states"

    def last(self) -> Path:
        return self.path / f"{self.name or 'last'}.{self.extension}"

    def epoch(self, epoch: int) -> Path:
        """File for the end of `epoch`, which counts from 1."""
        return self.path / f"{self.name or 'epoch'}-{epoch:06d}.{self.extension}"

    def step(self, step: int) -> Path:
        """File after `step` optimizer steps."""
        stem = f"{self.name}-step{step:08d}" if self.name else f"step-{step:08d}"
        return self.path / f"{stem}.{self.extension}"

    def best(self, step: int) -> Path:
        """File after `step` optimizer steps that is kept as one of the best."""
        stem = f"{self.name}-best{step:08d}" if self.name else f"best-{step:08d}"
        return self.path / f"{stem}.{self.extension}"

    def saved_best(self) -> dict[int, Path]:
        """The files that are there of the best steps, by number."""
        return self._saved(self.best(0).name, 8)

    def saved_epochs(self) -> dict[int, Path]:
        """The files that are there of epochs, by number."""
        return self._saved(self.epoch(0).name, 6)

    def saved_steps(self) -> dict[int, Path]:
        """The files that are there of steps, by number."""
        return self._saved(self.step(0).name, 8)

    def _saved(self, zeroth: str, digits: int) -> dict[int, Path]:
        before, _, after = zeroth.rpartition("0" * digits)
        pattern = re.compile(rf"{re.escape(before)}(\d{{{digits},}}){re.escape(after)}")
        found = ((pattern.fullmatch(path.name), path) for path in self.path.iterdir())
        return {int(match[1]): path for match, path in found if match}


def check_free(folder: OutputFolder, *, overwrite: bool) -> None:
    """Refuse a place that cannot be written to or that holds another run's results.

    What a run left that ended before it saved anything is no hindrance; it is moved aside like an older run.

    Raises:
        UserError: with the ways out: resume, another folder, --overwrite.
    """
    _check_writable(folder.path)
    found = [path.name for path in _belongings(folder)]
    is_only_begun = RUN_FILE in found and _BEGINNINGS.issuperset(found)
    if found and not overwrite and not is_only_begun:
        raise UserError(
            f"{folder.path} already holds a run ({_some(found)}), and nothing is overwritten. "
            f'To go on with it: lorasmith train --resume "{folder.path}". To start afresh: another --output, '
            "or --overwrite, which moves the old run aside."
        )


def move_aside(folder: OutputFolder) -> Path | None:
    """Move an older run's files into `old-1`, `old-2`, ... in the folder; return where, None if there are none."""
    belongings = _belongings(folder)
    if not belongings:
        return None
    number = 1
    while (target := folder.path / f"old-{number}").exists():
        number += 1
    target.mkdir()
    for path in belongings:
        shutil.move(path, target / path.name)
    return target


def _belongings(folder: OutputFolder) -> list[Path]:
    """Return what a run of this name would write over: its files and folders, not the user's other things."""
    if not folder.path.is_dir():
        return []
    named = {RUN_FILE, "logs", "samples", "report", "hub", "states"}
    stem = r"last|epoch-\d{6,}|(step|best)-\d{8,}"
    if folder.name is not None:
        stem = rf"{re.escape(folder.name)}(-\d{{6,}}|-(step|best)\d{{8,}})?"
    lora = re.compile(rf"({stem})\.(safetensors|pt|ckpt)")
    return sorted(path for path in folder.path.iterdir() if path.name in named or lora.fullmatch(path.name))


def _check_writable(path: Path) -> None:
    existing = path
    try:
        while not existing.exists():
            if existing.is_symlink():
                raise UserError(
                    f"--output {path}: {existing} is a link to nothing; remove it, or choose another place."
                )
            if existing == existing.parent:
                raise UserError(f"--output {path}: there is no such drive as {existing}; choose another place.")
            existing = existing.parent
        if not existing.is_dir():
            raise UserError(f"--output {path}: {existing} is a file, not a folder; choose another place.")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f"--output {path}: {existing} cannot be written to ({error.strerror}); "
            "choose another place or change its rights."
        ) from error


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
