"""The forward diffusion process: how noise is added, and what a model is trained to output.

Pure functions of tensors; nothing here owns parameters. The oracle in the tests is diffusers' DDPMScheduler.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction"]

# u, uniform in [0, 1), to shares of the range of timesteps in [0, 1], which lie more densely in some places; the second
# and third argument are the logit's mean and spread. Stable Diffusion 3 (arXiv:2403.03206), equations 19 and 21.
DENSITIES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "logit_normal": lambda u, mean, spread: torch.sigmoid(mean + spread * torch.special.ndtri(u)),
    "cosmap": lambda u, mean, spread: 1 - 1 / (torch.tan(math.pi / 2 * u) + 1),
}


@dataclass(frozen=True)
class Timesteps:
    """Which timesteps are trained, and how often each.

    Args:
        low, high: low <= t < high.
        density: `uniform`, or one of `DENSITIES`.
        mean, spread: of a normal logit.
    """

    low: int = 0
    high: int = 1000
    density: str = "uniform"
    mean: float = 0.0
    spread: float = 1.0

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Return (n,) timesteps, int64 on the generator's device."""
        if self.density == "uniform":
            return torch.randint(self.low, self.high, (n,), generator=generator, device=generator.device)
        u = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
        shares = DENSITIES[self.density](u, self.mean, self.spread)
        return self.low + (shares * (self.high - self.low)).long().clamp_max(self.high - self.low - 1)


@dataclass(frozen=True, eq=False)
class Discrete:
    """Variance-preserving diffusion in discrete steps (arXiv:2006.11239).

    Args:
        betas: (T,) variances of the steps, fp32.
        prediction: what the model outputs: the noise, or v (arXiv:2202.00512, appendix D).
    """

    betas: Tensor
    prediction: Prediction

    @cached_property
    def alpha_bar(self) -> Tensor:
        """(T,) share of the signal's variance that is left at each timestep."""
        return torch.cumprod(1 - self.betas, dim=0)

    def sample_t(self, n: int, generator: torch.Generator) -> Tensor:
        """Return (n,) timesteps, uniform over 0 .. T-1, int64 on the generator's device."""
        return Timesteps(0, len(self.betas)).sample(n, generator)

    def with_zero_terminal_snr(self) -> "Discrete":
        """Return the schedule whose last timestep is noise alone, as a picture's drawing begins."""
        return replace(self, betas=zero_terminal_snr(self.betas))

    @property
    def ends_in_noise(self) -> bool:
        """Whether nothing of the signal is left at the last timestep."""
        return bool(self.betas[-1] == 1)

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t for clean x_0 (B, ...), standard normal noise (B, ...) and timesteps (B,)."""
        signal, spread = self._scales(x_0, t)
        return signal * x_0 + spread * noise

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the model is to output for x_t, (B, ...)."""
        if self.prediction == "epsilon":
            return noise
        signal, spread = self._scales(x_0, t)
        return signal * noise - spread * x_0

    def snr(self, t: Tensor) -> Tensor:
        """Return the signal-to-noise ratio (B,) at timesteps (B,)."""
        alpha_bar = self.alpha_bar.to(t.device)[t]
        return alpha_bar / (1 - alpha_bar)

    def _scales(self, like: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of signal and noise, each (B, 1, 1, ...) for samples like `like`."""
        alpha_bar = self.alpha_bar.to(like.device)[t].to(like.dtype)
        alpha_bar = alpha_bar.reshape(-1, *[1] * (like.dim() - 1))
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Return betas (T,) whose signal-to-noise ratio is 0 at the last step and as before at the first.

    The square root of alpha_bar is shifted and scaled (arXiv:2305.08891, algorithm 1).
    """
    root = torch.cumprod(1 - betas.double(), dim=0).sqrt()
    alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    alphas = torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return (1 - alphas).to(betas.dtype)


def stable_diffusion_schedule(prediction: Prediction) -> Discrete:
    """Return the 1000 steps of Stable Diffusion 1 and 2: "scaled linear" betas from 0.00085 to 0.012."""
    return Discrete(torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2, prediction)
