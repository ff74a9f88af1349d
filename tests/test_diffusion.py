"""The schedule against diffusers' DDPMScheduler."""

from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import compute_snr

from lorasmith.diffusion import Prediction, stable_diffusion_schedule

T = torch.tensor([0, 1, 17, 500, 998, 999])
X_0, NOISE = torch.randn(2, 6, 4, 8, 6, generator=torch.Generator().manual_seed(0))


def theirs(prediction: str) -> Any:
    make: Any = DDPMScheduler
    return make(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noising_target_and_snr_are_diffusers(prediction: Prediction) -> None:
    ours, oracle = stable_diffusion_schedule(prediction), theirs(prediction)
    assert torch.equal(ours.betas, oracle.betas)
    torch.testing.assert_close(ours.add_noise(X_0, NOISE, T), oracle.add_noise(X_0, NOISE, T))
    target = NOISE if prediction == "epsilon" else oracle.get_velocity(X_0, NOISE, T)
    torch.testing.assert_close(ours.target(X_0, NOISE, T), target)
    torch.testing.assert_close(ours.snr(T), compute_snr(oracle, T))


def test_v_and_x_t_together_give_back_the_sample() -> None:
    schedule = stable_diffusion_schedule("v_prediction")
    x_t, v = schedule.add_noise(X_0, NOISE, T), schedule.target(X_0, NOISE, T)
    alpha_bar = schedule.alpha_bar[T].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * v, X_0, atol=1e-5, rtol=1e-5)


def test_timesteps_are_drawn_from_the_generator_alone_and_cover_all_evenly() -> None:
    schedule = stable_diffusion_schedule("epsilon")
    first, again, other = (schedule.sample_t(20_000, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.min() == 0 and first.max() == 999
    quarters = torch.bincount(first // 250, minlength=4)
    assert ((quarters - 5000).abs() < 400).all()
