"""The main job on real input: a trained base, pictures of a thing it has never seen, a LoRA that learned it.

Everything goes through `lorasmith demo`; a program judges. `tools/demo/README.md` has the numbers of several seeds.
"""

import random
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mascot import POSES, SHOWN_GROUNDS, UNSEEN_GROUNDS, draw_mascot

from lorasmith.cli import main
from lorasmith.commands import demo
from lorasmith.commands.demo import MASCOT_PROMPTS, Score
from lorasmith.models.base import LatentDiffusion

OTHERS = demo.wishes(range(100, 164))


@pytest.fixture(scope="module", params=[42, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA, trained by the demo as a user runs it."""
    folder = tmp_path_factory.mktemp("place") / "demo"
    assert main(["demo", "--output", str(folder), "--seed", str(request.param)]) == 0
    return folder


@pytest.fixture(scope="module")
def models(trained: Path) -> tuple[LatentDiffusion, LatentDiffusion]:
    """The base, and the base with the LoRA."""
    tuned = demo.load_base()
    demo.attach(tuned, trained / "lora" / "last.safetensors")
    return demo.load_base(), tuned


@pytest.fixture(scope="module")
def scores(models: tuple[LatentDiffusion, LatentDiffusion]) -> tuple[Score, Score]:
    prompts = [*MASCOT_PROMPTS, *(wish.prompt for wish in OTHERS)]
    base, tuned = (demo.judged(demo.draw(model, prompts, 100, "test"), OTHERS) for model in models)
    return base, tuned


def test_the_base_cannot_draw_the_mascot_and_the_lora_can_on_backgrounds_it_never_saw(
    scores: tuple[Score, Score],
) -> None:
    assert all(prompt.split()[-2] in UNSEEN_GROUNDS for prompt in MASCOT_PROMPTS)
    before, after = scores
    print(f"before {before}\nafter  {after}")
    assert before.mascot <= 0.15
    assert after.mascot >= 0.8


def test_other_prompts_lose_at_most_five_points(scores: tuple[Score, Score]) -> None:
    before, after = scores
    lost = [old - new for old, new in zip(astuple(before)[1:], astuple(after)[1:], strict=True)]
    assert max(lost) <= 0.05, f"things, colours, backgrounds lost {lost}"


def test_the_loss_on_new_pictures_of_the_mascot_falls_by_a_quarter(
    models: tuple[LatentDiffusion, LatentDiffusion],
) -> None:
    before, after = (concept_loss(model) for model in models)
    print(f"loss on new pictures: {before:.4f} before, {after:.4f} after")
    assert after < 0.75 * before


@torch.no_grad()
def concept_loss(model: LatentDiffusion) -> float:
    """Return the mean squared error on 16 drawings that are not in the set, at fixed timesteps and noise."""
    rng, generator = random.Random("new robots"), torch.Generator().manual_seed(0)
    grounds = [*UNSEEN_GROUNDS, *SHOWN_GROUNDS]
    labels = [(grounds[i % len(grounds)], list(POSES)[i % len(POSES)]) for i in range(16)]
    pixels = np.stack([np.asarray(draw_mascot(ground, pose, rng)) for ground, pose in labels])
    latents, _ = model.encode_image(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)
    cond = model.encode_text([f"a sks robot on a {ground} background" for ground, _ in labels])
    losses = []
    for t in range(50, 1000, 100):
        steps, noise = torch.full((len(labels),), t), torch.randn(latents.shape, generator=generator)
        predicted = model(model.schedule.add_noise(latents, noise, steps), steps, cond)
        losses.append(F.mse_loss(predicted, noise).item())
    return sum(losses) / len(losses)


def test_what_the_demo_leaves_behind(trained: Path) -> None:
    assert (trained / "before-after.png").is_file()
    assert (trained / "lora" / "report" / "index.html").is_file()
    assert len(list((trained / "regularization").glob("*/*.png"))) == 96
