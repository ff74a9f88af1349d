"""Per-sample losses against torch's own means."""

import pytest
import torch
import torch.nn.functional as F

from lorasmith.losses import per_sample

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
