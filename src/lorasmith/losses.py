"""How far a prediction is from its target: one number a sample, so that weights can be given to samples."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

_ERRORS: dict[str, Callable[..., Tensor]] = {"l2": F.mse_loss, "l1": F.l1_loss}


def per_sample(prediction: Tensor, target: Tensor, mask: Tensor | None = None, kind: str = "l2") -> Tensor:
    """Return the mean error of each sample, (B,), in fp32.

    Args:
        prediction, target: (B, ...), any floating dtype.
        mask: factors that broadcast to (B, ...), e.g. (B, 1, h, w). The mean is still over all elements, as in
            sd-scripts: a small mask is a small gradient.
        kind: `l2` (mean squared error) or `l1` (mean absolute error).
    """
    error = _ERRORS[kind](prediction.float(), target.float(), reduction="none")
    if mask is not None:
        error = error * mask
    return error.flatten(1).mean(dim=1)
