"""`lorasmith merge` into a model: the sum is exact, everything else stays as it was, and mistakes are explained."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorasmith.demo
from lorasmith import merging, model_families
from lorasmith.adapters.lora import LoRA
from lorasmith.checkpoint import open_checkpoint
from lorasmith.cli import main
from lorasmith.formats import kohya
from lorasmith.models.keys import sd as keys
from tests.clients import full_size_sd1
from tests.tiny import write_tiny

SUFFIX = {"safetensors": ".safetensors", "ckpt": ".ckpt", "diffusers": ""}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Miniatures of both families in every layout; the single files hold fp16."""
    folder = tmp_path_factory.mktemp("models")
    return {
        (family, layout): write_tiny(
            folder / f"{family}-{layout}{suffix}", family, layout=layout,
            dtype=torch.float32 if layout == "diffusers" else torch.float16,
        )
        for family in ("sd1", "sd2")
        for layout, suffix in SUFFIX.items()
    }  # fmt: skip


def shapes_of(model: Path) -> dict[str, tuple[int, ...]]:
    with open_checkpoint(model) as checkpoint:
        return model_families.target_shapes(checkpoint)


def write_lora(path: Path, model: Path, *, part: str = "", seed: int = 1, rank: int = 4, size: float = 0.2) -> Path:
    """Write a LoRA that looks trained for the layers of the model whose names begin with `part`."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes_of(model).items():
        if name.startswith(part):
            adapter = LoRA(shape, rank, alpha=3)
            for parameter in adapter.parameters():
                torch.nn.init.normal_(parameter, std=size, generator=generator)
            tensors |= {f"{name}.{key}": value.detach() for key, value in adapter.state_dict().items()}
    kohya.write(path, tensors, {"ss_network_dim": str(rank)})
    return path


@pytest.fixture(scope="module")
def loras(models: dict[tuple[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    sd1, sd2 = models["sd1", "safetensors"], models["sd2", "safetensors"]
    return {
        "sd1": write_lora(folder / "sd1.safetensors", sd1),
        "sd2": write_lora(folder / "sd2.safetensors", sd2),
        "other": write_lora(folder / "other.safetensors", sd1, seed=2, rank=2),
        "unet": write_lora(folder / "unet.safetensors", sd1, part="lora_unet"),
    }


def merge(model: Path, *lora: Path, output: Path, options: tuple[str, ...] = ()) -> int:
    return main(
        ["merge", "--model", str(model), "--lora", *map(str, lora), "--output", str(output), *map(str, options)]
    )


def tensors_of(path: Path) -> dict[str, Tensor]:
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.tensor(name).clone() for name in checkpoint.names()}


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether bytes, type and shape are the same; NaN too."""
    return one.dtype == other.dtype and one.shape == other.shape and raw(one) == raw(other)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def expected(model: Path, layout: str, family: Any, *terms: tuple[Path, dict[str, float]]) -> dict[str, Tensor]:
    """The merged model as the definition says, written without our code for merging.

    terms: a LoRA's file, and the factor of each saved name that it is added with.
    """
    tensors = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    if layout == "diffusers":
        unet, text = "unet/", {n: f"text_encoder/text_model.{m}.weight" for n, m in keys.text_targets(family).items()}
        where = {name: f"{unet}{module}.weight" for name, module in keys.unet_targets().items()} | text
    else:
        where = {name: keys.ldm_unet()[f"{module}.weight"].name for name, module in keys.unet_targets().items()}
        where |= {name: f"{keys.CLIP}{module}.weight" for name, module in keys.text_targets(family).items()}
    sums: dict[str, Tensor] = {}
    for path, factors in terms:
        file = load_file(path)
        for name, factor in factors.items():
            down, up = (file[f"{name}.lora_{end}.weight"].float().flatten(1) for end in ("down", "up"))
            delta = factor * float(file[f"{name}.alpha"]) / len(down) * (up @ down)
            place = where[name]
            if family == "sd2" and layout != "diffusers" and "_self_attn_" in name and "out_proj" not in name:
                layer, third = name.split("layers_")[1].split("_")[0], "qkv".index(name[-6])
                place = f"cond_stage_model.model.transformer.resblocks.{layer}.attn.in_proj_weight"
                whole = torch.zeros(tensors[place].shape)
                rows = len(whole) // 3
                whole[third * rows : (third + 1) * rows] = delta
                delta = whole
            elif family == "sd2" and layout != "diffusers" and name.startswith("lora_te"):
                layer = name.split("layers_")[1].split("_")[0]
                end = {"out_proj": "attn.out_proj", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}
                place = f"cond_stage_model.model.transformer.resblocks.{layer}." + next(
                    theirs + ".weight" for ours, theirs in end.items() if name.endswith(ours)
                )
            sums[place] = sums.get(place, tensors[place].float()) + delta.view(tensors[place].shape)
    return tensors | {name: total.to(tensors[name].dtype) for name, total in sums.items()}


def assert_merged(found: dict[str, Tensor], wanted: dict[str, Tensor], base: dict[str, Tensor]) -> int:
    """Check every tensor, the untouched ones to the byte; return how many differ from the base."""
    assert found.keys() == wanted.keys()
    num_changed = 0
    for name, tensor in wanted.items():
        if is_same(tensor, base[name]):
            assert is_same(found[name], tensor), name
        else:
            num_changed += 1
            assert found[name].dtype == tensor.dtype
            torch.testing.assert_close(
                found[name], tensor, atol=2e-3 if tensor.dtype == torch.float16 else 1e-6, rtol=1e-3
            )
    return num_changed


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize(
    ("given_as", "wanted_as"),
    [
        ("safetensors", "safetensors"), ("ckpt", "ckpt"), ("diffusers", "diffusers"),
        ("safetensors", "ckpt"), ("ckpt", "safetensors"),
    ],
)  # fmt: skip
def test_every_layer_gets_its_delta_and_nothing_else_changes(
    family: str, given_as: str, wanted_as: str, models: Any, loras: dict[str, Path], tmp_path: Path
) -> None:
    model, output = models[family, given_as], tmp_path / f"out{SUFFIX[wanted_as]}"
    assert merge(model, loras[family], output=output, options=("--ratio", "-0.7")) == 0
    factors = dict.fromkeys(shapes_of(model), -0.7)
    wanted = expected(model, given_as, family, (loras[family], factors))
    num_changed = assert_merged(tensors_of(output), wanted, tensors_of(model))
    assert num_changed == {"sd1": 264, "sd2": 330 if given_as == "diffusers" else 192 + 23 * 4}[family]
    with open_checkpoint(output) as checkpoint:
        assert checkpoint.format == {"ckpt": "torch"}.get(wanted_as, wanted_as)
        assert model_families.describe(checkpoint).family == family


@pytest.mark.parametrize(("family", "layout"), [("sd1", "safetensors"), ("sd2", "ckpt"), ("sd2", "diffusers")])
def test_verify_finds_that_merged_and_attached_give_the_same(
    family: str, layout: str, models: Any, loras: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / f"out{SUFFIX[layout]}"
    assert merge(models[family, layout], loras[family], output=output, options=("--ratio", "0.6", "--verify")) == 0
    for total, rounding, unexplained, limit, change in verified(capsys.readouterr().out):
        assert unexplained < 1e-5 < limit and change > 0.1
        if layout == "diffusers":
            assert rounding == 0 and total < 1e-5
        else:
            assert 0 < rounding < 3e-3 and total == pytest.approx(rounding, rel=0.2)


def verified(printed: str) -> list[list[float]]:
    """The numbers of both lines that --verify prints."""
    lines = [line for line in printed.splitlines() if line.startswith("verify: ") and "attached" in line]
    found = [[float(number) for number in re.findall(r"\d[.\d]*e[-+]\d+", line)] for line in lines]
    assert [len(numbers) for numbers in found] == [5, 5], printed
    return found


def test_verify_says_of_a_faint_lora_that_rounding_hides_it(
    models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is wrong with the merged model then, but little of the LoRA is in it."""
    model = models["sd1", "diffusers"]
    lora = write_lora(tmp_path / "faint.safetensors", model, size=0.01)
    options = ("--save-precision", "bf16", "--verify")
    assert merge(model, lora, output=tmp_path / "out", options=options) == 0
    printed = capsys.readouterr().out
    assert "rounding hides a good part of what the LoRA does" in printed
    for total, rounding, unexplained, _, change in verified(printed):
        assert unexplained < 1e-5 and total > change / 2 and rounding > change / 2


@pytest.mark.parametrize(
    ("mistake", "save_precision"),
    [("a layer is left out", "float"), ("another ratio", "bf16"), ("turned round", "bf16"), ("badly rounded", "bf16")],
)
def test_verify_finds_mistakes_of_merging(
    mistake: str,
    save_precision: str,
    models: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also of a LoRA that rounding to bf16 nearly swallows: then all else is held to the rounded sums."""
    model = models["sd1", "diffusers"]
    lora = write_lora(tmp_path / "faint.safetensors", model, size=0.02)
    right = merging.changing

    def wrong(places: Any, additions: Any, types: Any, precision: str) -> Any:
        change = right(places, additions, types, precision)

        def changed(name: str, stored: Tensor) -> Tensor:
            before, after = stored.float(), change(name, stored.clone())
            if mistake == "a layer is left out" and "to_out" in name:
                return before.to(after.dtype)
            if mistake == "another ratio":
                return (before + 2 * (after.float() - before)).to(after.dtype)
            if mistake == "turned round" and before.dim() == 2 and before.shape == before.T.shape:
                return (before + (after.float() - before).T).to(after.dtype)
            return (after.float() * (1 + 2**-8)).to(after.dtype) if mistake == "badly rounded" else after

        return changed

    monkeypatch.setattr(merging, "changing", wrong)
    options = ("--save-precision", save_precision, "--verify")
    assert merge(model, lora, output=tmp_path / "out", options=options) == 1
    assert "differ by more than rounding explains" in capsys.readouterr().out


def test_several_are_added_in_order_with_ratios_of_their_own(
    models: Any, loras: dict[str, Path], tmp_path: Path
) -> None:
    model, output = models["sd1", "safetensors"], tmp_path / "out.safetensors"
    options = ("--ratio", "0.8", "-0.5", "--text-encoder-ratio", "0", "0.25")
    assert merge(model, loras["sd1"], loras["other"], output=output, options=options) == 0
    unet = [name for name in shapes_of(model) if name.startswith("lora_unet")]
    text = [name for name in shapes_of(model) if name.startswith("lora_te")]
    wanted = expected(
        model,
        "safetensors",
        "sd1",
        (loras["sd1"], dict.fromkeys(unet, 0.8)),
        (loras["other"], dict.fromkeys(unet, -0.5) | dict.fromkeys(text, 0.25)),
    )
    assert assert_merged(tensors_of(output), wanted, tensors_of(model)) == 264


def block_of(name: str) -> str:
    """LoRA Block Weight's name of a layer's block, from diffusers' name."""
    words = name.split("_")
    if name.startswith("lora_te"):
        return "BASE"
    if words[2] == "mid":
        return "M00"
    level, layer = int(words[4]), int(words[6])
    return f"IN{3 * level + layer + 1:02}" if words[2] == "down" else f"OUT{3 * level + layer:02}"


IN, OUT = [f"IN{n:02}" for n in range(12)], [f"OUT{n:02}" for n in range(12)]
LISTS = {
    12: ["BASE", "IN04", "IN05", "IN07", "IN08", "M00", *OUT[:6]],
    17: ["BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", *OUT[3:]],
    25: [*IN, "M00", *OUT],
    26: ["BASE", *IN, "M00", *OUT],
}


@pytest.mark.parametrize("count", LISTS)
def test_block_weights_multiply_the_ratio(
    count: int, models: Any, loras: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = models["sd1", "safetensors"], tmp_path / "out.safetensors"
    weights = {block: round(0.5 + 0.1 * number, 1) for number, block in enumerate(LISTS[count])}
    options = ("--ratio", "0.5", "--block-weights", ",".join(map(str, weights.values())))
    assert merge(model, loras["sd1"], output=output, options=options) == 0
    left_out = 1.0 if count == 25 else 0.0
    factors = {
        name: 0.5 * weights.get(block_of(name), left_out if block_of(name) == "BASE" else 0)
        for name in shapes_of(model)
    }
    applied = {name: factor for name, factor in factors.items() if factor}
    wanted = expected(model, "safetensors", "sd1", (loras["sd1"], applied))
    assert assert_merged(tensors_of(output), wanted, tensors_of(model)) == len(applied)
    assert f"{len(applied)} layers applied, {264 - len(applied)} ignored, 0 unknown" in capsys.readouterr().out


def test_numbers_below_zero_are_no_options_in_lists_and_in_e_notation(
    models: Any, loras: dict[str, Path], tmp_path: Path
) -> None:
    model, output = models["sd1", "safetensors"], tmp_path / "out.safetensors"
    other = write_lora(tmp_path / "other.safetensors", model, seed=2)
    options = ("--ratio", "-5e-1", "1", "--block-weights", "-1" + ",1" * 16, "-.5" + ",0" * 16)
    assert merge(model, loras["sd1"], other, output=output, options=options) == 0
    is_text = {name: block_of(name) == "BASE" for name in shapes_of(model)}
    first = {name: 0.5 if is_text[name] else -0.5 for name in is_text}
    second = {name: -0.5 for name in is_text if is_text[name]}
    wanted = expected(model, "safetensors", "sd1", (loras["sd1"], first), (other, second))
    assert assert_merged(tensors_of(output), wanted, tensors_of(model)) == len(first)


def test_a_lora_of_the_u_net_alone_leaves_the_text_encoder(models: Any, loras: dict[str, Path], tmp_path: Path) -> None:
    model, output = models["sd1", "safetensors"], tmp_path / "out.safetensors"
    assert merge(model, loras["unet"], loras["sd1"], output=output, options=("--text-encoder-ratio", "1", "0")) == 0
    base, found = tensors_of(model), tensors_of(output)
    changed = {name for name in base if not is_same(base[name], found[name])}
    assert len(changed) == 192 and all(name.startswith(keys.UNET) for name in changed)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_taking_a_lora_out_again_gives_the_base_within_rounding(
    family: str, models: Any, loras: dict[str, Path], tmp_path: Path
) -> None:
    model, there, back = models[family, "safetensors"], tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    assert merge(model, loras[family], output=there, options=("--ratio", "0.9", "--save-precision", "float")) == 0
    assert merge(there, loras[family], output=back, options=("--ratio", "-0.9", "--save-precision", "fp16")) == 0
    base, found = tensors_of(model), tensors_of(back)
    assert all(found[name].dtype == tensor.dtype for name, tensor in base.items())
    for name, tensor in base.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), atol=1e-6, rtol=2**-10)


def test_precisions_of_the_sum_and_of_the_file_are_apart(models: Any, loras: dict[str, Path], tmp_path: Path) -> None:
    model, exact, rough = models["sd1", "safetensors"], tmp_path / "exact.safetensors", tmp_path / "rough.safetensors"
    assert merge(model, loras["sd1"], output=exact, options=("--save-precision", "float")) == 0
    assert merge(model, loras["sd1"], output=rough, options=("--precision", "bf16", "--save-precision", "float")) == 0
    base, found, rounded = tensors_of(model), tensors_of(exact), tensors_of(rough)
    changed = [name for name in base if found[name].dtype != base[name].dtype]
    assert len(changed) == 264
    for name in changed:
        assert rounded[name].dtype == torch.float32
        assert torch.equal(rounded[name].bfloat16().float(), rounded[name])
        torch.testing.assert_close(rounded[name], found[name], atol=2e-2, rtol=2e-2)
    assert not torch.equal(rounded[changed[0]], found[changed[0]])


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool]


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    extra=st.dictionaries(
        st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=20).map(
            lambda text: f"extra.{text}"
        ),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)),
        max_size=6,
    ),
    metadata=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8), st.text(max_size=20), max_size=4
    ),
    seed=st.integers(0, 1000),
)
def test_what_no_layer_uses_stays_to_the_byte(
    extra: Any, metadata: dict[str, str], seed: int, models: Any, loras: dict[str, Path], tmp_path_factory: Any
) -> None:
    """Extra tensors of any name and type, NaN too, and the metadata."""
    folder = tmp_path_factory.mktemp("extra")
    model, output = folder / "model.safetensors", folder / "out.safetensors"
    generator = torch.Generator().manual_seed(seed)
    tensors = tensors_of(models["sd1", "safetensors"])
    for name, (dtype, shape) in extra.items():
        size = math.prod(shape) * dtype.itemsize
        data = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8, generator=generator)
        tensors[name] = data.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)
    metadata = {name: value.encode(errors="ignore").decode() for name, value in metadata.items()}
    save_file(tensors, model, metadata)
    assert merge(model, loras["sd1"], output=output) == 0
    found = tensors_of(output)
    assert found.keys() == tensors.keys()
    touched = [name for name in tensors if not is_same(tensors[name], found[name])]
    assert len(touched) == 264 and not set(touched) & set(extra)
    with safe_open(model, "pt") as one, safe_open(output, "pt") as other:
        assert one.metadata() == other.metadata()
    shutil.rmtree(folder)


def test_a_ckpt_keeps_what_a_training_program_left_in_it(models: Any, loras: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "out.ckpt"
    assert merge(models["sd1", "ckpt"], loras["sd1"], output=output) == 0
    content = torch.load(output, weights_only=True, mmap=True)
    assert (content["epoch"], content["global_step"]) == (1, 2)
    tensor = content["state_dict"][f"{keys.UNET}out.2.weight"]
    assert tensor.data_ptr() % 64 == 0
    assert torch.equal(tensor, tensors_of(models["sd1", "ckpt"])[f"{keys.UNET}out.2.weight"])


def test_old_and_tied_ckpts_are_written_anew(models: Any, loras: dict[str, Path], tmp_path: Path) -> None:
    """The layout before torch 1.6 cannot be patched, nor can a storage that several tensors share."""
    wanted = expected(
        models["sd1", "ckpt"], "ckpt", "sd1", (loras["sd1"], dict.fromkeys(shapes_of(models["sd1", "ckpt"]), 1.0))
    )
    base = tensors_of(models["sd1", "ckpt"])
    old, tied, output = tmp_path / "old.ckpt", tmp_path / "tied.ckpt", tmp_path / "out.ckpt"
    torch.save({"state_dict": base}, old, _use_new_zipfile_serialization=False)
    assert merge(old, loras["sd1"], output=output) == 0
    assert assert_merged(tensors_of(output), wanted, base) == 264
    name = next(name for name in wanted if name.endswith("attn1.to_q.weight"))
    torch.save({"state_dict": base | {"copy": base[name]}}, tied)
    assert merge(tied, loras["sd1"], output=output, options=("--overwrite",)) == 0
    assert assert_merged(tensors_of(output), wanted | {"copy": base[name]}, base | {"copy": base[name]}) == 264


def test_a_moving_average_is_left_alone_with_a_note(
    models: Any, loras: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = tensors_of(models["sd1", "safetensors"])
    average = {keys.ema_name(name): value + 1 for name, value in tensors.items() if name.startswith(keys.UNET)}
    model, output = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    save_file(tensors | average, model)
    assert merge(model, loras["sd1"], output=output) == 0
    assert "moving average (EMA)" in capsys.readouterr().out
    found = tensors_of(output)
    assert all(is_same(found[name], value) for name, value in average.items())


def test_a_folder_keeps_its_other_files_but_no_outdated_weights(
    models: Any, loras: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = tmp_path / "model", tmp_path / "out"
    shutil.copytree(models["sd1", "diffusers"], model)
    (model / "tokenizer").mkdir()
    (model / "tokenizer" / "merges.txt").write_text("a b")
    (model / ".git").mkdir()
    (model / ".git" / "objects").write_text("the same weights again, in git")
    (model / "unet" / "diffusion_pytorch_model.fp16.bin").write_text("the same weights in another form")
    assert merge(model, loras["sd1"], output=output) == 0
    assert "diffusion_pytorch_model.fp16.bin" in capsys.readouterr().out
    files = {file.relative_to(model) for file in model.rglob("*") if file.is_file()}
    copied = {file.relative_to(output) for file in output.rglob("*") if file.is_file()}
    assert files - copied == {Path("unet/diffusion_pytorch_model.fp16.bin"), Path(".git/objects")}
    assert not copied - files
    changed = {file for file in copied if (model / file).read_bytes() != (output / file).read_bytes()}
    assert changed == {
        Path("unet/diffusion_pytorch_model.safetensors"), Path("text_encoder/model.safetensors")
    }  # fmt: skip


def test_layers_that_the_model_does_not_have_are_told(
    models: Any, loras: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(loras["sd1"])
    extra = {
        "lora_unet_down_blocks_3_attentions_0_proj_in.lora_down.weight": torch.zeros(1, 32, 1, 1),
        "lora_unet_down_blocks_3_attentions_0_proj_in.lora_up.weight": torch.zeros(32, 1, 1, 1),
    }
    lora = tmp_path / "locon.safetensors"
    save_file(tensors | extra, lora)
    assert merge(models["sd1", "safetensors"], lora, output=tmp_path / "out.safetensors") == 0
    printed = capsys.readouterr().out
    assert "264 layers applied, 0 ignored, 1 unknown" in printed
    assert "lora_unet_down_blocks_3_attentions_0_proj_in" in printed


def test_overwrite_replaces_a_file_and_a_model_folder(models: Any, loras: dict[str, Path], tmp_path: Path) -> None:
    for layout in ("safetensors", "diffusers"):
        output = tmp_path / f"out{SUFFIX[layout]}"
        for ratio in ("1", "2"):
            options = ("--ratio", ratio, "--overwrite")
            assert merge(models["sd1", layout], loras["sd1"], output=output, options=options) == 0
        factors = dict.fromkeys(shapes_of(output), 2.0)
        wanted = expected(models["sd1", layout], layout, "sd1", (loras["sd1"], factors))
        assert_merged(tensors_of(output), wanted, tensors_of(models["sd1", layout]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.safetensors"]


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize(
    ("layout", "name"), [("diffusers", "out.safetensors"), ("diffusers", "out.ckpt"), ("safetensors", "out")]
)
def test_a_folder_becomes_a_file_and_a_file_a_folder_by_the_outputs_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, layout: str, name: str
) -> None:
    (tmp_path / "models").mkdir()
    prediction = "v_prediction" if family == "sd2" else None
    model = write_tiny(tmp_path / "models" / f"base{SUFFIX[layout]}", family, layout=layout, prediction=prediction)
    lora = write_lora(tmp_path / "lora.safetensors", model)
    own, other = tmp_path / f"own{SUFFIX[layout]}", tmp_path / name
    verify = () if name == "out.ckpt" else ("--verify",)  # a miniature's structure is in a header alone
    assert merge(model, lora, output=other, options=verify) == 0
    assert ("verify: U-Net" in capsys.readouterr().out) == bool(verify)
    assert merge(model, lora, output=own) == 0
    to = "diffusers" if layout == "safetensors" else "checkpoint"
    converted = tmp_path / f"converted{other.suffix}"
    assert main(["convert", str(own), "--to", to, "--output", str(converted)]) == 0
    wanted, found = tensors_of(converted), tensors_of(other)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"models", "lora.safetensors", own.name, other.name, converted.name}


def test_a_model_that_cannot_be_converted_without_more_is_not_merged_first(
    models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models["sd2", "safetensors"]  # it does not say what it predicts
    lora = write_lora(tmp_path / "lora.safetensors", model)
    assert merge(model, lora, output=tmp_path / "out") == 2
    assert "lorasmith convert's option" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


# --- mistakes ---------------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert main(["merge", *map(str, arguments)]) == 2
    return capsys.readouterr().err


MISTAKES = {
    "no model to verify": (["--lora", "{lora}", "--output", "{out}", "--verify"], "give --model"),
    "no lora": (["--model", "{model}", "--output", "{out}"], "missing: --lora"),
    "no output": (["--model", "{model}", "--lora", "{lora}"], "missing: --output"),
    "too many ratios": (["--ratio", "1", "2"], "ratio is given 2 times for 1 LoRA"),
    "a ratio that is no number": (["--ratio", "2", "much"], "--ratio 2 much: expected one or more numbers"),
    "a ratio of NaN": (["--ratio", "nan"], "expected one or more numbers"),
    "a ratio that is not used": (
        ["--ratio", "1", "--unet-ratio", "1", "--text-encoder-ratio", "1"], "ratio is not used"
    ),
    "too few block weights": (["--block-weights", "1,1,1"], "3 block weights; give 12, 17, 25 or 26"),
    "block weights that are no numbers": (["--block-weights", "1,all"], "expected numbers with commas"),
    "nothing left": (["--ratio", "0"], "would change nothing: all of its 264 layers have the factor 0"),
    "an unknown precision": (["--precision", "fp8"], "expected one of float, fp16, bf16"),
    "an unknown ending": (["--output", "{dir}/out.txt"], "expected is a name that ends in .safetensors or .ckpt"),
    "an unknown ending for a folder": (
        ["--model", "{folder}", "--output", "{dir}/out.onnx"], "expected is the name of a folder"
    ),
    "the base itself": (["--output", "{model}", "--overwrite"], "which is read; give another name"),
    "the LoRA itself": (["--output", "{lora}", "--overwrite"], "which is read; give another name"),
    "an output that exists": (["--output", "{there}"], "exists already"),
    "a folder in place of the file": (["--output", "{odd}", "--overwrite"], "is a folder"),
    "a LoRA of the other family": (["--lora", "{sd2}"], "is a LoRA for SD 2.x, and the model is SD 1.x"),
    "a LoRA of another width": (["--lora", "{narrow}"], "does not fit the model: 1 of 264 layers"),
    "a LoRA as the model": (["--model", "{lora}"], "is a LoRA, not a base model"),
    "a LoRA as the model for a folder": (
        ["--model", "{lora}", "--output", "{dir}/out"], "goes to --lora (merge, generate) or --weights (train).\n"
    ),
    "a model as the LoRA": (["--lora", "{model}"], "is a whole model"),
    "a LoRA that is not there": (["--lora", "{dir}/none.safetensors"], "there is no such file"),
    "a LoRA with NaN": (["--lora", "{nan}"], "holds NaN or infinity (lora_"),
    "a LoRA without a known layer": (["--lora", "{strange}"], "none of its 1 layers is in the model"),
    "half a layer": (["--lora", "{half}"], "incomplete or damaged: of lora_"),
    "a base with NaN": (["--model", "{broken}"], "holds NaN or infinity, so nothing was merged"),
    "too strong for fp16": (["--ratio", "1e9"], "larger than float16"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_explained_and_nothing_is_written(
    case: str, models: Any, loras: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {
        "model": models["sd1", "safetensors"], "folder": models["sd1", "diffusers"], "lora": loras["sd1"],
        "sd2": loras["sd2"], "dir": tmp_path, "out": tmp_path / "out.safetensors", "there": tmp_path / "there.ckpt",
        "odd": tmp_path / "odd.ckpt", "nan": tmp_path / "nan.safetensors", "half": tmp_path / "half.safetensors",
        "strange": tmp_path / "strange.safetensors", "broken": tmp_path / "broken.safetensors",
        "narrow": tmp_path / "narrow.safetensors",
    }  # fmt: skip
    names["there"].write_text("mine")
    names["odd"].mkdir()
    lora = load_file(loras["sd1"])
    first = next(iter(lora)).partition(".")[0]
    save_file(lora | {f"{first}.lora_up.weight": lora[f"{first}.lora_up.weight"] * math.nan}, names["nan"])
    save_file({name: tensor for name, tensor in lora.items() if name != f"{first}.lora_up.weight"}, names["half"])
    save_file(lora | {f"{first}.lora_up.weight": lora[f"{first}.lora_up.weight"][1:].clone()}, names["narrow"])
    save_file(
        {f"lora_unet_other.lora_{end}.weight": torch.ones(shape) for end, shape in (("down", (1, 4)), ("up", (4, 1)))},
        names["strange"],
    )
    if case == "a base with NaN":
        base = load_file(names["model"])
        save_file(
            {name: value * math.nan if "to_q" in name else value for name, value in base.items()}, names["broken"]
        )
    before = sorted((path, path.is_file() and path.stat().st_size) for path in tmp_path.rglob("*"))
    arguments, message = MISTAKES[case]
    arguments = list(arguments)
    if not case.startswith("no "):
        for flag, value in (("--model", "{model}"), ("--lora", "{lora}"), ("--output", "{out}")):
            arguments += [] if flag in arguments else [flag, value]
    told = refused(capsys, *(argument.format(**names) for argument in arguments))
    assert message in told and "Traceback" not in told
    assert sorted((path, path.is_file() and path.stat().st_size) for path in tmp_path.rglob("*")) == before


def test_a_full_disk_is_told_before_anything_is_written(
    models: Any, loras: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    for layout in ("safetensors", "diffusers"):
        arguments = [
            "--model",
            models["sd1", layout],
            "--lora",
            loras["sd1"],
            "--output",
            tmp_path / f"o{SUFFIX[layout]}",
        ]
        assert "1 B are free there" in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_verify_asks_for_a_model_that_can_be_run(
    models: Any, loras: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(models["sd1", "safetensors"])
    wide = tensors[f"{keys.UNET}input_blocks.0.0.weight"].repeat(1, 3, 1, 1)[:, :9].contiguous()
    model, output = tmp_path / "inpainting.safetensors", tmp_path / "out.safetensors"
    save_file(tensors | {f"{keys.UNET}input_blocks.0.0.weight": wide}, model)
    arguments = ["--model", model, "--lora", loras["sd1"], "--output", output]
    assert "leave --verify out" in refused(capsys, *arguments, "--verify")
    assert main(["merge", *map(str, arguments)]) == 0  # merging itself needs no U-Net that runs here
    assert json.dumps(list(load_file(output))) == json.dumps(list(load_file(model)))


def test_verify_refuses_beforehand_a_file_that_could_not_be_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small model's structure is in its metadata, which a .ckpt has no place for."""
    model = Path(lorasmith.demo.__file__).parent / "sd1-mini.safetensors"
    lora, output = write_lora(tmp_path / "a.safetensors", model), tmp_path / "out.ckpt"
    arguments = ["--model", model, "--lora", lora, "--output", output]
    assert "leave --verify out" in refused(capsys, *arguments, "--verify") and not output.exists()
    assert main(["merge", *map(str, arguments)]) == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a program's peak memory")
def test_merging_takes_the_memory_of_one_layer(models: Any, loras: dict[str, Path], tmp_path: Path) -> None:
    """A full-size SD1, 2 GB: its largest layer as stored, in fp32 and changed, and the LoRA; not what Python takes."""
    model, merged = tmp_path / "full.safetensors", tmp_path / "merged.safetensors"
    full_size_sd1.write(model)
    lora = write_lora(tmp_path / "lora.safetensors", model, rank=16, size=0.02)
    arguments = ["merge", "--model", str(model), "--lora", str(lora), "--output", str(merged)]
    small = [models["sd1", "safetensors"], "--lora", loras["sd1"], "--output", tmp_path / "small.safetensors"]
    first = ["merge", "--model", *map(str, small)]
    program = (
        "import pathlib, lorasmith.cli as cli\n"
        "def told(name):\n"
        "    lines = pathlib.Path('/proc/self/status').read_text().splitlines()\n"
        "    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024\n"
        f"cli.main({first!r})  # loads all that the program needs\n"
        "pathlib.Path('/proc/self/clear_refs').write_text('5')\n"
        f"before, code = told('VmRSS'), cli.main({arguments!r})\n"
        "print('peak', told('VmHWM') - before)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    for path in (model, merged):
        path.unlink()  # pytest keeps the folders of three runs
    peak = int(done.stdout.split("peak ")[1])
    count = 10240 * 1280  # of ff.net.0.proj
    assert peak < 1.2 * count * (2 + 4 + 4) + lora.stat().st_size, f"{peak / 1e6:.0f} MB"
