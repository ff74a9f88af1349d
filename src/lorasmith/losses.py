"""How far a prediction is from its target: one number a sample, so that weights can be given to samples."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

_ERRORS: dict[str, Callable[..., Tensor]] = {"l2": F.mse_loss, "l1": F.l1_loss}


def per_sample(prediction: Tensor, target: Tensor, mask: Tensor | None = None, kind: str = "l2") -> Tensor:
    """Return the mean error of each sample, (B,), in fp32.

    Args:
        prediction, target: (B, ...), any floating dtype.
        mask: factors that broadcast to (B, ...), e.g. (B, 1, h, w), such as `mask_factors` makes. The mean is still
            over all elements.
        kind: `l2` (mean squared error) or `l1` (mean absolute error).
    """
    error = _ERRORS[kind](prediction.float(), target.float(), reduction="none")
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
