"""Learning-rate multipliers against diffusers' schedulers."""

import pytest
import torch
from diffusers.optimization import get_scheduler
from hypothesis import given
from hypothesis import strategies as st

from lorasmith import lr
from lorasmith.errors import UserError

THEIR_NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@pytest.mark.parametrize("name", THEIR_NAMES)
@pytest.mark.parametrize("warmup, total", [(0, 10), (3, 10), (10, 10), (0, 1), (12, 10)])
def test_the_same_as_diffusers_at_every_step(name: str, warmup: int, total: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(THEIR_NAMES[name], optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        ours = lr.multiplier(name, step, warmup_steps=warmup, total_steps=total)
        assert ours == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


@given(st.sampled_from(sorted(THEIR_NAMES)), st.integers(0, 50), st.integers(1, 100), st.integers(0, 300))
def test_always_between_0_and_1(name: str, warmup: int, total: int, step: int) -> None:
    assert 0.0 <= lr.multiplier(name, step, warmup_steps=warmup, total_steps=total) <= 1.0


def test_an_unknown_name_is_answered_with_all() -> None:
    with pytest.raises(UserError, match="'cosin'; there are: constant, linear, cosine"):
        lr.multiplier("cosin", 0, warmup_steps=0, total_steps=10)
