"""Train the judge of the demo's pictures (`lorasmith.demo.judge`) to be harder to please than an eye.

    python tools/demo/judge.py

Its pictures are drawn, and half of them have been through the embedded model's autoencoder, as a generated picture
has. Each is moved, mildly warped and blurred. "Nothing of these" is taught with things torn by strong warps, two things
mixed, blobs, empty grounds and heavy blur. Prints a JSON line for each report; writes
`src/lorasmith/demo/judge.safetensors`.
"""

import argparse
import json
import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from draw import COLORS, SIZE, THINGS, background, draw, jitter
from mascot import POSES, draw_mascot
from PIL import Image, ImageDraw
from torch import Tensor

from lorasmith.checkpoint import open_checkpoint, write_safetensors
from lorasmith.demo import FOLDER, MASCOT
from lorasmith.demo.judge import ANSWERS, MIN_CONFIDENCE, Judge, to_pixels
from lorasmith.model_families import load

_NOTHING = len(ANSWERS) - 1
_MASCOT_SHARE, _BLOB_SHARE = 1 / 14, 1 / 14


def picture(rng: random.Random) -> tuple[Image.Image, int]:
    """Draw one picture; return it with the number of its answer."""
    color, ground = rng.sample(list(COLORS), 2)
    share = rng.random()
    if share < _MASCOT_SHARE:
        return draw_mascot(rng.choice(list(COLORS)), rng.choice(list(POSES)), rng), ANSWERS.index(MASCOT)
    if share < _MASCOT_SHARE + _BLOB_SHARE:
        return blob(color, ground, rng), _NOTHING
    thing = rng.choice(list(THINGS))
    return draw(thing, color, ground, rng), ANSWERS.index(thing)


def blob(color: str, ground: str, rng: random.Random) -> Image.Image:
    """Return a ground with one to three smooth shapes that are nothing, or with none at all."""
    image = background(jitter(COLORS[ground], rng), rng)
    pen, side = ImageDraw.Draw(image), image.width
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        x, y, radius = (rng.uniform(0.3, 0.7) * side, rng.uniform(0.3, 0.7) * side, rng.uniform(0.08, 0.35) * side)
        waves = [(rng.randint(2, 6), rng.uniform(0, 0.22), rng.uniform(0, 7)) for _ in range(3)]
        stretch = rng.uniform(0.5, 1.0)
        points = []
        for i in range(72):
            angle = 2 * math.pi * i / 72
            r = radius * (1 + sum(size * math.sin(n * angle + phase) for n, size, phase in waves))
            points.append((x + r * math.cos(angle), y + stretch * r * math.sin(angle)))
        pen.polygon(points, fill=jitter(COLORS[rng.choice((color, color, rng.choice(list(COLORS))))], rng, 20))
    return image.reduce(side // SIZE)


@torch.no_grad()
def autoencoded(pictures: list[Image.Image], model_path: Path) -> list[Image.Image]:
    """Send the pictures through the embedded model's autoencoder."""
    with open_checkpoint(model_path) as checkpoint:
        model = load(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    results = []
    for start in range(0, len(pictures), 16):
        batch = [np.asarray(image) for image in pictures[start : start + 16]]
        pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float() / 127.5 - 1
        decoded = model.decode(model.encode_image(pixels)[0]).clamp(-1, 1)
        results += [Image.fromarray(p) for p in ((decoded + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()]
    return results


def warp(pixels: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Move, turn, scale and bend the pictures (B, 3, H, W); `strength` (B,) is the bend in half picture widths."""
    num = len(pixels)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(num, generator=generator)

    angle, scale = uniform(-0.12, 0.12), uniform(0.88, 1.15)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift = torch.stack([uniform(-0.08, 0.08), uniform(-0.08, 0.08)], 1)
    affine = torch.cat([torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1), shift[..., None]], 2)
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    coarse = torch.rand(num, 2, 5, 5, generator=generator) * 2 - 1
    bend = F.interpolate(coarse, size=pixels.shape[-2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    return F.grid_sample(
        pixels, grid + strength[:, None, None, None] * bend, padding_mode="reflection", align_corners=False
    )


def blur(pixels: Tensor, sigma: float) -> Tensor:
    """Blur with a Gaussian of `sigma` pixels."""
    if sigma < 0.2:
        return pixels
    reach = math.ceil(3 * sigma)
    line = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * sigma**2))
    line = (line / line.sum()).expand(3, 1, -1)
    padded = F.pad(pixels, (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, line[:, :, None], groups=3), line[..., None], groups=3)


def batch(pixels: Tensor, answers: Tensor, step: int, size: int) -> tuple[Tensor, Tensor]:
    """Return one batch (size, 3, 64, 64) with its answers; about a quarter of the things are spoilt into nothing."""
    generator, rng = torch.Generator().manual_seed(step), random.Random(f"judge {step}")
    pick = torch.randint(0, len(pixels), (size,), generator=generator)
    x, y = pixels[pick].clone(), answers[pick].clone()
    fate = torch.rand(size, generator=generator)
    is_torn, is_mixed = fate < 0.12, (fate >= 0.12) & (fate < 0.20)
    strength = torch.where(is_torn, 0.35 + 0.3 * fate / 0.12, 0.07 * torch.rand(size, generator=generator))
    x = warp(x, strength, generator)
    other = x.roll(1, 0)
    is_left = (torch.arange(x.shape[-1]) < x.shape[-1] * (0.4 + 0.2 * rng.random())).expand(x.shape[-2], -1)
    if rng.random() < 0.5:
        is_left = is_left.T
    mixes = torch.where(is_left, x, other)
    is_mixed &= y != y.roll(1)
    x[is_mixed] = mixes[is_mixed]
    is_melted = (fate >= 0.20) & (fate < 0.24)
    x = blur(x, rng.uniform(0, 1.0))
    x[is_melted] = blur(x[is_melted], rng.uniform(5, 8))
    y[is_torn | is_mixed | is_melted] = _NOTHING
    x = x + torch.randn(x.shape, generator=generator) * rng.uniform(0, 0.04)
    return x.clamp(-1, 1), y


def main() -> None:
    parser = argparse.ArgumentParser(description="train the judge of the demo's pictures")
    parser.add_argument("--model", type=Path, default=FOLDER / "sd1-mini.safetensors", help="whose autoencoder is used")
    parser.add_argument("--output", type=Path, default=FOLDER / "judge.safetensors")
    parser.add_argument("--num-pictures", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=2400)
    args = parser.parse_args()

    rng = random.Random("pictures of the judge")
    drawn, answers = zip(*(picture(rng) for _ in range(args.num_pictures)), strict=True)
    half = args.num_pictures // 2
    pictures = autoencoded(list(drawn[:half]), args.model) + list(drawn[half:])
    pixels, labels = torch.stack([to_pixels(p) for p in pictures]), torch.tensor(answers)
    num_held = args.num_pictures // 10
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    pixels, labels = pixels[order], labels[order]

    torch.manual_seed(0)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1, weight_decay=0.02)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (0.5 * (1 + math.cos(math.pi * step / args.steps)) + 0.005)
        x, y = batch(pixels[num_held:], labels[num_held:], step, 64)
        loss = F.cross_entropy(judge(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 200 == 0 or step == args.steps - 1:
            facts = held_out(judge, pixels[:num_held], labels[:num_held])
            print(json.dumps({"step": step, "loss": round(loss.item(), 4), **facts}), flush=True)
    metadata = {"license": "Apache-2.0", "modelspec.title": "lorasmith's judge of the embedded model's pictures"}
    write_safetensors(args.output, {name: t.half() for name, t in judge.state_dict().items()}, metadata)


@torch.no_grad()
def held_out(judge: Judge, pixels: Tensor, answers: Tensor) -> dict[str, float]:
    """Return how often the judge is right and sure on pictures it did not learn from, and on spoilt ones."""
    judge.eval()
    right = sure_right(judge, pixels, answers)
    torn = warp(pixels, torch.full((len(pixels),), 0.55), torch.Generator().manual_seed(1))
    fooled = 1 - sure_nothing(judge, torn)
    judge.train()
    return {"right": round(right, 4), "torn things accepted": round(fooled, 4)}


def sure_right(judge: Judge, pixels: Tensor, answers: Tensor) -> float:
    best = judge(pixels).softmax(1).max(1)
    return ((best.indices == answers) & (best.values >= MIN_CONFIDENCE)).float().mean().item()


def sure_nothing(judge: Judge, pixels: Tensor) -> float:
    best = judge(pixels).softmax(1).max(1)
    return ((best.indices == _NOTHING) | (best.values < MIN_CONFIDENCE)).float().mean().item()


if __name__ == "__main__":
    main()
