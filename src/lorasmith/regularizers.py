"""What holds an adapter back while it is trained: dropout, decay of what it adds to a weight, a limit of that.

docs/losses.md has the formulas and says why they are what they are.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from lorasmith.dropout import Dropout, DropoutRates
from lorasmith.network import Network
from lorasmith.optimizers.base import adaptation


class Regularizers:
    """Dropout around each micro-batch, and what is done to the adapters after each optimizer step.

    Args:
        product_decay: weight of half the squared norm of every delta, in the loss that a step of plain descent follows;
            0: none.
        max_norm: what no delta's norm may exceed; None: any may.
    """

    def __init__(
        self, network: Network, rates: DropoutRates, *, seed: int, product_decay: float, max_norm: float | None
    ) -> None:
        self._network, self._rates, self._seed = network, rates, seed
        self._product_decay, self._max_norm = product_decay, max_norm

    def dropping(self, step: int, samples: Sequence[int]) -> AbstractContextManager[None]:
        """Return what is entered for forward and backward pass of a step's samples, by index in its global batch."""
        if self._rates == DropoutRates():
            return nullcontext()
        return self._network.dropping(Dropout(self._rates, self._seed, step, samples))

    def after_step_(self, groups: Sequence[Mapping[str, Any]]) -> int | None:
        """Decay and limit what the optimizer made of its groups; return how many deltas were too large, if limited."""
        if self._product_decay:
            self._decay_(groups)
        return None if self._max_norm is None else self._network.clip_norms_(self._max_norm)

    def _decay_(self, groups: Sequence[Mapping[str, Any]]) -> None:
        rates = {p: group["lr"] * (adaptation(group) or 1.0) for group in groups for p in group["params"]}
        for parameters, gradients in self._network.decay_gradients():
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.sub_(gradient, alpha=rates[parameter] * self._product_decay)
