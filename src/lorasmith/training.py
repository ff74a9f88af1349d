"""One optimizer step of adapter training: forward, backward, sum over processes, clip, update.

Draws nothing: noise, timesteps and augmentations come in the batches (law 1).
"""

import math
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorasmith.data.dataset import Batch
from lorasmith.errors import UserError
from lorasmith.foreign_network import ForeignNetwork
from lorasmith.losses import PLAIN, Objective
from lorasmith.models.base import Conditioning, LatentDiffusion
from lorasmith.processes import Processes
from lorasmith.regularizers import Regularizers

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # the first one wins where processes got different ones


class LossNotFiniteError(UserError):
    """The loss became NaN or infinite: nothing of this step was applied."""


def latents_of(model: LatentDiffusion, batch: Batch) -> Tensor:
    """Return the batch's latents x_0 (B, C, H/f, W/f), encoding its pixels where nothing is cached."""
    if batch.latents is not None:
        return batch.latents.to(model.device, torch.float32)
    assert batch.pixels is not None
    with torch.no_grad():
        mean, std = model.encode_image(batch.pixels)
    return mean + std * batch.posterior_noise.to(mean.device)


def weighted_loss(
    model: LatentDiffusion,
    batch: Batch,
    encode: Callable[[list[str]], Conditioning],
    objective: Objective = PLAIN,
    most: Callable[[int], int] = int,
) -> Tensor:
    """Return sum(weight_i * loss_i) / count: this micro-batch's part of the mean over the whole step's samples."""
    losses = sample_losses(model, batch, encode, objective, most)
    return (losses * batch.weight.to(losses.device)).sum() / batch.count


def sample_losses(
    model: LatentDiffusion,
    batch: Batch,
    encode: Callable[[list[str]], Conditioning],
    objective: Objective = PLAIN,
    most: Callable[[int], int] = int,
) -> Tensor:
    """Return the loss of each sample, (B,), before weights.

    Args:
        most: `Processes.most`, in a run.
    """
    x_0 = latents_of(model, batch)
    noise, t = batch.noise.to(x_0.device), batch.t.to(x_0.device)
    seen = noise
    if batch.noise_draws is not None:
        noise = batch.noise_draws.noise(noise, x_0)
        seen = batch.noise_draws.input_noise(noise)
    x_t = model.schedule.add_noise(x_0, seen, t)
    prediction = model(x_t, t, encode(batch.captions))
    target = model.schedule.target(x_0, noise, t)
    if batch.keeps_output is not None:
        kept = batch.keeps_output.nonzero()[:, 0].to(x_0.device)
        if most(len(kept)):
            asked = kept if len(kept) else kept.new_zeros(1)  # any sample, for those who share the model and need it
            with torch.no_grad(), objective.base_alone():
                base_output = model(x_t[asked], t[asked], encode([batch.captions[i] for i in asked.tolist()]))
            target = target.index_copy(0, kept, base_output[: len(kept)].float())
    mask = None if batch.mask is None else batch.mask.to(x_0.device)
    return objective.losses(model.schedule, prediction.float(), target, t, mask)


@dataclass
class StepResult:
    """What one step reports, alike in all processes.

    loss: the mean over all samples of all processes. stop_signal: SIGINT or SIGTERM if any process got it.
    num_limited: adapters whose norm was too large; None: it has no limit.
    """

    loss: float
    stop_signal: int | None
    num_limited: int | None = None


class Stepper:
    """Takes optimizer steps; owns the gradient scaler that fp16 needs.

    `base_rates` are the learning rates of the optimizer's groups before the schedule's multiplier.

    Args:
        max_grad_norm: 0 turns clipping off.
        regularizers: of the adapters; None: none.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        processes: Processes,
        encode: Callable[[list[str]], Conditioning],
        objective: Objective = PLAIN,
        *,
        max_grad_norm: float,
        is_fp16: bool,
        regularizers: Regularizers | ForeignNetwork | None = None,
    ) -> None:
        self._regularizers = regularizers
        self._model, self._parameters, self._optimizer = model, list(parameters), optimizer
        self._processes, self.encode, self.objective, self._max_grad_norm = processes, encode, objective, max_grad_norm
        self.base_rates = [group["lr"] for group in optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=is_fp16)

    def step(
        self, batches: Sequence[Batch], rate_multiplier: float, *, step: int, stop_signal: Callable[[], int | None]
    ) -> StepResult:
        """Train on one global batch; `step` counts from 0 and is for messages only.

        Args:
            stop_signal: tells the signal that this process got, asked once the gradients are there; all processes learn
                of it and finish the same step.

        Raises:
            LossNotFiniteError: at the first NaN or infinite loss, before any weight is changed.
        """
        with self._processes.together(), self._processes.in_step():
            loss = self._accumulate(batches, step)
        asked = stop_signal()
        loss, *num_stops = self._processes.sums([loss, *(float(asked == number) for number in STOP_SIGNALS)])
        if not math.isfinite(loss):
            raise LossNotFiniteError(not_finite_message(step, loss))
        self._processes.sum_gradients_(self._parameters)
        with self._processes.in_step():
            num_limited = self._update(rate_multiplier)
        stops = [number for number, count in zip(STOP_SIGNALS, num_stops, strict=True) if count]
        return StepResult(loss, stops[0] if stops else None, num_limited)

    def _accumulate(self, batches: Sequence[Batch], step: int) -> float:
        """Add up the gradients of this process's batches; return its part of the loss."""
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            with self._regularizers.dropping(step, batch.indexes) if self._regularizers else nullcontext():
                loss = weighted_loss(self._model, batch, self.encode, self.objective, self._processes.most)
                total += loss.detach().double().cpu()
                self.scaler.scale(loss).backward()  # within, as checkpointed layers compute again
        return total.item()

    def _update(self, rate_multiplier: float) -> int | None:
        for group, rate in zip(self._optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * rate_multiplier
        self.scaler.unscale_(self._optimizer)
        if self._max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)
        self.scaler.step(self._optimizer)
        self.scaler.update()
        return self._regularizers.after_step_(self._optimizer.param_groups) if self._regularizers else None


def not_finite_message(step: int, value: float) -> str:
    """Say where the loss broke and what usually mends it."""
    return (
        f"the loss became {value} at step {step + 1}; training stopped there and nothing of that step was kept. "
        "What to try, in this order: a learning rate ten times lower (--learning-rate); --precision bf16 or fp32 "
        "instead of fp16; --max-grad-norm 1; and a base model and VAE without NaN (this one's pictures go black too "
        "if its VAE is the cause: give --vae another one)."
    )
