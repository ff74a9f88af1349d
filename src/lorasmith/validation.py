"""The loss of held-out pictures, measured the same way each time."""

from collections.abc import Callable

import torch

from lorasmith.data.dataset import Dataset
from lorasmith.data.plan import Plan
from lorasmith.losses import PLAIN, Objective
from lorasmith.models.base import Conditioning, LatentDiffusion
from lorasmith.processes import Processes
from lorasmith.training import weighted_loss

_NUM_DRAWS = 32  # at least so many pairs of noise and timestep: of few pictures, several each


@torch.no_grad()
def validation_loss(
    model: LatentDiffusion,
    plan: Plan,
    dataset: Dataset,
    processes: Processes,
    encode: Callable[[list[str]], Conditioning],
    objective: Objective = PLAIN,
    *,
    workers: int,
) -> float:
    """Return the mean loss of the held-out pictures, alike in all processes.

    Noise and timesteps are those of the plan's first steps each time, so two values differ only by what was learned in
    between.

    Args:
        plan, dataset: see `plan.validation_plan` and `Dataset.held_out`.
    """
    num_epochs = -(-_NUM_DRAWS // plan.num_samples_per_epoch)
    total, count = 0.0, 0
    with processes.together():
        for batches in dataset.prefetch(range(num_epochs * plan.steps_per_epoch), processes.index, workers):
            for batch in batches:
                total += weighted_loss(model, batch, encode, objective).item() * batch.count
                count += batch.count
    return processes.sums([total])[0] / count
