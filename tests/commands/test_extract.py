"""`lorasmith extract`, through the command, on miniatures: a LoRA put into a model is found again."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasmith import model_families
from lorasmith.checkpoint import open_checkpoint
from lorasmith.cli import main
from lorasmith.models.keys import sd as keys
from tests.random_lora import deltas_of, make_lora, ranks_of, read_lora
from tests.tiny import build_tiny, openclip_rest, write_tiny

RANK = 3
SUFFIX = {"safetensors": ".safetensors", "diffusers": ""}


def targets(family: str, unet: torch.nn.Module, text: torch.nn.Module) -> dict[str, Tensor]:
    """Return the weights that a LoRA goes on."""
    found: dict[str, Tensor] = {
        name: unet.get_parameter(f"{module}.weight") for name, module in keys.unet_targets().items()
    }
    names = keys.text_targets(family)  # type: ignore[arg-type]
    return found | {name: text.get_parameter(f"{module}.weight") for name, module in names.items()}


def write_tuned(path: Path, family: str, parts: Iterable[str], *, seed: int = 0) -> dict[str, Tensor]:
    """Write the miniature with a random LoRA in it, and return the LoRA."""
    unet, vae, text = build_tiny(family)
    weights = {name: weight for name, weight in targets(family, unet, text).items() if name.startswith(tuple(parts))}
    lora = make_lora({name: tuple(weight.shape) for name, weight in weights.items()}, rank=RANK, seed=seed)
    with torch.no_grad():
        for name, delta in deltas_of(lora).items():
            weights[name] += delta.view(weights[name].shape).float()
    tensors = keys.to_ldm(*(part.state_dict() for part in (unet, vae, text)), kept=openclip_rest(family))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    return lora


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a folder with the same, and the base with a LoRA in all its layers."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny(folder / "base.safetensors")
    write_tiny(folder / "folder", layout="diffusers")
    write_tuned(folder / "tuned.safetensors", "sd1", ["lora_"])
    return folder


def extract(
    models: Path, output: Path, *options: str, tuned: str = "tuned.safetensors", base: str = "base.safetensors"
):
    arguments = ["--tuned", str(models / tuned), "--base", str(models / base), "--output", str(output), *options]
    assert main(["extract", *arguments]) == 0
    return read_lora(output)


def differences(models: Path, tuned: str, base: str) -> dict[str, Tensor]:
    """Return tuned minus base by saved name as matrices, read from the files with nobody's help."""
    both = [load_file(models / name) for name in (tuned, base)]
    found = {}
    for name, module in keys.unet_targets().items():
        stored = keys.ldm_unet()[f"{module}.weight"].name
        found[name] = (both[0][stored].double() - both[1][stored].double()).flatten(1)
    for name, module in keys.text_targets("sd1").items():
        stored = f"cond_stage_model.transformer.text_model.{module}.weight"
        found[name] = both[0][stored].double() - both[1][stored].double()
    return found


@pytest.mark.parametrize("base", ["base.safetensors", "folder"])
def test_a_lora_in_a_model_is_found_again(models: Path, tmp_path: Path, base: str) -> None:
    tensors, metadata = extract(
        models, tmp_path / "out.safetensors", "--rank", str(RANK), "--save-precision", "float", base=base
    )
    found = deltas_of(tensors)
    assert len(found) == 264 and set(ranks_of(tensors).values()) == {RANK}
    for name, delta in deltas_of(make_lora_of(models)).items():
        torch.testing.assert_close(found[name], delta, atol=2e-6, rtol=1e-3)
    wanted = {
        "ss_network_dim": "3", "ss_network_alpha": "3.0", "ss_network_module": "networks.lora", "ss_v2": "False",
        "ss_base_model_version": "sd_v1", "ss_sd_model_name": base, "modelspec.title": "out",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "ss_training_comment": "extracted from tuned.safetensors with rank 3",
    }  # fmt: skip
    assert wanted.items() <= metadata.items()


def make_lora_of(models: Path) -> dict[str, Tensor]:
    """Return the LoRA that is in the tuned model."""
    unet, _, text = build_tiny("sd1")
    return make_lora({name: tuple(weight.shape) for name, weight in targets("sd1", unet, text).items()}, rank=RANK)


def test_sd2_whose_files_hold_query_key_and_value_in_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(tmp_path / "base.safetensors", "sd2")
    lora = write_tuned(tmp_path / "tuned.safetensors", "sd2", ["lora_te"])
    tensors, metadata = extract(
        tmp_path, tmp_path / "out.safetensors", "--quality", "0.999999", "--save-precision", "float"
    )
    found = deltas_of(tensors)
    assert len(found) == 138 and set(ranks_of(tensors).values()) == {RANK} and metadata["ss_v2"] == "True"
    for name, delta in deltas_of(lora).items():
        torch.testing.assert_close(found[name], delta, atol=2e-6, rtol=1e-3)
    assert "left out: 192 layers of the unet, the same in both models" in capsys.readouterr().out


def test_the_quality_is_met_and_one_rank_less_would_miss_it(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = ranks_of(extract(models, tmp_path / "out.safetensors", "--quality", "0.7")[0])
    assert len(set(ranks.values())) > 1
    for name, delta in differences(models, "tuned.safetensors", "base.safetensors").items():
        squares = torch.linalg.svdvals(delta).square()
        shares = squares.cumsum(0) / squares.sum()
        assert shares[ranks[name] - 1] >= 0.7 - 1e-6
        assert ranks[name] == 1 or shares[ranks[name] - 2] < 0.7 + 1e-6
    assert "quality 0.7 is met by 264 of 264 layers\n" in capsys.readouterr().out


def test_a_limit_is_kept_and_told(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unlimited = ranks_of(extract(models, tmp_path / "a.safetensors", "--quality", "0.45")[0])
    ranks = ranks_of(extract(models, tmp_path / "b.safetensors", "--quality", "0.45", "--max-rank", "1")[0])
    num_met = sum(rank == 1 for rank in unlimited.values())
    assert set(ranks.values()) == {1} and 0 < num_met < 264
    assert f"quality 0.45 is met by {num_met} of 264 layers; the others would need" in capsys.readouterr().out


def test_the_energy_that_is_told_is_that_of_the_file(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, _ = extract(models, tmp_path / "out.safetensors", "--rank", "1", "--save-precision", "float")
    rows = {words[0]: words for line in capsys.readouterr().out.splitlines() if len(words := line.split()) == 5}
    whole, found = differences(models, "tuned.safetensors", "base.safetensors"), deltas_of(tensors)
    for block, part in [("mid_block", "lora_unet_mid_block"), ("text_encoder", "lora_te"), ("all", "lora_")]:
        names = [name for name in whole if name.startswith(part)]
        kept = sum(found[name].square().sum() for name in names)
        total = sum(whole[name].square().sum() for name in names)
        assert float(rows[block][3].rstrip("%")) == pytest.approx(100 * float(kept / total), abs=1e-2)
        assert int(rows[block][1]) == len(names)


@pytest.mark.parametrize("layout", ["safetensors", "diffusers"])
def test_convolutions_that_were_merged_are_found_again(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Merge and extract through the commands; what is not extracted is told by its share of the squared norm."""
    base, tuned = (tmp_path / f"{name}{SUFFIX[layout]}" for name in ("base", "tuned"))
    lora = tmp_path / "lora.safetensors"
    write_tiny(base, layout=layout)
    with open_checkpoint(base) as checkpoint:
        places = model_families.adapter_places(checkpoint)[1]
    names = [name for name, place in places.items() if len(place.shape) > 1 and "_embeddings_" not in name]
    tensors = make_lora({name: places[name].shape for name in names}, rank=RANK)
    norm = "lora_unet_down_blocks_0_resnets_0_norm1"
    rest = {f"{norm}.w_norm": torch.full((32,), 0.5), "lora_unet_conv_in.diff_b": torch.full((32,), 0.25)}
    save_file({key: tensor for key, tensor in tensors.items() if "_conv_in." not in key} | rest, lora)
    merge = ["merge", "--model", str(base), "--lora", str(lora), "--output", str(tuned)]
    assert main([*merge, "--save-precision", "float"]) == 0
    capsys.readouterr()
    arguments = [
        "extract",
        "--tuned",
        str(tuned),
        "--base",
        str(base),
        "--rank",
        str(RANK),
        "--save-precision",
        "float",
    ]
    assert main([*arguments, "--conv-rank", str(RANK), "--output", str(tmp_path / "all.safetensors")]) == 0
    printed = capsys.readouterr().out
    found, wanted = deltas_of(read_lora(tmp_path / "all.safetensors")[0]), deltas_of(tensors)
    assert found.keys() == wanted.keys() - {"lora_unet_conv_in"}
    for name, delta in found.items():
        torch.testing.assert_close(delta, wanted[name], atol=2e-6, rtol=1e-3)
    squares = {name: delta.square().sum().item() for name, delta in wanted.items() if name in found}
    whole = sum(squares.values()) + 32 * 0.5**2 + 32 * 0.25**2
    assert f"left out: {32 * 0.5**2 / whole:.4%} in norms" in printed
    assert f"left out: {32 * 0.25**2 / whole:.4%} in biases" in printed and "other convolutions" not in printed
    assert main([*arguments, "--output", str(tmp_path / "plain.safetensors")]) == 0
    printed, plain = capsys.readouterr().out, read_lora(tmp_path / "plain.safetensors")[0]
    assert deltas_of(plain).keys() == {name for name in squares if places[name].is_target}
    share = sum(square for name, square in squares.items() if not places[name].is_target) / whole
    told = float(printed.split("% in other convolutions")[0].rsplit(" ", 1)[1])
    assert told == pytest.approx(100 * share, abs=1e-3) and "--conv-rank extracts it" in printed


def test_convolutions_have_a_rank_of_their_own(models: Path, tmp_path: Path) -> None:
    before = load_file(models / "base.safetensors")
    generator = torch.Generator().manual_seed(1)
    tuned = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) if "input_blocks" in name else tensor
        for name, tensor in before.items()
    }
    save_file(tuned, tmp_path / "tuned.safetensors")
    tuned_name = str(tmp_path / "tuned.safetensors")
    for options in (["--rank", "4"], ["--quality", "0.9999", "--max-rank", "4"]):
        output = tmp_path / f"{options[0]}.safetensors"
        ranks = ranks_of(extract(models, output, *options, "--conv-rank", "2", tuned=tuned_name)[0])
        spatial = ("conv1", "conv2", "samplers_0_conv", "conv_in")
        assert {rank for name, rank in ranks.items() if name.endswith(spatial)} == {2}
        assert {rank for name, rank in ranks.items() if not name.endswith(spatial)} == {4}
        assert any("time_emb_proj" in name for name in ranks) and any("conv_shortcut" in name for name in ranks)


def test_models_without_a_vae_will_do(models: Path, tmp_path: Path) -> None:
    for name in ("base", "tuned"):
        tensors = load_file(models / f"{name}.safetensors")
        kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(keys.VAE)}
        save_file(kept, tmp_path / f"{name}.safetensors")
    with_vae, _ = extract(models, tmp_path / "a.safetensors", "--rank", "2")
    without, _ = extract(tmp_path, tmp_path / "b.safetensors", "--rank", "2")
    assert with_vae.keys() == without.keys() and all(torch.equal(with_vae[key], without[key]) for key in without)


def test_models_that_differ_only_elsewhere_are_told(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(models / "base.safetensors")
    tensors[f"{keys.UNET}input_blocks.0.0.weight"] += 1
    save_file(tensors, tmp_path / "tuned.safetensors")
    arguments = ["--tuned", str(tmp_path / "tuned.safetensors"), "--base", str(models / "base.safetensors")]
    output = str(tmp_path / "out.safetensors")
    assert main(["extract", *arguments, "--rank", "1", "--output", output]) == 2
    assert "They differ elsewhere; --conv-rank" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--tuned", "tuned.safetensors", "--base", "base.safetensors"], "missing: --rank"),
        (["--tuned", "tuned.safetensors", "--rank", "4"], "missing: --base"),
        (["--base", "base.safetensors", "--rank", "4"], "missing: --tuned"),
        (["--tuned", "T", "--base", "B", "--rank", "4", "--quality", "0.9"], "leave out one"),
        (["--tuned", "T", "--base", "B", "--rank", "4", "--max-rank", "8"], "add --quality"),
        (["--tuned", "T", "--base", "B", "--quality", "99"], "at most 1"),
        (["--tuned", "absent.ckpt", "--base", "base.safetensors", "--rank", "4"], "no such file"),
        (["--tuned", "base.safetensors", "--base", "base.safetensors", "--rank", "4"], "the same in all 264 layers"),
        (["--tuned", "tuned.safetensors", "--base", "sd2.safetensors", "--rank", "4"], "different families"),
        (["--tuned", "tuned.safetensors", "--base", "wide.safetensors", "--rank", "4"], "different shapes"),
        (["--tuned", "nan.safetensors", "--base", "base.safetensors", "--rank", "4"], "NaN or infinity"),
        (["--tuned", "lora.safetensors", "--base", "base.safetensors", "--rank", "4"], "is a LoRA, not a base model"),
        (["--tuned", "T", "--base", "B", "--rank", "4", "--output", "out"], "should end in"),
        (["--tuned", "T", "--base", "B", "--rank", "4", "--output", "base.safetensors"], "exists already"),
        (
            ["--tuned", "tuned.safetensors", "--base", "base.safetensors", "--rank", "4", "--overwrite", "--output",
             "base.safetensors"],
            "is what is read",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_told_and_nothing_is_written(
    more_models: Path,
    options: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(more_models)
    before = {path: path.stat().st_mtime_ns for path in more_models.iterdir()}
    output = [] if "--output" in options else ["--output", "out.safetensors"]
    assert main(["extract", *options, *output]) == 2
    assert expected in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in more_models.iterdir()} == before


@pytest.fixture(scope="module")
def more_models(models: Path) -> Path:
    write_tiny(models / "sd2.safetensors", "sd2")
    write_tiny(models / "wide.safetensors", width=64)
    tensors = load_file(models / "base.safetensors")
    tensors["model.diffusion_model.input_blocks.1.1.proj_in.weight"][0, 0] = float("nan")
    save_file(tensors, models / "nan.safetensors")
    save_file(make_lora(), models / "lora.safetensors")
    return models
