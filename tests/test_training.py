"""One step of training: the same update however the global batch is cut, and none at all where the loss breaks."""

import math
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorasmith.data.dataset import Batch
from lorasmith.diffusion import stable_diffusion_schedule
from lorasmith.errors import UserError
from lorasmith.losses import Objective
from lorasmith.models.base import Conditioning, LatentDiffusion
from lorasmith.noise import NoiseDraws
from lorasmith.processes import Processes
from lorasmith.training import STOP_SIGNALS, LossNotFiniteError, Stepper, latents_of, sample_losses, weighted_loss

CHANNELS, SIDE = 4, 3


class Miniature(LatentDiffusion):
    """A denoiser of one convolution, pushed by a text encoder of one number per letter."""

    latent_factor, latent_channels = 8, CHANNELS

    def __init__(self, prediction: str = "epsilon") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.denoiser = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.text_encoder = nn.Linear(2, CHANNELS)
        self.vae = nn.Identity()
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        self.schedule = stable_diffusion_schedule(prediction)  # type: ignore[arg-type]

    def encode_text(self, captions: list[str]) -> Conditioning:
        return {"text": self.text_encoder(torch.tensor([[len(c), c.count("a")] for c in captions]).float())}

    def count_tokens(self, captions: list[str]) -> list[int]:
        return [len(caption) for caption in captions]

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        small = nn.functional.avg_pool2d(pixels, 8)
        mean = torch.cat([small, small.mean(1, keepdim=True)], dim=1)
        return mean, 0.1 + mean.abs()

    def image_encoding(self) -> dict[str, Any]:
        return {}

    def text_encoding(self) -> dict[str, Any]:
        return {}

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3]

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.denoiser(x_t) + cond["text"][:, :, None, None] * (t / 1000)[:, None, None, None]

    def adapter_targets(self) -> dict[str, nn.Module]:
        return {"lora_unet_conv": self.denoiser}

    def adaptable_layers(self) -> dict[str, nn.Module]:
        return self.adapter_targets()


def samples(count: int, *, seed: int = 0, is_cached: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    return Batch(
        latents=normal(CHANNELS, SIDE, SIDE) if is_cached else None,
        pixels=None if is_cached else normal(3, 8 * SIDE, 8 * SIDE).tanh(),
        posterior_noise=normal(CHANNELS, SIDE, SIDE),
        noise=normal(CHANNELS, SIDE, SIDE),
        t=torch.randint(0, 1000, (count,), generator=generator),
        captions=["a cat", "a banana", "", "dog"][:count],
        weight=torch.tensor([1.0, 0.5, 1.0, 2.0])[:count],
        count=count,
    )


def part(batch: Batch, start: int, end: int) -> Batch:
    """Some of the samples; `count` stays that of the whole step."""
    fields = ("latents", "pixels", "posterior_noise", "noise", "t", "captions", "weight")
    values = {name: getattr(batch, name) for name in fields}
    return replace(batch, **{name: value[start:end] for name, value in values.items() if value is not None})


def stepper(
    model: Miniature,
    *,
    lr: float = 0.1,
    max_grad_norm: float = 0.0,
    processes: Processes | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
) -> Stepper:
    groups = [
        {"params": model.denoiser.parameters(), "lr": lr},
        {"params": model.text_encoder.parameters(), "lr": lr / 10},
    ]
    return Stepper(
        model, list(model.parameters()), optimizer(groups), processes or Processes("cpu"), model.encode_text,
        max_grad_norm=max_grad_norm, is_fp16=False,
    )  # fmt: skip


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


def step_of(model: Miniature, batches: Sequence[Batch], multiplier: float = 1.0, **options: float) -> Tensor:
    """The change of all weights that one step makes."""
    before = weights(model)
    stepper(model, **options).step(batches, multiplier, step=0, stop_signal=lambda: None)  # type: ignore[arg-type]
    return weights(model) - before


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_weighted_mean_of_the_samples_errors(prediction: str) -> None:
    model, batch = Miniature(prediction), samples(4)
    assert batch.latents is not None
    alpha_bar = model.schedule.alpha_bar[batch.t].view(-1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * batch.latents + (1 - alpha_bar).sqrt() * batch.noise
    target = batch.noise
    if prediction == "v_prediction":
        target = alpha_bar.sqrt() * batch.noise - (1 - alpha_bar).sqrt() * batch.latents
    errors = (model(x_t, batch.t, model.encode_text(batch.captions)) - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(weighted_loss(model, batch, model.encode_text), (errors * batch.weight).sum() / 4)


def test_kept_samples_have_the_base_models_output_as_target_and_others_the_noise() -> None:
    model, batch = Miniature(), replace(samples(4), keeps_output=torch.tensor([False, True, False, True]))
    base = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    @contextmanager
    def base_alone() -> Iterator[None]:
        trained, model.denoiser = model.denoiser, base
        yield
        model.denoiser = trained

    assert batch.latents is not None
    x_t = model.schedule.add_noise(batch.latents, batch.noise, batch.t)
    target = batch.noise.clone()
    with torch.no_grad(), base_alone():
        output = model(x_t, batch.t, model.encode_text(batch.captions))
    target[1], target[3] = output[1], output[3]
    errors = (model(x_t, batch.t, model.encode_text(batch.captions)) - target).square().mean(dim=(1, 2, 3))
    loss = weighted_loss(model, batch, model.encode_text, Objective(base_alone=base_alone))
    torch.testing.assert_close(loss, (errors * batch.weight).sum() / 4)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_who_shares_the_model_asks_the_base_too_where_only_others_keep_its_output() -> None:
    model, asked = Miniature(), list[str]()
    batch = replace(samples(4), keeps_output=torch.zeros(4, dtype=torch.bool))

    @contextmanager
    def base_alone() -> Iterator[None]:
        asked.append("base")
        yield

    objective = Objective(base_alone=base_alone)
    alone = weighted_loss(model, batch, model.encode_text, objective)
    assert asked == []
    shared = weighted_loss(model, batch, model.encode_text, objective, lambda number: max(number, 3))
    assert asked == ["base"] and torch.equal(shared, alone)


@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 2, 3), (3,)])
def test_a_batch_cut_into_micro_batches_makes_the_same_step(cuts: tuple[int, ...]) -> None:
    batch = samples(4)
    edges = [0, *cuts, 4]
    parts = [part(batch, start, end) for start, end in pairwise(edges)]
    torch.testing.assert_close(step_of(Miniature(), parts), step_of(Miniature(), [batch]))


def test_gradients_of_an_earlier_step_do_not_stay() -> None:
    model = Miniature()
    steps = stepper(model, lr=0.0)
    steps.step([samples(4, seed=1)], 1.0, step=0, stop_signal=lambda: None)
    steps.step([samples(4, seed=2)], 1.0, step=1, stop_signal=lambda: None)
    fresh = Miniature()
    stepper(fresh, lr=0.0).step([samples(4, seed=2)], 1.0, step=0, stop_signal=lambda: None)
    for one, two in zip(model.parameters(), fresh.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None and torch.equal(one.grad, two.grad)


def test_padding_changes_nothing() -> None:
    batch, extra = samples(3), part(samples(4, seed=7), 3, 4)
    padding = replace(extra, weight=torch.zeros(1), count=batch.count)
    assert torch.equal(step_of(Miniature(), [batch, padding]), step_of(Miniature(), [batch]))


@pytest.mark.parametrize("multiplier", [0.0, 0.25, 1.0])
def test_the_schedule_multiplies_every_groups_own_rate(multiplier: float) -> None:
    torch.testing.assert_close(
        step_of(Miniature(), [samples(4)], multiplier), multiplier * step_of(Miniature(), [samples(4)])
    )


def test_multipliers_do_not_pile_up() -> None:
    model = Miniature()
    optimizers: list[torch.optim.Optimizer] = []

    def make(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        optimizers.append(torch.optim.SGD(groups))
        return optimizers[-1]

    steps = stepper(model, optimizer=make)
    for number, multiplier in enumerate((0.5, 0.5, 0.25)):
        steps.step([samples(2)], multiplier, step=number, stop_signal=lambda: None)
        assert [group["lr"] for group in optimizers[0].param_groups] == [0.1 * multiplier, 0.01 * multiplier]


@pytest.mark.parametrize("limit", [1e-2, 1e3])
def test_gradients_are_clipped_together_to_the_limit(limit: float) -> None:
    model, batch = Miniature(), samples(4)
    weighted_loss(model, batch, model.encode_text).backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    factor = min(1.0, limit / float(gradients.norm()))
    clipped, free = step_of(Miniature(), [batch], max_grad_norm=limit), step_of(Miniature(), [batch])
    torch.testing.assert_close(clipped, factor * free, rtol=1e-3, atol=1e-7)


def test_the_loss_told_is_the_mean_over_all_micro_batches() -> None:
    model, batch = Miniature(), samples(4)
    expected = float(weighted_loss(model, batch, model.encode_text).detach())
    result = stepper(model).step([part(batch, 0, 1), part(batch, 1, 4)], 1.0, step=0, stop_signal=lambda: None)
    assert result.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_a_loss_that_breaks_changes_no_weight_and_says_where(broken: float, place: int) -> None:
    model, batches = Miniature(), [part(samples(4), 0, 2), part(samples(4), 2, 4)]
    batches[place] = replace(batches[place], noise=torch.full_like(batches[place].noise, broken))
    steps, before = stepper(model, optimizer=torch.optim.AdamW), weights(model)
    with pytest.raises(LossNotFiniteError, match=r"at step 8; .*--learning-rate") as error:
        steps.step(batches, 1.0, step=7, stop_signal=lambda: None)
    assert isinstance(error.value, UserError)
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("number", [None, signal.SIGINT, signal.SIGTERM])
def test_a_wish_to_stop_comes_back_after_the_step_was_taken(number: int | None) -> None:
    model = Miniature()
    before = weights(model)
    result = stepper(model).step([samples(2)], 1.0, step=0, stop_signal=lambda: number)
    assert result.stop_signal == number
    assert not torch.equal(weights(model), before)


def test_a_wish_to_stop_during_a_step_is_heard_in_that_step() -> None:
    asked: list[int] = []

    class Stopped(Miniature):
        def encode_text(self, captions: list[str]) -> Conditioning:
            asked.append(signal.SIGTERM)
            return super().encode_text(captions)

    result = stepper(Stopped()).step([samples(2)], 1.0, step=0, stop_signal=lambda: asked[0] if asked else None)
    assert result.stop_signal == signal.SIGTERM


class TwoProcesses(Processes):
    """This process and another that sent these numbers: sums are taken with what it has."""

    def __init__(self, gradient: float, *, loss: float = 0.0, stop_signal: int | None = None) -> None:
        super().__init__("cpu")
        self.gradient = gradient
        self.others = [loss, *(float(stop_signal == number) for number in STOP_SIGNALS)]

    def sums(self, values: Sequence[float]) -> list[float]:
        return [own + other for own, other in zip(values, self.others, strict=True)]

    def sum_gradients_(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad += self.gradient


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_losses_gradients_and_wishes_of_other_processes_count(number: int) -> None:
    alone, two = Miniature(), Miniature()
    own = stepper(alone).step([samples(2)], 1.0, step=0, stop_signal=lambda: None)
    steps = stepper(two, processes=TwoProcesses(0.5, loss=0.25, stop_signal=number))
    both = steps.step([samples(2)], 1.0, step=0, stop_signal=lambda: None)
    assert (both.loss, both.stop_signal) == (pytest.approx(own.loss + 0.25), number)
    torch.testing.assert_close(weights(two.denoiser), weights(alone.denoiser) - 0.1 * 0.5)
    torch.testing.assert_close(weights(two.text_encoder), weights(alone.text_encoder) - 0.01 * 0.5)


def test_another_processes_broken_loss_stops_this_one_too() -> None:
    model = Miniature()
    before = weights(model)
    with pytest.raises(LossNotFiniteError):
        stepper(model, processes=TwoProcesses(0.0, loss=math.nan)).step(
            [samples(2)], 1.0, step=0, stop_signal=lambda: None
        )
    assert torch.equal(weights(model), before)


def test_the_global_random_state_is_neither_read_nor_changed() -> None:
    changes = []
    for seed in (1, 2):
        model = Miniature()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        changes.append(step_of(model, [samples(4, is_cached=False)]))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*changes)


def test_uncached_latents_are_the_posterior_at_the_batchs_noise() -> None:
    model, batch = Miniature(), samples(3, is_cached=False)
    assert batch.pixels is not None
    mean, std = model.encode_image(batch.pixels)
    assert torch.equal(latents_of(model, batch), mean + std * batch.posterior_noise)


def test_cached_and_uncached_latents_make_the_same_step() -> None:
    fresh = samples(4, is_cached=False)
    cached = replace(fresh, pixels=None, latents=latents_of(Miniature(), fresh))
    assert torch.equal(step_of(Miniature(), [cached]), step_of(Miniature(), [fresh]))


def test_perturbed_noise_is_seen_and_the_other_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """arXiv:2301.11706, algorithm 1; an offset is part of both."""
    model, batch, seen = Miniature(), samples(3), list[Tensor]()
    offset, strength = torch.ones(3, CHANNELS, 1, 1), torch.full((3, 1, 1, 1), 0.5)
    draws = NoiseDraws(offset, strength, 0.0, None, torch.full_like(batch.noise, 0.25))
    monkeypatch.setattr(Miniature, "forward", lambda self, x_t, t, cond: (seen.append(x_t), torch.zeros_like(x_t))[1])
    losses = sample_losses(model, replace(batch, noise_draws=draws), model.encode_text)
    torch.testing.assert_close(losses, (batch.noise + 0.5).square().flatten(1).mean(dim=1))
    assert batch.latents is not None
    torch.testing.assert_close(seen[0], model.schedule.add_noise(batch.latents, batch.noise + 0.75, batch.t))
