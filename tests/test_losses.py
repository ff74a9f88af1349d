"""Per-sample losses against torch's own means, and what samples count against formulas in Python's numbers."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.diffusion import Prediction, stable_diffusion_schedule
from lorasmith.losses import Objective, mask_factors, per_sample

ORACLES = {"l2": F.mse_loss, "l1": F.l1_loss}


def make_pair(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 4, 6, 5, generator=generator).to(dtype)
    return prediction, target


@pytest.mark.parametrize("kind", ORACLES)
def test_each_sample_is_torchs_mean_over_it(kind: str) -> None:
    prediction, target = make_pair()
    losses = per_sample(prediction, target, kind=kind)
    assert losses.shape == (3,)
    for i in range(3):
        torch.testing.assert_close(losses[i], ORACLES[kind](prediction[i], target[i]))


def test_a_mask_weighs_and_the_mean_stays_over_all_elements() -> None:
    prediction, target = make_pair()
    mask = torch.zeros(3, 1, 6, 5)
    mask[:, :, :3] = 1
    half = ((prediction - target)[:, :, :3] ** 2).flatten(1).sum(dim=1) / (4 * 6 * 5)
    torch.testing.assert_close(per_sample(prediction, target, mask), half)
    torch.testing.assert_close(per_sample(prediction, target, torch.ones(3, 1, 6, 5)), per_sample(prediction, target))


def test_low_precision_is_summed_in_fp32() -> None:
    prediction, target = make_pair(torch.bfloat16)
    losses = per_sample(prediction, target)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, per_sample(prediction.float(), target.float()), atol=0, rtol=0)


def some_masks(seed: int) -> torch.Tensor:
    """Soft masks (3, 1, 6, 5) with black places, of very different areas."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(3, 1, 6, 5, generator=generator)
    limits = torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1, 1)
    return torch.where(masks > limits, masks, 0.0)


@given(st.integers(0, 500), st.floats(0, 1), st.booleans(), st.sampled_from(["l2", "l1"]))
def test_a_masked_loss_is_the_weighted_mean_place_by_place(
    seed: int, background: float, by_area: bool, kind: str
) -> None:
    prediction, target = make_pair(torch.float64)
    masks = some_masks(seed)
    found = per_sample(prediction, target, mask_factors(masks, background=background, by_area=by_area), kind)
    for i in range(3):
        total = weights = 0.0
        for c in range(4):
            for y in range(6):
                for x in range(5):
                    m = float(masks[i, 0, y, x])
                    weight = m * 1.0 + (1.0 - m) * background
                    difference = float(prediction[i, c, y, x] - target[i, c, y, x])
                    total += weight * (difference**2 if kind == "l2" else abs(difference))
                    weights += weight
        expected = total / weights if by_area and weights else total / (4 * 6 * 5)
        assert float(found[i]) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def gradient(masks: torch.Tensor | None, *, background: float = 0.0, by_area: bool = True) -> torch.Tensor:
    prediction, target = make_pair()
    prediction.requires_grad_()
    factors = None if masks is None else mask_factors(masks, background=background, by_area=by_area)
    (result,) = torch.autograd.grad(per_sample(prediction, target, factors).sum(), prediction)
    return result


@pytest.mark.parametrize("by_area", [False, True])
def test_nothing_is_learned_outside_a_mask(by_area: bool) -> None:
    masks = some_masks(1)
    found = gradient(masks, by_area=by_area)
    inside = (masks > 0).expand_as(found)
    assert (found[~inside] == 0).all() and (found[inside] != 0).all()
    assert (gradient(masks, background=0.1, by_area=by_area) != 0).all()


@pytest.mark.parametrize("by_area", [False, True])
@pytest.mark.parametrize("background", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(6, 5), (64, 64), (96, 57)])
def test_a_white_mask_changes_no_bit(background: float, by_area: bool, shape: tuple[int, int]) -> None:
    prediction, target = torch.randn(2, 2, 4, *shape, generator=torch.Generator().manual_seed(0))
    factors = mask_factors(torch.ones(2, 1, *shape), background=background, by_area=by_area)
    assert torch.equal(per_sample(prediction, target, factors), per_sample(prediction, target))
    if shape == (6, 5):
        assert torch.equal(gradient(torch.ones(3, 1, 6, 5), background=background, by_area=by_area), gradient(None))


def test_by_area_the_black_around_does_not_matter_and_over_all_it_does() -> None:
    prediction, target = make_pair()
    masks = some_masks(2)
    around = (7, 2, 0, 9)  # left, right, top, bottom
    wide = [F.pad(tensor, around, value=5.0 * sign) for tensor, sign in ((prediction, 1), (target, -1))]
    wide_masks = F.pad(masks, around)

    def loss(pair: list[torch.Tensor], own: torch.Tensor, by_area: bool) -> torch.Tensor:
        return per_sample(pair[0], pair[1], mask_factors(own, background=0.0, by_area=by_area))

    torch.testing.assert_close(loss(wide, wide_masks, True), loss([prediction, target], masks, True))
    share = 6 * 5 / (15 * 14)
    torch.testing.assert_close(loss(wide, wide_masks, False), share * loss([prediction, target], masks, False))


def test_a_black_mask_teaches_nothing_and_breaks_nothing() -> None:
    masks = some_masks(3)
    masks[1] = 0
    found = gradient(masks)
    assert (found[1] == 0).all() and found.isfinite().all()
    assert torch.equal(found[0], gradient(some_masks(3))[0])


# ---- what a sample counts at its timestep ---------------------------------------------------------------------------


def number_of(losses: torch.Tensor) -> list[float]:
    return losses.double().tolist()


def snr_by_hand(t: int, *, is_zero_terminal: bool) -> float:
    """The ratio of the variances of signal and noise from the betas, in Python's numbers."""
    roots, alpha_bar = [], 1.0
    for i in range(1000):
        alpha_bar *= 1 - (0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2
        roots.append(alpha_bar**0.5)
    root = roots[t]
    if is_zero_terminal:
        root = (root - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    return root**2 / (1 - root**2)


WEIGHT_BY_HAND: dict[tuple[str, str], Callable[[float, float], float]] = {
    ("min_snr_gamma", "epsilon"): lambda snr, gamma: min(snr, gamma) / snr if snr else 1.0,
    ("min_snr_gamma", "v_prediction"): lambda snr, gamma: min(snr, gamma) / (snr + 1),
    ("debiased_estimation", "epsilon"): lambda snr, _: 1 / min(snr, 1000) ** 0.5,
    ("debiased_estimation", "v_prediction"): lambda snr, _: 1 / (min(snr, 1000) + 1),
    ("scale_v_pred_loss", "v_prediction"): lambda snr, _: min(snr, 1000) / (min(snr, 1000) + 1),
    ("v_pred_like_loss", "epsilon"): lambda snr, share: 1 + share * (min(snr, 1000) + 1) / min(snr, 1000),
}


@pytest.mark.parametrize("is_zero_terminal", [False, True])
@pytest.mark.parametrize(("name", "prediction"), WEIGHT_BY_HAND)
def test_a_weighting_is_its_formula_of_the_ratio(name: str, prediction: Prediction, is_zero_terminal: bool) -> None:
    """With zero terminal SNR the ratio is that of the corrected betas, 0 at the last timestep."""
    if is_zero_terminal and prediction == "epsilon":
        return
    schedule = stable_diffusion_schedule(prediction)
    schedule = schedule.with_zero_terminal_snr() if is_zero_terminal else schedule
    guess, target = make_pair()
    t = torch.tensor([3, 400, 999])
    found = Objective(weightings={name: 1.7}).losses(schedule, guess, target, t)
    factors = [WEIGHT_BY_HAND[name, prediction](snr_by_hand(int(i), is_zero_terminal=is_zero_terminal), 1.7) for i in t]
    expected = [a * b for a, b in zip(factors, number_of(per_sample(guess, target)), strict=True)]
    assert number_of(found) == pytest.approx(expected, rel=2e-3)  # the ratio of betas in fp32
    assert found.isfinite().all()


def test_several_weightings_are_multiplied_and_none_changes_no_bit() -> None:
    schedule, t, pair = stable_diffusion_schedule("epsilon"), torch.tensor([3, 400, 999]), make_pair()
    plain = per_sample(*pair)
    one, other = ({"min_snr_gamma": 5.0}, {"debiased_estimation": 1.0})
    both = Objective(weightings={**one, **other}).losses(schedule, *pair, t)
    single = [Objective(weightings=w).losses(schedule, *pair, t) / plain for w in (one, other)]
    torch.testing.assert_close(both, plain * single[0] * single[1])
    assert torch.equal(Objective().losses(schedule, *pair, t), plain)


def test_a_scaled_v_loss_is_the_loss_of_the_noise() -> None:
    """|v' - v|^2 = |eps' - eps|^2 (snr + 1) / snr, where both predictions mean the same picture."""
    v, epsilon = stable_diffusion_schedule("v_prediction"), stable_diffusion_schedule("epsilon")
    t = torch.tensor([100, 400, 900])
    noise, x_0 = make_pair()
    guess = noise + 0.1
    x_t = v.add_noise(x_0, noise, t)
    a = v.alpha_bar[t].view(-1, 1, 1, 1)
    guessed_v = (guess - (1 - a).sqrt() * x_t) / a.sqrt()
    found = Objective(weightings={"scale_v_pred_loss": 1.0}).losses(v, guessed_v, v.target(x_0, noise, t), t)
    torch.testing.assert_close(found, Objective().losses(epsilon, guess, noise, t), rtol=1e-3, atol=1e-6)


# ---- huber and smooth_l1 --------------------------------------------------------------------------------------------


def threshold_by_hand(schedule: str, t: int, c: float, scale: float) -> float:
    if schedule == "constant":
        return c * scale
    if schedule == "exponential":
        return math.exp(math.log(c) * t / 1000) * scale
    sigma = snr_by_hand(t, is_zero_terminal=False) ** -0.5
    return (1 - c) / (1 + sigma) ** 2 + c


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_pseudo_huber_is_its_formula_place_by_place(kind: str, schedule: str) -> None:
    guess, target = make_pair()
    t = torch.tensor([3, 400, 999])
    found = Objective(kind, 0.2, 1.5, schedule).losses(stable_diffusion_schedule("epsilon"), guess, target, t)
    for i in range(3):
        c = threshold_by_hand(schedule, int(t[i]), 0.2, 1.5)
        differences = (guess[i] - target[i]).double().flatten().tolist()
        errors = [2 * ((d * d + c * c) ** 0.5 - c) * (c if kind == "huber" else 1) for d in differences]
        assert float(found[i]) == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_huber_is_squares_for_small_and_twice_c_the_distance_for_large_differences() -> None:
    zero = torch.zeros(2, 1, 1, 1)
    small, large = (torch.full((2, 1, 1, 1), d) for d in (1e-6, 1e4))
    c = torch.tensor([0.1, 0.5])
    torch.testing.assert_close(per_sample(small, zero, None, "huber", c), torch.full((2,), 1e-12), rtol=1e-3, atol=0)
    torch.testing.assert_close(per_sample(large, zero, None, "huber", c), 2e4 * c, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_a_perfect_guess_has_no_gradient(kind: str) -> None:
    target, _ = make_pair()
    guess = target.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(per_sample(guess, target, None, kind, torch.full((3,), 0.1)).sum(), guess)
    assert torch.count_nonzero(gradient) == 0
