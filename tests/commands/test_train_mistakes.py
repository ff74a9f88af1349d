"""Every mistake that a user can make with `lorasmith train`: one message with the fix, exit code 2, nothing touched.

Each test goes through the front door. What can be known before a model is loaded must be told before (`refused` fails
when a model is loaded), and no file may appear, vanish or change.
"""

import json
import os
import pickle
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lorasmith import model_families
from lorasmith.cli import main
from tests.tiny import write_tiny

COMMON = ["--resolution", "64", "--no-before-after", "--no-tensorboard", "--no-progress", "--rank", "2"]
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base models of both families, pictures, and a finished run in `run`."""
    place = tmp_path_factory.mktemp("place")
    write_tiny(place / "models" / "sd1.safetensors", "sd1")
    write_tiny(place / "models" / "sd2.safetensors", "sd2")
    write_pictures(place / "pictures" / "2_sks thing")
    assert main([*command(place, "--output", str(place / "run")), "--steps", "1"]) == 0
    return place


def write_pictures(folder: Path, number: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        Image.effect_noise((80, 64), 40 + 20 * index).convert("RGB").save(folder / f"{index}.png")
    return folder


def command(place: Path, *options: str) -> list[str]:
    """Return a sound command line, with further options, the last of which count."""
    given = ["--base", str(place / "models" / "sd1.safetensors"), "--images", str(place / "pictures")]
    return ["train", *given, *COMMON, *options]


def tree(*roots: Path) -> dict[str, tuple[int, int]]:
    """Return every path below the roots with its size and the time it was changed."""
    found = [path for root in roots for path in [root, *sorted(root.rglob("*"))]]
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in found}


def one_message(error: str) -> str:
    """Return the message that stands on stderr, if that is all there is: a sentence, then perhaps a list."""
    lines = error.splitlines()
    assert lines and all(line.startswith("lorasmith: ") for line in lines), error
    told = [line.removeprefix("lorasmith: ") for line in lines]
    assert all(line.startswith("  ") for line in told[1:]), f"more than one message:\n{error}"
    return "\n".join(told)


@pytest.fixture
def refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """A function that runs a command line, checks that it is refused as it should be, and returns the message."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded, but the mistake could have been told before")

    monkeypatch.setattr(model_families, "load", load)

    def run(*options: str, whole: list[str] | None = None) -> str:
        arguments = command(place, "--output", str(tmp_path / "out"), *options) if whole is None else whole
        before = tree(place, tmp_path)
        capsys.readouterr()
        code = main(arguments)
        out, error = capsys.readouterr()
        assert code == 2, out + error
        assert tree(place, tmp_path) == before
        return one_message(error)

    return run


def test_the_sound_command_is_not_refused(place: Path, tmp_path: Path) -> None:
    assert main([*command(place, "--output", str(tmp_path / "out")), "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()


# ---- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pictures", "given", "right"),
    [
        ("set/3_sks dog", "set/3_sks dog/deeper", "set/3_sks dog"),  # one level too low
        ("set/3_sks dog", "above", "above/photos"),  # one too high
    ],
)
def test_no_pictures(tmp_path: Path, refused: Refused, pictures: str, given: str, right: str) -> None:
    write_pictures(tmp_path / pictures)
    write_pictures(tmp_path / "above" / "photos")
    (tmp_path / given).mkdir(exist_ok=True)
    message = refused("--images", str(tmp_path / given))
    assert f"no pictures found in {tmp_path / given}" in message
    assert f"{tmp_path / right} holds 2" in message and "give that folder instead" in message


def test_no_such_folder_of_pictures(tmp_path: Path, refused: Refused) -> None:
    write_pictures(tmp_path / "photos")
    assert f"did you mean {tmp_path / 'photos'}?" in refused("--images", str(tmp_path / "photo"))


def test_no_regularization_pictures(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "empty").mkdir()
    assert f"no pictures found in {tmp_path / 'empty'}" in refused("--regularization", str(tmp_path / "empty"))


@pytest.fixture
def broken_pictures(tmp_path: Path) -> Path:
    folder = write_pictures(tmp_path / "broken" / "1_sks thing", 5)
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "2.png").write_bytes(b"")
    (folder / "3.png").write_bytes(b"no picture at all")
    return folder.parent


def test_unreadable_pictures_are_listed_all_at_once(broken_pictures: Path, refused: Refused) -> None:
    first, *others = refused("--images", str(broken_pictures)).splitlines()
    assert "3 of 5 pictures cannot be read" in first and "--skip-unreadable" in first
    assert [line.strip().partition(": ")[0] for line in others] == [
        str(broken_pictures / "1_sks thing" / f"{number}.png") for number in (1, 2, 3)
    ]
    for line, reason in zip(others, ("cut off", "0 bytes", "not a picture"), strict=True):
        assert reason in line


def test_unreadable_pictures_are_left_out_when_asked(
    place: Path, tmp_path: Path, broken_pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--images", str(broken_pictures), "--output", str(tmp_path / "out"), "--skip-unreadable"]
    assert main(command(place, *options, "--steps", "1")) == 0
    plan = " ".join(capsys.readouterr().out.split())
    assert "left out because they cannot be read (3 of 5)" in plan and "of 2 samples" in plan
    assert (tmp_path / "out" / "last.safetensors").is_file()


def test_nothing_is_left_when_all_pictures_are_unreadable(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "1_x").mkdir()
    (tmp_path / "1_x" / "a.png").touch()
    assert "none is left to train on" in refused("--images", str(tmp_path), "--skip-unreadable")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1", "cp1252"])
def test_captions_in_another_encoding(tmp_path: Path, refused: Refused, encoding: str) -> None:
    folder = write_pictures(tmp_path / "1_sks thing")
    for number in (0, 1):
        (folder / f"{number}.txt").write_bytes("ein schöner Hund".encode(encoding))
    message = refused("--images", str(tmp_path))
    assert "2 caption files are not UTF-8; save them again as UTF-8" in message
    assert str(folder / "0.txt") in message and str(folder / "1.txt") in message


def test_pictures_without_captions(tmp_path: Path, refused: Refused) -> None:
    message = refused("--images", str(write_pictures(tmp_path / "photos")))
    assert "2 pictures have no caption" in message and "--caption" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be opened"),
        ('{"0": {"caption": "é"}}'.encode("latin-1"), "is not UTF-8"),
        (b'{"0": {"caption": "a"}', "is not valid JSON"),
        (b'{"7": {"caption": "a"}}', "none of the 1 keys"),
        (b"[]", "it holds nothing"),
    ],
)
def test_metadata_json_that_cannot_be_used(
    tmp_path: Path, refused: Refused, content: bytes | None, message: str
) -> None:
    folder, captions = write_pictures(tmp_path / "photos"), tmp_path / "captions.json"
    if content is not None:
        captions.write_bytes(content)
    told = refused("--images", str(folder), "--captions", str(captions))
    assert message in told and str(captions) in told


# ---- base models ---------------------------------------------------------------------------------------------------


def tensors(*names: str, shape: tuple[int, ...] = (2, 2)) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name in names}


UNET = "model.diffusion_model.input_blocks.0.0.weight"
FLUX = "lora_unet_double_blocks_0_img_attn_proj"
NO_BASE_MODELS = {
    "SDXL": tensors(UNET, "conditioner.embedders.1.model.ln_final.weight", "model.diffusion_model.label_emb.0.0.bias"),
    "SDXL's refiner": tensors(UNET, "conditioner.embedders.0.model.ln_final.weight"),
    "SD3": tensors("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"),
    "FLUX": tensors("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"),
    "a ControlNet": tensors("control_model.input_blocks.0.0.weight"),
    "is a LoRA, not a base model": tensors("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"),
    "is a VAE alone": tensors("first_stage_model.encoder.conv_in.weight"),
    "is a textual inversion": tensors("emb_params", shape=(3, 768)),
    "no text encoder": tensors(UNET),
    "is no base model that is known": tensors("some.other.weight"),
}


@pytest.mark.parametrize("kind", NO_BASE_MODELS)
def test_a_model_that_is_no_sd1_or_sd2(tmp_path: Path, refused: Refused, kind: str) -> None:
    path = tmp_path / "given.safetensors"
    save_file(NO_BASE_MODELS[kind], path)
    message = refused("--base", str(path))
    assert message.startswith(str(path)) and kind in message
    assert "xpected" in message or "give" in message.lower()


def test_a_diffusers_folder_of_sdxl(tmp_path: Path, refused: Refused) -> None:
    for part, names in {
        "unet/diffusion_pytorch_model": ["add_embedding.linear_1.weight", "conv_in.weight"],
        "text_encoder/model": ["text_model.embeddings.token_embedding.weight"],
        "text_encoder_2/model": ["text_model.embeddings.token_embedding.weight"],
    }.items():
        path = tmp_path / "xl" / f"{part}.safetensors"
        path.parent.mkdir(parents=True)
        save_file(tensors(*names), path)
    assert "is not supported yet: this is SDXL" in refused("--base", str(tmp_path / "xl"))


def test_an_inpainting_model(place: Path, tmp_path: Path, refused: Refused) -> None:
    model = load_file(place / "models" / "sd1.safetensors")
    model[UNET] = torch.zeros(32, 9, 3, 3)
    save_file(model, tmp_path / "inpaint.safetensors")
    message = refused("--base", str(tmp_path / "inpaint.safetensors"))
    assert "an inpainting model (9 input channels)" in message and "Train on the plain model" in message


def test_a_model_without_vae_or_with_something_else_for_it(place: Path, tmp_path: Path, refused: Refused) -> None:
    model = load_file(place / "models" / "sd1.safetensors")
    without = {name: tensor for name, tensor in model.items() if not name.startswith("first_stage_model.")}
    save_file(without, tmp_path / "without.safetensors")
    assert "has no VAE in it; give one with --vae" in refused("--base", str(tmp_path / "without.safetensors"))
    assert "holds no VAE" in refused("--vae", str(tmp_path / "without.safetensors"))
    assert "no such file" in refused("--vae", str(tmp_path / "nowhere.safetensors"))


@pytest.mark.parametrize(
    ("given", "hint"), [("models/sd-1.safetensors", "did you mean"), ("models/nothing-like-it", "check the path")]
)
def test_a_missing_checkpoint(
    place: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused, given: str, hint: str
) -> None:
    def ask_the_hub(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", ask_the_hub)
    monkeypatch.chdir(place)
    message = refused("--base", given)
    assert f"{given}: there is no such file or folder" in message and hint in message


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.5, 0.999])
@pytest.mark.parametrize("layout", ["safetensors", "ckpt", "legacy"])
def test_a_truncated_checkpoint(place: Path, tmp_path: Path, refused: Refused, layout: str, share: float) -> None:
    source = place / "models" / "sd1.safetensors"
    if layout != "safetensors":
        source = tmp_path / "whole.ckpt"
        small = tensors(*(f"{UNET}.{number}" for number in range(300)), shape=(20, 20))
        torch.save({"state_dict": small}, source, _use_new_zipfile_serialization=layout == "ckpt")
    path = tmp_path / f"cut{source.suffix}"
    with source.open("rb") as file:
        path.write_bytes(file.read(int(source.stat().st_size * share)))
    message = refused("--base", str(path))
    assert str(path) in message and re.search("again|anew|other", message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"GIF89a....", "no model file"),
    ],
)
def test_something_else_under_the_name_of_a_model(
    tmp_path: Path, refused: Refused, content: bytes, message: str
) -> None:
    (tmp_path / "m.ckpt").write_bytes(content)
    assert message in refused("--base", str(tmp_path / "m.ckpt"))


@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_a_diffusers_folder_with_a_damaged_description(tmp_path: Path, refused: Refused, file: str) -> None:
    folder = write_tiny(tmp_path / "folder", layout="diffusers")
    (folder / file).write_text('{"cut": ')
    assert f"{folder / file} is not JSON" in refused("--base", str(folder))


def test_a_diffusers_folder_with_a_missing_part(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "folder" / "unet").mkdir(parents=True)
    index = tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    message = refused("--base", str(tmp_path / "folder"))
    assert "is incomplete: one.safetensors" in message and "get the model folder anew" in message


class Attack:
    """Makes a file when it is unpickled by anything that obeys."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.arguments


@pytest.mark.parametrize("option", ["--base", "--vae", "--weights"])
@pytest.mark.parametrize("layout", ["zip", "legacy", "bare"])
def test_a_pickle_that_tries_to_run_code(
    place: Path, tmp_path: Path, refused: Refused, option: str, layout: str
) -> None:
    mark, path = tmp_path / "it-ran", tmp_path / "model.ckpt"
    for attack in (Attack(os.system, f"touch {mark}"), Attack(exec, f"open({str(mark)!r}, 'w')")):
        content = {"state_dict": tensors(UNET), "callbacks": attack}
        if layout == "bare":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
        message = refused(whole=weights(place, tmp_path, option, str(path)))
        assert f"{path} tries to run code when it is loaded" in message and "Nothing of it was run" in message
        assert ".safetensors" in message and not mark.exists()
    pickle.loads(pickle.dumps(Attack(os.system, f"touch {mark}")))
    assert mark.exists()  # so the file really was an attack


@pytest.mark.parametrize(("base", "option", "title"), [("sd1", "--v2", "1.x"), ("sd2", "--no-v2", "2.x")])
def test_a_wrong_v2(place: Path, refused: Refused, base: str, option: str, title: str) -> None:
    message = refused("--base", str(place / "models" / f"{base}.safetensors"), option)
    assert f"is Stable Diffusion {title} by its text encoder, but --v2" in message and "leave --v2 out" in message


# ---- starting weights ----------------------------------------------------------------------------------------------


def write_lora(path: Path, base: Path, change: Callable[[dict[str, torch.Tensor]], object] = lambda _: None) -> Path:
    """Write a LoRA of rank 2 for all layers of a base model, changed as wanted."""
    from lorasmith.checkpoint import open_checkpoint

    with open_checkpoint(base) as checkpoint:
        shapes = model_families.target_shapes(checkpoint)
    lora: dict[str, torch.Tensor] = {}
    for name, (num_out, num_in, *kernel) in shapes.items():
        lora[f"{name}.lora_down.weight"] = torch.ones(2, num_in, *kernel)
        lora[f"{name}.lora_up.weight"] = torch.ones(num_out, 2, *(1 for _ in kernel))
    change(lora)
    save_file(lora, path)
    return path


def weights(place: Path, tmp_path: Path, *options: str) -> list[str]:
    """Return a command line that starts from weights, which bring their own rank."""
    whole = command(place, "--output", str(tmp_path / "out"), *options)
    at = whole.index("--rank")
    return whole[:at] + whole[at + 2 :]


def test_weights_of_another_family(place: Path, tmp_path: Path, refused: Refused) -> None:
    models = place / "models"
    path = write_lora(tmp_path / "two.safetensors", models / "sd2.safetensors")
    message = refused(whole=weights(place, tmp_path, "--weights", str(path)))
    assert f"--weights {path} is a LoRA for Stable Diffusion 2.x, but the base model is Stable Diffusion 1.x" in message
    one = write_lora(tmp_path / "one.safetensors", models / "sd1.safetensors")
    message = refused(whole=weights(place, tmp_path, "--weights", str(one), "--base", str(models / "sd2.safetensors")))
    assert f"--weights {one}" in message and "do not fit" in message and "this base model" in message


def test_weights_of_which_a_part_matches(place: Path, tmp_path: Path, refused: Refused) -> None:
    def shorten(lora: dict[str, torch.Tensor]) -> None:
        for name in [name for name in lora if name.startswith("lora_te_")]:
            del lora[name]

    path = write_lora(tmp_path / "unet.safetensors", place / "models" / "sd1.safetensors", shorten)
    message = refused(whole=weights(place, tmp_path, "--weights", str(path)))
    assert str(path) in message and "192 of the 264 layers to train match" in message
    assert "72 are missing from the file" in message and "--train" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("picture.png", None, "no model file"),
        ("other.safetensors", tensors("a", "b"), "is no LoRA (it holds a)"),
        ("base.safetensors", tensors(UNET), "is a whole model"),
        ("xl.safetensors", tensors(*(f"lora_te2_x.lora_{end}.weight" for end in ("up", "down"))), "is a LoRA for SDXL"),
        ("flux.safetensors", tensors(*(f"{FLUX}.lora_{end}.weight" for end in ("up", "down"))), "is a LoRA for FLUX"),
        ("missing.safetensors", None, "no such file"),
    ],
)
def test_weights_that_are_no_lora_for_it(
    place: Path, tmp_path: Path, refused: Refused, name: str, content: dict[str, torch.Tensor] | None, message: str
) -> None:
    if content is not None:
        save_file(content, tmp_path / name)
    elif name.endswith(".png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    told = refused(whole=weights(place, tmp_path, "--weights", str(tmp_path / name)))
    assert message in told and str(tmp_path / name) in told


def test_weights_of_another_type_than_is_trained(place: Path, tmp_path: Path, refused: Refused) -> None:
    def as_full(lora: dict[str, torch.Tensor]) -> None:
        for name in {key.partition(".")[0] for key in lora}:
            down, up = (lora.pop(f"{name}.lora_{end}.weight").flatten(1) for end in ("down", "up"))
            lora[f"{name}.diff"] = up @ down

    path = write_lora(tmp_path / "full.safetensors", place / "models" / "sd2.safetensors", as_full)
    given = weights(place, tmp_path, "--weights", str(path), "--base", str(place / "models" / "sd2.safetensors"))
    message = refused(whole=given)
    assert "brings adapters of another type than lora (330 full); give --adapter full" in message
    assert main([*given, "--adapter", "full", "--dry-run"]) == 0


def test_weights_of_another_program(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lora(tmp_path / "ours.safetensors", place / "models" / "sd1.safetensors")
    theirs, args = str(tmp_path / "theirs.safetensors"), ["--to", "diffusers", "--output"]
    assert main(["convert", str(path), *args, theirs]) == 0
    assert main([*weights(place, tmp_path, "--weights", theirs), "--dry-run"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "starting from" in printed and "theirs.safetensors, which fits" in printed


@pytest.mark.parametrize(("option", "value"), [("--rank", "3"), ("--alpha", "1")])
def test_weights_of_another_rank_or_alpha_than_asked_for(
    place: Path, tmp_path: Path, refused: Refused, option: str, value: str
) -> None:
    lora = ["--weights", str(write_lora(tmp_path / "lora.safetensors", place / "models" / "sd1.safetensors"))]
    message = refused(whole=weights(place, tmp_path, *lora, option, value))
    assert "brings rank 2 and alpha 2" in message and f"{option} {value} is given; leave it out" in message
    assert main([*weights(place, tmp_path, *lora, option, "2"), "--dry-run"]) == 0  # that is no contradiction


def test_weights_with_nan(place: Path, tmp_path: Path, refused: Refused) -> None:
    path = write_lora(
        tmp_path / "nan.safetensors",
        place / "models" / "sd1.safetensors",
        lambda lora: lora[next(iter(lora))].fill_(torch.nan),
    )
    message = refused(whole=weights(place, tmp_path, "--weights", str(path)))
    assert "holds NaN or infinity in 1 tensors" in message and "earlier save" in message


# ---- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--rank", "4000"], ["rank 4000 is larger than", "at most 24", "--rank"]),
        (["--rank", "0"], ["--rank 0: expected a whole number above 0"]),
        (["--resolution", "100"], ["100 is not a multiple of 8", "use 96 or 104"]),
        (["--resolution", "64,100"], ["100 is not a multiple of 8"]),
        (["--sample-size", "65"], ["65 is not a multiple of 8"]),
        (["--resolution", "big"], ["--resolution big: expected one side or width,height"]),
        (["--batch-size", "0"], ["--batch-size 0: expected a whole number above 0"]),
        (["--learning-rate", "-0.1"], ["--learning-rate -0.1: expected a number above 0"]),
        (["--learning-rate", "nan"], ["--learning-rate nan: expected a number above 0"]),
        (["--caption-dropout", "1.5"], ["at most 1"]),
        (["--steps", "5", "--epochs", "2"], ["steps and epochs are both given", "give one"]),
        (["--train", "text_encoder", "--unet-lr", "0.1"], ["unet_lr is given, but train = text_encoder", "leave out"]),
        (["--train", "unet", "--text-encoder-lr", "0.1"], ["text_encoder_lr is given, but train = unet"]),
        (
            ["--prompts", "a cat", "--no-before-after"],
            ["prompts are given, but nothing draws them", "sample_every_steps"],
        ),
        (["--cache-latents", "--color"], ["cache_latents keeps each picture as it is, but color", "leave out"]),
        (["--cache-latents", "--color", "--random-crop"], ["but color and random_crop"]),
        (["--buckets", "--bucket-min", "512", "--bucket-max", "256"], ["bucket_min = 512", "swap them"]),
        (["--buckets", "--bucket-step", "60"], ["bucket_step = 60 is not a multiple of 8"]),
        (["--buckets"], ["the resolution is 64x64, but the sides of buckets go from 256", "leave buckets off"]),
        (["--bucket-max", "512"], ["bucket_max would change the buckets, but they are off", "add buckets"]),
        (["--lr-warmup-steps", "10", "--steps", "10"], ["lr_warmup_steps = 10 is not below steps = 10", "lower"]),
        (["--lr-warmup-steps", "8", "--epochs", "2"], ["lr_warmup_steps = 8 is not below the run's 8 steps", "lower"]),
        (["--captions", "c.json", "--caption-extension", ".txt"], ["caption_extension is for caption files"]),
        (["--prior-loss-weight", "0.5"], ["prior_loss_weight is for regularization pictures", "give it"]),
        (["--name", "../last"], ["no plain file name", "--output"]),
        (["--optimizer", "adamv"], ["no optimizer named 'adamv'", "did you mean adamw"]),
        (["--optimizer", "torch.optim.LBFGS"], ["--optimizer torch.optim.LBFGS cannot be used"]),
        (["--optimizer", "no.such.thing"], ["no module named 'no'"]),
        (["--adapter", "lroa"], ["no adapter named 'lroa'", "did you mean lora"]),
        (["--device", "gpu"], ["--device gpu: not here", "cpu"]),
        (["--device", "cuda:99"], ["--device cuda:99: not here"]),
        (["--precision", "fp15"], ["expected one of auto, fp32, bf16, fp16"]),
        (["--prompts", "nowhere.txt", "--before-after"], ["--prompts nowhere.txt"]),
        (["--prompts", "a cat --am 0.5", "--before-after"], ["prompt 'a cat': --am is for lorasmith generate"]),
        (["--prompts", "a cat --d 1,2", "--before-after"], ["several seeds are for lorasmith generate; give one"]),
        (["--resume", "nowhere"], ["--resume nowhere: there is no such folder"]),
        (["--resume", "x", "--overwrite"], ["resume goes on with a run, but overwrite starts afresh"]),
        (["--config", "nowhere.toml"], ["nowhere.toml: there is no such file"]),
        (["--flipp"], ["no option --flipp; did you mean --flip?"]),
    ],
)
def test_options_that_cannot_be_meant(refused: Refused, options: list[str], parts: list[str]) -> None:
    message = refused(*options)
    assert [part for part in parts if part not in message] == [], message


def test_the_thing_itself_as_regularization(place: Path, refused: Refused) -> None:
    assert "are the same folder" in refused("--regularization", f"{place / 'pictures'}/.")


def test_captions_without_the_folder_of_their_pictures(place: Path, refused: Refused) -> None:
    whole = ["train", "--base", str(place / "models" / "sd1.safetensors"), "--captions", "c.json"]
    assert "images, the folder of its pictures, is missing" in refused(whole=whole)


@pytest.mark.parametrize("left_out", ["base", "images", "output"])
def test_required_options_are_asked_for_all_at_once(refused: Refused, left_out: str) -> None:
    every = {"base": "m.safetensors", "images": "photos", "output": "my-lora"}
    given = [word for name, value in every.items() if name != left_out for word in (f"--{name}", value)]
    message = refused(whole=["train", *given])
    assert message.startswith(f"missing: --{left_out} (") and "For example: lorasmith train" in message
    assert [name for name in every if f"--{name} (" in refused(whole=["train"])] == list(every)


def test_a_mistake_in_a_file_of_options_names_its_line(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "run.toml").write_text("[training]\nsteps = 5\nepochs = 2\n")
    assert "steps and epochs are both given" in refused("--config", str(tmp_path / "run.toml"))
    (tmp_path / "run.toml").write_text("[network]\nrnak = 5\n")
    assert "run.toml, line 2: rnak = 5" in refused("--config", str(tmp_path / "run.toml"))


# ---- the output folder and an older run ----------------------------------------------------------------------------


def test_an_output_folder_that_holds_a_run(place: Path, refused: Refused) -> None:
    message = refused("--output", str(place / "run"))
    assert f"{place / 'run'} already holds a run" in message
    for way_out in ("--resume", "another --output", "--overwrite"):
        assert way_out in message
    assert "already holds a run" in refused("--output", str(place / "run"), "--name", "other")


def test_overwrite_moves_the_old_run_aside_and_is_not_remembered(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    (tmp_path / "run" / "notes.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    options = ["--output", str(tmp_path / "run"), "--steps", "2", "--overwrite"]
    assert main(command(place, *options)) == 0
    for name, content in before.items():
        where = tmp_path / "run" / ("" if name == "notes.md" else "old-1") / name
        assert where.read_bytes() == content
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "3"]) == 0
    assert not (tmp_path / "run" / "old-2").exists()


@pytest.mark.parametrize("below", ["", "deeper", "deeper/and/deeper"])
def test_an_output_folder_that_is_a_file(tmp_path: Path, refused: Refused, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    message = refused("--output", str(tmp_path / "file" / below))
    assert f"{tmp_path / 'file'} is a file, not a folder; choose another place" in message


def test_an_output_folder_that_is_a_link_to_nothing(tmp_path: Path, refused: Refused) -> None:
    try:
        (tmp_path / "link").symlink_to(tmp_path / "gone")
    except OSError:
        pytest.skip("no links can be made here")
    assert "is a link to nothing" in refused("--output", str(tmp_path / "link"))


def test_an_output_folder_without_the_right_to_write(tmp_path: Path, refused: Refused) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    message = refused("--output", str(folder))
    assert f"{folder} cannot be written to" in message and "choose another place or change its rights" in message


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that nobody may write to")
def test_an_output_folder_on_a_file_system_that_cannot_be_written_to(refused: Refused) -> None:
    assert "/proc cannot be written to" in refused("--output", "/proc/new/run")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--rank", "8"], ["network.rank was 2, now 8", "new run from the saved LoRA with --weights"]),
        (["--learning-rate", "0.5", "--seed", "1"], ["optimizer.learning_rate", "training.seed"]),
        ([], ["this run is complete: 1 of 1 steps", "--steps"]),
        (["--steps", "4", "--batch-size", "2"], ["--batch-size"]),
    ],
)
def test_a_resumed_run_keeps_its_options(place: Path, refused: Refused, options: list[str], parts: list[str]) -> None:
    message = refused(whole=["train", "--resume", str(place / "run"), *options])
    assert [part for part in parts if part not in message] == [], message


def test_a_run_that_goes_on_elsewhere_writes_over_no_other_run(place: Path, tmp_path: Path, refused: Refused) -> None:
    shutil.copytree(place / "run", tmp_path / "other")
    onward = ["train", "--resume", str(place / "run"), "--steps", "2"]
    message = refused(whole=[*onward, "--output", str(tmp_path / "other")])
    assert f"{tmp_path / 'other'} already holds a run" in message


def test_a_run_goes_on_where_it_lies_however_that_is_spelled(place: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(place / "run", tmp_path / "moved")  # its options name the place where it was
    assert main(["train", "--resume", str(folder), "--steps", "2"]) == 0
    assert (folder / "states" / "step-00000002").is_dir() and not (place / "run/states/step-00000002").exists()
    state = folder / "states" / "step-00000002"
    assert main(["train", "--resume", str(state), "--output", f"{folder}/../moved", "--steps", "3"]) == 0
    assert (folder / "states" / "step-00000003").is_dir()


def test_a_resumed_run_keeps_its_pictures(place: Path, tmp_path: Path, refused: Refused) -> None:
    write_pictures(tmp_path / "2_other thing", 1)
    whole = ["train", "--resume", str(place / "run"), "--steps", "4", "--images", str(tmp_path)]
    message = refused(whole=whole)
    assert "the pictures, captions or masks are not those" in message and "Put them back" in message


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", b'{"step": '),
        ("state.json", b"{}"),
        ("network.safetensors", b"cut"),
        ("optimizer.pt", b""),
        ("run.toml", None),
    ],
)
def test_a_damaged_state(place: Path, tmp_path: Path, refused: Refused, file: str, content: bytes | None) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    path = next((tmp_path / "run").rglob(file))
    path.unlink() if content is None else path.write_bytes(content)
    message = refused(whole=["train", "--resume", str(tmp_path / "run"), "--steps", "4"])
    assert str(path) in message and "missing" in message and "start the run again" in message


# ---- while training ------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """A function that runs a command that fails on the way, and returns the message; afterwards nothing is NaN."""
    out = tmp_path / "out"

    def run(*options: str) -> str:
        options = ("--output", str(out), "--save-every-steps", "1", "--train", "unet", *options)
        assert main(command(place, *options)) == 2
        return one_message(capsys.readouterr().err)

    yield run
    saved = [*out.glob("*.safetensors"), *out.glob("states/*/network.safetensors")]
    assert saved and all(tensor.isfinite().all() for path in saved for tensor in load_file(path).values())
    assert list(out.rglob(".*")) == []


def test_a_loss_that_is_not_finite(tmp_path: Path, stopped: Callable[..., str]) -> None:
    options = ["--learning-rate", "1e30", "--steps", "9", "--save-precision", "float"]
    message = stopped(*options)
    found = re.search(r"the loss became (nan|inf) at step (\d+)", message)
    assert found and "--learning-rate" in message and "--precision" in message and "--vae" in message
    steps = [json.loads(line)["step"] for line in (tmp_path / "out/logs/loss.jsonl").read_text().splitlines()]
    assert steps == list(range(1, int(found[2])))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == [
        f"step-{step:08d}.safetensors" for step in steps
    ]
    told, _, way_on = message.partition("; from there with a tenth of the learning rate: ")
    assert f"The last whole state is that of step {steps[-1]}" in told
    command = shlex.split(way_on)
    assert command[:2] == ["lorasmith", "train"] and command[command.index("--learning-rate") + 1] == "1e+29"
    assert main([*command[1:], "--dry-run"]) == 0


def test_a_loss_that_is_not_finite_at_the_first_step(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorasmith import losses

    monkeypatch.setattr(losses, "per_sample", lambda a, b, *rest: (a - b).mean((1, 2, 3)) * torch.nan)
    assert main(command(place, "--output", str(tmp_path / "out"))) == 2
    message = one_message(capsys.readouterr().err)
    assert "at step 1" in message and "state" not in message


@pytest.mark.parametrize("options", [[], ["--save-every-steps", "9", "--state-every-steps", "1"]])
def test_weights_that_become_nan_under_a_finite_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: Callable[..., str], options: list[str]
) -> None:
    step = torch.optim.AdamW.step

    def poison(self: torch.optim.AdamW, *arguments: Any, **named: Any) -> Any:
        result = step(self, *arguments, **named)
        weight = self.param_groups[0]["params"][0]
        if self.state[weight]["step"] == 2:
            weight.data.fill_(torch.nan)
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", poison)
    message = stopped("--steps", "2" if not options else "3", *options)
    assert re.search("NaN or infinit[ey]", message) and "--learning-rate" in message
    assert [path.name for path in (tmp_path / "out" / "states").iterdir()] == ["step-00000001"]


def test_a_disk_that_is_full_at_the_second_save(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: Callable[..., str]
) -> None:
    out, fsync = tmp_path / "out", os.fsync

    def sync(handle: int) -> None:
        if (out / "states" / "step-00000001").exists() and stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", sync)
        message = stopped("--steps", "3", "--no-disk-cache")
    assert f"{out / 'step-00000002.safetensors'} could not be saved: the disk is full" in message
    assert re.search(r"\(\d+ MiB free\)", message) and "make room" in message and "--resume" in message
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["step-00000001.safetensors"]
    assert main(["train", "--resume", str(out)]) == 0
    assert (out / "last.safetensors").is_file()


def test_a_disk_that_is_full_when_the_loss_is_logged(
    monkeypatch: pytest.MonkeyPatch, stopped: Callable[..., str]
) -> None:
    from lorasmith.loss_log import LossLog

    append = LossLog.append

    def full(self: LossLog, step: int, loss: float, **facts: float) -> None:
        if step == 2:
            raise OSError(28, "No space left on device")
        append(self, step, loss, **facts)

    monkeypatch.setattr(LossLog, "append", full)
    message = stopped("--steps", "3")
    assert "the disk is full; make room" in message and "--resume" in message


def test_too_little_memory(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(model_families, "load", load)
    assert main(command(place, "--output", str(tmp_path / "out"))) == 2
    message = one_message(capsys.readouterr().err)
    assert "too little memory" in message and "--gradient-checkpointing" in message and "2 GiB" in message


@pytest.fixture
def small_files() -> Iterator[None]:
    """The kernel refuses to let a file grow above 100 KiB, so a LoRA breaks off in the middle."""
    resource = pytest.importorskip("resource", reason="Windows has no limit on the size of a file")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 * 2**10, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_breaks_off_is_not_left_behind(
    place: Path, tmp_path: Path, small_files: None, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--output", str(tmp_path / "out"), "--steps", "1", "--save-precision", "float"]
    assert main(command(place, *options)) == 2
    message = one_message(capsys.readouterr().err)
    assert str(tmp_path / "out" / "last.safetensors") in message and "MiB free" in message
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert not list((tmp_path / "out").rglob(".*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MiB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(place: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = small_disk / "out"
    options = ["--output", str(out), "--steps", "6", "--save-every-steps", "1", "--state-every-steps", "0"]
    assert main(command(place, *options)) == 2
    message = one_message(capsys.readouterr().err)
    assert "the disk is full" in message and "make room" in message and str(out) in message
    saved = sorted(out.glob("*.safetensors"))
    assert saved and all(len(load_file(path)) == 3 * 264 for path in saved)
    assert not list(out.rglob(".*"))


# ---- as a program --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--rank", "4000"], "rank 4000 is larger"),
        (["--steps", "1", "--epochs", "1"], "steps and epochs"),
    ],
)
def test_a_program_ends_with_code_2_and_the_message_alone(
    place: Path, tmp_path: Path, options: list[str], part: str
) -> None:
    arguments = command(place, "--output", str(tmp_path / "out"), *options)
    done = subprocess.run([sys.executable, "-m", "lorasmith", *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert part in one_message(done.stderr)
    assert list(tmp_path.iterdir()) == []
