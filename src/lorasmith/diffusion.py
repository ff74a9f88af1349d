"""The forward diffusion process: how noise is added, and what a model is trained to output.

Pure functions of tensors; nothing here owns parameters. The oracle in the tests is diffusers' DDPMScheduler.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction"]


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
        return torch.randint(len(self.betas), (n,), generator=generator, device=generator.device)

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


def stable_diffusion_schedule(prediction: Prediction) -> Discrete:
    """Return the 1000 steps of Stable Diffusion 1 and 2: "scaled linear" betas from 0.00085 to 0.012."""
    return Discrete(torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2, prediction)
