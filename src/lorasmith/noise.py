"""What noise is besides independent normal numbers: offsets, several resolutions at once, a perturbed input.

All draws of a sample are made with its batch, from generators of its own (law 1); what depends on its latents is added
in the training step, which draws nothing. docs/losses.md has the formulas and where they are from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class NoiseOptions:
    """How noise differs from independent normal numbers.

    Args:
        offset: strength of one normal number that a whole channel of a sample is raised by; 0: none.
        has_random_offset: the strength is uniform in [0, offset), anew for each sample.
        offset_by_mean: what a channel's strength grows by, for each unit that its latents' mean is away from 0.
        pyramid_levels: how many coarser and coarser noises are added; 0: none.
        pyramid_discount: each is so many times as strong as the one before.
        perturbation: strength of further noise that the model sees and is not to predict; 0: none.
        has_random_perturbation: the strength is uniform in [0, perturbation), anew for each sample.
    """

    offset: float = 0.0
    has_random_offset: bool = False
    offset_by_mean: float = 0.0
    pyramid_levels: int = 0
    pyramid_discount: float = 0.3
    perturbation: float = 0.0
    has_random_perturbation: bool = False

    def draw(self, shape: tuple[int, int, int], generator: Callable[[str], torch.Generator]) -> "NoiseDraws":
        """Return the draws of one sample of latents (C, h, w), as a batch of one.

        Args:
            generator: a new generator on the CPU for each purpose.
        """
        offset = strength = pyramid = perturbation = None
        if self.offset:
            offset = torch.randn(1, shape[0], 1, 1, generator=generator("noise offset"))
            strength = torch.full((1, 1, 1, 1), self.offset)
            if self.has_random_offset:
                strength *= torch.rand(1, generator=generator("noise offset strength"))
        if self.pyramid_levels:
            pyramid = self._pyramid(shape, generator("noise pyramid"))
        if self.perturbation:
            perturbation = self.perturbation * torch.randn(1, *shape, generator=generator("input perturbation"))
            if self.has_random_perturbation:
                perturbation *= torch.rand(1, generator=generator("input perturbation strength"))
        return NoiseDraws(offset, strength, self.offset_by_mean, pyramid, perturbation)

    def _pyramid(self, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        """Return the sum (1, C, h, w) of noises of lower and lower resolution."""
        channels, height, width = shape
        total = torch.zeros(1, *shape)
        for level in range(self.pyramid_levels):
            factor = (2 + 2 * torch.rand(1, generator=generator).item()) ** level
            size = max(1, int(height / factor)), max(1, int(width / factor))
            coarse = torch.randn(1, channels, *size, generator=generator)
            total += self.pyramid_discount**level * F.interpolate(coarse, (height, width), mode="bilinear")
            if 1 in size:
                break
        return total


@dataclass(frozen=True)
class NoiseDraws:
    """What is added to the noise of a batch's B samples, on the CPU; None: nothing.

    offset: (B, C, 1, 1), standard normal, with its strength (B, 1, 1, 1). pyramid, perturbation: (B, C, h, w).
    """

    offset: Tensor | None
    strength: Tensor | None
    offset_by_mean: float
    pyramid: Tensor | None
    perturbation: Tensor | None

    @staticmethod
    def stack(draws: Sequence["NoiseDraws"]) -> "NoiseDraws":
        """Return the draws of several batches as those of one."""

        def joined(name: str) -> Tensor | None:
            parts = [getattr(one, name) for one in draws]
            return None if parts[0] is None else torch.cat(parts)

        return NoiseDraws(
            joined("offset"), joined("strength"), draws[0].offset_by_mean, joined("pyramid"), joined("perturbation")
        )

    def noise(self, noise: Tensor, x_0: Tensor) -> Tensor:
        """Return the noise (B, C, h, w) that is added to latents x_0 and predicted, from standard normal noise."""
        if self.offset is not None and self.strength is not None:
            means = x_0.mean(dim=(2, 3), keepdim=True).abs()
            strength = (self.strength.to(x_0.device) + self.offset_by_mean * means).clamp_min(0)
            noise = noise + strength * self.offset.to(x_0.device)
        if self.pyramid is not None:
            noise = noise + self.pyramid.to(x_0.device)
            noise = noise / noise.std(dim=(1, 2, 3), keepdim=True)
        return noise

    def input_noise(self, noise: Tensor) -> Tensor:
        """Return the noise that the model sees where it is to predict `noise`."""
        return noise if self.perturbation is None else noise + self.perturbation.to(noise.device)
