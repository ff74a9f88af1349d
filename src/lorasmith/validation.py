"""The loss of held-out pictures, measured the same way each time."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lorasmith.data.dataset import Dataset
from lorasmith.data.plan import Plan
from lorasmith.losses import PLAIN, Objective
from lorasmith.models.base import Conditioning, LatentDiffusion
from lorasmith.processes import Processes
from lorasmith.training import sample_losses

_NUM_DRAWS = 32  # at least so many pairs of noise and timestep: of few pictures, several each


@dataclass(frozen=True)
class Validation:
    """The mean loss of all held-out pictures, and that of each, by its record's index."""

    loss: float
    pictures: dict[int, float]


@torch.no_grad()
def validate(
    model: LatentDiffusion,
    plan: Plan,
    dataset: Dataset,
    processes: Processes,
    encode: Callable[[list[str]], Conditioning],
    objective: Objective = PLAIN,
    *,
    workers: int,
) -> Validation:
    """Return the losses of the held-out pictures, alike in all processes.

    Noise and timesteps are those of the plan's first steps each time, so two values differ only by what was learned in
    between.

    Args:
        plan, dataset: see `plan.validation_plan` and `Dataset.held_out`.
    """
    steps = range(-(-_NUM_DRAWS // plan.num_samples_per_epoch) * plan.steps_per_epoch)
    measured: list[tuple[int, float]] = []  # record, loss
    prepared = dataset.prefetch(steps, processes.index, workers)
    for step in steps:
        with processes.together():
            batches = next(prepared)
        with processes.together(), processes.in_step():
            for micro_batch, batch in zip(plan.step(step, processes.index), batches, strict=True):
                losses = sample_losses(model, batch, encode, objective, processes.most).tolist()
                samples = zip(micro_batch.samples, micro_batch.is_padding, losses, strict=True)
                measured += [(sample.record, loss) for sample, is_padding, loss in samples if not is_padding]
    by_record: dict[int, list[float]] = defaultdict(list)
    for record, loss in (pair for part in processes.gather(measured) for pair in part):
        by_record[record].append(loss)
    # fsum does not mind the order, so any number of processes gives the same
    total = math.fsum(loss for losses in by_record.values() for loss in losses)
    pictures = {record: math.fsum(by_record[record]) / len(by_record[record]) for record in sorted(by_record)}
    return Validation(total / sum(map(len, by_record.values())), pictures)


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the files' names, with as many of their folders as it takes to tell them apart."""
    longest = max(len(path.parts) for path in paths)
    for depth in range(1, longest + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names
