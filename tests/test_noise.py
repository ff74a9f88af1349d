"""Noise against formulas written place by place, and against what it is when nothing is changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lorasmith.noise import NoiseDraws, NoiseOptions
from lorasmith.seeds import derive

SHAPE = (4, 12, 9)
NOISE, X_0 = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(0))
X_0 = X_0 + torch.tensor([0.0, 1.0, -2.0, 5.0]).view(1, 4, 1, 1)


def generators(sample: int) -> Callable[[str], torch.Generator]:
    return lambda purpose: torch.Generator().manual_seed(derive(1, purpose, sample))


def drawn(count: int = 3, **options: Any) -> NoiseDraws:
    return NoiseDraws.stack([NoiseOptions(**options).draw(SHAPE, generators(i)) for i in range(count)])


def test_an_offset_raises_whole_channels() -> None:
    draws = drawn(offset=0.2)
    assert draws.offset is not None
    expected = torch.empty_like(NOISE)
    for i in range(3):
        for c in range(4):
            expected[i, c] = NOISE[i, c] + 0.2 * draws.offset[i, c]
    torch.testing.assert_close(draws.noise(NOISE, X_0), expected)
    assert torch.equal(draws.noise(NOISE, X_0), draws.noise(NOISE, 0 * X_0))


def test_an_adaptive_offset_grows_with_the_mean_of_the_channels_latents_and_never_turns_round() -> None:
    for by_mean in (0.5, -0.1):
        draws = drawn(offset=0.2, offset_by_mean=by_mean)
        assert draws.offset is not None
        found = draws.noise(NOISE, X_0) - NOISE
        for i in range(3):
            for c in range(4):
                strength = max(0.0, 0.2 + by_mean * abs(X_0[i, c].mean().item()))
                torch.testing.assert_close(
                    found[i, c], (strength * draws.offset[i, c]).expand(12, 9), atol=1e-5, rtol=0
                )
    assert torch.equal(found[:, 3], torch.zeros(3, 12, 9))  # 0.2 - 0.1 * 5 is below 0


def test_an_offset_is_standard_normal_and_a_random_strength_uniform() -> None:
    draws = drawn(2000, offset=0.2, has_random_offset=True)
    assert draws.offset is not None and draws.strength is not None
    assert abs(draws.offset.mean()) < 0.05 and abs(draws.offset.std() - 1) < 0.05
    counts = torch.histc(draws.strength, 4, 0, 0.2)
    assert counts.sum() == 2000 and ((counts - 500).abs() < 80).all()


def test_a_pyramid_is_made_level_by_level() -> None:
    levels, discount = 5, 0.6
    found = drawn(1, pyramid_levels=levels, pyramid_discount=discount).noise(NOISE[:1], X_0[:1])
    generator = generators(0)("noise pyramid")
    total, num_levels = NOISE[:1].clone(), 0
    for level in range(levels):
        r = torch.rand(1, generator=generator).item() * 2 + 2
        height, width = max(1, int(12 / r**level)), max(1, int(9 / r**level))
        coarse = torch.randn(1, 4, height, width, generator=generator)
        total += torch.nn.Upsample((12, 9), mode="bilinear")(coarse) * discount**level
        num_levels += 1
        if height == 1 or width == 1:
            break
    assert num_levels == 3  # 12 x 9 is a single place wide after two to three divisions
    torch.testing.assert_close(found, total / total.std())


def test_a_pyramid_has_more_of_what_is_coarse_and_the_same_variance() -> None:
    noise = torch.randn(400, *SHAPE, generator=torch.Generator().manual_seed(3))
    pyramid = drawn(400, pyramid_levels=4, pyramid_discount=0.8).noise(noise, 0 * noise)
    torch.testing.assert_close(pyramid.std(dim=(1, 2, 3)), torch.ones(400))
    coarse = [F.avg_pool2d(x, 3).var() for x in (noise, pyramid)]
    assert coarse[1] > 2 * coarse[0]


def test_a_perturbed_input_leaves_what_is_predicted_alone() -> None:
    draws = drawn(1000, perturbation=0.1)
    noise = torch.randn(1000, *SHAPE, generator=torch.Generator().manual_seed(3))
    assert draws.noise(noise, 0 * noise) is noise
    difference = draws.input_noise(noise) - noise
    assert difference.std().item() == pytest.approx(0.1, rel=0.01)
    strengths = (drawn(1000, perturbation=0.1, has_random_perturbation=True).input_noise(noise) - noise).std((1, 2, 3))
    assert strengths.min() < 0.01 and strengths.max() > 0.09 and abs(strengths.mean() - 0.05) < 0.003


ALL = {"offset": 0.1, "has_random_offset": True, "offset_by_mean": 0.3, "pyramid_levels": 6, "perturbation": 0.1,
       "has_random_perturbation": True}  # fmt: skip


def test_a_sample_is_the_same_in_every_company() -> None:
    together = drawn(**ALL)
    noise = together.noise(NOISE, X_0)
    for i in range(3):
        alone = NoiseOptions(**ALL).draw(SHAPE, generators(i))
        mine = alone.noise(NOISE[i : i + 1], X_0[i : i + 1])
        assert torch.equal(mine, noise[i : i + 1])
        assert torch.equal(alone.input_noise(mine), together.input_noise(noise)[i : i + 1])


def test_without_options_noise_is_untouched() -> None:
    draws = drawn()
    assert draws.noise(NOISE, X_0) is NOISE and draws.input_noise(NOISE) is NOISE
