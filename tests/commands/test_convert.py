"""`lorasmith convert`: round trips are exact, what has no place is told, and nothing is overwritten."""

import errno
import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lorasmith.cli import main
from lorasmith.formats.dialects import read_any
from tests.formats import writers

LAYERS = writers.make_layers(alpha=1.0)
FIRST = {name: own for name, own in LAYERS.items() if not re.search(r"proj_(in|out)$|ff_net_2$|mlp", name)}
HEADER = {"ss_network_dim": "2", "ss_output_name": "ünï", "modelspec.title": "t", "modelspec.hash_sha256": "0xold"}
SOME = writers.make_layers(only="unet_mid|te.*layers_0_")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return writers.kohya(tmp_path / "lora.safetensors", LAYERS, HEADER)


def load(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(path)


def folded(layers: writers.Layers) -> dict[str, Tensor]:
    """Return the tensors with alpha / rank, here a half, in `up`."""
    made = {}
    for name, own in layers.items():
        made[f"{name}.lora_down.weight"] = own["lora_down.weight"]
        made[f"{name}.lora_up.weight"] = (own["lora_up.weight"].float() / 2).half()
        made[f"{name}.alpha"] = torch.tensor(2.0)
    return made


@pytest.mark.parametrize("to, output, layers, is_folded", [
    ("kohya", "b.safetensors", LAYERS, False),
    ("kohya", "b.pt", LAYERS, False),
    ("ldm", "b.safetensors", LAYERS, False),
    ("ldm", "b.ckpt", LAYERS, False),
    ("peft", "b", LAYERS, False),
    ("lycoris", "b.safetensors", LAYERS, False),
    ("cloneofsimo-new", "b.pt", FIRST, True),
    ("cloneofsimo-new", "b.safetensors", FIRST, True),
    ("diffusers", "b.safetensors", LAYERS, True),
    ("d8ahazard", "b.safetensors", LAYERS, True),
    ("d8ahazard", "b.pt", FIRST, True),
    ("cloneofsimo", "b.pt", FIRST, True),
    ("cloneofsimo", "b.safetensors", FIRST, True),
])  # fmt: skip
def test_there_and_back(
    tmp_path: Path, lora: Path, to: str, output: str, layers: writers.Layers, is_folded: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(["convert", str(lora), "--to", to, "--output", str(tmp_path / output)]) == (layers is FIRST)
    told = capsys.readouterr().out
    assert ("multiplied into the factors: " in told) == is_folded
    assert (f"left out        {len(LAYERS) - len(FIRST)}: " in told) == (layers is FIRST)
    assert main(["convert", str(tmp_path / output), "--output", str(tmp_path / "back.safetensors")]) == 0
    expected = folded(layers) if is_folded else writers.flat(layers)
    back = load(tmp_path / "back.safetensors")
    assert back.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(back[key].float() if key.endswith("alpha") else back[key], value), key
    if Path(output).suffix == ".safetensors":
        with safetensors.safe_open(tmp_path / "back.safetensors", "pt") as file:
            assert HEADER.keys() <= file.metadata().keys() and file.metadata()["ss_output_name"] == "ünï"


def test_the_forms_are_those_of_the_golden_files(tmp_path: Path) -> None:
    """Made by hand in tests/formats/writers.py, and written by the command, they are the same."""
    layers = {name: {tail: t for tail, t in own.items() if tail != "alpha"} for name, own in LAYERS.items()}
    made = writers.kohya(tmp_path / "a.safetensors", layers)
    for to, is_new in (("cloneofsimo", False), ("cloneofsimo-new", True)):
        assert main(["convert", str(made), "--to", to, "--output", str(tmp_path / f"{to}.pt")]) == 1
        writers.cloneofsimo_list(tmp_path / f"{to}-golden.pt", layers, "unet", new_order=is_new)
        written, golden = (torch.load(tmp_path / f"{to}{end}.pt", weights_only=True) for end in ("", "-golden"))
        assert len(written) == len(golden) == 288
        assert all(torch.equal(one, other) for one, other in zip(written, golden, strict=True))
    golden = load(writers.renamed(tmp_path / "c.safetensors", LAYERS, "^lora_(unet|te)_", "lycoris_"))
    writers.kohya(made, LAYERS)
    assert main(["convert", str(made), "--to", "lycoris", "--output", str(tmp_path / "d.safetensors")]) == 0
    written = load(tmp_path / "d.safetensors")
    assert written.keys() == golden.keys() and all(torch.equal(written[name], golden[name]) for name in golden)


def test_the_header_is_kept_and_the_hashes_are_made_anew(tmp_path: Path, lora: Path) -> None:
    assert main(["convert", str(lora), "--to", "diffusers", "--output", str(tmp_path / "b.safetensors")]) == 0
    data = (tmp_path / "b.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])["__metadata__"]
    digest = hashlib.sha256(data[8 + length :]).hexdigest()
    assert header["sshs_model_hash"] == digest and header["modelspec.hash_sha256"] == f"0x{digest}"
    assert {name: header[name] for name in HEADER if "hash" not in name} == {
        name: value for name, value in HEADER.items() if "hash" not in name
    }


def test_broken_text_encoder_names_are_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = writers.renamed(tmp_path / "a.safetensors", SOME, "_te_text_model_", "_te_")
    assert main(["convert", str(broken), "--output", str(tmp_path / "b.safetensors")]) == 0
    assert "text-encoder names mended, which no program but diffusers reads: 6 layers" in capsys.readouterr().out
    assert load(tmp_path / "b.safetensors").keys() == writers.flat(SOME).keys()


def test_convolutions_stored_as_matrices_are_reshaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flattened = {k: v.flatten(1) if v.dim() == 4 else v for k, v in writers.flat(SOME).items()}
    path = writers.save(tmp_path / "a.safetensors", flattened)
    assert main(["convert", str(path), "--output", str(tmp_path / "b.safetensors")]) == 0
    assert "reshaped to the layer's own number of dimensions: 2 layers" in capsys.readouterr().out
    assert {k: v.shape for k, v in load(tmp_path / "b.safetensors").items()} == {
        k: v.shape for k, v in writers.flat(SOME).items()
    }


@pytest.mark.parametrize("precision, dtype", [("float", torch.float32), ("bf16", torch.bfloat16)])
def test_precision(tmp_path: Path, lora: Path, precision: str, dtype: torch.dtype) -> None:
    output = tmp_path / "b.safetensors"
    command = ["convert", str(lora), "--to", "diffusers", "--output", str(output), "--save-precision", precision]
    assert main(command) == 0
    name = "unet.mid_block.attentions.0.proj_in.lora_B.weight"
    up = LAYERS["lora_unet_mid_block_attentions_0_proj_in"]["lora_up.weight"]
    assert torch.equal(load(output)[name], (up.float() / 2).to(dtype))


@pytest.mark.parametrize("tails", [
    ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"], ["lokr_w1", "lokr_w2", "alpha"],
    ["oft_blocks", "alpha"], ["a1.weight", "a2.weight", "b1.weight", "b2.weight"], ["weight", "on_input"], ["diff"],
    ["w_norm", "b_norm"], ["lora_down.weight", "lora_up.weight", "dora_scale"],
    ["lora_down.weight", "lora_up.weight", "lora_mid.weight"],
])  # fmt: skip
def test_other_kinds_change_names_and_nothing_else(
    tmp_path: Path, tails: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    values = {tail: torch.rand(()) if tail in ("alpha", "on_input") else torch.rand(2, 2) for tail in tails}
    layers = {"lora_unet_middle_block_1_proj_in": values, "lora_te_encoder_layers_0_mlp_fc1": values}
    path = writers.kohya(tmp_path / "a.safetensors", layers)
    assert main(["convert", str(path), "--output", str(tmp_path / "b.safetensors")]) == 0
    wanted = ["lora_unet_mid_block_attentions_0_proj_in", "lora_te_text_model_encoder_layers_0_mlp_fc1"]
    found = load(tmp_path / "b.safetensors")
    assert found.keys() == {f"{name}.{tail}" for name in wanted for tail in tails}
    assert all(torch.equal(value, values[key.partition(".")[2]]) for key, value in found.items())
    for to, output in [("diffusers", "c.safetensors"), ("peft", "c"), ("cloneofsimo", "c.pt"), ("d8ahazard", "c.pt")]:
        assert main(["convert", str(path), "--to", to, "--output", str(tmp_path / output)]) == 2
        assert "holds only plain LoRA" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_what_has_no_place_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factors = SOME["lora_unet_mid_block_attentions_0_proj_in"]
    tensors = {**writers.flat({**SOME, "lora_unet_unheard_of": factors}), "bundle_emb.x.clip_l": torch.ones(1, 768)}
    path = writers.save(tmp_path / "a.safetensors", tensors)
    assert main(["convert", str(path), "--to", "diffusers", "--output", str(tmp_path / "b.safetensors")]) == 1
    told = capsys.readouterr().out
    assert "1: a layer whose name is not known; lora_unet_unheard_of" in told
    assert "1: a bundled embedding, which diffusers has no place for; bundle_emb.x.clip_l" in told
    assert len(read_any(tmp_path / "b.safetensors").layers()) == len(SOME)


def mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["convert", *words]) == 2
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    return capsys.readouterr().err


def test_mistakes(tmp_path: Path, lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = str(tmp_path / "b.safetensors")
    assert "missing: LORA" in mistake(tmp_path, capsys, "--output", other)
    assert "missing: --output" in mistake(tmp_path, capsys, str(lora))
    assert "add --overwrite" in mistake(tmp_path, capsys, str(lora), "--output", str(lora))
    told = mistake(tmp_path, capsys, str(lora), "--to", "peft", "--output", other)
    assert "a folder's name" in told
    assert "one of .pt, .safetensors" in mistake(
        tmp_path, capsys, str(lora), "--to", "cloneofsimo", "--output", "b.zip"
    )
    (tmp_path / "c.pt").mkdir()
    assert "is a folder" in mistake(tmp_path, capsys, str(lora), "--output", str(tmp_path / "c.pt"))
    (tmp_path / "d_txt.pt").touch()
    told = mistake(tmp_path, capsys, str(lora), "--to", "cloneofsimo", "--output", str(tmp_path / "d.pt"))
    assert "taken for a part of the output" in told
    writers.kohya(tmp_path / "e.safetensors", SOME)
    told = mistake(tmp_path, capsys, str(tmp_path / "e.safetensors"), "--to", "cloneofsimo", "--output", other)
    assert "needs all of 192 layers" in told
    writers.kohya(tmp_path / "f.safetensors", {"lora_unet_x": SOME["lora_unet_mid_block_attentions_0_proj_in"]})
    told = mistake(tmp_path, capsys, str(tmp_path / "f.safetensors"), "--to", "ldm", "--output", other)
    assert "nothing of it has a place in ldm" in told
    flux = {"lora_unet_double_blocks_0_x": SOME["lora_unet_mid_block_attentions_0_proj_in"]}
    writers.kohya(tmp_path / "g.safetensors", flux)
    factors = SOME["lora_unet_mid_block_attentions_0_proj_in"]
    two = {f"{part}.x.lora_{half}.weight": torch.ones(2, 2) for part in ("unet", "text_encoder_2") for half in "AB"}
    writers.save(tmp_path / "sdxl.safetensors", two)
    assert "for SDXL;" in mistake(tmp_path, capsys, str(tmp_path / "sdxl.safetensors"), "--output", other)
    writers.kohya(tmp_path / "te2.safetensors", {"lora_te2_x": factors})
    told = mistake(tmp_path, capsys, str(tmp_path / "te2.safetensors"), "--to", "diffusers", "--output", other)
    assert "names in sd-scripts' form are mended" in told
    assert "for FLUX;" in mistake(tmp_path, capsys, str(tmp_path / "g.safetensors"), "--output", other)
    broken = {name: {tail: tensor * float("nan") for tail, tensor in own.items()} for name, own in SOME.items()}
    writers.kohya(tmp_path / "h.safetensors", broken)
    told = mistake(tmp_path, capsys, str(tmp_path / "h.safetensors"), "--output", other)
    assert "holds NaN" in told and "lorasmith train --learning-rate" in told  # convert has no such option
    large = {name: {**own, "alpha": torch.tensor(1e5)} for name, own in SOME.items()}
    writers.kohya(tmp_path / "i.safetensors", large)
    told = mistake(tmp_path, capsys, str(tmp_path / "i.safetensors"), "--to", "diffusers", "--output", other)
    assert "fp16 cannot hold" in told


@pytest.mark.parametrize("to, output", [("ldm", "b.safetensors"), ("peft", "b"), ("diffusers", "b.safetensors")])
def test_sd2_too(tmp_path: Path, to: str, output: str) -> None:
    layers = writers.make_layers("sd2", rank=1, only="unet_mid|te.*layers_(0|22)_")  # alpha is the rank
    path = writers.kohya(tmp_path / "a.safetensors", layers)
    assert main(["convert", str(path), "--to", to, "--output", str(tmp_path / output)]) == 0
    assert main(["convert", str(tmp_path / output), "--output", str(tmp_path / "back.safetensors")]) == 0
    back = load(tmp_path / "back.safetensors")
    assert {k: v.float().tolist() for k, v in back.items()} == {
        k: v.float().tolist() for k, v in writers.flat(layers).items()
    }


def test_a_full_disk_is_told_as_this_command_can_be_helped(
    tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    output = tmp_path / "b.safetensors"
    monkeypatch.setattr(os, "fsync", full)
    told = mistake(tmp_path, capsys, str(lora), "--output", str(output))
    assert f"{output} could not be saved: the disk is full" in told and "make room and start again" in told
    assert "--resume" not in told  # which this command does not have


def test_a_file_is_mended_in_its_place_when_that_is_asked_for(tmp_path: Path) -> None:
    path = writers.renamed(tmp_path / "a.safetensors", SOME, "_te_text_model_", "_te_")
    assert main(["convert", str(path), "--output", str(path), "--overwrite"]) == 0
    assert load(path).keys() == writers.flat(SOME).keys()
