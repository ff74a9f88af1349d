"""Which layers `lorasmith train` puts adapters on, of which rank, and how fast each block learns."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lorasmith.cli import main
from lorasmith.compat import network_args
from lorasmith.models.keys import sd as keys
from lorasmith.models.keys.sd_blocks import LISTS, block_of
from lorasmith.training_run import session
from tests.tiny import write_tiny

COMMON = [
    "--resolution", "64", "--no-before-after", "--no-tensorboard", "--no-progress", "--workers", "0", "--steps", "1",
    "--rank", "2", "--save-precision", "float", "--no-disk-cache", "--optimizer", "torch.optim.SGD",
    "--weight-decay", "0", "--max-grad-norm", "0", "--learning-rate", "0.01",
]  # fmt: skip
BLOCKS = LISTS[25]


class Place:
    """A miniature, pictures, and the runs with them, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._runs = folder, dict[tuple[str, ...], Path]()
        self.base = write_tiny(folder / "base.safetensors", "sd1")
        pictures = folder / "pictures"
        pictures.mkdir()
        Image.linear_gradient("L").convert("RGB").save(pictures / "a.png")
        self.given = ["train", "--base", str(self.base), "--images", str(pictures), "--caption", "sks", *COMMON]

    def train(self, *options: str) -> Path:
        if options not in self._runs:
            output = self.folder / f"run{len(self._runs)}"
            assert main([*self.given, "--output", str(output), *options]) == 0
            self._runs[options] = output / "last.safetensors"
        return self._runs[options]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(session, "write_report", lambda folder, contents: folder)
        yield Place(tmp_path_factory.mktemp("place"))


def ranks(path: Path) -> dict[str, int]:
    tensors = load_file(path)
    return {name.partition(".")[0]: t.shape[0] for name, t in tensors.items() if name.endswith("lora_down.weight")}


def alphas(path: Path) -> dict[str, float]:
    return {name.partition(".")[0]: t.item() for name, t in load_file(path).items() if name.endswith(".alpha")}


def blocks(names: Mapping[str, object]) -> dict[str, str]:
    """Return the block of each U-Net layer, by way of the original file's names."""
    modules = {name: f"{part}.{module}" for name, (part, module) in keys.layers().items()}
    table = keys.ldm_unet()
    return {
        name: block_of(table[f"{modules[name].removeprefix('unet.')}.weight"].name)
        for name in names
        if name.startswith("lora_unet_")
    }


def is_spatial(tensors: Mapping[str, Tensor], name: str) -> bool:
    down = tensors[f"{name}.lora_down.weight"]
    return down.dim() == 4 and tuple(down.shape[2:]) == (3, 3)


def test_convolutions_get_adapters_of_their_own_rank(place: Place) -> None:
    plain, path = ranks(place.train()), place.train("--conv-rank", "3", "--conv-alpha", "1")
    found, tensors = ranks(path), load_file(path)
    added = found.keys() - plain.keys()
    assert plain.keys() < found.keys() and len(plain) == 264 and len(added) == 86  # formats.md, section 5
    spatial = {name for name in found if is_spatial(tensors, name)}
    assert len(spatial) == 50 and spatial <= added
    assert all(rank == (3 if name in spatial else 2) for name, rank in found.items())
    assert all(alpha == (1 if name in spatial else 2) for name, alpha in alphas(path).items())
    learned = {name for name in added if tensors[f"{name}.lora_up.weight"].any()}
    assert learned == added


def test_the_text_encoder_alone_has_no_convolutions(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*place.given, "--output", "x", "--train", "text_encoder", "--conv-rank", "2"]) == 2
    assert "leaves the U-Net alone" in capsys.readouterr().err


def test_each_block_has_its_rank_and_alpha_and_none_at_0(place: Place) -> None:
    numbers = [str(n % 4) for n in range(25)]
    path = place.train("--block-ranks", *numbers, "--block-alphas", *(str(n + 1) for n in range(25)))
    found = ranks(path)
    wanted = dict(zip(BLOCKS, map(int, numbers), strict=True))
    assert all(found[name] == wanted[block] > 0 for name, block in blocks(found).items())
    without = {name for name, block in blocks(ranks(place.train())).items() if wanted[block] == 0}
    assert without and not without & found.keys()
    assert {found[name] for name in found if name.startswith("lora_te")} == {2}
    stored = alphas(path)
    assert all(stored[name] == BLOCKS.index(block) + 1 for name, block in blocks(found).items())


def test_convolutions_have_ranks_by_block_too(place: Place) -> None:
    path = place.train("--train", "unet", "--conv-block-ranks", *(["1"] * 12 + ["4"] + ["2"] * 12))
    found, tensors = ranks(path), load_file(path)
    spatial = {name: block for name, block in blocks(found).items() if is_spatial(tensors, name)}
    assert len(spatial) == 50
    assert all(found[name] == {"I": 1, "M": 4, "O": 2}[block[0]] for name, block in spatial.items())


def test_convolutions_have_alphas_by_block_too(place: Place) -> None:
    numbers = [str(n + 1) for n in range(25)]
    path = place.train("--train", "unet", "--conv-rank", "2", "--conv-block-alphas", *numbers)
    stored, tensors = alphas(path), load_file(path)
    placed = blocks(stored)
    spatial = {name for name in placed if is_spatial(tensors, name)}
    assert len(spatial) == 50 and all(stored[name] == BLOCKS.index(placed[name]) + 1 for name in spatial)
    assert {stored[name] for name in placed.keys() - spatial} == {2}


def test_each_block_learns_at_its_own_rate(place: Place) -> None:
    factors = ["0", *["0.5"] * 11, "1", *["2"] * 12]
    even, uneven = (
        load_file(place.train("--train", "unet")),
        load_file(place.train("--train", "unet", "--block-lr", *factors)),
    )
    by_block = dict(zip(BLOCKS, map(float, factors), strict=True))
    for name, block in blocks(ranks(place.train("--train", "unet"))).items():
        key = f"{name}.lora_up.weight"
        assert even[key].any()
        torch.testing.assert_close(uneven[key], even[key] * by_block[block], rtol=1e-4, atol=1e-9)


def test_a_block_without_a_rate_gets_no_adapters(place: Place) -> None:
    factors = ["0"] * 12 + ["1"] + ["0"] * 12
    found = ranks(place.train("--train", "unet", "--block-lr", *factors))
    assert set(blocks(found).values()) == {"M00"}


def test_the_file_says_what_its_layers_got_as_sd_scripts_writes_it(place: Place) -> None:
    with safe_open(place.train("--conv-rank", "3", "--conv-alpha", "1"), "pt") as file:
        assert file.metadata()["ss_network_args"] == '{"conv_dim": "3", "conv_alpha": "1.0"}'
        assert file.metadata()["ss_network_module"] == "networks.lora"


@pytest.mark.parametrize("adapter", ["lora", "lokr"])
def test_what_the_file_says_given_to_sd_scripts_is_the_same_network(place: Place, adapter: str) -> None:
    factors = [*map(str, range(12)), "0.5", *["1"] * 12]
    options = ["--rank-dropout", "0.1", "--module-dropout", "0.2", "--lora-plus-ratio", "4", "--neuron-dropout", "0.3",
               "--unet-lora-plus-ratio", "2", "--block-lr", *factors]  # fmt: skip
    if adapter == "lokr":
        options = ["--adapter", "lokr", "--module-dropout", "0.2", "--adapter-options", "factor=2"]
    with safe_open(place.train(*options), "pt") as file:
        said = file.metadata()
    words = [f"{name}={text}" for name, text in json.loads(said["ss_network_args"]).items()]
    found = network_args.values({"network_module": said["ss_network_module"], "network_args": words})
    assert found["network.module_dropout"] == 0.2
    if adapter == "lora":
        assert said["ss_network_dropout"] == "0.3" and found["network.rank_dropout"] == 0.1
        assert found["optimizer.lora_plus_ratio"] == 4 and found["optimizer.unet_lora_plus_ratio"] == 2
        assert found["optimizer.block_lr"] == list(map(float, factors))


def test_starting_weights_bring_their_convolutions(place: Place) -> None:
    start = place.train("--conv-rank", "3", "--conv-alpha", "1")
    gone_on = place.train("--weights", str(start))
    assert ranks(gone_on) == ranks(start) and alphas(gone_on) == alphas(start)
    assert any(not torch.equal(tensor, load_file(start)[name]) for name, tensor in load_file(gone_on).items())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--block-ranks", "1", "2"], "2 numbers; give 25"),
        (["--conv-alpha", "1"], "conv_rank and conv_block_ranks are left out"),
        (["--conv-block-alphas", *["1"] * 25], "conv_rank and conv_block_ranks are left out"),
        (["--train", "unet", "--block-ranks", *["0"] * 25], "leave no layer that is trained"),
        (["--train", "unet", "--block-lr", *["0"] * 25], "leave no layer that is trained"),
        (["--block-lr", *["1"] * 25, "--train", "text_encoder"], "leaves the U-Net alone"),
        (["--weights", "x.safetensors", "--conv-rank", "2"], "starting weights bring their ranks"),
        (["--conv-rank", "100000"], "rank 100000 is larger than 50 of 350 layers can use"),
    ],
)
def test_bad_numbers_are_told_before_anything_is_loaded(
    place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], told: str
) -> None:
    assert main([*place.given, "--output", str(tmp_path / "x"), *options]) == 2
    assert told in capsys.readouterr().err
