"""The VAE, in two stages and a folding: shapes of all kinds, then the recipe's drawings too, both as 64-pixel pictures
and crops; then the latents' scale goes into the weights, so that Stable Diffusion's own 0.18215 makes it 1.
"""

import copy
import math
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recipe
import shapes
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from draw import COLORS, SIZE, THINGS, draw
from journal import Journal
from PIL import Image
from torch import Tensor, nn

from lorasmith.checkpoint import atomic_file
from lorasmith.models.sd import LATENT_SCALE

BATCH_SIZE = 16
_CROP = 64  # pixels
_REPORT_EVERY, _AVERAGE_EVERY = 250, 4
_KL_WEIGHT = 1e-4
_MEAN, _LOG_VARIANCE = slice(0, 4), slice(4, 8)  # channels


@dataclass(frozen=True)
class Stage:
    """What differs between the two stages.

    Attributes:
        learning_rate, average_decay: by the step.
        noisy_from: the step from which latents are drawn from the posterior, and the posterior is held to the normal
            distribution; before, the mean alone is decoded.
        pictures: a step's batch.
        probe: pictures that are only looked at, for the log.
    """

    steps: int
    learning_rate: Callable[[int], float]
    average_decay: Callable[[int], float]
    noisy_from: int
    pictures: Callable[[int], list[Image.Image]]
    probe: Callable[[], list[Image.Image]]


def first_stage(steps: int) -> Stage:
    """Return the stage on shapes; the cosine is of 6500 steps, of which the shipped model was given 2001."""
    return Stage(
        steps=steps,
        learning_rate=lambda step: 1e-3 * min(1, step / 200) * (_cosine(step, 6500) + 0.02),
        average_decay=lambda step: min(0.999, (step + 1) / (step + 10)),
        noisy_from=301,
        pictures=_shapes,
        probe=lambda: _some_shapes(random.Random(999), 24),
    )


def second_stage(steps: int) -> Stage:
    """Return the stage on drawings and shapes, five to three."""
    return Stage(
        steps=steps,
        learning_rate=lambda step: 8e-4 * (_cosine(step, steps) + 0.005),
        average_decay=lambda step: 0.995,
        noisy_from=0,
        pictures=_drawings_and_shapes,
        probe=_probe_with_drawings,
    )


def start() -> AutoencoderKL:
    """Return the untrained VAE: its channel-changing convolutions begin near the identity and its posterior narrow.
    With the usual start it stalls on grey pictures.
    """
    torch.manual_seed(0)
    vae = recipe.build_vae()
    with torch.no_grad():
        for name, module in vae.named_modules():
            changes_channels = name.endswith(("conv_in", "quant_conv", "conv_shortcut")) or "sampler" in name
            if isinstance(module, nn.Conv2d) and changes_channels:
                module.weight.mul_(0.3).add_(_identity_like(module.weight))
        to_posterior: Any = vae.quant_conv
        to_posterior.bias[_LOG_VARIANCE] = -5
        to_posterior.weight[_LOG_VARIANCE].mul_(0.1)
    return vae


def train(stage: Stage, before: Path | None, after: Path, journal: Journal) -> None:
    """Run a stage and write weights, their moving average and the optimizer.

    Args:
        before: the stage to go on from; None: from the start.
    """
    vae = start()
    average = copy.deepcopy(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0, betas=(0.9, 0.99))
    if before is not None:
        state = torch.load(before)
        vae.load_state_dict(state["vae"])
        average.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["opt"])
    probe = recipe.to_pixels(stage.probe())
    l1 = 0.0
    with ThreadPoolExecutor(1) as pool:  # draws the next batch meanwhile
        upcoming = pool.submit(stage.pictures, 0)
        for step in range(stage.steps):
            pixels = recipe.to_pixels(upcoming.result())
            upcoming = pool.submit(stage.pictures, step + 1)
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate(step)
            error = _optimize(vae, optimizer, pixels, is_noisy=step >= stage.noisy_from)
            l1 = 0.98 * l1 + 0.02 * error
            if step % _AVERAGE_EVERY == 0:
                _follow(average, vae, stage.average_decay(step) ** _AVERAGE_EVERY)
            if step % _REPORT_EVERY == 0 or step == stage.steps - 1:
                journal.write(step=step, l1=l1 / (1 - 0.98 ** (step + 1)), **_inspect(average, probe))
    with atomic_file(after) as temporary:
        torch.save({"vae": vae.state_dict(), "ema": average.state_dict(), "opt": optimizer.state_dict()}, temporary)


@torch.no_grad()
def fold(before: Path, after: Path, journal: Journal) -> None:
    """Write the average's weights, scaled so that the drawings' latents times 0.18215 have a deviation of 1."""
    vae = recipe.build_vae().eval()
    vae.load_state_dict(torch.load(before)["ema"])
    pixels = recipe.to_pixels([recipe.sample(index)[1] for index in range(64)])
    factor = 1 / (_posterior(vae, pixels).mean.std().item() * LATENT_SCALE)
    to_posterior: Any = vae.quant_conv
    to_posterior.weight[_MEAN] *= factor
    to_posterior.bias[_MEAN] *= factor
    to_posterior.bias[_LOG_VARIANCE] += 2 * math.log(factor)
    from_latents: Any = vae.post_quant_conv
    from_latents.weight /= factor
    journal.write(factor=factor, **_inspect(vae, pixels))
    with atomic_file(after) as temporary:
        torch.save(vae.state_dict(), temporary)


def _optimize(vae: AutoencoderKL, optimizer: torch.optim.Optimizer, pixels: Tensor, *, is_noisy: bool) -> float:
    """Do one step and return the mean absolute error."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = _posterior(vae, pixels)
        latents = posterior.mean
        if is_noisy:
            latents = latents + posterior.std * torch.randn_like(posterior.mean)
        output = _decode(vae, latents)
    output = output.float()
    l1 = (output - pixels).abs().mean()
    edges = _edge_error(output, pixels)
    squared = ((output - pixels) ** 2).mean()
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    loss = l1 + squared + 0.5 * edges + _KL_WEIGHT * kl * is_noisy
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()
    return l1.item()


def _edge_error(output: Tensor, pixels: Tensor) -> Tensor:
    """Return how far the differences of neighbouring pixels are off."""
    (across, down), (wanted_across, wanted_down) = _edges(output), _edges(pixels)
    return (across - wanted_across).abs().mean() + (down - wanted_down).abs().mean()


def _edges(pixels: Tensor) -> tuple[Tensor, Tensor]:
    return pixels[..., 1:] - pixels[..., :-1], pixels[..., 1:, :] - pixels[..., :-1, :]


@torch.no_grad()
def _follow(average: AutoencoderKL, vae: AutoencoderKL, decay: float) -> None:
    for mean, weight in zip(average.state_dict().values(), vae.state_dict().values(), strict=True):
        mean.lerp_(weight, 1 - decay)


@torch.no_grad()
def _inspect(vae: AutoencoderKL, pixels: Tensor) -> dict[str, float]:
    """Return the peak signal-to-noise ratio in dB of what comes back, and the latents' deviations."""
    posterior = _posterior(vae, pixels)
    output = _decode(vae, posterior.mean).clamp(-1, 1)
    ratio = 10 * torch.log10(4 / ((output - pixels) ** 2).mean((1, 2, 3))).mean()
    return {
        "psnr": round(ratio.item(), 2),
        "zstd": posterior.mean.std().item(),
        "post_std": posterior.std.mean().item(),
    }


def _posterior(vae: AutoencoderKL, pixels: Tensor) -> DiagonalGaussianDistribution:
    return vae.encode(pixels).latent_dist  # pyright: ignore[reportAttributeAccessIssue]


def _decode(vae: AutoencoderKL, latents: Any) -> Tensor:
    return vae.decode(latents).sample  # pyright: ignore[reportAttributeAccessIssue]


def _identity_like(weight: Tensor) -> Tensor:
    """Return a convolution's weight (out, in, k, k) that hands each channel on, in turn where there are fewer."""
    identity = torch.zeros_like(weight)
    center = weight.shape[2] // 2
    for channel in range(weight.shape[0]):
        identity[channel, channel % weight.shape[1], center, center] = 1
    return identity


def _cosine(step: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def _shapes(step: int) -> list[Image.Image]:
    return _some_shapes(random.Random(1000003 * step + 7), BATCH_SIZE, _CROP)


def _some_shapes(rng: random.Random, number: int, size: int = SIZE) -> list[Image.Image]:
    return [shapes.picture(rng, size) for _ in range(number)]


def _drawings_and_shapes(step: int) -> list[Image.Image]:
    rng = random.Random(1000003 * (step + 50000) + 7)
    return [_crop_of_a_drawing(rng) if k % 8 < 5 else shapes.picture(rng, _CROP) for k in range(BATCH_SIZE)]


def _crop_of_a_drawing(rng: random.Random) -> Image.Image:
    """Return a part of any thing in any two colors: the VAE reads no captions, so nothing is held out from it."""
    color, ground = rng.sample(list(COLORS), 2)
    picture = draw(rng.choice(list(THINGS)), color, ground, rng)
    x, y = rng.randint(0, SIZE - _CROP), rng.randint(0, SIZE - _CROP)
    return picture.crop((x, y, x + _CROP, y + _CROP))


def _probe_with_drawings() -> list[Image.Image]:
    rng = random.Random(999)
    pictures = _some_shapes(rng, 12)
    for thing in list(THINGS)[:12]:
        color, ground = rng.sample(list(COLORS), 2)
        pictures.append(draw(thing, color, ground, rng))
    return pictures
