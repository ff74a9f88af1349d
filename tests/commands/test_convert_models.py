"""`lorasmith convert` of base models: one file to a diffusers folder and back, exact and readable by others."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorasmith.demo
from lorasmith import model_conversion, model_families, rewriting
from lorasmith.checkpoint import open_checkpoint
from lorasmith.cli import main
from lorasmith.models import tokenizer
from tests.tiny import write_tiny

LAST = "cond_stage_model.model.transformer.resblocks.23."
POSITION_IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
PREDICTIONS = {"sd1": "epsilon", "sd2": "v_prediction"}
UNUSED = ("cond_stage_model.model.text_projection", "cond_stage_model.model.logit_scale")
PICTURES = Path(lorasmith.demo.__file__).parent / "pictures"
CAPTIONS = ["a photo of a masterpiece", ""]


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def single(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of a miniature, fp16."""
    path = tmp_path_factory.mktemp(family) / "model.safetensors"
    return write_tiny(path, family, prediction=PREDICTIONS[family], dtype=torch.float16)


@pytest.fixture(scope="module")
def folder(single: Path) -> Path:
    """The same as a folder, converted."""
    output = single.with_name("folder")
    assert main(["convert", str(single), "--to", "diffusers", "--output", str(output)]) == 0
    return output


@cache
@torch.no_grad()
def results(path: Path) -> dict[str, Tensor]:
    """What the model computes; a path is asked for only when what is there stays."""
    with open_checkpoint(path) as checkpoint:
        model = model_families.load(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    cond = model.encode_text(CAPTIONS[:1])
    mean, _ = model.encode_image(torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1)
    return {
        "text": cond["text"], "step": model(latents, torch.tensor([500]), cond), "latents": mean,
        "pixels": model.decode(latents), "resolution": torch.tensor(model_families.describe(checkpoint).resolution),
    }  # fmt: skip


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


def test_there_and_back(
    family: str, single: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    back = tmp_path / "back.safetensors"
    assert main(["convert", str(folder), "--to", "checkpoint", "--output", str(back)]) == 0
    told = capsys.readouterr().out
    expected, found = load_file(single), load_file(back)
    if family == "sd1":
        assert POSITION_IDS in told
    else:
        assert "layer 24 of the text encoder (a copy of the one before): 12 tensors" in told
        unused = [name for name in expected if name.startswith(LAST)]
        for name in unused:
            assert torch.equal(found.pop(name), found[name.replace(".23.", ".22.")])
            expected.pop(name)
        for name in UNUSED:
            assert name in told and found.pop(name).shape == expected.pop(name).shape
    assert_same(found, expected)
    assert_same(results(single), results(folder))
    assert_same(results(folder), results(back))


def test_a_folder_is_the_same_after_one_file(family: str, folder: Path, tmp_path: Path) -> None:
    one = tmp_path / "one.safetensors"
    assert main(["convert", str(folder), "--to", "checkpoint", "--output", str(one)]) == 0
    assert main(["convert", str(one), "--to", "diffusers", "--output", str(tmp_path / "again")]) == 0
    files = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    assert files == sorted(f.relative_to(tmp_path / "again") for f in (tmp_path / "again").rglob("*") if f.is_file())
    for file in files:
        if file.suffix == ".safetensors":
            assert_same(load_file(folder / file), load_file(tmp_path / "again" / file))
        else:
            assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_diffusers_reads_the_folder(family: str, single: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    load: Any = StableDiffusionPipeline.from_pretrained
    pipeline = load(folder, torch_dtype=torch.float32, local_files_only=True)
    assert len(pipeline.tokenizer) == tokenizer.NUM_TOKENS and pipeline.safety_checker is None
    assert pipeline.scheduler.config.prediction_type == PREDICTIONS[family]
    assert type(pipeline.scheduler).__name__ == {"sd1": "PNDMScheduler", "sd2": "DDIMScheduler"}[family]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod, (1 - betas).cumprod(0))
    ours = results(single)
    assert torch.equal(pipeline.encode_prompt(CAPTIONS[0], "cpu", 1, False)[0], ours["text"])
    with torch.no_grad():
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        step = pipeline.unet(latents, torch.tensor([500]), encoder_hidden_states=ours["text"]).sample
        assert torch.equal(step, ours["step"])
        pixels = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    assert torch.equal(pixels, ours["pixels"])


def test_diffusers_reads_the_one_file(family: str, folder: Path, tmp_path: Path) -> None:
    """Its own converter of single files is the oracle, with the folder's settings."""
    one = tmp_path / "one.safetensors"
    assert main(["convert", str(folder), "--to", "checkpoint", "--output", str(one)]) == 0
    for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        load: Any = kind.from_single_file
        module = load(str(one), config=str(folder), subfolder=part, local_files_only=True, torch_dtype=torch.float16)
        assert_same(dict(module.state_dict()), load_file(folder / part / "diffusion_pytorch_model.safetensors"))
    load = StableDiffusionPipeline.from_single_file
    pipeline = load(str(one), config=str(folder), local_files_only=True, torch_dtype=torch.float32)
    direct: Any = StableDiffusionPipeline.from_pretrained
    own = direct(folder, torch_dtype=torch.float32, local_files_only=True)
    assert_same(dict(pipeline.text_encoder.state_dict()), dict(own.text_encoder.state_dict()))


def test_old_names_a_ckpt_and_what_lies_beside_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny(tmp_path / "a.safetensors", dtype=torch.float16)
    tensors = {n.replace("transformer.text_model.", "transformer."): t for n, t in load_file(path).items()}
    extras = {
        "model_ema.diffusion_modeloutblocks": torch.ones(1), "model_ema.decay": torch.ones(()),
        "alphas_cumprod": torch.ones(1000), "first_stage_model.loss.x": torch.ones(1), "unheard.of": torch.ones(1),
    }  # fmt: skip
    torch.save({"state_dict": {**tensors, **extras}, "global_step": 3}, tmp_path / "a.ckpt")
    assert main(["convert", str(tmp_path / "a.ckpt"), "--to", "diffusers", "--output", str(tmp_path / "b")]) == 1
    told = capsys.readouterr().out
    for name in (*extras, "cond_stage_model.transformer.embeddings.position_ids"):
        assert name in told, name
    assert "1 tensors of no known use: unheard.of" in told
    assert_same(results(path), results(tmp_path / "b"))


@pytest.mark.parametrize("kind, dtype", [("sd1", torch.float32), ("sd2", torch.float16)])
def test_a_ckpt_in_and_out(kind: str, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As another kind of file everything is kept, the moving average too; through a folder, the model."""
    path = write_tiny(tmp_path / "a.ckpt", kind, layout="ckpt", dtype=dtype)
    average = {"model_ema.decay": torch.ones(()), "model_ema.diffusion_modeloutblocks": torch.full((2,), torch.nan)}
    tensors = {**torch.load(path, weights_only=True)["state_dict"], **average}
    torch.save({"state_dict": tensors, "global_step": 3}, path)
    ways = [("a.ckpt", "b.safetensors"), ("b.safetensors", "c.ckpt"), ("a.ckpt", "d"), ("d", "e.ckpt")]
    for source, output in ways:
        to = "checkpoint" if Path(output).suffix else "diffusers"
        predicts = ["--prediction", PREDICTIONS[kind]] if output == "d" else []
        assert main(["convert", str(tmp_path / source), "--to", to, "--output", str(tmp_path / output), *predicts]) == 0
        told = capsys.readouterr().out
        assert "read back and compared" in told
        assert ("kept, the moving average (EMA) of the weights: 2 tensors" in told) == (output[0] in "bc")
        assert ("left out, the moving average (EMA) of the weights: 2 tensors" in told) == (output == "d")
        assert ("nothing in it says what the model predicts" in told) == output.endswith(".ckpt")
    same = load_file(tmp_path / "b.safetensors")
    again = torch.load(tmp_path / "c.ckpt", weights_only=True)["state_dict"]
    model = torch.load(tmp_path / "e.ckpt", weights_only=True)["state_dict"]
    assert same.keys() == again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(same[name].nan_to_num(), tensor.nan_to_num()) and same[name].dtype == tensor.dtype, name
        assert torch.equal(again[name].nan_to_num(), tensor.nan_to_num()) and again[name].dtype == tensor.dtype, name
        if name not in average and not name.startswith((LAST, *UNUSED)):
            assert torch.equal(model[name], tensor), name
    assert model.keys() | average.keys() == tensors.keys()
    with safetensors.safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # it did not say what it predicts, nor did the user


def test_one_file_in_other_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    single = write_tiny(tmp_path / "a.safetensors", width=8, dtype=torch.float16)
    words = ["convert", str(single), "--to", "checkpoint", "--output", str(tmp_path / "b.safetensors")]
    assert main(words) == 2
    assert "is one file already" in capsys.readouterr().err
    assert main([*words, "--save-precision", "float"]) == 0
    found, expected = load_file(tmp_path / "b.safetensors"), load_file(single)
    assert_same(found, {n: t.float() if t.is_floating_point() else t for n, t in expected.items()})
    with safetensors.safe_open(single, "pt") as old, safetensors.safe_open(tmp_path / "b.safetensors", "pt") as new:
        assert new.metadata() == old.metadata()


@pytest.mark.parametrize("output", ["b", "b.safetensors"])
@pytest.mark.parametrize("at", [-1, 40])  # a number, and a letter of the header
def test_what_reads_back_otherwise_is_thrown_away(
    tmp_path: Path, output: str, at: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    to, layout = ("checkpoint", "diffusers") if output.endswith(".safetensors") else ("diffusers", "safetensors")
    source = write_tiny(tmp_path / "source", layout=layout, width=8)

    def damage(target: Path, *content: Any) -> None:
        rewriting.write_pending(target, *content)
        data = bytearray(target.read_bytes())
        place = at if at < 0 else data.index(b"conv_in" if b"conv_in" in data else b"input_blocks")
        data[place] ^= 1
        target.write_bytes(data)

    monkeypatch.setattr(model_conversion, "write_pending", damage)
    assert main(["convert", str(source), "--to", to, "--output", str(tmp_path / output)]) == 2
    assert "reads back otherwise than meant at" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


def test_a_text_encoder_that_ends_elsewhere_is_refused_by_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One file cannot say which layer's output is taken; in a folder its configuration does."""
    path = write_tiny(tmp_path / "a", "sd2", layout="diffusers", prediction="epsilon")
    config = path / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 24}))
    for words in (
        ["convert", str(path), "--to", "checkpoint", "--output", str(tmp_path / "b.safetensors")],
        ["train", "--dry-run", "--base", str(path), "--images", str(PICTURES), "--output", str(tmp_path / "c")],
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert "takes the output of layer 24" in error and "that of layer 23" in error, error
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_layer_that_nothing_uses_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny(tmp_path / "a", "sd2", layout="diffusers", prediction="epsilon")
    weights = path / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    generator = torch.Generator().manual_seed(1)
    last = {
        n.replace("layers.22.", "layers.23."): torch.randn(t.shape, generator=generator)
        for n, t in tensors.items()
        if ".22." in n
    }
    save_file({**tensors, **last}, weights, {"format": "pt"})
    (path / "safety_checker").mkdir()
    (path / "safety_checker" / "model.safetensors").write_bytes(b"x")
    output = tmp_path / "b.safetensors"
    assert main(["convert", str(path), "--to", "checkpoint", "--output", str(output)]) == 0
    told = capsys.readouterr().out
    assert "layer 24 of the text encoder is kept; in both forms nothing uses it" in told
    assert "safety_checker/model.safetensors" in told
    found = load_file(output)
    start = "text_model.encoder.layers.23.self_attn."
    fused = torch.cat([last[f"{start}{letter}_proj.weight"] for letter in "qkv"])
    assert torch.equal(found[LAST + "attn.in_proj_weight"], fused)
    assert torch.equal(found[LAST + "mlp.c_fc.bias"], last["text_model.encoder.layers.23.mlp.fc1.bias"])
    assert_same(results(path), results(output))  # training too reads both, and does without the layer
    last.pop(f"{start}q_proj.weight")
    save_file({**tensors, **last}, weights, {"format": "pt"})
    assert main(["convert", str(path), "--to", "checkpoint", "--output", str(tmp_path / "c.safetensors")]) == 2
    assert f"1 missing: text_encoder/{start}q_proj.weight" in capsys.readouterr().err


def test_metadata_and_precision(single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(single)
    with safetensors.safe_open(single, "pt") as file:
        header = file.metadata() | {"modelspec.title": "ünï", "modelspec.hash_sha256": "0xold"}
    save_file(tensors, tmp_path / "a.safetensors", header)
    for source, to, output, more in [
        ("a.safetensors", "diffusers", "b", ["--save-precision", "bf16"]),
        ("b", "checkpoint", "c.safetensors", []),
    ]:
        command = ["convert", str(tmp_path / source), "--to", to, "--output", str(tmp_path / output), *more]
        assert main(command) == 0
    assert "hashes of the old file in its metadata: modelspec.hash_sha256" in capsys.readouterr().out
    with safetensors.safe_open(tmp_path / "c.safetensors", "pt") as file:
        found = file.metadata()
    assert found["modelspec.title"] == "ünï" and "modelspec.hash_sha256" not in found
    assert found["modelspec.prediction_type"] == header["modelspec.prediction_type"]
    name = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(load_file(tmp_path / "c.safetensors")[name], tensors[name].to(torch.bfloat16))


def mistake(capsys: pytest.CaptureFixture[str], folder: Path, *words: str | Path) -> str:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(["convert", *map(str, words)]) == 2
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    return capsys.readouterr().err


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_tiny(tmp_path / "a.safetensors")
    many = write_tiny(tmp_path / "a", layout="diffusers")
    file, other = tmp_path / "b.safetensors", tmp_path / "b"

    def told(*words: str | Path) -> str:
        return mistake(capsys, tmp_path, *words)

    assert "is one file already" in told(one, "--to", "checkpoint", "--output", file)
    assert "is a diffusers folder already" in told(many, "--to", "diffusers", "--output", other)
    assert "--to kohya is for LoRAs" in told(one, "--output", file)
    assert "--to peft is for LoRAs" in told(many, "--to", "peft", "--output", other)
    assert "expected is a folder's name" in told(one, "--to", "diffusers", "--output", file)
    assert "that ends in .safetensors or .ckpt" in told(many, "--to", "checkpoint", "--output", tmp_path / "b.zip")
    assert "is a folder" in told(many, "--to", "checkpoint", "--output", _folder(tmp_path / "c.safetensors"))
    assert "holds no diffusers model" in told(
        one, "--to", "diffusers", "--output", _folder(tmp_path / "mine", "x.txt"), "--overwrite"
    )
    assert "exists already" in told(one, "--to", "diffusers", "--output", many)
    assert "would replace or lie in" in told(many, "--to", "checkpoint", "--output", many / "x.safetensors")
    assert "no such file" in told(tmp_path / "z.safetensors", "--to", "checkpoint", "--output", file)
    assert "nothing can be written into it" in told(
        one, "--to", "diffusers", "--output", _file(tmp_path / "d") / "x" / "y"
    )
    tensors = load_file(one)
    parts = {"vae": "first_stage_model.", "unet": "model.diffusion_model.", "text": "cond_stage_model."}
    for part, start in parts.items():
        save_file({n: t for n, t in tensors.items() if n.startswith(start)}, tmp_path / f"{part}.safetensors")
    for part, missing in [("vae", "no U-Net and no text encoder"), ("unet", "no text encoder and no VAE"),
                          ("text", "no U-Net and no VAE")]:  # fmt: skip
        error = told(tmp_path / f"{part}.safetensors", "--to", "diffusers", "--output", other)
        assert "is not a whole model" in error and missing in error
    wide = {n: t * 1e6 if n.endswith("time_embed.0.weight") else t for n, t in tensors.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    words = (tmp_path / "wide.safetensors", "--to", "diffusers", "--output", other, "--save-precision", "fp16")
    assert "time_embedding.linear_1.weight holds numbers that fp16 cannot hold" in told(*words)
    gone = "model.diffusion_model.out.2.weight"
    save_file({n: t for n, t in tensors.items() if n != gone}, tmp_path / "less.safetensors")
    assert "missing: conv_out.weight" in told(tmp_path / "less.safetensors", "--to", "diffusers", "--output", other)
    inpainting = {**tensors, "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}
    save_file(inpainting, tmp_path / "in.safetensors")
    assert "inpainting" in told(tmp_path / "in.safetensors", "--to", "diffusers", "--output", other)
    silent = write_tiny(tmp_path / "two.safetensors", "sd2")
    assert "does not say what it predicts; give --prediction" in told(silent, "--to", "diffusers", "--output", other)


def test_a_lora_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(1, 1)}, path)
    error = mistake(capsys, tmp_path, path, "--to", "checkpoint", "--output", tmp_path / "b.safetensors")
    assert "is no base model" in error and "lorasmith merge" in error
    error = mistake(capsys, tmp_path, path, "--prediction", "epsilon", "--output", tmp_path / "b.safetensors")
    assert "--prediction is for base models" in error


def test_what_it_predicts_may_be_said(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "a.safetensors", "sd2")
    command = ["convert", str(path), "--to", "diffusers", "--prediction", "epsilon", "--output", str(tmp_path / "b")]
    assert main(command) == 0
    scheduler = json.loads((tmp_path / "b" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["prediction_type"], scheduler["_class_name"]) == ("epsilon", "PNDMScheduler")
    assert main([*command, "--overwrite"]) == 0


@pytest.mark.parametrize("said", ["epsilon", "v_prediction"])
def test_a_prediction_that_is_not_the_models_own_is_told(
    said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_tiny(tmp_path / "a.safetensors", "sd2", prediction="v_prediction")
    command = ["convert", str(path), "--to", "diffusers", "--prediction", said, "--output", str(tmp_path / "b")]
    assert main(command) == 0
    told = "would be taken for a model that predicts v_prediction; --prediction says otherwise"
    assert (told in capsys.readouterr().out) == (said == "epsilon")


def _file(path: Path) -> Path:
    path.touch()
    return path


def _folder(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).touch()
    return path
