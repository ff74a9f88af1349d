"""`lorasmith generate`: diffusers' own pictures, whatever is drawn beside them, and LoRAs as their definition says."""

import copy
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import StableDiffusionImg2ImgPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from PIL import Image
from torch import Tensor

from lorasmith import model_families
from lorasmith.adapters.lora import LoRA
from lorasmith.checkpoint import file_sha256, open_checkpoint
from lorasmith.cli import main
from lorasmith.commands import generate
from lorasmith.config import GenerateConfig
from lorasmith.formats import kohya
from lorasmith.metadata import model_hash
from lorasmith.models import tokenizer
from lorasmith.picture_run import drawing
from tests.tiny import build_tiny, write_tiny

THEIR: Any = diffusers  # its names are not exported as a type checker wants it
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DORA = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "mini.safetensors", resolution=64)


def write_lora(path: Path, base: Path, *, seed: int = 1, kind: str = "lora") -> Path:
    """Write a LoRA for an eighth of the model's targets that changes its pictures much; `dora`: one layer is one."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    with open_checkpoint(base) as checkpoint:
        shapes = model_families.target_shapes(checkpoint)
    for name in [*sorted(shapes)[::8], DORA]:
        shape = shapes[name]
        adapter = LoRA(shape, 4, alpha=3)
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        tensors |= {f"{name}.{key}": value.detach() for key, value in adapter.state_dict().items()}
    if kind == "dora":
        tensors[f"{DORA}.dora_scale"] = torch.rand(shapes[DORA][0], 1, generator=generator) + 0.5
    kohya.write(path, tensors, {"ss_network_dim": "4"})
    return path


@pytest.fixture(scope="module")
def loras(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    return {
        "robot": write_lora(folder / "robot.safetensors", base),
        "style": write_lora(folder / "more" / "style.safetensors", base, seed=2, kind="dora"),
    }


@pytest.fixture(scope="module")
def loaded() -> dict[Any, Any]:
    """Models that stay for the next test: what one leaves behind in them, the others see."""
    return {}


@pytest.fixture
def draw(
    base: Path, tmp_path: Path, loaded: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[Path]]:
    """Run the command with a seed into a new folder, and return the pictures in their order."""
    count, load = iter(range(1000)), generate.load

    def load_once(cfg: GenerateConfig, *rest: Any) -> Any:
        key = cfg.base, cfg.clip_skip, cfg.zero_terminal_snr
        if key not in loaded:
            loaded[key] = load(cfg, *rest)
        return loaded[key]

    monkeypatch.setattr(generate, "load", load_once)

    def run(
        *arguments: object, size: str = "64", steps: int = 3, output: Path | None = None, prompts: Path | None = None
    ) -> list[Path]:
        folder = output or tmp_path / f"out{next(count)}"
        common = ["--base", base, "--output", folder, "--size", size, "--steps", steps, "--seed", 7, "--device", "cpu"]
        assert (
            main(
                [
                    "generate",
                    *map(str, common),
                    "--prompts" if prompts else "--prompt",
                    *map(str, [prompts] if prompts else arguments),
                ]
            )
            == 0
        )
        return sorted(folder.iterdir())

    return run


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def difference(one: Path, other: Path) -> int:
    """Largest difference in grey levels."""
    return int(np.abs(pixels(one) - pixels(other)).max())


def is_same(one: Path, other: Path) -> bool:
    return bool((pixels(one) == pixels(other)).all())


def text_of(path: Path) -> str:
    """What the picture's file says of itself, as WebUI reads it."""
    picture = Image.open(path)
    if path.suffix == ".png":
        return str(picture.info["parameters"])
    comment = picture.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    return bytes(comment[8:]).decode("utf-16-be")


def parsed(text: str) -> dict[str, str]:
    """WebUI's way to read it (modules/infotext_utils.py, parse_generation_parameters), without its repairs."""
    *lines, last = text.strip().split("\n")
    found, negative = {"Prompt": "", "Negative prompt": ""}, False
    for line in lines:
        if line.startswith("Negative prompt:"):
            negative, line = True, line[len("Negative prompt:") :]
        name = "Negative prompt" if negative else "Prompt"
        found[name] = (found[name] + "\n" + line.strip()).strip()
    for name, value in re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last):
        found[name] = json.loads(value) if value.startswith('"') else value
    return found


# --- what is drawn ----------------------------------------------------------------------------------------------------

THEIRS: dict[str, tuple[list[str], Any]] = {
    "ddim": (
        ["--sampler", "ddim"],
        THEIR.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    ),
    "euler": (["--sampler", "euler"], THEIR.EulerDiscreteScheduler(**BETAS)),
    "euler_a": (["--sampler", "k_euler_a"], THEIR.EulerAncestralDiscreteScheduler(**BETAS)),
    "heun": (["--sampler", "heun"], THEIR.HeunDiscreteScheduler(**BETAS)),
    "pndm": (
        ["--sampler", "pndm"],
        THEIR.PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
    ),
    "unipc": (["--sampler", "unipc"], THEIR.UniPCMultistepScheduler(**BETAS)),
    "dpm++": ([], THEIR.DPMSolverMultistepScheduler(**BETAS)),
    "karras": (["--sigmas", "karras"], THEIR.DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True)),
    "exponential": (
        ["--sampler", "euler", "--sigmas", "exponential"],
        THEIR.EulerDiscreteScheduler(**BETAS, use_exponential_sigmas=True),
    ),
    "rescaled": (
        ["--guidance-rescale", "0.7"],
        THEIR.DPMSolverMultistepScheduler(**BETAS),
    ),
}


OFTEN = ("euler_a", "karras", "rescaled")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in OFTEN else pytest.mark.slow) for n in THEIRS])
def test_the_same_picture_as_diffusers_own_pipeline(name: str, draw: Callable[..., list[Path]]) -> None:
    unet, vae, text = build_tiny(resolution=64)
    options, scheduler = THEIRS[name]
    words = copy.deepcopy(tokenizer.build())
    words.model_max_length, words.pad_token = 77, "<|endoftext|>"
    make: Any = StableDiffusionPipeline
    pipeline = make(
        vae=vae, unet=unet, text_encoder=text, tokenizer=words, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a photo of a cat", negative_prompt="blurred", width=72, height=64, num_inference_steps=4, guidance_scale=5.0,
        generator=torch.Generator().manual_seed(7), guidance_rescale=0.7 if name == "rescaled" else 0.0,
    ).images[0]  # fmt: skip
    [ours] = draw("a photo of a cat", "--negative", "blurred", "--guidance", 5, *options, size="72,64", steps=4)
    assert np.abs(pixels(ours) - np.asarray(theirs).astype(int)).max() <= 1
    assert pixels(ours).std() > 5


def test_a_picture_depends_on_its_seed_and_not_on_its_company(draw: Callable[..., list[Path]]) -> None:
    """Ancestral sampling, which draws while it runs; a batch computes in another order, so 1 grey level is allowed."""
    common = ("--sampler", "euler_a", "--images", 3)
    one_by_one = draw("a cat", "a longer prompt of a dog", *common)
    together = draw("a cat", "a longer prompt of a dog", *common, "--batch-size", 4)
    [alone] = draw("a longer prompt of a dog --d 9", "--sampler", "euler_a")
    assert len(one_by_one) == len(together) == 6
    assert max(map(difference, one_by_one, together)) <= 1
    assert is_same(alone, one_by_one[5])
    assert not is_same(one_by_one[4], one_by_one[5])


def test_texts_of_any_length_are_drawn_together_as_alone(draw: Callable[..., list[Path]]) -> None:
    long = "a photo of a cat with very many words " * 12
    pictures = draw("a cat", long, "a BREAK cat", "--negative", "bad", "--batch-size", 3)
    for prompt, picture in zip(["a cat", long, "a BREAK cat"], pictures, strict=True):
        assert difference(draw(prompt, "--negative", "bad")[0], picture) <= 1
    assert not is_same(pictures[0], pictures[2])
    assert difference(draw(long + "and a dog", "--negative", "bad")[0], pictures[1]) > 0


def test_the_negative_prompt_may_have_a_scale_of_its_own(draw: Callable[..., list[Path]]) -> None:
    """g(text - away) + away = empty + g(text - empty) - (g - 1)(away - empty); and with 0 it has no part."""
    usual, same, none, own = draw(
        "a cat", "a cat --nl 6.5", "a cat --nl 0", "a cat --nl 2", "--negative", "bad", "--batch-size", 4
    )
    assert difference(usual, same) <= 1 and difference(none, draw("a cat")[0]) <= 1
    assert min(difference(own, other) for other in (usual, none)) > 1
    others = ("--negative", "bad", "--pag-scale", 2, "--guidance-rescale", 0.7, "--batch-size", 2)
    assert difference(*draw("a cat", "a cat --nl 6.5", *others)) <= 1
    [by_option] = draw("a cat", "--negative", "bad", "--negative-guidance", 2)
    assert difference(own, by_option) <= 1 and parsed(text_of(own))["Negative guidance"] == "2"


def test_a_prompt_lists_the_seeds_of_its_pictures_and_says_their_name(draw: Callable[..., list[Path]]) -> None:
    listed = draw("a cat --d 9,3 --f some", steps=1)
    assert [path.name for path in listed] == ["some-2.png", "some.png"]
    for path, seed in zip(listed, (3, 9), strict=True):
        assert is_same(path, draw("a cat", "--seed", seed, steps=1)[0])
    assert [path.name for path in draw("a cat --f {seed}.webp", "--images", 2, steps=1)] == ["7.webp", "8.webp"]


def test_each_prompt_says_how_much_of_a_picture_is_drawn_anew(draw: Callable[..., list[Path]], tmp_path: Path) -> None:
    Image.linear_gradient("L").resize((64, 64)).save(tmp_path / "init.png")
    init = ("--init", tmp_path / "init.png")
    usual, less = draw("a cat", "a cat --t 0.5", *init, "--denoise", 1)
    assert is_same(less, draw("a cat", *init, "--denoise", 0.5)[0]) and not is_same(usual, less)
    assert parsed(text_of(less))["Denoising strength"] == "0.5"


def test_a_prompt_says_how_strong_each_lora_is(draw: Callable[..., list[Path]], loras: dict[str, Path]) -> None:
    given = ("--lora", loras["robot"], loras["style"])
    [picture] = draw("a cat --am 0.5,-1", *given)
    assert is_same(picture, draw("a cat", *given, "--strength", 0.5, -1)[0])
    assert parsed(text_of(picture))["Prompt"] == "a cat <lora:robot:0.5> <lora:style:-1>"


def test_prompts_that_AND_joins_are_summed_with_their_weights(draw: Callable[..., list[Path]]) -> None:
    cat, dog, both, halves, only = draw(
        "a cat", "a dog", "a cat AND a dog", "a cat :0.5 AND a cat :0.5", "a cat AND a dog :0", "--batch-size", 5
    )
    assert difference(cat, halves) <= 1 and difference(cat, only) <= 1
    assert difference(both, cat) > 1 and difference(both, dog) > 1


def test_options_of_a_prompt_and_a_file_of_prompts(draw: Callable[..., list[Path]], tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat --n bad --w 72 --h 56 --d 5 --s 2 --l 3 --ss euler\n# no prompt\na dog\n")
    first, second = draw(prompts=file)
    facts = parsed(text_of(first))
    assert facts["Prompt"] == "a cat" and facts["Negative prompt"] == "bad"
    assert [facts[name] for name in ("Steps", "Sampler", "CFG scale", "Seed", "Size")] == [
        "2", "Euler", "3", "5", "72x56"
    ]  # fmt: skip
    assert Image.open(first).size == (72, 56) and Image.open(second).size == (64, 64)
    # DPM++ 2M without a schedule is one with karras sigmas to WebUI
    assert "Schedule type" not in facts and parsed(text_of(second))["Schedule type"] == "Uniform"
    assert is_same(first, draw("a cat", "--negative", "bad", "--sampler", "euler", "--guidance", 3, "--seed", 5,
                               size="72,56", steps=2)[0])  # fmt: skip


def test_prompts_that_are_typed_one_after_the_other(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model is loaded once; a mistake is told, and the next line asked for; an empty line ends it."""
    loads, load = [], generate.load
    monkeypatch.setattr(generate, "load", lambda *rest: loads.append(1) or load(*rest))
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("a cat --d 5\na cat --q 1\na dog --w 60\na dog --s 1 --d 5,6\n\na cow\n")
    )
    options = ["--size", "64", "--steps", "2", "--seed", "1", "--output", str(tmp_path / "out")]
    assert main(["generate", "--interactive", "--base", str(base), *options]) == 0
    told = capsys.readouterr()
    names = ["00001-5.png", "00002-5.png", "00003-6.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names and loads == [1]
    assert all(name in told.out for name in names) and "out: 3 pictures" in told.out
    assert "there is no option --q" in told.err and "--w 60: expected a multiple of 8" in told.err
    assert parsed(text_of(tmp_path / "out" / names[2]))["Steps"] == "1"


def test_prompts_that_are_piped_in(draw: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("# two\na cat\na dog --d 9\n"))
    assert [path.name for path in draw(prompts=Path("-"), steps=1)] == ["00001-7.png", "00002-9.png"]


def test_variants_of_a_prompt(draw: Callable[..., list[Path]]) -> None:
    def shown(found: list[Path]) -> list[str]:
        return [parsed(text_of(path))["Prompt"] for path in found]

    every = draw("a {red|blue} {cat|dog}", "--all-variants")
    assert shown(every) == ["a red cat", "a red dog", "a blue cat", "a blue dog"]
    assert {parsed(text_of(path))["Seed"] for path in every} == {"7"}
    some = draw("a {red|blue|green|black} cat", "--images", 12, steps=1)
    assert len(set(shown(some))) > 1
    assert shown(draw("a {red|blue|green|black} cat --d 10", steps=1)) == shown(some)[3:4]


def test_a_random_seed_is_told_and_draws_the_same_again(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, *options: str) -> Path:
        command = ["generate", "a cat", "--base", str(base), "--output", str(tmp_path / name), "--steps", "1"]
        assert main([*command, *options]) == 0
        return next((tmp_path / name).iterdir())

    first = run("first")
    told = re.search(r"^seed (\d+), a random one", capsys.readouterr().out, re.MULTILINE)
    assert told and parsed(text_of(first))["Seed"] == told[1]
    assert is_same(first, run("again", "--seed", told[1]))
    assert not is_same(first, run("other"))


@pytest.mark.parametrize("sampler, denoise", [("euler_a", 0.5), ("dpm++", 0.75), ("heun", 0.5), ("ddim", 1.0)])
def test_drawing_on_from_a_picture_is_as_in_diffusers(
    sampler: str, denoise: float, draw: Callable[..., list[Path]], tmp_path: Path
) -> None:
    unet, vae, text = build_tiny(resolution=64)
    words = copy.deepcopy(tokenizer.build())
    words.model_max_length, words.pad_token = 77, "<|endoftext|>"
    make: Any = StableDiffusionImg2ImgPipeline
    pipeline = make(
        vae=vae, unet=unet, text_encoder=text, tokenizer=words, scheduler=THEIRS[sampler][1], safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    init = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 72, 3), dtype=np.uint8))
    init.save(tmp_path / "init.png")
    theirs = pipeline(
        "a cat", image=init, strength=denoise, num_inference_steps=4, guidance_scale=7.5,
        generator=torch.Generator().manual_seed(7),
    ).images[0]  # fmt: skip
    options = ("--init", tmp_path / "init.png", "--denoise", denoise, "--sampler", sampler)
    ours, other = draw("a cat", *options, "--images", 2, "--batch-size", 2, size="72,64", steps=4)
    assert np.abs(pixels(ours) - np.asarray(theirs).astype(int)).max() <= 1
    assert not is_same(ours, other) and parsed(text_of(ours))["Denoising strength"] == f"{denoise:g}"


def test_a_mask_says_where_is_drawn_as_in_diffusers(draw: Callable[..., list[Path]], tmp_path: Path) -> None:
    unet, vae, text = build_tiny(resolution=64)
    words = copy.deepcopy(tokenizer.build())
    words.model_max_length, words.pad_token = 77, "<|endoftext|>"
    make: Any = StableDiffusionInpaintPipeline
    pipeline = make(
        vae=vae, unet=unet, text_encoder=text, tokenizer=words, scheduler=THEIRS["dpm++"][1], safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    init = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 72, 3), dtype=np.uint8))
    mask = Image.new("L", init.size)
    mask.paste(255, (0, 0, 24, 64))
    init.save(tmp_path / "init.png")
    mask.save(tmp_path / "mask.png")
    theirs = pipeline(
        "a cat", image=init, mask_image=mask, width=72, height=64, strength=0.75, num_inference_steps=4,
        guidance_scale=7.5, generator=torch.Generator().manual_seed(7),
    ).images[0]  # fmt: skip
    options = ("--init", tmp_path / "init.png", "--denoise", 0.75)
    [ours] = draw("a cat", *options, "--mask", tmp_path / "mask.png", size="72,64", steps=4)
    [unmasked] = draw("a cat", *options, size="72,64", steps=4)
    assert np.abs(pixels(ours) - np.asarray(theirs).astype(int)).max() <= 1
    assert difference(ours, unmasked) > 5


def test_pictures_are_of_the_size_of_the_one_that_is_drawn_on_from(
    base: Path, loaded: dict[Any, Any], draw: Callable[..., list[Path]], tmp_path: Path
) -> None:
    Image.new("RGB", (90, 70), "red").save(tmp_path / "init.png")
    command = ["generate", "a cat", "--base", str(base), "--init", str(tmp_path / "init.png"), "--steps", "2"]
    assert main([*command, "--output", str(tmp_path / "out"), "--seed", "1"]) == 0
    assert Image.open(tmp_path / "out" / "00001-1.png").size == (88, 64)


# --- two passes -------------------------------------------------------------------------------------------------------

TWICE = ("--highres-scale", 1.5, "--highres-denoise", 0.5)


@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_second_pass_is_drawing_on_from_the_enlarged_picture(
    batch: int, draw: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: the small picture, enlarged, is given with --init. Of a batch each is enlarged alone."""
    (tmp_path / "my_upscalers.py").write_text(
        "def mirrored(picture):\n    return picture.transpose(0).resize((200, 200))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = ("--sampler", "euler_a", "--images", batch, "--batch-size", batch)
    small = draw("a cat", *options)
    for upscaler, enlarge in (
        ("lanczos", lambda one: one),
        ("my_upscalers.mirrored", lambda one: one.transpose(0).resize((200, 200))),
    ):
        found = draw("a cat", *options, *TWICE, "--highres-steps", 4, "--highres-upscaler", upscaler)
        for number, (picture, first) in enumerate(zip(found, small, strict=True)):
            enlarge(Image.open(first)).save(tmp_path / "init.png")
            by_hand = ("--init", tmp_path / "init.png", "--denoise", 0.5, "--seed", 7 + number, "--sampler", "euler_a")
            [expected] = draw("a cat", *by_hand, size="96", steps=4)
            assert difference(picture, expected) <= (0 if batch == 1 else 1)
    facts = parsed(text_of(found[0]))
    assert {name: facts[name] for name in facts if name.startswith(("Hires", "Denoising", "Size"))} == {
        "Size": "64x64", "Denoising strength": "0.5", "Hires upscale": "1.5", "Hires steps": "2",
        "Hires upscaler": "my_upscalers.mirrored",
    }  # fmt: skip


def test_latents_are_enlarged_as_in_diffusers(draw: Callable[..., list[Path]]) -> None:
    """Its pipelines one after the other, with WebUI's enlarging of latents between them."""
    unet, vae, text = build_tiny(resolution=64)
    words = copy.deepcopy(tokenizer.build())
    words.model_max_length, words.pad_token = 77, "<|endoftext|>"
    make: tuple[Any, Any] = StableDiffusionPipeline, StableDiffusionImg2ImgPipeline
    first, second = (
        kind(
            vae=vae, unet=unet, text_encoder=text, tokenizer=words, scheduler=THEIRS["dpm++"][1], safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )
        for kind in make
    )  # fmt: skip
    common = {"guidance_scale": 7.5, "num_inference_steps": 4}
    latents = first(
        "a cat", width=72, height=64, generator=torch.Generator().manual_seed(7), output_type="latent", **common
    ).images
    larger = torch.nn.functional.interpolate(latents, (12, 13), mode="bilinear")
    theirs = second(
        "a cat", image=larger, strength=0.5, generator=torch.Generator().manual_seed(7), **common
    ).images[0]  # fmt: skip
    [ours] = draw("a cat", *TWICE, "--name", "{width}x{height}", size="72,64", steps=4)
    assert np.abs(pixels(ours) - np.asarray(theirs).astype(int)).max() <= 1 and ours.name == "104x96.png"
    assert parsed(text_of(ours))["Hires upscaler"] == "Latent" and "Hires steps" not in parsed(text_of(ours))


# --- LoRAs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["robot"], ["style"], ["robot", "style"]])
def test_attached_folded_and_merged_into_the_model_are_the_same(
    names: list[str], draw: Callable[..., list[Path]], loras: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    """Strengths of U-Net and text encoder apart; the merged model is made by `lorasmith merge`."""
    files = ["--lora", *(loras[name] for name in names)]
    unet, text = ["0.8", "-0.5"][: len(names)], ["0.3", "0.6"][: len(names)]
    strengths = ["--unet-strength", *unet, "--text-encoder-strength", *text]
    [attached] = draw("a cat", *files, *strengths)
    [folded] = draw("a cat", *files, *strengths, "--fold")
    merged = tmp_path / "merged.safetensors"
    ratios = ["--unet-ratio", *unet, "--text-encoder-ratio", *text]
    assert main(["merge", "--model", str(base), *map(str, files), *ratios, "--output", str(merged)]) == 0
    [of_merged] = draw("a cat", "--base", merged)
    assert difference(attached, folded) <= 1 and difference(folded, of_merged) <= 1
    assert difference(attached, draw("a cat")[0]) > 5
    assert difference(attached, draw("a cat", *files)[0]) > 5


@pytest.mark.parametrize("fold", [[], ["--fold"]])
def test_each_prompt_has_its_own_loras(
    fold: list[str], draw: Callable[..., list[Path]], loras: dict[str, Path]
) -> None:
    """Afterwards the base model is what it was: its pictures are the same to the byte."""
    folder = ["--lora-folder", loras["robot"].parent, *fold]
    prompts = ["a cat", "a cat <lora:robot:0.8>", "a cat", "a <lora:style:0.5:1>cat <lora:robot>", "a cat"]
    pictures = draw(*prompts, *folder, "--batch-size", 2)
    assert is_same(pictures[0], pictures[2]) and is_same(pictures[0], pictures[4])
    assert is_same(pictures[0], draw("a cat")[0])
    assert difference(pictures[1], draw("a cat", "--lora", loras["robot"], "--strength", 0.8, *fold)[0]) <= 1
    both = ["--lora", loras["style"], loras["robot"], "--text-encoder-strength", 0.5, 1, *fold]
    assert difference(pictures[3], draw("a cat", *both)[0]) <= 1
    assert parsed(text_of(pictures[3]))["Prompt"] == "a cat <lora:style:0.5:1> <lora:robot:1>"
    hashes = [parsed(text_of(picture)).get("Lora hashes", "") for picture in pictures]
    assert [re.findall(r"(\w+): \w{12}", one) for one in hashes] == [[], ["robot"], [], ["style", "robot"], []]


def test_a_prompt_says_otherwise_of_a_lora_that_is_given(
    draw: Callable[..., list[Path]], loras: dict[str, Path]
) -> None:
    given = ["--lora", loras["robot"], "--strength", 0.5]
    off, stronger, as_given = draw("a cat <lora:robot:0>", "a cat <lora:robot:0.9>", "a cat", *given)
    assert is_same(off, draw("a cat")[0])
    assert is_same(stronger, draw("a cat", "--lora", loras["robot"], "--strength", 0.9)[0])
    assert is_same(as_given, draw("a cat", *given)[0]) and not is_same(as_given, stronger)


@pytest.mark.parametrize("name", ["robot", pytest.param("style", marks=pytest.mark.slow)])
def test_a_mask_says_where_a_lora_acts(
    name: str, draw: Callable[..., list[Path]], loras: dict[str, Path], tmp_path: Path
) -> None:
    """All white it is the LoRA without one, all black the base model, both to the byte; style has a DoRA in it."""
    for level, file in ((255, "white.png"), (0, "black.png")):
        Image.new("L", (64, 64), level).save(tmp_path / file)
    Image.linear_gradient("L").rotate(90).save(tmp_path / "part.png")
    given = ("--lora", loras[name], "--strength", 0.8)
    prompts = ("a cat AND a dog :0.5", "a dog --d 9")
    white, black = (draw(prompts[0], *given, "--lora-mask", tmp_path / file) for file in ("white.png", "black.png"))
    base, whole = draw(prompts[0]), draw(prompts[0], *given)
    assert is_same(white[0], whole[0]) and is_same(black[0], base[0])
    part = draw(*prompts, *given, "--lora-mask", tmp_path / "part.png", "--batch-size", 2)
    alone = draw(prompts[1], *given, "--lora-mask", tmp_path / "part.png")
    assert difference(part[1], alone[0]) <= 1 and min(difference(part[0], one[0]) for one in (base, whole)) > 1
    assert parsed(text_of(part[0]))["Lora masks"] == f"{name}: part.png"
    left_out = draw(f"{prompts[0]} <lora:{name}:0>", *given, "--lora-mask", tmp_path / "part.png")
    assert is_same(left_out[0], base[0]) and is_same(draw(prompts[0])[0], base[0])


def test_a_lora_that_has_to_be_folded_can_have_no_mask(
    base: Path, loras: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Two LoRAs on a layer, one of them a DoRA: one without a mask may be folded. It is told before the model loads."""
    monkeypatch.delattr(generate, "load")
    Image.new("L", (64, 64), 255).save(tmp_path / "white.png")
    options = ["--lora", str(loras["robot"]), str(loras["style"]), "--steps", "1", "--output", str(tmp_path / "out")]
    command = ["generate", "a cat", "--base", str(base), *options, "--lora-mask", "none", str(tmp_path / "white.png")]
    assert main(command) == 2
    assert re.search(rf"style.safetensors changes {DORA} in a way that has to be folded", capsys.readouterr().err)


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form, suffix", [("png", ".png"), ("webp", ".webp"), ("jpeg", ".jpg")])
def test_what_a_picture_was_drawn_from_is_in_its_file(
    form: str, suffix: str, draw: Callable[..., list[Path]], base: Path, loras: dict[str, Path]
) -> None:
    prompt = "ein Kätzchen 猫, (red:1.2)\nwith: a second line"
    [picture] = draw(
        prompt, "--negative", 'bad, "worse"', "--lora", loras["robot"], "--strength", 0.5, "--form", form,
        "--sigmas", "karras", "--clip-skip", 2, "--zero-terminal-snr",
    )  # fmt: skip
    assert picture.suffix == suffix
    assert parsed(text_of(picture)) == {
        "Prompt": f"{prompt} <lora:robot:0.5>",
        "Negative prompt": 'bad, "worse"',
        "Steps": "3", "Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": "7.5", "Seed": "7",
        "Size": "64x64", "Model hash": file_sha256(base)[:10], "Model": "mini", "Clip skip": "2", "RNG": "CPU",
        "Noise Schedule": "Zero Terminal SNR",
        "Lora hashes": f"robot: {model_hash(loras['robot'].read_bytes())[:12]}",
        "Version": parsed(text_of(picture))["Version"],
    }  # fmt: skip


def test_names_count_on_and_nothing_is_replaced(draw: Callable[..., list[Path]], tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    draw("a cat", "--images", 2, output=folder, steps=1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(before) == ["00001-7.png", "00002-8.png"]
    draw("a cat", output=folder, steps=1)
    draw("a/b: <cat>", "--name", "{prompt} {width} {sampler}", output=folder, steps=1)
    draw("a/b: <cat>", "--name", "{prompt} {width} {sampler}", output=folder, steps=1)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["00001-7.png", "00002-8.png", "00003-7.png", "a b cat 64 dpm++-2.png", "a b cat 64 dpm++.png"]
    assert before.items() <= {path.name: path.read_bytes() for path in folder.iterdir()}.items()


@pytest.mark.parametrize(
    "ending, code, said",
    [
        (KeyboardInterrupt(), 130, r"stopped by Ctrl\+C"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "--batch-size than 2; .*--precision bf16.*smaller --size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "cpu has too little memory"),
    ],
)
def test_what_was_drawn_before_the_end_is_there_and_whole(
    ending: BaseException, code: int, said: str, base: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    real, calls = drawing.draw, []

    def once(*args: Any, **settings: Any) -> Any:
        calls.append(settings["seeds"])
        if len(calls) == 2:
            raise ending
        return real(*args, **settings)

    monkeypatch.setattr(drawing, "draw", once)
    options = ["--images", "4", "--batch-size", "2", "--steps", "1", "--seed", "1", "--precision", "fp32"]
    command = ["generate", "a cat", "--base", str(base), "--output", str(tmp_path / "out"), *options]
    assert main([*command, "--device", "cpu", "--on-out-of-memory", "stop"]) == code
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00001-1.png", "00002-2.png"]
    assert all(pixels(path).shape == (64, 64, 3) for path in (tmp_path / "out").iterdir())
    assert re.search(said, capsys.readouterr().err)


MASKED = ["--base", "BASE", "--lora", "ROBOT", "--lora-mask", "PICTURE"]


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["a cat"], "missing: --base"),
        (["a cat", "--base", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--base", "BASE"], "missing: what to draw"),
        (["a cat", "--base", "BASE", "--prompts", "x.txt"], "prompt and prompts both say what to draw"),
        (["--base", "BASE", "--prompts", "x.md"], r"expected a file that ends in .txt, .toml or .json"),
        (["a cat", "--base", "BASE", "--interactive"], "interactive asks for prompts, but some are given"),
        (["--base", "BASE", "--interactive", "--sampler", "eular"], "did you mean euler"),
        (["a cat", "--base", "BASE", "--sampler", "eular"], "no sampler named 'eular'; did you mean euler"),
        (["a cat --ss eular", "--base", "BASE"], "no sampler named 'eular'; did you mean euler"),
        (["a cat", "--base", "BASE", "--sampler", "ddim", "--sigmas", "karras"], "ddim has no karras sigmas; .*dpm"),
        (["a cat", "--base", "BASE", "--sigmas", "beta", "--zero-terminal-snr"], "beta .* out of reach .* give normal"),
        (["a cat", "--base", "BASE", "--size", "60"], "60 is not a multiple of 8"),
        (["a cat --w 60", "--base", "BASE"], "--w 60: expected a multiple of 8"),
        (["a cat --q 1", "--base", "BASE"], "there is no option --q"),
        (["a cat --d 100000000000000000000", "--base", "BASE"], "seed 100000000000000000000 is too large"),
        (["a cat", "--base", "BASE", "--lora", "gone.safetensors"], "gone.safetensors"),
        (["a cat", "--base", "BASE", "--lora", "ROBOT", "--strength", "1", "2"], "strength is given 2 times for 1"),
        (["a cat", "--base", "BASE", "--lora-mask", "PICTURE"], "lora_mask is given 1 picture for 0 LoRAs"),
        (["a cat", *MASKED, "--fold"], "lora_mask and fold do not go together"),
        (["a cat", *MASKED, "--compile"], "lora_mask and compile do not go together"),
        (["a cat", *MASKED, "--control", "a.pth", "--control-picture", "PICTURE"], "lora_mask and control do not go"),
        (["a cat", "--base", "BASE", "--lora", "ROBOT", "--lora-mask", "gone.png"], "gone.png"),
        (["a <lora:robbot>", "--base", "BASE", "--lora", "ROBOT"], "<lora:robbot>.*did you mean robot"),
        (["a <lora:x>", "--base", "BASE"], "<lora:x>: there is no LoRA of that name; .*give --lora-folder"),
        (["a <lora:robot:much>", "--base", "BASE", "--lora", "ROBOT"], "<lora:robot:much>: expected"),
        (["a <lora:robot><lora:robot>", "--base", "BASE", "--lora", "ROBOT"], "names <lora:robot> twice"),
        (["a cat", "--base", "BASE", "--lora-folder", "gone"], "--lora-folder gone: there is no such folder"),
        (["a cat", "--base", "BASE", "--lora", "SD2"], "is a LoRA for SD 2.x, and the model is SD 1.x"),
        (["{3$$a|b}", "--base", "BASE"], "asks for 3 of 2 variants"),
        (["a cat --am 1,2", "--base", "BASE", "--lora", "ROBOT"], "--am 1,2 has 2 strengths for 1 LoRAs of --lora"),
        (["a cat --n <lora:robot>", "--base", "BASE", "--lora", "ROBOT"], "<lora:robot> stands in a negative prompt"),
        (["a <lora:robot> --am 1", "--base", "BASE", "--lora", "ROBOT"], "--am and <lora:robot> both say"),
        (["a cat --t 0.5", "--base", "BASE"], "--t 0.5 is for drawing on from a picture; give it with --init"),
        (["a cat --t 0.01", "--base", "BASE", "--init", "PICTURE"], "0.01 of 20 steps is less than one"),
        (["a cat --d 1,2,3", "--base", "BASE", "--images", "2"], "has 3 seeds, and --images 2 asks for another"),
        (["a cat --nl 2 --l 1", "--base", "BASE"], "'a cat': a guidance scale of the negative prompt alone is for"),
        (["a cat --f {sed}", "--base", "BASE"], r"--f \{sed\}: there is no field \{sed\}"),
        (["{a|b}" * 14, "--base", "BASE", "--all-variants"], "more than 10,000 variants"),
        (["a cat", "--base", "BASE", "--name", "{numbr}"], r"no field \{numbr\}; there are \{number\}"),
        (["a cat", "--base", "BASE", "--output", "ROBOT"], "is a file; give a folder"),
        (["a cat", "--base", "BASE", "--denoise", "0.5"], "denoise is for drawing on from a picture"),
        (["a cat", "--base", "BASE", "--mask", "PICTURE"], "mask is for drawing on from a picture"),
        (["a cat", "--base", "BASE", "--init", "PICTURE", "--mask", "WIDER"], "is 72x64, and .* is 64x64; give a mask"),
        (["a cat", "--base", "BASE", "--highres-steps", "9"], "highres_steps is for a second pass"),
        (["a cat", "--base", "BASE", "--highres-scale", "2", "--init", "PICTURE"], "highres_scale and init do not go"),
        (["a cat", "--base", "BASE", "--highres-scale", "1.1", "--size", "64"], "makes 64x64 of 64x64"),
        (["a cat --s 1", "--base", "BASE", "--highres-scale", "2"], "0.5 of 1 steps is less than one"),
        (
            ["a cat", "--base", "BASE", "--highres-scale", "2", "--highres-upscaler", "esrgan"],
            "there are latent, lanczos",
        ),
        (["a cat", "--base", "BASE", "--highres-scale", "2", "--highres-upscaler", "no.such"], "no module named 'no'"),
        (["a cat", "--base", "BASE", "--init", "gone.png"], "gone.png"),
        (["a cat", "--base", "BASE", "--init", "BASE"], "mini.safetensors"),
        (["a cat", "--base", "BASE", "--init", "PICTURE", "--denoise", "0.01"], "0.01 of 20 steps is less than one"),
        (["a cat", "--base", "BASE", "--device", "tpu"], "--device tpu: not here"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(
    arguments: list[str], said: str, base: Path, loras: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def load(*args: object, **options: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(model_families, "load", load)
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other.safetensors"
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    kohya.write(other, {
        f"{key}.lora_down.weight": torch.ones(4, 1024), f"{key}.lora_up.weight": torch.ones(320, 4),
        f"{key}.alpha": torch.tensor(4.0),
    }, {"ss_v2": "True"})  # fmt: skip
    Image.new("RGB", (64, 64)).save(tmp_path / "init.png")
    Image.new("L", (72, 64)).save(tmp_path / "wider.png")
    places = {
        "BASE": str(base),
        "WIDER": str(tmp_path / "wider.png"),
        "PICTURE": str(tmp_path / "init.png"),
        "ROBOT": str(loras["robot"]),
        "SD2": str(other),
    }
    assert main(["generate", *(places.get(word, word) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and "Traceback" not in error
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize("options", [["--sampler", "k_lms"], ["--sigmas", "beta"]])
def test_a_package_that_is_missing_is_told_before_the_model_is_loaded(
    options: list[str], base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.delattr(model_families, "load")
    assert main(["generate", "a cat", "--base", str(base), *options]) == 2
    assert "pip install 'lorasmith[samplers]'" in capsys.readouterr().err
