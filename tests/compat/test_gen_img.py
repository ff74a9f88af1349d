"""gen_img_diffusers.py: where its options go, and that it draws what the line draws that it prints."""

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lorasmith.checkpoint import open_checkpoint
from lorasmith.cli import main as lorasmith
from lorasmith.compat import entry
from lorasmith.model_families import target_shapes
from tests.compat.running import run
from tests.random_lora import make_lora, write_lora
from tests.tiny import write_tiny

NAME = "gen_img_diffusers.py"
SCRIPT = entry.SCRIPTS[NAME]
PROMPT = ["--prompt", "a cat"]
CONTROLS = ["--control_net_models", "a.pth", "b", "--guide_image_path", "p.png"]
ALWAYS = {
    "prompt": ["a cat"], "size": "512,512", "steps": 50, "guidance": 7.5, "sampler": "ddim", "output": "outputs",
    "precision": "fp32",
}  # fmt: skip


def translate(*words: str) -> dict[str, Any]:
    return entry.translate(SCRIPT, entry.read(SCRIPT, words))


def mistake(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert entry.main(NAME, words) == 2
    told = capsys.readouterr().err
    assert told.startswith("lorasmith: ") and "Traceback" not in told
    return told


# ---- where options go -----------------------------------------------------------------------------------------------


def test_what_is_left_out_is_as_it_was_there() -> None:
    assert translate(*PROMPT) == ALWAYS


LORAS = ["--network_module", "networks.lora", "lycoris.kohya", "--network_weights", "a.pt", "b.safetensors"]


@pytest.mark.parametrize(
    ("words", "places"),
    [
        ([r"--ckpt=..\models\a.ckpt", "--vae=b.pt"], {"base": "../models/a.ckpt", "vae": "b.pt"}),
        (["--v_parameterization", "--zero_terminal_snr"],
         {"prediction": "v_prediction", "zero_terminal_snr": True}),
        (["--v1", "--v2", "--no_preview", "--iter_same_seed", "--max_embeddings_multiples=3", "--shuffle_prompts"], {}),
        (["--clip_skip=2"], {"clip_skip": 2}),
        (["--textual_inversion_embeddings", "x.pt", "y.pt"], {"embeddings": ["x.pt", "y.pt"]}),
        (["--W=448"], {"size": "448,512"}),
        (["--H=640"], {"size": "512,640"}),
        (["--steps=28", "--scale=9", "--sampler=k_euler_a", "--seed=3"],
         {"steps": 28, "guidance": 9.0, "sampler": "k_euler_a", "seed": 3}),
        (["--images_per_prompt=4"], {"images": 4}),
        (["--n_iter=3"], {"images": 3}),
        (["--images_per_prompt=4", "--n_iter=3", "--batch_size=2"], {"images": 12, "batch_size": 2}),
        ([r"--outdir=..\out", "--sequential_file_name"], {"output": "../out", "name": "im_{number}"}),
        (["--image_path=i.png"], {"init": "i.png", "denoise": 0.8, "size": None}),
        (["--image_path=i.png", "--W=64"], {"init": "i.png", "denoise": 0.8, "size": None}),
        (["--image_path=i.png", "--mask_path=m.png", "--strength=0.3", "--W=64", "--H=96"],
         {"init": "i.png", "mask": "m.png", "denoise": 0.3, "size": "64,96"}),
        (["--mask_path=m.png", "--strength=0.3"], {}),  # both do nothing without a picture
        (["--highres_fix_scale=0.5", "--W=768", "--H=1024"],
         {"size": "384,512", "steps": 28, "highres_scale": 2.0, "highres_steps": 50, "highres_denoise": 0.8,
          "highres_upscaler": "lanczos"}),
        (["--highres_fix_scale=0.6", "--highres_fix_steps=12", "--steps=30", "--strength=0.4",
          "--highres_fix_latents_upscaling", "--highres_fix_strength=0.7"],
         {"size": "288,288", "steps": 12, "highres_scale": 512 / 288, "highres_steps": 30, "highres_denoise": 0.4,
          "highres_upscaler": "latent"}),
        (["--highres_fix_steps=12"], {}),  # it does nothing alone
        (["--bf16"], {"precision": "bf16"}),
        (["--xformers"], {"attention": "sdpa"}),
        (["--diffusers_xformers", "--sdpa"], {"attention": "sdpa"}),
        (LORAS, {"lora": ["a.pt", "b.safetensors"]}),
        ([*LORAS, "--network_mul", "0.7"], {"lora": ["a.pt", "b.safetensors"], "strength": [0.7, 1.0]}),
        ([*LORAS, "--network_mul", "0.7", "-0.5", "--network_dim", "4", "--network_merge"],
         {"lora": ["a.pt", "b.safetensors"], "strength": [0.7, -0.5], "fold": True}),
        (["--network_pre_calc"], {"fold": True}),
        (["--negative_scale=3"], {"negative_guidance": 3.0}),
    ],
)  # fmt: skip
def test_each_option_reaches_its_place(words: list[str], places: dict[str, Any]) -> None:
    expected = {place: value for place, value in (ALWAYS | places).items() if value is not None}
    assert translate(*PROMPT, *words) == expected


def test_prompts_of_a_file() -> None:
    assert translate("--from_file=p.txt") == {"prompts": "p.txt", **{k: v for k, v in ALWAYS.items() if k != "prompt"}}


def test_prompts_that_are_typed() -> None:
    assert translate("--interactive") == {
        "interactive": True, **{k: v for k, v in ALWAYS.items() if k != "prompt"}
    }  # fmt: skip


def test_fp16_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, precision, is_told in (("cpu", "fp32", True), ("cuda", "fp16", False)):
        monkeypatch.setattr("lorasmith.devices.choose_device", lambda asked, device=device: device)
        given = entry.read(SCRIPT, [*PROMPT, "--fp16"])
        values = entry.translate(SCRIPT, given)
        assert values["precision"] == precision
        assert ("--fp16 needs a GPU" in entry.page(SCRIPT, given, values)) == is_told


def test_controlnets_are_those_of_generate_and_short_lists_are_filled() -> None:
    words = ["--control_net_preps", "canny_50_150", "--control_net_weights", "0.8", "--control_net_ratios", "0.6"]
    values = translate(*PROMPT, *CONTROLS, *words)
    assert values["control"] == ["a.pth", "b"] and values["control_picture"] == ["p.png"]
    assert values["control_preprocessor"] == ["canny:50,150", "none"]
    assert values["control_weight"] == [0.8, 1.0] and values["control_range"] == ["0,0.6", "0,1"]
    plain = translate(*PROMPT, *CONTROLS, "--control_net_preps", "canny", "none")
    assert plain["control_preprocessor"] == ["canny:63,191", "none"]
    assert "control_picture" not in translate(*PROMPT, "--guide_image_path=p.png")


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "missing: what to draw, --prompt"),
        ([*PROMPT, "--from_file=p.txt"], "--prompt and --from_file both say what to draw"),
        (["--from_file=gone.txt"], "gone.txt"),
        (["--from_file=p.csv", "--ckpt=BASE"], "--from_file p.csv: expected a file that ends in .txt"),
        (PROMPT, "missing: --ckpt"),
        ([*PROMPT, "--ckpt=BASE", "--sampler=eular"], "did you mean euler"),
        ([*PROMPT, "--fp16", "--bf16"], "--fp16 and --bf16 contradict"),
        ([*PROMPT, "--network_weights=a.pt"], "--network_module is given 0 modules and --network_weights 1 files"),
        ([*PROMPT, "--network_module=networks.lora"], "1 modules and --network_weights 0 files"),
        ([*PROMPT, "--network_module=my.module"], "--network_module my.module: expected one of networks.lora"),
        ([*PROMPT, *LORAS, "--network_mul", "1", "2", "3"], "--network_mul is given 3 numbers for 2 files"),
        ([*PROMPT, "--steps=0"], "--steps 0: expected"),
        ([*PROMPT, "--scale=-1"], "--scale -1"),
        ([*PROMPT, "--W=60"], "--W 60: expected a multiple of 8"),
        ([*PROMPT, "--H=0"], "--H 0: expected a multiple of 8"),
        ([*PROMPT, "--n_iter=0"], "--n_iter 0: expected a whole number above 0"),
        ([*PROMPT, *LORAS, "--network_mul", "nan"], "--network_mul nan: expected a number"),
        ([*PROMPT, "--image_path=i.png", "--strength=2"], "--strength 2.0: expected"),
        ([*PROMPT, "--interactive"], "--prompt and --interactive both say what to draw"),
        ([*PROMPT, "--control_net_lllite_models=a"], "--control_net_lllite_models is refused: it is for SDXL"),
        ([*PROMPT, "--control_net_models", "a", "b"], "--guide_image_path is given 0 pictures for 2"),
        ([*PROMPT, *CONTROLS, "--control_net_preps=hed"], "--control_net_preps hed: expected none, canny"),
        ([*PROMPT, *CONTROLS, "--control_net_ratios", "1", "1", "1"], "--control_net_ratios is given 3 values for 2"),
        ([*PROMPT, *CONTROLS, "--control_net_weights=1", "--control_net_multipliers=1"], "say the same; leave one"),
        ([*PROMPT, *CONTROLS, "--control_net_ratios=0"], "'0,0': expected two numbers"),
        ([*PROMPT, "--highres_fix_scale=2"], "--highres_fix_scale 2: expected a share of --W and --H"),
        ([*PROMPT, "--highres_fix_scale=0.5", "--image_path=i.png"], "--highres_fix_scale and --image_path do not go"),
        ([*PROMPT, "--highres_fix_scale=0.6", "--H=768"], "0.6 of 512x768 is 288x448, for"),
        ([*PROMPT, "--highres_fix_scale=0.5", "--highres_fix_upscaler=tools.esrgan"], "--highres-upscaler my_module"),
        (["--prompt=a cat --w 640", "--highres_fix_scale=0.5"], "--w is refused with --highres_fix_scale"),
        ([*PROMPT, "--clip_guidance_scale=100"], "--clip_guidance_scale is refused"),
        (["--prompt=a cat --am 0.5", "--ckpt=BASE"], "--am 0.5 has 1 strengths for 0 LoRAs"),
        (["--prompt=a cat --t 0.5", "--ckpt=BASE"], "--t 0.5 is for drawing on from a picture"),
        (["--prompt=a cat --d 1,2", "--images_per_prompt=3", "--ckpt=BASE"], "has 2 seeds, and --images 3"),
        (["--prompt=a cat --dsd1 3"], "--dsd1 is refused: Deep Shrink"),
        (["--prompt=a cat --q 1", "--ckpt=BASE"], "there is no option --q"),
        ([*PROMPT, "--netwrk_mul=1"], "did you mean --network_mul?"),
    ],
)
def test_mistakes_are_told_in_old_words(
    capsys: pytest.CaptureFixture[str], base: Path, words: list[str], told: str
) -> None:
    assert told in mistake(capsys, *(word.replace("BASE", str(base)) for word in words))


def test_what_stands_in_a_line_of_a_file_is_looked_at_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("# a cat --c dog\na cat --w 64\na dog --ow 2\n")
    told = mistake(capsys, f"--from_file={tmp_path / 'p.txt'}")
    assert "prompt 'a dog --ow 2': --ow is refused" in told


# ---- drawing --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "model.ckpt", layout="ckpt", resolution=64)


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path), dtype=int)


@pytest.fixture
def typed_in(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder beside those of the model and of two LoRAs."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model.ckpt").symlink_to(base)
    with open_checkpoint(base) as checkpoint:
        shapes = target_shapes(checkpoint)
    shapes = {name: shapes[name] for name in sorted(shapes)[::8]}
    for number in (1, 2):
        (tmp_path / f"lora{number}").mkdir()
        tensors = {key: 3 * tensor for key, tensor in make_lora(shapes, seed=number).items()}
        write_lora(tmp_path / f"lora{number}" / f"char{number}.safetensors", tensors)
    (tmp_path / "sd-scripts").mkdir()
    monkeypatch.chdir(tmp_path / "sd-scripts")
    return tmp_path


COMMON = [
    *["--ckpt", r"..\models\model.ckpt", "--outdir", r"..\old", "--W", "64", "--H", "64", "--steps", "2"],
    *["--seed", "7", "--xformers", "--fp16", "--max_embeddings_multiples", "3"],
]
ONE = ["--network_module", "networks.lora", "--network_weights", r"..\lora1\char1.safetensors", "--network_dim", "4"]


def test_a_lora_is_drawn_as_the_printed_line_draws_it(typed_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ["--prompt", "a cat --n blurred --d 5 --w 72"]
    assert run(NAME, *COMMON, *prompt, *ONE, "--network_mul", "0.7") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("lorasmith generate "))
    (old,) = (typed_in / "old").iterdir()
    assert old.name == "00001-5.png" and Image.open(old).size == (72, 64)

    assert lorasmith([*shlex.split(line)[1:], "--output", "../printed"]) == 0
    own = ["generate", "a cat <lora:char1:0.7> --n blurred --d 5 --w 72", "--base", "../models/model.ckpt"]
    settings = ["--size=64", "--steps=2", "--sampler=ddim", "--lora-folder=../lora1", "--output=../own"]
    precision = "fp16" if torch.cuda.is_available() else "fp32"
    assert lorasmith([*own, *settings, "--precision", precision]) == 0
    (printed,), (ours,) = (typed_in / "printed").iterdir(), (typed_in / "own").iterdir()
    assert np.array_equal(pixels(old), pixels(printed)) and np.array_equal(pixels(old), pixels(ours))

    assert run(NAME, *COMMON, *prompt, *ONE, "--outdir", "../whole") == 0  # at strength 1
    (whole,) = (typed_in / "whole").iterdir()
    assert np.abs(pixels(old) - pixels(whole)).max() > 1


def test_several_loras_and_several_pictures_of_a_file_of_prompts(typed_in: Path) -> None:
    (typed_in / "p.txt").write_text("# two\na cat\na dog --d 3\n")
    modules = ["--network_module", "networks.lora", "networks.lora", "--network_weights"]
    files = [r"..\lora1\char1.safetensors", r"..\lora2\char2.safetensors", "--network_mul", "0.7", "-0.5"]
    count = ["--images_per_prompt=2", "--batch_size=2", "--sequential_file_name"]
    assert run("gen_img.py", "--from_file=../p.txt", *COMMON, *modules, *files, *count) == 0
    found = sorted((typed_in / "old").iterdir())
    assert [path.name for path in found] == [f"im_{number:05d}.png" for number in (1, 2, 3, 4)]
    texts = [Image.open(path).info["parameters"] for path in found]
    assert [re.findall(r"Seed: (\d+)", text) for text in texts] == [["7"], ["8"], ["3"], ["4"]]
    assert all("<lora:char1:0.7> <lora:char2:-0.5>" in text for text in texts)


def test_a_line_says_what_is_meant_for_it_alone(typed_in: Path) -> None:
    """Strengths of the LoRAs, the scale of the negative prompt, two seeds, and the file's name."""
    modules = ["--network_module", "networks.lora", "networks.lora", "--network_weights"]
    files = [r"..\lora1\char1.safetensors", r"..\lora2\char2.safetensors", "--network_mul", "0.7", "-0.5"]
    line = "--prompt={e$$a|the} cat --d 5,9 --nl 2 --am 0,0.4 --f one {seed}.webp"
    assert run(NAME, line, *COMMON, *modules, *files) == 0
    found = {path.name: text_of(path) for path in (typed_in / "old").iterdir()}
    assert sorted(found) == ["one 5-2.webp", "one 5.webp", "one 9-2.webp", "one 9.webp"]
    assert "the cat <lora:char2:0.4>\n" in found["one 9-2.webp"] and "Seed: 9," in found["one 9-2.webp"]
    assert all("<lora:char1" not in text and "Negative guidance: 2," in text for text in found.values())


def text_of(path: Path) -> str:
    return Image.open(path).getexif().get_ifd(0x8769)[0x9286][8:].decode("utf-16-be")


def test_drawing_on_from_a_picture(typed_in: Path) -> None:
    Image.linear_gradient("L").resize((72, 64)).save(typed_in / "i.png")
    drawn = ["--image_path=../i.png", "--strength=0.5"]
    words = [word for word in COMMON if word not in ("--W", "--H", "64")]
    assert run(NAME, *PROMPT, *words, *drawn) == 0
    (picture,) = (typed_in / "old").iterdir()
    assert Image.open(picture).size == (72, 64)
    assert "Denoising strength: 0.5" in Image.open(picture).info["parameters"]
