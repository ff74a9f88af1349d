"""Per-sample losses against torch's own means."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.losses import mask_factors, per_sample

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
