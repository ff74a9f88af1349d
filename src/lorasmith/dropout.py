"""Dropout in adapters: what is left out of a training step, as a pure function of the step (law 1).

Nothing is drawn from a running generator: a mask follows from the seed, the step, the module's name and, inside of
adapters, the sample. So it is the same when activations are computed again for gradient checkpointing, after a resume,
and however the samples of a step are spread over processes and micro-batches. docs/losses.md has the formulas.
"""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.seeds import derive


@dataclass(frozen=True)
class DropoutRates:
    """Shares of what is left out, each in [0, 1).

    neuron: of the numbers between an adapter's two factors. rank: of its ranks, for each sample. module: of adapters.
    """

    neuron: float = 0.0
    rank: float = 0.0
    module: float = 0.0

    @property
    def has_inner(self) -> bool:
        """Whether something inside of adapters is left out."""
        return bool(self.neuron or self.rank)


@dataclass(frozen=True)
class Dropout:
    """What is left out while the given samples, by their index in the global batch of the step, are trained."""

    rates: DropoutRates
    seed: int
    step: int
    samples: Sequence[int]

    def left_out(self, names: Collection[str]) -> set[str]:
        """Return the adapters without a part in this step: at most all but one of these, so that something is learned.

        It is the same for all samples of the step, so that no process lacks a gradient that another has.
        """
        if not self.rates.module:
            return set()
        draws = {name: random.Random(derive(self.seed, f"module dropout/{name}", self.step)).random() for name in names}
        left_out = {name for name, draw in draws.items() if draw < self.rates.module}
        return left_out - {max(draws, key=lambda name: draws[name])}

    def inner(self, name: str, hidden: Tensor, rank_dim: int) -> Tensor:
        """Return what is between an adapter's factors, (rows, ...), with some of it zero and the rest larger for that.

        Args:
            hidden: of each sample the same number of rows, those of one sample together.
            rank_dim: which dimension of `hidden` are the ranks.
        """
        rows = hidden.unflatten(0, (len(self.samples), -1))  # (samples, rows of a sample, ...)
        whole = tuple(rows.shape[1:])
        ranks = [1] * len(whole)
        ranks[rank_dim] = hidden.shape[rank_dim]
        for kind, rate, shape in [("neuron", self.rates.neuron, whole), ("rank", self.rates.rank, tuple(ranks))]:
            if rate:
                kept = torch.stack(
                    [self._kept(f"{kind} dropout/{name}", sample, shape, rate) for sample in self.samples]
                )
                rows = rows * kept.to(hidden.device, hidden.dtype) / (1 - rate)
        return rows.flatten(0, 1)

    def _kept(self, purpose: str, sample: int, shape: tuple[int, ...], rate: float) -> Tensor:
        generator = torch.Generator().manual_seed(derive(self.seed, purpose, self.step, sample))
        return torch.rand(shape, generator=generator) >= rate
