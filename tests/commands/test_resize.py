"""`lorasmith resize`, through the command: what it keeps, what it promises, and what it refuses."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorasmith.cli import main
from tests.random_lora import CONV, SHAPES, TE, deltas_of, make_lora, ranks_of, read_lora, write_lora

METADATA = {"ss_network_dim": "8", "ss_network_alpha": "4.0", "ss_training_comment": "mine", "modelspec.title": "t"}


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """Rank 8 with values that fall, in fp32."""
    tensors = make_lora(rank=8, alpha=4.0)
    for key, tensor in tensors.items():
        if key.endswith("lora_down.weight"):
            tensor.mul_(0.6 ** torch.arange(8.0).view(-1, *(1 for _ in tensor.shape[1:])))
    return write_lora(tmp_path / "in.safetensors", tensors, METADATA)


def resize(lora: Path, *options: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    output = lora.with_name("out.safetensors")
    assert main(["resize", str(lora), "--output", str(output), "--overwrite", *options]) == 0
    return read_lora(output)


def energies(delta: Tensor) -> Tensor:
    """Return the share of the squared norm that each rank keeps, from the whole matrix."""
    squares = torch.linalg.svdvals(delta).square()
    return squares.cumsum(0) / squares.sum()


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_each_layer_becomes_the_nearest_of_its_rank(lora: Path, rank: int) -> None:
    before = read_lora(lora)[0]
    tensors, metadata = resize(lora, "--rank", str(rank))
    assert set(ranks_of(tensors).values()) == {rank}
    assert all(tensors[f"{name}.alpha"] == 0.5 * rank for name in SHAPES)
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (str(rank), str(0.5 * rank))
    assert {key: tuple(tensor.shape[2:]) for key, tensor in tensors.items()} == {
        key: tuple(tensor.shape[2:]) for key, tensor in before.items()
    }
    for name, delta in deltas_of(before).items():
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        nearest = left[:, :rank] * values[:rank] @ right[:rank]
        torch.testing.assert_close(deltas_of(tensors)[name], nearest, atol=1e-6, rtol=1e-5)


def test_the_full_rank_changes_nothing(lora: Path) -> None:
    tensors, before = resize(lora, "--rank", "8")[0], read_lora(lora)[0]
    assert tensors.keys() == before.keys() and all(torch.equal(tensors[key], before[key]) for key in before)


@pytest.mark.parametrize(("rule", "power"), [("energy", 1.0), ("frobenius", 0.5)])
@pytest.mark.parametrize("value", [0.8, 0.95, 0.99])
def test_a_share_is_kept_and_one_rank_less_would_miss_it(lora: Path, rule: str, power: float, value: float) -> None:
    before = deltas_of(read_lora(lora)[0])
    tensors, metadata = resize(lora, "--dynamic", rule, "--value", str(value))
    ranks = ranks_of(tensors)
    assert len(set(ranks.values())) > 1 and metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "Dynamic"
    for name, delta in before.items():
        shares = energies(delta) ** power
        assert shares[ranks[name] - 1] >= value
        assert ranks[name] == 1 or shares[ranks[name] - 2] < value


def test_a_ratio_keeps_what_is_not_so_much_smaller(lora: Path) -> None:
    before = deltas_of(read_lora(lora)[0])
    for name, rank in ranks_of(resize(lora, "--dynamic", "ratio", "--value", "5")[0]).items():
        values = torch.linalg.svdvals(before[name])
        assert rank == int((values > values[0] / 5).sum()) > 1


def test_the_energy_that_is_told_is_that_of_the_file(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = deltas_of(read_lora(lora)[0]), deltas_of(resize(lora, "--rank", "2")[0])
    rows = {words[0]: words for line in capsys.readouterr().out.splitlines() if len(words := line.split()) == 5}
    whole, kept = (sum(delta.square().sum().item() for delta in deltas.values()) for deltas in (before, after))
    assert float(rows["all"][3].rstrip("%")) == pytest.approx(100 * kept / whole, abs=1e-3)
    assert rows["up_blocks_1"][1:3] == ["1", "2"] and rows["text_encoder"][1] == "1"
    lost = (before[CONV] - after[CONV]).norm() / before[CONV].norm()
    assert float(rows["up_blocks_1"][4].rstrip("%")) == pytest.approx(100 * lost.item(), abs=1e-2)


def test_layers_of_a_lower_rank_stay_as_they_are(tmp_path: Path) -> None:
    small = make_lora({TE: SHAPES[TE]}, rank=2)
    lora = write_lora(tmp_path / "in.safetensors", {**make_lora(rank=6), **small})
    tensors, metadata = resize(lora, "--rank", "4")
    assert ranks_of(tensors)[TE] == 2 and set(ranks_of(tensors).values()) == {2, 4}
    assert all(torch.equal(tensors[key], small[key]) for key in small)
    assert metadata["ss_network_dim"] == "Dynamic"


def test_precision_and_metadata_are_the_inputs_unless_asked(lora: Path) -> None:
    tensors, metadata = resize(lora, "--rank", "4")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert metadata["modelspec.title"] == "t"
    assert metadata["ss_training_comment"] == "dimension is resized from 8 to 4; mine"
    tensors, metadata = resize(lora, "--dynamic", "energy", "--value", "0.9", "--save-precision", "bf16")
    assert tensors[f"{TE}.lora_up.weight"].dtype == torch.bfloat16
    assert metadata["ss_training_comment"] == "dimension is resized from 8 by energy 0.9; mine"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "missing: --rank"),
        (["--rank", "9"], "has rank 8"),
        (["--rank", "0"], "above 0"),
        (["--rank", "4", "--dynamic", "energy", "--value", "0.9"], "leave out one"),
        (["--dynamic", "energy"], "belong together"),
        (["--rank", "4", "--value", "0.9"], "belong together"),
        (["--dynamic", "energy", "--value", "1.5"], "share up to 1"),
        (["--dynamic", "frobenius", "--value", "99"], "share up to 1"),
        (["--dynamic", "ratio", "--value", "0.5"], "from 1 on"),
        (["--dynamic", "size", "--value", "0.5"], "energy"),
        (["--rank", "4", "--output", "IN"], "is what is read"),
        (["--rank", "4", "--output", "there.safetensors"], "exists already"),
        (["--rank", "4", "--output", "out.zip"], "should end in"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    lora: Path, options: list[str], expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lora.parent)
    Path("there.safetensors").write_bytes(b"mine")
    before = lora.read_bytes()
    given = [str(lora) if option == "IN" else option for option in options]
    output = [] if "--output" in options else ["--output", "out.safetensors"]
    assert main(["resize", str(lora), *output, *given]) == 2
    assert expected in capsys.readouterr().err
    assert lora.read_bytes() == before and Path("there.safetensors").read_bytes() == b"mine"
    assert sorted(path.name for path in lora.parent.iterdir()) == ["in.safetensors", "there.safetensors"]


def test_files_that_are_no_lora_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = make_lora()
    broken[f"{TE}.lora_up.weight"][0, 0] = float("nan")
    write_lora(tmp_path / "nan.safetensors", broken)
    write_lora(tmp_path / "peft.safetensors", {"unet.conv_in.lora_A.weight": torch.zeros(2, 2)})
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "nan.safetensors").read_bytes()[:-5])
    for name, expected in [("nan", "NaN"), ("peft", "incomplete"), ("cut", "cut short"), ("absent", "no such file")]:
        file = tmp_path / f"{name}.safetensors"
        assert main(["resize", str(file), "--rank", "2", "--output", str(tmp_path / "out.safetensors")]) == 2
        assert expected in capsys.readouterr().err
    assert main(["resize", "--rank", "2", "--output", str(tmp_path / "out.safetensors")]) == 2
    assert "missing: the LoRA" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()
