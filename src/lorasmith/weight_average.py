"""The exponential moving average of what is trained: smoother weights, saved and drawn in place of the last step's."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """The average of named parameters, begun at what they are now.

    After step n it moves to them by 1 - d_n, with d_n = min(decay, (1 + n) / (10 + n)): the first steps, which change
    most, are forgotten sooner (the rule of TensorFlow's ExponentialMovingAverage).

    Args:
        decay: 0 .. below 1; the average looks back over some 1 / (1 - decay) steps.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self._parameters, self._decay = dict(parameters), decay
        self._averages = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after `step` steps, counted from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(list(self._averages.values()), list(self._parameters.values()), step)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While entered, the parameters hold the average; afterwards they are what they were, to the last bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            held = parameter.clone()
            parameter.copy_(self._averages[name])
            self._averages[name].copy_(held)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by name."""
        return dict(self._averages)

    def load_state_dict(self, averages: Mapping[str, Tensor]) -> None:
        """Go on from averages that `state_dict` gave."""
        for name, average in self._averages.items():
            average.copy_(averages[name])
