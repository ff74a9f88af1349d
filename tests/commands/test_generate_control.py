"""ControlNets in `lorasmith generate`: diffusers' own pictures, in every form that the networks come in."""

import copy
import json
import re
import shutil
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from diffusers.pipelines.controlnet.pipeline_controlnet import StableDiffusionControlNetPipeline
from diffusers.pipelines.controlnet.pipeline_controlnet_img2img import StableDiffusionControlNetImg2ImgPipeline
from diffusers.pipelines.controlnet.pipeline_controlnet_inpaint import StableDiffusionControlNetInpaintPipeline
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from lorasmith import model_families
from lorasmith.cli import main
from lorasmith.commands import generate
from lorasmith.config import GenerateConfig
from lorasmith.edges import canny
from lorasmith.metadata import legacy_hash
from lorasmith.models import tokenizer
from lorasmith.models.keys import sd_control
from tests.tiny import build_tiny, build_tiny_control, write_tiny

THEIR: Any = diffusers
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "mini.safetensors", resolution=64)


@pytest.fixture(scope="module")
def controls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same ControlNet as a folder, a diffusers file, lllyasviel's files; and another one."""
    folder = tmp_path_factory.mktemp("controls")
    for seed, name in ((1, "lines"), (2, "depth")):
        build_tiny_control(seed=seed).save_pretrained(folder / name)
    file = folder / "lines" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    theirs = {source.name: tensors[module] for module, source in sd_control.original("").items() if module in tensors}
    save_file(theirs, folder / "cut.safetensors")
    whole = {f"control_model.{name}": tensor for name, tensor in theirs.items()}
    torch.save({"state_dict": whole | {"model.diffusion_model.out.2.bias": torch.zeros(4)}}, folder / "whole.pth")
    torch.save(whole, folder / "control_shuffle.pth")
    unet = build_tiny(resolution=64)[0].state_dict()
    changed = {
        source.name: tensors[module] - unet[module] if module in unet else tensors[module]
        for module, source in sd_control.original("control_model.").items()
        if module in tensors
    }
    save_file(changed | {"difference": torch.zeros(())}, folder / "difference.safetensors")
    build_tiny_control("sd2").save_pretrained(folder / "sd2")
    build_tiny_control(width=64).save_pretrained(folder / "wide")
    return {path.stem: path for path in [*folder.iterdir(), file]}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pictures of 72 x 64: shapes, noise, and a mask of the left third."""
    folder = tmp_path_factory.mktemp("pictures")
    canvas = Image.new("RGB", (72, 64), "black")
    pen = ImageDraw.Draw(canvas)
    pen.ellipse((8, 8, 40, 40), fill="orange")
    pen.rectangle((44, 30, 66, 60), fill="teal")
    canvas.save(folder / "shapes.png")
    noise = np.random.default_rng(0).integers(0, 255, (64, 72, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    mask = Image.new("L", (72, 64))
    mask.paste(255, (0, 0, 24, 64))
    mask.save(folder / "mask.png")
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture
def draw(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: dict[Any, Any]) -> Callable[..., Path]:
    """Run the command with a seed into a new folder, and return the first picture."""
    count, load = iter(range(1000)), generate.load

    def load_once(cfg: GenerateConfig, *rest: Any) -> Any:
        return loaded[cfg.base] if cfg.base in loaded else loaded.setdefault(cfg.base, load(cfg, *rest))

    monkeypatch.setattr(generate, "load", load_once)

    def run(*arguments: object, prompts: Sequence[str] = ("a cat",), steps: int = 4, size: str = "72,64") -> Path:
        folder = tmp_path / f"out{next(count)}"
        common = ["--base", base, "--output", folder, "--seed", 7, "--guidance", 5, "--device", "cpu"]
        settings = ["--size", size, "--steps", steps, *common, *arguments]
        assert main(["generate", *prompts, *map(str, settings)]) == 0
        return min(folder.iterdir())

    return run


@pytest.fixture(scope="module")
def loaded() -> dict[Any, Any]:
    return {}


def pipeline(make: Any, *controls: Any) -> Any:
    unet, vae, text = build_tiny(resolution=64)
    words = copy.deepcopy(tokenizer.build())
    words.model_max_length, words.pad_token = 77, "<|endoftext|>"
    found = make(
        vae=vae, unet=unet, text_encoder=text, tokenizer=words, safety_checker=None, feature_extractor=None,
        scheduler=THEIR.DPMSolverMultistepScheduler(**BETAS), requires_safety_checker=False,
        controlnet=controls[0] if len(controls) == 1 else MultiControlNetModel(list(controls)),
    )  # fmt: skip
    found.set_progress_bar_config(disable=True)
    return found


def theirs(pipe: Any, image: Any, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    common = {"width": 72, "height": 64, "num_inference_steps": 4, "guidance_scale": 5.0, "generator": generator}
    return np.asarray(pipe("a cat", image=image, **{**common, **options}).images[0]).astype(int)


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def facts(path: Path) -> str:
    return str(Image.open(path).info["parameters"]).split("\n")[-1]


# --- as diffusers has it ----------------------------------------------------------------------------------------------


def test_two_that_are_summed_with_weights_and_ranges_are_as_in_diffusers(
    draw: Callable[..., Path], controls: dict[str, Path], shapes: dict[str, Path]
) -> None:
    pipe = pipeline(StableDiffusionControlNetPipeline, build_tiny_control(), build_tiny_control(seed=2))
    seen = Image.open(shapes["shapes"])
    edges = Image.fromarray(canny(np.asarray(seen), 50, 150).astype(np.uint8) * 255).convert("RGB")
    expected = theirs(
        pipe, [edges, Image.open(shapes["noise"])], controlnet_conditioning_scale=[0.8, -0.5],
        control_guidance_start=[0.0, 0.25], control_guidance_end=[0.6, 1.0],
    )  # fmt: skip
    options = ["--control", controls["lines"], controls["depth"], "--control-weight", 0.8, -0.5]
    options += ["--control-picture", shapes["shapes"], shapes["noise"], "--control-range", "0,0.6", "0.25,1"]
    ours = draw(*options, "--control-preprocessor", "canny:50,150", "none")
    assert np.abs(pixels(ours) - expected).max() <= 1
    assert np.abs(expected - pixels(draw())).max() > 5


def test_drawing_on_from_a_picture_and_in_a_mask_is_as_in_diffusers(
    draw: Callable[..., Path], controls: dict[str, Path], shapes: dict[str, Path]
) -> None:
    """The range is a share of the steps that are drawn."""
    control = ["--control", controls["lines"], "--control-picture", shapes["shapes"], "--control-range", "0,0.7"]
    options = [*control, "--init", shapes["noise"], "--denoise", 0.75]
    seen, init, mask = (Image.open(shapes[name]) for name in ("shapes", "noise", "mask"))
    common: dict[str, Any] = {
        "control_image": seen, "strength": 0.75, "control_guidance_end": 0.7, "controlnet_conditioning_scale": 1.0,
    }  # fmt: skip
    expected = theirs(pipeline(StableDiffusionControlNetImg2ImgPipeline, build_tiny_control()), init, **common)
    whole = draw(*options)
    assert np.abs(pixels(whole) - expected).max() <= 1
    pipe = pipeline(StableDiffusionControlNetInpaintPipeline, build_tiny_control())
    expected = theirs(pipe, init, mask_image=mask, **common)
    masked = draw(*options, "--mask", shapes["mask"])
    assert np.abs(pixels(masked) - expected).max() <= 1
    assert np.abs(pixels(masked) - pixels(whole)).max() > 5


@pytest.mark.slow
def test_one_that_averages_acts_on_the_conditional_prediction_alone_as_in_diffusers(
    draw: Callable[..., Path], controls: dict[str, Path], shapes: dict[str, Path]
) -> None:
    """Shuffle; of lllyasviel's files only the name says so."""
    control = build_tiny_control()
    control.register_to_config(global_pool_conditions=True)
    expected = theirs(pipeline(StableDiffusionControlNetPipeline, control), Image.open(shapes["shapes"]))
    ours = draw("--control", controls["control_shuffle"], "--control-picture", shapes["shapes"])
    assert np.abs(pixels(ours) - expected).max() <= 1


# --- our own ----------------------------------------------------------------------------------------------------------


def test_every_form_of_a_controlnet_is_the_same(
    draw: Callable[..., Path], controls: dict[str, Path], shapes: dict[str, Path]
) -> None:
    def drawn(name: str) -> Any:
        return pixels(draw("--control", controls[name], "--control-picture", shapes["shapes"], steps=1))

    folder = drawn("lines")
    assert all((drawn(name) == folder).all() for name in ("diffusion_pytorch_model", "cut", "whole"))
    assert np.abs(drawn("difference") - folder).max() <= 1
    assert (drawn("depth") != folder).any()


def test_one_of_the_hub_is_fetched_without_what_is_not_needed(
    draw: Callable[..., Path], controls: dict[str, Path], shapes: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (controls["lines"] / "diffusion_pytorch_model.bin").write_bytes(b"the same again")

    def fetch(name: str, allow_patterns: list[str]) -> str:
        assert name == "somebody/lines"
        taken = [path for path in controls["lines"].iterdir() if any(fnmatch(path.name, p) for p in allow_patterns)]
        for path in taken:
            shutil.copy(path, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    fetched = draw("--control", "somebody/lines", "--control-picture", shapes["shapes"], steps=1)
    here = draw("--control", controls["lines"], "--control-picture", shapes["shapes"], steps=1)
    assert (pixels(fetched) == pixels(here)).all()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "config.json", "diffusion_pytorch_model.safetensors"
    ]  # fmt: skip
    assert "Model: lines," in facts(fetched)


def test_what_is_drawn_beside_a_picture_does_not_change_it(
    draw: Callable[..., Path], controls: dict[str, Path], shapes: dict[str, Path]
) -> None:
    """Texts of other lengths, and sizes of their own: each picture is shown what was cut to it."""
    options = ["--control", controls["lines"], "--control-picture", shapes["shapes"], "--control-preprocessor", "canny"]
    long = "a photo of a dog with very many words " * 12
    together = draw(*options, "--batch-size", 2, prompts=["a cat", long, "a cat --w 64"], steps=2).parent
    first, _, last = (pixels(path) for path in sorted(together.iterdir()))
    assert np.abs(first - pixels(draw(*options, steps=2))).max() <= 1
    assert np.abs(last - pixels(draw(*options, steps=2, size="64"))).max() <= 1


def test_what_acted_is_in_the_picture_as_webui_reads_it(
    draw: Callable[..., Path], controls: dict[str, Path], shapes: dict[str, Path]
) -> None:
    ours = draw(
        "--control", controls["cut"], controls["depth"], "--control-picture", shapes["shapes"],
        "--control-preprocessor", "canny:50,150", "none", "--control-weight", 0.8, 1, "--control-range", "0,0.6", "0,1",
        steps=2,
    )  # fmt: skip
    found = dict(re.findall(r'(ControlNet \d): ("(?:\\.|[^\\"])+")', facts(ours)))
    told = {name: dict(part.split(": ") for part in json.loads(text).split(", ")) for name, text in found.items()}
    shared = {"Resize Mode": "Crop and Resize", "Pixel Perfect": "True", "Control Mode": "Balanced"}
    assert told == {
        "ControlNet 0": {
            "Module": "canny", "Model": f"cut [{legacy_hash(controls['cut'].read_bytes())}]", "Weight": "0.8",
            "Threshold A": "50", "Threshold B": "150", "Guidance Start": "0", "Guidance End": "0.6", **shared,
        },
        "ControlNet 1": {
            "Module": "none", "Model": "depth", "Weight": "1", "Guidance Start": "0", "Guidance End": "1", **shared,
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--control", "sd2", "--control-picture", "shapes"],
         r"sd2 is a ControlNet for Stable Diffusion 2.x \(its cross-attention is 32 wide\), and .*1.x \(24\)"),
        (["--control", "wide", "--control-picture", "shapes"], "another model than .*first layer is 64 wide"),
        (["--control", "BASE", "--control-picture", "shapes"], "mini.safetensors is no ControlNet for Stable"),
        (["--control", "gone.pth", "--control-picture", "shapes"], "gone.pth"),
        (["--control", "lines"], "control_picture is given 0 times for 1 ControlNet .*one picture for all, or one"),
        (["--control-picture", "shapes"], "control_picture is given 1 time for 0 ControlNets"),
        (["--control", "lines", "--control-picture", "gone.png"], "gone.png"),
        (["--control", "lines", "--control-picture", "shapes", "--control-weight", "1", "2"],
         "control_weight is given 2 times for 1 ControlNet"),
        (["--control", "lines", "--control-picture", "shapes", "--control-range", "0.6,0.2"], "'0.6,0.2': expected"),
        (["--control", "lines", "--control-picture", "shapes", "--control-range", "0.5,0.51"], "none of 20 steps lies"),
        (["--control", "lines", "--control-picture", "shapes", "--control-preprocessor", "lineart"],
         "'lineart': expected none, canny, or"),
        (["--control", "lines", "--control-picture", "shapes", "--control-preprocessor", "canny:9"], "'canny:9': exp"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_the_model_is_loaded(
    arguments: list[str], said: str, base: Path, controls: dict[str, Path], shapes: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def load(*args: object, **options: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(model_families, "load", load)
    monkeypatch.chdir(tmp_path)
    places = {name: str(path) for name, path in {**controls, **shapes, "BASE": base}.items()}
    command = ["generate", "a cat", "--base", str(base), "--size", "64"]
    assert main([*command, *(places.get(word, word) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and "Traceback" not in error


def test_a_damaged_one_is_told_before_the_model_is_loaded(
    base: Path, controls: dict[str, Path], shapes: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(model_families, "load", None)
    tensors = load_file(controls["cut"])
    del tensors["zero_convs.3.0.weight"]
    save_file(tensors, tmp_path / "part.safetensors")
    command = ["generate", "a cat", "--base", str(base), "--control", str(tmp_path / "part.safetensors")]
    assert main([*command, "--control-picture", str(shapes["shapes"]), "--output", str(tmp_path / "out")]) == 2
    assert "part.safetensors: the ControlNet's tensors are not" in capsys.readouterr().err
