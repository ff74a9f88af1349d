"""`lorasmith merge` without a model, through the command: what the sum does is what the LoRAs do together."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lorasmith.checkpoint import open_checkpoint
from lorasmith.cli import main
from lorasmith.model_families import target_shapes
from tests.random_lora import CONV, SHAPES, TE, TO_K, deltas_of, make_lora, ranks_of, read_lora, write_lora
from tests.tiny import write_tiny

A, B = make_lora(rank=4, alpha=2.0, seed=1), make_lora(rank=3, alpha=None, seed=2)
UNET = make_lora({name: shape for name, shape in SHAPES.items() if name != TE}, rank=2, alpha=1.0, seed=3)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_lora(tmp_path / "a.safetensors", A, {"ss_v2": "False", "ss_seed": "1", "modelspec.title": "first"})
    write_lora(tmp_path / "b.safetensors", B, {"ss_v2": "False", "ss_seed": "2"})
    write_lora(tmp_path / "unet.safetensors", UNET)
    torch.save(A, tmp_path / "a.pt")
    return tmp_path


def merge(*arguments: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    assert main(["merge", *arguments, "--output", "out.safetensors", "--overwrite"]) == 0
    return read_lora(Path("out.safetensors"))


def assert_sum(tensors: dict[str, Tensor], *weighted: tuple[float, dict[str, Tensor]]) -> None:
    found, changes = deltas_of(tensors), [(ratio, deltas_of(lora)) for ratio, lora in weighted]
    assert found.keys() == set().union(*(deltas.keys() for _, deltas in changes))
    for name, delta in found.items():
        expected = sum(ratio * deltas[name] for ratio, deltas in changes if name in deltas)
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(delta, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("ratio", ["0.5", "1", "-0.7", "2"])
def test_one_lora_becomes_as_strong_as_its_ratio_says(folder: Path, ratio: str) -> None:
    assert_sum(merge("--lora", "a.safetensors", "--ratio", ratio)[0], (float(ratio), A))


def test_the_products_are_added_at_the_sum_of_the_ranks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, metadata = merge("--lora", "a.safetensors", "b.safetensors", "--ratio", "0.8", "-0.5")
    assert_sum(tensors, (0.8, A), (-0.5, B))
    assert set(ranks_of(tensors).values()) == {7}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert tensors[f"{CONV}.lora_down.weight"].shape == (7, 8, 3, 3)
    assert tensors[f"{CONV}.lora_up.weight"].shape == (10, 7, 1, 1)
    assert metadata["ss_v2"] == "False" and "ss_seed" not in metadata
    assert (metadata["ss_network_dim"], metadata["modelspec.merged_from"]) == ("7", "first, b")
    assert [origin["ratios"]["unet"] for origin in json.loads(metadata["lorasmith.merged"])] == [0.8, -0.5]
    out = capsys.readouterr().out
    assert "a.safetensors: 1 layers of the text_encoder x 0.8, 3 layers of the unet x 0.8" in out
    assert "100.0000%" in out and "no --model is given" in out


def test_files_of_torch_without_alphas_and_without_ratios_will_do(folder: Path) -> None:
    assert_sum(merge("--lora", "a.pt", "b.safetensors")[0], (1, A), (1, B))


def test_what_a_lora_does_not_have_counts_as_zero(folder: Path) -> None:
    for files in (["a.safetensors", "unet.safetensors"], ["unet.safetensors", "a.safetensors"]):
        tensors, metadata = merge("--lora", *files)
        assert_sum(tensors, (1, A), (1, UNET))
        assert ranks_of(tensors)[TE] == 4 and ranks_of(tensors)[TO_K] == 6
        assert metadata["ss_network_dim"] == "Dynamic"


def test_loras_that_cancel_each_other_leave_nothing_to_save(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = ["merge", "--lora", "a.safetensors", "a.pt", "--output", "out.safetensors"]
    assert main([*same, "--ratio", "1", "-1"]) == 2
    assert "cancel each other" in capsys.readouterr().err and not Path("out.safetensors").exists()
    assert main([*same, "--ratio", "1", "-0.999"]) == 0  # a thousandth is left, and no rounding


def test_parts_have_ratios_of_their_own(folder: Path) -> None:
    found = deltas_of(merge("--lora", "a.safetensors", "--unet-ratio", "0.5", "--text-encoder-ratio", "-2")[0])
    for name, delta in deltas_of(A).items():
        torch.testing.assert_close(found[name], delta * (-2 if name == TE else 0.5), atol=1e-6, rtol=1e-5)


def test_svd_cuts_the_sum_and_tells_the_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = deltas_of(merge("--lora", "a.safetensors", "b.safetensors")[0])
    capsys.readouterr()
    tensors = merge("--lora", "a.safetensors", "b.safetensors", "--method", "svd", "--rank", "2")[0]
    rows = {words[0]: words for line in capsys.readouterr().out.splitlines() if len(words := line.split()) == 5}
    assert set(ranks_of(tensors).values()) == {2}
    lost = {name: delta - whole[name] for name, delta in deltas_of(tensors).items()}
    for block, names in (("up_blocks_1", [CONV]), ("all", list(SHAPES))):
        error = sum(lost[name].square().sum() for name in names) / sum(whole[name].square().sum() for name in names)
        assert float(rows[block][4].rstrip("%")) == pytest.approx(100 * float(error) ** 0.5, abs=1e-2)  # type: ignore[arg-type]
    exact = merge("--lora", "a.safetensors", "b.safetensors", "--method", "svd", "--rank", "7")[0]
    assert_sum(exact, (1, A), (1, B))


def test_a_model_with_the_sum_is_a_model_with_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = write_tiny(tmp_path / "base.safetensors")
    with open_checkpoint(base) as checkpoint:
        shapes = target_shapes(checkpoint)
    write_lora(tmp_path / "a.safetensors", make_lora(shapes, seed=1))
    write_lora(tmp_path / "b.safetensors", make_lora(shapes, rank=2, seed=2))
    loras = ["--lora", "a.safetensors", "b.safetensors", "--ratio", "0.8", "-0.5"]
    merge(*loras)
    model = ["merge", "--model", "base.safetensors"]
    assert main([*model, *loras, "--output", "both.safetensors"]) == 0
    assert main([*model, "--lora", "out.safetensors", "--output", "sum.safetensors"]) == 0
    both, summed = load_file("both.safetensors"), load_file("sum.safetensors")
    assert both.keys() == summed.keys()
    for name, tensor in both.items():
        torch.testing.assert_close(summed[name], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "missing: --lora"),
        (["--lora", "a.safetensors", "--ratio", "1", "2"], "ratio is given 2 times for 1 LoRA"),
        (["--lora", "a.safetensors", "--ratio", "0"], "its ratio is 0"),
        (["--lora", "a.safetensors", "--method", "svd"], "--method svd --rank 32"),
        (["--lora", "a.safetensors", "--rank", "4"], "--method svd --rank 32"),
        (["--lora", "a.safetensors", "--method", "svd", "--rank", "0"], "above 0"),
        (["--lora", "a.safetensors", "--method", "sum"], "concat"),
        (["--lora", "a.safetensors", "--verify"], "give --model"),
        (["--lora", "a.safetensors", "--block-weights", "1,1"], "give --model"),
        (["--lora", "a.safetensors", "--precision", "fp16"], "give --model"),
        (["--lora", "a.safetensors", "--model", "m", "--method", "svd", "--rank", "4"], "leave out model"),
        (["--lora", "a.safetensors", "absent.safetensors"], "no such file"),
        (["--lora", "a.safetensors", "wide.safetensors"], f"{TO_K} has weights of 16 x 24 in a.safetensors"),
        (["--lora", "sd1.safetensors", "sd2.safetensors"], "different width (768 and 1024)"),
        (["--lora", "a.safetensors", "nan.safetensors"], "NaN"),
        (["--lora", "a.safetensors", "--ratio", "1e14", "--save-precision", "fp16"], "--save-precision"),
        (["--lora", "a.safetensors", "--output", "there.safetensors"], "exists already"),
        (["--lora", "a.safetensors", "--output", "a.safetensors", "--overwrite"], "is what is read"),
        (["--lora", "a.safetensors", "--output", "out.bin"], "should end in"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    folder: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, shape in (("wide", (16, 32)), ("sd1", (16, 768)), ("sd2", (16, 1024))):
        write_lora(folder / f"{name}.safetensors", make_lora({TO_K: shape}))
    write_lora(folder / "nan.safetensors", {**A, f"{TE}.alpha": torch.tensor(float("nan"))})
    (folder / "there.safetensors").write_bytes(b"mine")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    output = [] if "--output" in arguments else ["--output", "out.safetensors"]
    assert main(["merge", *arguments, *output]) == 2
    assert expected in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
