"""The schedule against diffusers' DDPMScheduler."""

from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler, rescale_zero_terminal_snr
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr

from lorasmith.diffusion import DENSITIES, Prediction, Timesteps, stable_diffusion_schedule

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


# ---- zero terminal SNR ----------------------------------------------------------------------------------------------


def test_zero_terminal_snr_is_diffusers() -> None:
    ours = stable_diffusion_schedule("v_prediction").with_zero_terminal_snr()
    expected = rescale_zero_terminal_snr(stable_diffusion_schedule("v_prediction").betas.double())
    torch.testing.assert_close(ours.betas, expected.float(), atol=1e-6, rtol=1e-4)
    assert ours.ends_in_noise and not stable_diffusion_schedule("v_prediction").ends_in_noise


def test_with_zero_terminal_snr_the_last_step_is_noise_and_the_first_as_before() -> None:
    before = stable_diffusion_schedule("v_prediction")
    after = before.with_zero_terminal_snr()
    last = torch.full((6,), 999)
    assert torch.equal(after.add_noise(X_0, NOISE, last), NOISE)
    assert torch.equal(after.target(X_0, NOISE, last), -X_0)
    assert after.snr(last).tolist() == [0.0] * 6
    torch.testing.assert_close(after.alpha_bar[0], before.alpha_bar[0])


# ---- which timesteps ------------------------------------------------------------------------------------------------


def drawn(timesteps: Timesteps, seed: int = 1, n: int = 20_000) -> torch.Tensor:
    return timesteps.sample(n, torch.Generator().manual_seed(seed))


def test_a_whole_uniform_range_draws_what_was_always_drawn() -> None:
    expected = torch.randint(1000, (50,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn(Timesteps(), n=50), expected)


@pytest.mark.parametrize("density", ["uniform", *DENSITIES])
def test_timesteps_stay_in_their_range_and_reach_its_ends(density: str) -> None:
    t = drawn(Timesteps(990, 1000, density, 0.5, 3.0))
    assert t.dtype == torch.int64 and (t.min(), t.max()) == (990, 999)


def test_a_normal_logit_is_diffusers_density() -> None:
    t = drawn(Timesteps(0, 1000, "logit_normal", 0.4, 0.7)).double() / 1000
    theirs = compute_density_for_timestep_sampling(
        "logit_normal", 20_000, 0.4, 0.7, generator=torch.Generator().manual_seed(5)
    )
    quantiles = torch.linspace(0.02, 0.98, 25)
    torch.testing.assert_close(t.quantile(quantiles.double()), theirs.quantile(quantiles).double(), atol=0.02, rtol=0)


def test_cosmap_has_its_papers_density() -> None:
    counts = torch.bincount(drawn(Timesteps(0, 1000, "cosmap"), n=100_000) // 100, minlength=10)
    middles = (torch.arange(10) + 0.5) / 10
    density = 2 / (torch.pi - 2 * torch.pi * middles + 2 * torch.pi * middles**2)
    torch.testing.assert_close(counts / 10_000, density, atol=0.05, rtol=0)
