"""`lorasmith generate` with perturbed-attention guidance, against diffusers' own pipeline for it."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.pag.pipeline_pag_sd import StableDiffusionPAGPipeline
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from PIL import Image

from lorasmith.cli import main
from lorasmith.commands import generate
from lorasmith.models import tokenizer
from tests.tiny import build_tiny, write_tiny

Draw = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "mini.safetensors", resolution=64)


@pytest.fixture(scope="module")
def loaded() -> list[Any]:
    """The model, which stays for the next test: what one leaves behind in it, the others see."""
    return []


@pytest.fixture
def draw(base: Path, tmp_path: Path, loaded: list[Any], monkeypatch: pytest.MonkeyPatch) -> Draw:
    """Run the command with a seed, and return the pictures' pixels; smaller ones have one place in the middle block."""
    count, load = iter(range(1000)), generate.load

    def load_once(*args: Any) -> Any:
        if not loaded:
            loaded.append(load(*args))
        return loaded[0]

    monkeypatch.setattr(generate, "load", load_once)

    def run(*arguments: object) -> list[Any]:
        folder = tmp_path / f"out{next(count)}"
        common = ["--base", base, "--output", folder, "--steps", 2, "--seed", 7, "--size", 128, "--device", "cpu"]
        assert main(["generate", "--prompt", *map(str, [*arguments, *common])]) == 0
        return [np.asarray(Image.open(path)).astype(int) for path in sorted(folder.iterdir())]

    return run


def difference(one: Any, other: Any) -> int:
    """Largest difference in grey levels."""
    return int(np.abs(one - other).max())


@pytest.fixture(scope="module")
def pipeline() -> Any:
    unet, vae, text = build_tiny(resolution=64)
    words = copy.deepcopy(tokenizer.build())
    words.model_max_length, words.pad_token = 77, "<|endoftext|>"
    scheduler: Any = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    make: Any = StableDiffusionPAGPipeline
    found = make(
        vae=vae, unet=unet, text_encoder=text, tokenizer=words, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    found.set_progress_bar_config(disable=True)
    return found


@pytest.mark.parametrize(
    "guidance, scale, layers, rescale",
    [(5, 3, ["mid"], 0), (1, 3, ["mid"], 0), (5, 1.5, ["down_blocks.1", "up_blocks.2.attentions.0"], 0.7)],
)
def test_the_same_picture_as_diffusers_own_pipeline(
    guidance: float, scale: float, layers: list[str], rescale: float, draw: Draw, pipeline: Any
) -> None:
    pipeline.set_pag_applied_layers(layers)
    theirs = pipeline(
        "a photo of a cat", negative_prompt="blurred", width=128, height=128, num_inference_steps=2,
        guidance_scale=guidance, pag_scale=scale, guidance_rescale=rescale, generator=torch.Generator().manual_seed(7),
    ).images[0]  # fmt: skip
    common = ("--negative", "blurred", "--guidance", guidance, "--guidance-rescale", rescale)
    options = ("--pag-scale", scale, "--pag-layers", *layers)
    [plain] = draw("a photo of a cat", *common)
    [ours] = draw("a photo of a cat", *common, *options)
    assert difference(ours, np.asarray(theirs).astype(int)) <= 1
    assert difference(ours, plain) > 3
    assert difference(plain, draw("a photo of a cat", *common)[0]) == 0


def test_composed_prompts_are_perturbed_with_their_weights_and_company_changes_nothing(draw: Draw) -> None:
    options = ("--pag-scale", 3, "--pag-layers", "up", "--negative", "bad")
    cat, halves, both, long = draw(
        "a cat", "a cat :0.5 AND a cat :0.5", "a cat AND a dog", "a cat " * 60, *options, "--batch-size", 4
    )
    assert difference(cat, halves) <= 1
    assert difference(cat, both) > 1 and difference(cat, long) > 1
    assert difference(both, draw("a cat AND a dog", *options)[0]) <= 1
    assert difference(long, draw("a cat " * 60, *options)[0]) <= 1
    assert difference(both, draw("a cat AND a dog", "--negative", "bad")[0]) > 1


def test_what_is_perturbed_is_written_into_the_picture(draw: Draw, tmp_path: Path) -> None:
    draw("a cat", "--pag-scale", 2.5, "--pag-layers", "mid", "up_blocks.1")
    text = str(Image.open(next((tmp_path / "out0").iterdir())).info["parameters"])
    assert "PAG Scale: 2.5, PAG Layers: mid up_blocks.1" in text


@pytest.mark.parametrize(
    "options, said",
    [
        (
            ["--pag-scale", "3", "--pag-layers", "down_blocks.3"],
            r"down_blocks.3: .* some in down_blocks.0, .*mid_block",
        ),
        (["--pag-scale", "3", "--pag-layers", "mi"], "--pag-layers mi: the U-Net has no self-attention there"),
        (["--pag-layers", "up"], "give pag_scale too"),
        (["--pag-scale", "-1"], "pag-scale"),
    ],
)
def test_layers_that_there_are_not(
    options: list[str], said: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "a cat", "--base", str(base), "--output", str(tmp_path / "out"), *options]) == 2
    assert re.search(said, capsys.readouterr().err) and not (tmp_path / "out").exists()
