"""`lorasmith merge` without a model and `lorasmith resize` for files of every kind: the change stays what it was."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorasmith.adapters.base import Adapter
from lorasmith.cli import main
from lorasmith.formats.dialects import read_any
from lorasmith.network import adapter_class, recognise
from tests.formats import writers
from tests.random_lora import CONV, PROJ_IN, TE, TO_K, make_lora, ranks_of, read_lora, write_lora

NORM, CONV_IN = "lora_unet_up_blocks_1_resnets_0_norm1", "lora_unet_conv_in"
POSITIONS = "lora_te_text_model_embeddings_position_embedding"
SHAPES: dict[str, tuple[int, ...]] = {
    TE: (24, 24), TO_K: (16, 24), PROJ_IN: (12, 12, 1, 1), CONV: (32, 16, 3, 3), CONV_IN: (16, 4, 3, 3),
    NORM: (12,), POSITIONS: (77, 24),
}  # fmt: skip
MATRICES = [TE, TO_K, PROJ_IN, CONV, CONV_IN]
KINDS: dict[str, tuple[str, dict[str, bool]]] = {
    "LoHa": ("loha", {}), "LoHa with a kernel": ("loha", {"use_tucker": True}),
    "LoKr": ("lokr", {}), "LoKr with a kernel": ("lokr", {"use_tucker": True}),
    "LoKr of four factors": ("lokr", {"decompose_both": True}), "LoKr of two": ("lokr", {"full_matrix": True}),
    "Tucker": ("lora", {"use_tucker": True}), "full": ("full", {}),
}  # fmt: skip


def make(kind: str, names: list[str], *, seed: int = 0, **options: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name in names:
        adapter = adapter_class(kind)(SHAPES[name], 2, 3.0, **options)
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.4, generator=generator)
        tensors |= {f"{name}.{tail}": tensor.clone() for tail, tensor in adapter.state_dict().items()}
    return tensors


@torch.no_grad()
def changes(tensors: Mapping[str, Tensor], ratio: float = 1.0) -> dict[str, Tensor]:
    """What the adapters themselves say that they change, weights and biases."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, tail = key.partition(".")
        layers.setdefault(name, {})[tail] = tensor
    found: dict[str, Tensor] = {}
    for name, own in layers.items():
        adapter: Adapter = recognise(own).from_tensors(SHAPES[name], own)
        found[name] = ratio * adapter.delta(torch.zeros(SHAPES[name]))
        if (bias := adapter.delta_bias(None)) is not None:
            found[f"{name} bias"] = ratio * bias.detach()
    return found


def assert_changes(tensors: Mapping[str, Tensor], *wanted: Mapping[str, Tensor]) -> None:
    found = changes(tensors)
    assert found.keys() == {name for one in wanted for name in one}
    for name, change in found.items():
        total = sum(one[name] for one in wanted if name in one)
        assert isinstance(total, Tensor)
        assert (change - total).norm() <= 2e-6 * total.norm(), name


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merge(*arguments: str) -> dict[str, Tensor]:
    assert main(["merge", *arguments, "--output", "out.safetensors", "--overwrite"]) == 0
    return read_lora(Path("out.safetensors"))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_is_that_of_the_changes(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, options = KINDS[kind]
    theirs, lora = make(name, MATRICES, **options), make_lora({n: SHAPES[n] for n in (TE, CONV)}, rank=1)
    save_file(theirs, "theirs.safetensors")
    save_file(lora, "lora.safetensors")
    tensors = merge(
        "--lora", "theirs.safetensors", "lora.safetensors", "--ratio", "0.5", "-2", "--save-precision", "float"
    )
    assert_changes(tensors, changes(theirs, 0.5), changes(lora, -2))
    assert all(tensors[f"{n}.lora_down.weight"].shape[1:] == SHAPES[n][1:] for n in (TE, TO_K, CONV, CONV_IN))
    most = {"loha": 4, "lora": 2}.get(name, 1000)  # the rank of a LoHa of rank 2 is 4
    assert max(ranks_of(tensors).values()) <= most + 1
    assert "become LoRA" in capsys.readouterr().out
    assert read_any(folder / "out.safetensors").dialect == "kohya"


def test_changes_of_norms_embeddings_and_biases_are_added_as_they_are(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make("norm", [NORM]) | {f"{POSITIONS}.diff": torch.randn(77, 24), f"{TO_K}.diff_b": torch.randn(16)}
    two = make("full", [NORM, POSITIONS, CONV], seed=1) | {f"{CONV}.diff_b": torch.randn(32)}
    lora = make_lora({CONV: SHAPES[CONV], TO_K: SHAPES[TO_K]}, rank=1)
    for number, tensors in enumerate((one, two, lora)):
        save_file(tensors, f"{number}.safetensors")
    tensors = merge("--lora", *(f"{n}.safetensors" for n in range(3)), "--ratio", "0.5", "-2", "0.25")
    assert "4 layers are whole changes" in capsys.readouterr().out
    assert {f"{NORM}.w_norm", f"{NORM}.b_norm", f"{CONV}.diff", f"{CONV}.diff_b", f"{TO_K}.diff"} <= tensors.keys()
    parts = changes(one, 0.5), changes(two, -2), changes(lora, 0.25)
    assert_changes(tensors, *parts)


def test_what_stays_whole_is_counted_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A change of an embedding is whole, of whatever kind it is."""
    save_file(make("loha", [POSITIONS, TE]) | make("full", [TO_K]), "a.safetensors")
    merge("--lora", "a.safetensors")
    assert [line for line in capsys.readouterr().out.split("\n") if line.startswith("  ")] == [
        "  1 LoHa layers become LoRA, which is exact",
        "  1 full differences become LoRA of the rank that they have",
        "  1 changes of norms, embeddings, or weight and bias stay whole",
    ]


def test_resize_takes_files_of_every_program_and_kind(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loha = make("loha", [TE, CONV]) | make("norm", [NORM])
    save_file(loha, "loha.safetensors")
    before = changes(loha)
    resize = ["--output", "out.safetensors", "--overwrite", "--save-precision", "float"]
    assert main(["resize", "loha.safetensors", "--rank", "4", *resize]) == 0
    printed = capsys.readouterr().out
    assert "2 LoHa layers become LoRA, which is exact" in printed and "1 changes of norms" in printed
    assert_changes(read_lora(Path("out.safetensors"))[0], before)
    assert main(["resize", "loha.safetensors", "--rank", "2", *resize]) == 0
    found = changes(read_lora(Path("out.safetensors"))[0])
    values = torch.linalg.svdvals(before[CONV].flatten(1))
    torch.testing.assert_close((found[CONV] - before[CONV]).norm(), values[2:].norm(), atol=1e-5, rtol=1e-4)
    layers = writers.make_layers(rank=4, only="attn1_to_q")
    diffusers, kohya = (
        writers.diffusers(folder / "d.safetensors", layers),
        writers.kohya(folder / "k.safetensors", layers),
    )
    written = []
    for path in (diffusers, kohya):
        without_alpha = {key: t for key, t in read_any(path).tensors.items() if not key.endswith("alpha")}
        write_lora(path, without_alpha) if path == kohya else None
        assert main(["resize", str(path), "--rank", "2", *resize]) == 0
        written.append(read_lora(Path("out.safetensors"))[0])
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(tensor, written[1][name]) for name, tensor in written[0].items())


@pytest.mark.parametrize("kind", ["dora", "oft", "boft", "ia3", "glora", "loha"])
def test_what_depends_on_the_model_is_refused_with_the_way(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decomposed = {f"{TE}.dora_scale": torch.ones(24, 1)} if kind == "loha" else {}
    save_file(make(kind, [TE, CONV]) | decomposed, "theirs.safetensors")
    for command in (["merge", "--lora", "theirs.safetensors"], ["resize", "theirs.safetensors", "--rank", "1"]):
        assert main([*command, "--output", "out.safetensors"]) == 2
        told = capsys.readouterr().err
        assert "depends on the model's own weights" in told and "lorasmith merge --model" in told
    assert not Path("out.safetensors").exists()


def test_nothing_of_a_low_rank_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(make("norm", [NORM]), "norm.safetensors")
    assert main(["resize", "norm.safetensors", "--rank", "1", "--output", "out.safetensors"]) == 2
    assert "holds nothing of a low rank" in capsys.readouterr().err
    assert_changes(merge("--lora", "norm.safetensors", "--ratio", "2"), changes(make("norm", [NORM]), 2))


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"lokr_w1": ones(8000, 100), "lokr_w2": ones(100, 8000)}, "800000 x 800000"),
        (
            {"lora_up.weight": ones(4, 1, 1, 1), "lora_mid.weight": ones(9000, 1, 1, 1)}
            | {"lora_down.weight": ones(1, 9000, 1, 1)},
            "9000 x 9000",
        ),
        ({"lokr_w1": ones(8), "lokr_w2": ones(10, 8)}, "no matrices"),
        ({"lokr_w1": torch.tensor(1.0), "lokr_w2": ones(10, 8)}, "no matrices"),
        ({f"hada_w{number}_{side}": ones(8) for number in (1, 2) for side in "ab"}, "no matrices"),
        ({"diff": torch.tensor(1.0)}, "a single number"),
    ],
)
@pytest.mark.parametrize(
    "command", [["resize", "bad.safetensors", "--rank", "1"], ["merge", "--lora", "bad.safetensors"]]
)
def test_what_is_no_layer_of_a_model_is_told_before_it_is_built(
    command: list[str], tensors: dict[str, Tensor], expected: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({f"{PROJ_IN}.{tail}": tensor for tail, tensor in tensors.items()}, "bad.safetensors")
    assert main([*command, "--output", "out.safetensors"]) == 2
    assert expected in capsys.readouterr().err and not Path("out.safetensors").exists()
