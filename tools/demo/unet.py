"""The U-Net, in two stages on latents: together with a text encoder of its own, then alone on the encoder of `text.py`.

Of the first stage only the U-Net was kept: its text encoder told colors apart too weakly. A stage writes a checkpoint
every 250 steps and goes on from there when it is started again; each step draws from seeds of its own.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recipe
import torch
from encode import Latents
from journal import Journal
from torch import Tensor, nn
from transformers import CLIPTextModel

from lorasmith.checkpoint import atomic_file
from lorasmith.diffusion import stable_diffusion_schedule

BATCH_SIZE = 32
_REPORT_EVERY, _SAVE_EVERY = 50, 250
_HIGH_NOISE = 900  # timesteps from here on are reported apart
_SCHEDULE = stable_diffusion_schedule("epsilon")
_UNET, _TEXT = "u", "t"  # beginnings of the names in a checkpoint

Conditioning = Callable[[Sequence[str]], Tensor]  # captions -> (B, 77, width)


@dataclass(frozen=True)
class Stage:
    """What differs between the two stages.

    Attributes:
        decay_from: the step at which the linear decay of the learning rate begins.
        word, number: what the seeds of pictures and captions, and of noise, are made with.
        grow_every: steps after which another shard of pictures joins; 0: all are there from the start.
        high_noise_from: the step from which timesteps near pure noise, where colors are decided, come more often and
            count more; None: never.
    """

    steps: int
    decay_from: int
    learning_rate: float
    warm_up: int
    word: str
    number: int
    grow_every: int
    high_noise_from: int | None


@dataclass(frozen=True)
class Batch:
    """latents and noise: (B, 4, 16, 16); t: timesteps (B,); captions: B of them."""

    latents: Tensor
    captions: list[str]
    t: Tensor
    noise: Tensor


def first_stage(steps: int, decay_from: int) -> Stage:
    return Stage(
        steps, decay_from, learning_rate=1.2e-3, warm_up=150, word="step", number=13, grow_every=60,
        high_noise_from=None,
    )  # fmt: skip


def second_stage(steps: int, decay_from: int) -> Stage:
    return Stage(
        steps, decay_from, learning_rate=1e-3, warm_up=100, word="second step", number=1000013, grow_every=0,
        high_noise_from=250,
    )  # fmt: skip


def train_with_text(stage: Stage, work: Path, num_shards: int, target: Path, journal: Journal) -> None:
    """Train U-Net and text encoder from the start."""
    torch.manual_seed(0)
    parts = nn.ModuleDict({_UNET: recipe.build_unet(), _TEXT: recipe.build_text_encoder()})
    encoder = parts[_TEXT]
    conditioning = lambda captions: encoder(recipe.tokenize(captions)).last_hidden_state  # noqa: E731
    _train(stage, parts, conditioning, Latents(work), num_shards, target, journal)


def train_alone(
    stage: Stage, before: Path, text: Path, work: Path, num_shards: int, target: Path, journal: Journal
) -> None:
    """Train the U-Net on a text encoder that stays as it is.

    Args:
        before: the checkpoint of the first stage; its moving average is the start.
        text: the text encoder's weights.
    """
    parts = nn.ModuleDict({_UNET: recipe.build_unet()})
    parts.load_state_dict(unet_average(before, prefix=f"{_UNET}."))
    encoder = recipe.build_text_encoder().eval().requires_grad_(False)
    encoder.load_state_dict(torch.load(text))
    _train(stage, parts, _remembering(encoder), Latents(work), num_shards, target, journal)


def unet_average(checkpoint: Path, prefix: str = "") -> dict[str, Tensor]:
    """Return the U-Net's moving average in a checkpoint of either stage, each name with this beginning."""
    start = f"{_UNET}."
    average = torch.load(checkpoint)["ema"]
    return {prefix + name.removeprefix(start): value for name, value in average.items() if name.startswith(start)}


def steps_done(checkpoint: Path) -> int:
    """Return the number of steps in a checkpoint; 0 where there is none."""
    return torch.load(checkpoint, mmap=True)["step"] if checkpoint.exists() else 0


def _train(
    stage: Stage,
    parts: nn.ModuleDict,
    conditioning: Conditioning,
    latents: Latents,
    num_shards: int,
    target: Path,
    journal: Journal,
) -> None:
    optimizer = _make_optimizer(parts)
    weights = dict(parts.named_parameters())
    average = {name: weight.detach().clone() for name, weight in weights.items()}
    start = _resume(target, weights, average, optimizer)
    smooth_loss: float | None = None
    smooth_high: float | None = None
    for step in range(start, stage.steps):
        latents.grow(min(1 + step // stage.grow_every, num_shards) if stage.grow_every else num_shards)
        batch = _draw(stage, step, latents)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step)
        errors = _errors(parts[_UNET], conditioning, batch)
        optimizer.zero_grad()
        (errors * _weights(batch.t, has_high_noise=_has_high_noise(stage, step))).mean().backward()
        norm = nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
        _follow(average, weights, min(0.998, (step + 1) / (step + 10)))
        smooth_loss = _smooth(smooth_loss, errors, 0.02)
        smooth_high = _smooth(smooth_high, errors[batch.t >= _HIGH_NOISE], 0.03)
        if step % _REPORT_EVERY == 0:
            journal.write(
                step=step,
                loss=round(smooth_loss or 0, 4),
                high_noise=round(smooth_high or 0, 5),
                lr=round(learning_rate(stage, step), 6),
                gn=round(norm.item(), 2),
            )
        if (step + 1) % _SAVE_EVERY == 0 or step == stage.steps - 1:
            _save(target, step + 1, weights, average, optimizer)


def learning_rate(stage: Stage, step: int) -> float:
    """Return the rate: linear warm-up, then constant, then linear decay to a two-hundredth."""
    warm_up = min(1, (step + 1) / stage.warm_up)
    if step < stage.decay_from:
        return stage.learning_rate * warm_up
    return stage.learning_rate * warm_up * max(0.005, (stage.steps - step) / (stage.steps - stage.decay_from))


def _smooth(before: float | None, errors: Tensor, share: float) -> float | None:
    """Return the running mean with these errors' mean as its newest share; as it was where there are none."""
    if not len(errors):
        return before
    mean = errors.mean().item()
    return mean if before is None else (1 - share) * before + share * mean


def _remembering(encoder: CLIPTextModel) -> Conditioning:
    """Return the frozen encoder, which encodes each caption once and remembers it in fp16."""
    known: dict[str, Tensor] = {}

    @torch.no_grad()
    def encode(captions: Sequence[str]) -> Tensor:
        for caption in captions:
            if caption not in known:
                known[caption] = encoder(recipe.tokenize([caption])).last_hidden_state.half()
        return torch.cat([known[caption] for caption in captions]).float()

    return encode


def _draw(stage: Stage, step: int, latents: Latents) -> Batch:
    rng = random.Random(f"{stage.word} {step}")
    generator = torch.Generator().manual_seed(step * 7919 + stage.number)
    indices = [rng.randrange(len(latents.labels)) for _ in range(BATCH_SIZE)]
    captions = [recipe.caption(*latents.labels[index], rng) for index in indices]
    clean = latents.draw(indices, generator)
    t = _draw_t(generator, has_high_noise=_has_high_noise(stage, step))
    return Batch(clean, captions, t, torch.randn(clean.shape, generator=generator))


def _has_high_noise(stage: Stage, step: int) -> bool:
    return stage.high_noise_from is not None and step >= stage.high_noise_from


def _draw_t(generator: torch.Generator, *, has_high_noise: bool) -> Tensor:
    """Return timesteps (B,), uniform, or about a third of them from the noisiest fifth."""
    if not has_high_noise:
        return _SCHEDULE.sample_t(BATCH_SIZE, generator)
    is_high = torch.rand(BATCH_SIZE, generator=generator) < 0.35
    high = torch.randint(800, 1000, (BATCH_SIZE,), generator=generator)
    return torch.where(is_high, high, _SCHEDULE.sample_t(BATCH_SIZE, generator))


def _errors(unet: nn.Module, conditioning: Conditioning, batch: Batch) -> Tensor:
    """Return the squared error of the predicted noise, (B,)."""
    cond = conditioning(batch.captions)
    x_t = _SCHEDULE.add_noise(batch.latents, batch.noise, batch.t)
    prediction = unet(x_t, batch.t, encoder_hidden_states=cond).sample
    return ((prediction - batch.noise) ** 2).mean((1, 2, 3))


def _weights(t: Tensor, *, has_high_noise: bool) -> Tensor:
    """Return min-SNR weights with gamma 5 (arXiv:2303.09556), (B,), raised up to eightfold for high noise."""
    snr = _SCHEDULE.snr(t)
    weights = snr.clamp(max=5) / snr
    return weights * snr.pow(-0.5).clamp(1, 8) if has_high_noise else weights


def _make_optimizer(parts: nn.ModuleDict) -> torch.optim.AdamW:
    """Return AdamW that decays matrices, but no token: those that no caption has must stay as they are."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in parts.named_parameters():
        is_kept = parameter.ndim < 2 or "embedding" in name.split(".")[-2]
        (kept if is_kept else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": 0.01},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99))


@torch.no_grad()
def _follow(average: dict[str, Tensor], weights: dict[str, nn.Parameter], decay: float) -> None:
    for name, weight in weights.items():
        average[name].lerp_(weight, 1 - decay)


@torch.no_grad()
def _resume(
    path: Path, weights: dict[str, nn.Parameter], average: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> int:
    """Take up a checkpoint, where there is one, and return the number of steps done."""
    if not path.exists():
        return 0
    state = torch.load(path)
    optimizer.load_state_dict(state["opt"])
    for name, weight in weights.items():
        weight.copy_(state["w"][name])
        average[name].copy_(state["ema"][name])
    return state["step"]


def _save(
    path: Path,
    step: int,
    weights: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    plain = {name: weight.detach() for name, weight in weights.items()}
    with atomic_file(path) as temporary:
        torch.save({"step": step, "opt": optimizer.state_dict(), "ema": average, "w": plain}, temporary)
