"""LoRA files as low-rank matrices: there and back, what is damaged, what is reported, and where results may go."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorasmith.errors import UserError
from lorasmith.formats import kohya
from lorasmith.lora_files import (
    Kept,
    Layer,
    check_output,
    dim_metadata,
    energy_share,
    layers_of,
    report,
    tensors_of,
    widest_precision,
)
from lorasmith.lowrank import Factors
from tests.random_lora import PROJ_IN, TE, TO_K, deltas_of, make_lora, write_lora


def read(tensors: dict[str, Tensor]) -> kohya.LoraFile:
    return kohya.LoraFile(Path("a.safetensors"), tensors, {}, "unknown")


def test_layers_are_written_as_they_were_read() -> None:
    tensors = make_lora()
    again = tensors_of(layers_of(read(tensors)))
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_an_absent_alpha_is_the_rank() -> None:
    tensors = make_lora(alpha=None)
    for name, layer in layers_of(read(tensors)).items():
        assert layer.alpha == 4 and layer.scale == 1
        product = (layer.factors.up @ layer.factors.down).double()
        torch.testing.assert_close(product, deltas_of(tensors)[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (f"{TE}.lora_up.weight", None, "lora_up.weight missing"),
        (f"{TE}.lora_down.weight", None, "lora_down.weight missing"),
        (f"{TE}.lora_up.weight", torch.zeros(24, 3), "down 4 x 24 and up 24 x 3"),
        (f"{TE}.lora_up.weight", torch.zeros(24), "no matrices"),
        (f"{TE}.lora_up.weight", torch.zeros(0, 4), "no matrices"),
        (f"{TE}.lora_down.weight", torch.full((4, 24), float("nan")), "NaN"),
        (f"{TE}.alpha", torch.tensor(float("inf")), "infinity"),
        (f"{TE}.alpha", torch.zeros(2), "single number"),
        ("else.lora_down.weight", torch.zeros(2, 2), "a layer's name starts with lora_te or lora_unet"),
    ],
)
def test_damaged_layers_are_named(key: str, value: Tensor | None, expected: str) -> None:
    tensors = make_lora()
    if value is None:
        del tensors[key]
    else:
        tensors[key] = value
    with pytest.raises(UserError, match=expected) as error:
        layers_of(read(tensors))
    assert key.partition(".")[0] in str(error.value) and "a.safetensors" in str(error.value)


def test_dims_are_dynamic_where_layers_differ() -> None:
    def layer(rank: int, alpha: float) -> Layer:
        return Layer((3, 3), Factors(torch.zeros(3, rank), torch.zeros(rank, 3)), alpha)

    same = dim_metadata([layer(2, 1.5), layer(2, 1.5)])
    assert (same["ss_network_dim"], same["ss_network_alpha"]) == ("2", "1.5")
    other = dim_metadata([layer(2, 1.0), layer(3, 1.0)])
    assert (other["ss_network_dim"], other["ss_network_alpha"]) == ("Dynamic", "1.0")


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.float16], "fp16"),
        ([torch.bfloat16], "bf16"),
        ([torch.float32], "float"),
        ([torch.float16, torch.bfloat16], "float"),
        ([torch.float16, torch.float32], "float"),
    ],
)
def test_the_precision_that_holds_all(dtypes: list[torch.dtype], expected: str) -> None:
    tensors = [torch.zeros(2, 2, dtype=dtype) for dtype in dtypes]
    assert widest_precision([*tensors, torch.tensor(1.0)]) == expected


def test_energy_is_reported_for_each_block_and_for_all() -> None:
    kept = {TE: Kept(2, 3.0, 4.0), PROJ_IN: Kept(4, 1.0, 1.0), TO_K: Kept(1, 0.0, 5.0), f"{TO_K}_x": Kept(3, 5.0, 5.0)}
    rows = [line.split() for line in report(kept)[1:]]
    assert rows == [
        ["text_encoder", "1", "2", "75.0000%", "50.000%"],
        ["down_blocks_0", "1", "4", "100.0000%", "0.000%"],
        ["mid_block", "2", "1-3", "50.0000%", "70.711%"],
        ["all", "4", "1-4", "60.0000%", "63.246%"],
    ]
    assert energy_share([Kept(1, 0.0, 0.0)]) == 1


def test_an_output_replaces_nothing_unasked(tmp_path: Path) -> None:
    source, there, folder = (tmp_path / name for name in ("in.safetensors", "there.safetensors", "d.safetensors"))
    write_lora(source, make_lora())
    there.write_bytes(b"mine")
    folder.mkdir()
    for output, overwrite, expected in [
        (None, False, "missing: --output"),
        (tmp_path / "a.bin", False, "should end in .safetensors"),
        (folder, True, "is a folder"),
        (there, False, "exists already"),
        (source, True, "is what is read"),
        (there / "a.safetensors", False, "is a file"),
    ]:
        with pytest.raises(UserError, match=expected):
            check_output(output, [source], overwrite=overwrite)
    assert check_output(there, [source], overwrite=True) == there
    inside = folder / "unet" / "adapter_model.safetensors"
    inside.parent.mkdir()
    inside.write_bytes(b"read with its folder")
    beside = tmp_path / "in_txt.pt"
    beside.write_bytes(b"read with in.pt")
    for output, read in [(inside, folder), (beside, tmp_path / "in.pt")]:
        with pytest.raises(UserError, match="is what is read"):
            check_output(output, [read], overwrite=True)
    assert check_output(folder / "new.safetensors", [folder], overwrite=True)
    assert check_output(tmp_path / "new" / "a.pt", [source], overwrite=False).name == "a.pt"
