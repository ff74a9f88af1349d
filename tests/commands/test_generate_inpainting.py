"""Inpainting models in `lorasmith generate`: diffusers' own pictures, LoRAs of plain models, and no training."""

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.controlnet.pipeline_controlnet_inpaint import StableDiffusionControlNetInpaintPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from PIL import Image

from lorasmith import model_families
from lorasmith.checkpoint import open_checkpoint
from lorasmith.cli import main
from lorasmith.commands import generate
from lorasmith.config import GenerateConfig
from lorasmith.models import tokenizer
from tests.random_lora import make_lora, write_lora
from tests.tiny import build_tiny, build_tiny_control, write_tiny

THEIR: Any = diffusers
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return write_tiny(folder / "inpainting.safetensors", resolution=64, is_inpainting=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Noise of 72 x 64, and masks of it: in a corner, and everywhere."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0).integers(0, 255, (64, 72, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "init.png")
    mask = Image.new("L", (72, 64))
    mask.paste(255, (5, 3, 45, 39))  # not on the latents' grid
    mask.paste(120, (50, 40, 70, 60))  # less than half is black
    mask.save(folder / "mask.png")
    Image.new("L", (72, 64), 255).save(folder / "white.png")
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def loaded() -> dict[Any, Any]:
    return {}


@pytest.fixture
def draw(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: dict[Any, Any]) -> Callable[..., Any]:
    """Run the command with a seed into a new folder, and return the pixels of each picture."""
    count, load = iter(range(1000)), generate.load

    def load_once(cfg: GenerateConfig, *rest: Any) -> Any:
        return loaded[cfg.base] if cfg.base in loaded else loaded.setdefault(cfg.base, load(cfg, *rest))

    monkeypatch.setattr(generate, "load", load_once)

    def run(*arguments: object, prompts: Sequence[str] = ("a cat",), steps: int = 4) -> list[Any]:
        folder = tmp_path / f"out{next(count)}"
        common = ["--base", base, "--output", folder, "--seed", 7, "--guidance", 5, "--device", "cpu"]
        settings = ["--size", "72,64", "--steps", steps, *common, *arguments]
        assert main(["generate", *prompts, *map(str, settings)]) == 0
        return [np.asarray(Image.open(path)).astype(int) for path in sorted(folder.iterdir())]

    return run


def theirs(make: Any, pictures: dict[str, Path], mask: str, *, strength: float, **parts: Any) -> Any:
    unet, vae, text = build_tiny(resolution=64, is_inpainting=True)
    words = copy.deepcopy(tokenizer.build())
    words.model_max_length, words.pad_token = 77, "<|endoftext|>"
    control = {"control_image": Image.open(pictures["init"])} if parts else {}
    pipe = make(
        vae=vae, unet=unet, text_encoder=text, tokenizer=words, safety_checker=None, feature_extractor=None,
        scheduler=THEIR.DPMSolverMultistepScheduler(**BETAS), requires_safety_checker=False, **parts,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    picture = pipe(
        "a cat", image=Image.open(pictures["init"]), mask_image=Image.open(pictures[mask]), width=72, height=64,
        strength=strength, num_inference_steps=4, guidance_scale=5.0, generator=torch.Generator().manual_seed(7),
        **control,
    ).images[0]  # fmt: skip
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("denoise", [1.0, 0.75])
def test_the_same_picture_as_diffusers(denoise: float, draw: Callable[..., Any], pictures: dict[str, Path]) -> None:
    expected = theirs(StableDiffusionInpaintPipeline, pictures, "mask", strength=denoise)
    [ours] = draw("--init", pictures["init"], "--mask", pictures["mask"], "--denoise", denoise)
    assert np.abs(ours - expected).max() <= 1
    assert ours.std() > 5


def test_without_a_mask_all_is_drawn_as_in_a_white_one(draw: Callable[..., Any], pictures: dict[str, Path]) -> None:
    init = ["--init", pictures["init"], "--denoise", 1]
    [plain], [unmasked], [white] = draw(), draw(*init), draw(*init, "--mask", pictures["white"])
    assert (plain == white).all() and (unmasked == white).all()
    [masked] = draw(*init, "--mask", pictures["mask"])
    assert np.abs(plain - masked).max() > 5


@pytest.mark.slow
def test_with_a_controlnet_as_in_diffusers(draw: Callable[..., Any], pictures: dict[str, Path], tmp_path: Path) -> None:
    """ControlNets are for plain models: they are shown the latents alone."""
    control = build_tiny_control()
    control.save_pretrained(tmp_path / "control")
    parts = {"controlnet": control}
    expected = theirs(StableDiffusionControlNetInpaintPipeline, pictures, "mask", strength=1.0, **parts)
    options = ["--init", pictures["init"], "--mask", pictures["mask"], "--denoise", 1]
    # diffusers' default is half a ControlNet here
    [ours] = draw(*options, "--control", tmp_path / "control", "--control-picture", pictures["init"],
                  "--control-weight", 0.5)  # fmt: skip
    assert np.abs(ours - expected).max() <= 1


def test_what_is_drawn_beside_a_picture_does_not_change_it(draw: Callable[..., Any], pictures: dict[str, Path]) -> None:
    options = ["--init", pictures["init"], "--mask", pictures["mask"], "--denoise", 0.75]
    one, two = draw(*options, "--images", 2, "--batch-size", 2, steps=3)
    assert np.abs(one - draw(*options, steps=3)[0]).max() <= 1 and (one != two).any()


def test_a_lora_of_a_plain_model_acts_without_its_change_of_the_first_layer(
    base: Path, draw: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_checkpoint(base) as checkpoint:
        shapes = model_families.target_shapes(checkpoint)
    tensors = make_lora({name: shapes[name] for name in sorted(shapes)[::8]})
    write_lora(tmp_path / "some.safetensors", tensors)
    first = {
        "lora_unet_conv_in.lora_down.weight": torch.ones(2, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.ones(32, 2, 1, 1),
        "lora_unet_conv_in.alpha": torch.tensor(2.0),
    }
    write_lora(tmp_path / "all.safetensors", {**tensors, **first})
    [plain], [some], [whole] = (
        draw(steps=2),
        *(draw("--lora", tmp_path / f"{name}.safetensors", "--strength", 3, steps=2) for name in ("some", "all")),
    )
    assert (some == whole).all() and (some != plain).any()
    assert re.search(r"all\.safetensors: \d+ layers, 1 that the model does not have", capsys.readouterr().out)


def test_sd2s_predicts_noise_unless_it_says_otherwise(tmp_path: Path) -> None:
    """So Stability's, which is called 512-inpainting-ema."""
    path = write_tiny(tmp_path / "inpainting.safetensors", "sd2", is_inpainting=True)
    with open_checkpoint(path) as checkpoint:
        facts = model_families.describe(checkpoint, may_inpaint=True)
    assert facts.prediction == "epsilon" and facts.notes == [
        "an inpainting model: it is shown what stays of the picture, and the mask"
    ]
