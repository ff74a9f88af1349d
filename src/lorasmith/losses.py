"""How far a prediction is from its target: one number a sample, and how much it counts at its timestep.

Pure functions in tables; docs/losses.md has the formulas and where they are from.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.diffusion import Discrete, Prediction

_MAX_SNR = 1000.0  # sd-scripts' limit, where the ratio grows without bounds near t = 0


def _l2(prediction: Tensor, target: Tensor, c: Tensor) -> Tensor:
    return F.mse_loss(prediction, target, reduction="none")


def _l1(prediction: Tensor, target: Tensor, c: Tensor) -> Tensor:
    return F.l1_loss(prediction, target, reduction="none")


def _smooth_l1(prediction: Tensor, target: Tensor, c: Tensor) -> Tensor:
    """2 (sqrt(d^2 + c^2) - c) for a difference d, written so that small differences do not cancel out."""
    square = (prediction - target).square()
    return 2 * square / ((square + c.square()).sqrt() + c)


def _huber(prediction: Tensor, target: Tensor, c: Tensor) -> Tensor:
    """2 c (sqrt(d^2 + c^2) - c): d^2 for small differences, 2 c |d| for large ones."""
    return c * _smooth_l1(prediction, target, c)


# kohya-ss/sd-scripts, library/train_util.py: conditional_loss
_ERRORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "l2": _l2,
    "l1": _l1,
    "huber": _huber,
    "smooth_l1": _smooth_l1,
}

# The difference c at which huber and smooth_l1 turn from squares to absolute values, of a schedule at timesteps (B,),
# from huber_c and huber_scale. sd-scripts, library/train_util.py: get_huber_threshold_if_needed; arXiv:2403.16728
_THRESHOLDS: dict[str, Callable[[Discrete, Tensor, float, float], Tensor]] = {
    "constant": lambda schedule, t, c, scale: torch.full(t.shape, c * scale, device=t.device),
    "exponential": lambda schedule, t, c, scale: scale * c ** (t / len(schedule.betas)),
    "snr": lambda schedule, t, c, scale: (1 - c) / (1 + schedule.snr(t).rsqrt()).square() + c,
}


def _min_snr(snr: Tensor, prediction: Prediction, gamma: float) -> Tensor:
    """min(snr, gamma) / snr for epsilon, / (snr + 1) for v."""
    return (gamma / snr).clamp_max(1) if prediction == "epsilon" else snr.clamp_max(gamma) / (snr + 1)


def _debiased(snr: Tensor, prediction: Prediction, _: float) -> Tensor:
    """1 / sqrt(snr) for epsilon, 1 / (snr + 1) for v."""
    limited = snr.clamp_max(_MAX_SNR)
    return limited.rsqrt() if prediction == "epsilon" else 1 / (limited + 1)


def _scaled_v(snr: Tensor, prediction: Prediction, _: float) -> Tensor:
    """snr / (snr + 1), which makes the loss of v that of epsilon."""
    limited = snr.clamp_max(_MAX_SNR)
    return limited / (limited + 1)


def _v_like(snr: Tensor, prediction: Prediction, share: float) -> Tensor:
    """1 + share (snr + 1) / snr: the loss of epsilon, and so much of the loss of v."""
    limited = snr.clamp_max(_MAX_SNR)
    return 1 + share * (limited + 1) / limited


# How much a sample counts, from the signal-to-noise ratio (B,) at its timestep, what the model predicts, and a number.
# min_snr_gamma: arXiv:2303.09556. debiased_estimation: arXiv:2310.08442. All: sd-scripts,
# library/custom_train_functions.py; but the ratio here is that of the schedule trained on, zero terminal SNR included.
WEIGHTINGS: dict[str, Callable[[Tensor, Prediction, float], Tensor]] = {
    "min_snr_gamma": _min_snr,
    "debiased_estimation": _debiased,
    "scale_v_pred_loss": _scaled_v,
    "v_pred_like_loss": _v_like,
}


@dataclass(frozen=True)
class Objective:
    """What training makes small.

    Args:
        kind: `l2`, `l1`, `huber` or `smooth_l1`.
        huber_c, huber_scale, huber_schedule: see `_THRESHOLDS`.
        weightings: names in `WEIGHTINGS` with their number; several are multiplied.
        base_alone: while what it returns is entered, the model is the base model, without what is trained.
    """

    kind: str = "l2"
    huber_c: float = 0.1
    huber_scale: float = 1.0
    huber_schedule: str = "snr"
    weightings: Mapping[str, float] = field(default_factory=dict)
    base_alone: Callable[[], AbstractContextManager[None]] = nullcontext

    def losses(
        self, schedule: Discrete, prediction: Tensor, target: Tensor, t: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Return the loss of each sample, (B,), in fp32; arguments as in `per_sample`, with timesteps (B,)."""
        threshold = None
        if self.kind in ("huber", "smooth_l1"):
            threshold = _THRESHOLDS[self.huber_schedule](schedule, t, self.huber_c, self.huber_scale)
        losses = per_sample(prediction, target, mask, self.kind, threshold)
        for name, number in self.weightings.items():
            losses = losses * WEIGHTINGS[name](schedule.snr(t), schedule.prediction, number)
        return losses


PLAIN = Objective()


def per_sample(
    prediction: Tensor, target: Tensor, mask: Tensor | None = None, kind: str = "l2", c: Tensor | None = None
) -> Tensor:
    """Return the mean error of each sample, (B,), in fp32.

    Args:
        prediction, target: (B, ...), any floating dtype.
        mask: factors that broadcast to (B, ...), e.g. (B, 1, h, w), such as `mask_factors` makes. The mean is still
            over all elements.
        kind: `l2` (squares), `l1` (absolute values), `huber` or `smooth_l1` (squares of what is small beside c).
        c: (B,), for the last two.
    """
    c = torch.ones(len(target), device=target.device) if c is None else c
    error = _ERRORS[kind](prediction.float(), target.float(), c.float().view(-1, *[1] * (target.dim() - 1)))
    if mask is not None:
        error = error * mask
    return error.flatten(1).mean(dim=1)


def mask_factors(mask: Tensor, *, background: float, by_area: bool) -> Tensor:
    """Return what each place's error is multiplied by, (B, 1, h, w), before the mean over all places is taken.

    A place's weight is w = m + background * (1 - m), where the mask m is 1 in what is learned and 0 in the rest. With
    e the error, a sample's loss is then sum(w * e) / n over all n places, which is sd-scripts' loss; or, by area,
    sum(w * e) / sum(w), which does not get smaller with the mask: the factors are w * n / sum(w). A mask that is 1
    everywhere gives 1 exactly, one without any weight gives 0.

    Args:
        mask: (B, 1, h, w) in [0, 1].
        background: weight of what is masked out, in [0, 1].
    """
    weights = mask + background * (1 - mask)
    if not by_area:
        return weights
    area = weights.flatten(1).sum(dim=1) / weights[0].numel()  # (B,): in [0, 1]
    return weights / area.where(area > 0, 1).view(-1, 1, 1, 1)
