"""Scores of the samples that are drawn while training, for keeping the LoRAs that draw best.

All is read off the log, as the losses of held-out pictures are: the first line has what the untrained model draws.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lorasmith import picture_judges
from lorasmith.data.images import open_record
from lorasmith.data.records import ImageRecord
from lorasmith.errors import UserError
from lorasmith.judging import Bench, at_most
from lorasmith.loss_log import LossLog, read_log
from lorasmith.picture_judges import Choice
from lorasmith.picture_scores import Reference, Scores, overall
from lorasmith.sampling import Drawing

_SAME = 1e-3  # of what two devices make of the same pictures


def load_bench(choice: Choice, records: Sequence[ImageRecord], device: torch.device) -> Bench:
    """Return the judge with what it saw in the training pictures.

    Raises:
        UserError: its files are damaged or not complete.
    """
    judge = picture_judges.load(choice, device)
    return Bench(judge, map(open_record, at_most([record for record in records if not record.is_prior])))


def judge_lines(choice: Choice | None, stop_early: int | None, keep_best: int | None) -> list[str]:
    """Return what the plan says of the judge."""
    if choice is None:
        return []
    parts = [
        *([f"the best {keep_best} LoRAs are kept"] if keep_best else []),
        *([f"the run ends after {stop_early} samplings without a better one"] if stop_early else []),
    ]
    return [f"scored by {choice.title}: {'; '.join(parts)}"]


def check_same(path: Path, bench: Bench, drawings: Sequence[Drawing]) -> None:
    """Check that what is to be scored from now on can be compared with what stands in a resumed run's log.

    Raises:
        UserError: other prompts or settings, or another judge.
    """
    first = next(iter(read_log(path)), None)
    if first is None:
        return
    if first["drawn_from"] != _identity(drawings):
        raise UserError(
            "--best-by pictures compares samples of the same prompts and settings, and these are others than the run "
            "began with; leave them as they were."
        )
    if not math.isclose(first["variety"], bench.variety, rel_tol=_SAME, abs_tol=_SAME):
        raise UserError("--judge: this sees the training pictures otherwise than the run's own judge; give that one.")


class SampleScores:
    """The scores of each moment's samples.

    Args:
        done: steps done when the run starts; lines of later ones are dropped.
    """

    def __init__(self, path: Path, bench: Bench, drawings: Sequence[Drawing], *, done: int) -> None:
        self._bench, self._drawings = bench, drawings
        self._log = LossLog(path, done=done, name="score")
        self.lines = read_log(path)

    @property
    def losses(self) -> list[tuple[int, float]]:
        """The steps with their scores below 0, so that the lowest is the best."""
        return [(step, -score) for step, score in self._log.losses]

    def add(self, step: int, pictures: Sequence[Image.Image]) -> dict[str, float]:
        """Log what is seen in the pictures after this step, unless it stands there already; return it by name."""
        if step in dict(self._log.losses):
            return {}
        seen = self._bench.look(pictures, [one.prompt for one in self._drawings])
        found = {name: value for name, value in asdict(self._bench.scores(seen)).items() if value is not None}
        facts: dict[str, Any] = {}
        if not self.lines:
            facts = {"variety": self._bench.variety, "drawn_from": _identity(self._drawings)}
        first = self.lines[0] if self.lines else found
        base = Scores(**{field.name: first.get(field.name) for field in fields(Scores)})  # type: ignore[arg-type]
        score = overall(Scores(**found), Reference(base, self._bench.variety))
        self._log.append(step, score, **found, **facts)
        self.lines.append({"step": step, "score": score, **found})
        return {"score": score, **found}

    def close(self) -> None:
        self._log.close()


def _identity(drawings: Sequence[Drawing]) -> str:
    return hashlib.sha256(repr(list(drawings)).encode()).hexdigest()[:16]
