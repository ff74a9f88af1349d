"""`lorasmith train --adapter ...`: every type trains, saves, goes on and is read again, on the miniature model."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from lorasmith import model_families, plugins
from lorasmith.adapters.base import Adapter
from lorasmith.checkpoint import open_checkpoint
from lorasmith.cli import main
from lorasmith.network import adapter_class, group_by_module, recognise
from tests.tiny import write_tiny

COMMON = [
    "--resolution", "64", "--no-before-after", "--no-tensorboard", "--no-progress", "--workers", "0", "--train", "unet",
    "--learning-rate", "0.01", "--caption", "a thing", "--save-precision", "float",
]  # fmt: skip
QUICK = {"lokr"}  # the others are all alike to the command
TRAINABLE = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in plugins.names("adapters")
    if name not in ("lora", "norm")
]
OPTIONS = {
    "lokr": ["factor=2", "decompose_both=true", "dora_wd=true"],
    "loha": ["dora_wd=true", "wd_on_output=false"],
    "ia3": ["train_on_input=true"],
    "oft": ["rescaled=true"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_tiny(folder / "tiny.safetensors", "sd1")
    (folder / "pictures").mkdir()
    for number in range(2):
        Image.effect_noise((64, 64), 40 + 20 * number).convert("RGB").save(folder / "pictures" / f"{number}.png")
    return folder


def command(place: Path, output: Path, *more: str) -> list[str]:
    given = ["--base", place / "tiny.safetensors", "--images", place / "pictures", "--output", output]
    return ["train", *map(str, given), *COMMON, *more]


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def read(place: Path, path: Path) -> dict[str, tuple[Adapter, torch.Tensor]]:
    """Return the adapters that a file holds, each with its layer's weight."""
    with open_checkpoint(place / "tiny.safetensors") as checkpoint:
        targets = model_families.load(checkpoint, dtype=torch.float32, device=torch.device("cpu")).adapter_targets()
    weights = {name: layer.get_parameter("weight") for name, layer in targets.items()}
    return {
        name: (recognise(tensors).from_tensors(weights[name].shape, tensors), weights[name])
        for name, tensors in group_by_module(load_file(path)).items()
    }


@pytest.fixture
def fixed_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


@pytest.mark.parametrize("adapter", TRAINABLE)
def test_a_run_is_saved_resumed_to_the_same_bytes_and_read_again(
    place: Path, tmp_path: Path, fixed_clock: None, adapter: str
) -> None:
    more = ["--adapter", adapter, "--adapter-options", *OPTIONS.get(adapter, [])]
    assert main(command(place, tmp_path, *more, "--steps", "3", "--state-every-steps", "2", "--keep-states", "2")) == 0
    saved = tmp_path / "last.safetensors"
    whole = saved.read_bytes()
    saved.unlink()
    assert main(["train", "--resume", str(tmp_path / "states" / "step-00000002")]) == 0
    assert saved.read_bytes() == whole
    layers = read(place, saved)
    assert len(layers) == 192
    for one, weight in layers.values():
        assert type(one) is adapter_class(adapter)
        change = one.delta(weight)
        assert change.isfinite().all() and change.norm() > 1e-6 * weight.norm()


@pytest.mark.parametrize(
    ("options", "network", "module", "args"),
    [
        ([], "lora, rank 4, alpha 4, effective scale 1: 192 modules", "networks.lora", None),
        (
            ["--adapter", "dora", "--rank", "2", "--alpha", "1"],
            "dora, rank 2, alpha 1, effective scale 0.5: 192 modules",
            "lycoris.kohya",
            {"algo": "lora", "dora_wd": "True"},
        ),
        (
            ["--adapter", "lokr", "--adapter-options", "factor=8", "full_matrix=TRUE"],
            "lokr, factor=8, full_matrix=TRUE, rank 4, alpha 4, effective scale 1: 192 modules",
            "lycoris.kohya",
            {"algo": "lokr", "factor": "8", "full_matrix": "True"},
        ),
        (
            ["--adapter", "oft", "--alpha", "0.5"],
            "oft, rank 4, constraint 0.5: 192 modules",
            "lycoris.kohya",
            {"algo": "diag-oft", "constraint": "0.5"},
        ),
        (["--adapter", f"{__name__}"], f"{__name__}: 192 modules", __name__, None),
    ],
)
def test_plan_and_file_say_what_is_trained(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    network: str,
    module: str,
    args: dict[str, str] | None,
) -> None:
    assert main(command(place, tmp_path, *options, "--steps", "1")) == 0
    saved = load_file(tmp_path / "last.safetensors")
    count = sum(tensor.numel() for name, tensor in saved.items() if not name.endswith(".alpha"))
    plan = " ".join(capsys.readouterr().out.split())
    assert network in plan and f"{count / 1e6:.2f} M values" in plan
    said = metadata(tmp_path / "last.safetensors")
    assert said["ss_network_module"] == module
    assert json.loads(said.get("ss_network_args", "null")) == args


class Own(adapter_class("full")):  # type: ignore[misc]
    """A type of a user's, which LyCORIS does not know."""

    lycoris_args = ""


ADAPTER = Own


def test_options_shape_the_tensors(place: Path, tmp_path: Path) -> None:
    more = ["--adapter", "lokr", "--adapter-options", "factor=2", "full_matrix=true", "--steps", "1"]
    assert main(command(place, tmp_path, *more)) == 0
    tensors = load_file(tmp_path / "last.safetensors")
    assert {tuple(tensor.shape) for name, tensor in tensors.items() if name.endswith("lokr_w1")} == {(2, 2)}
    assert not any("_a" in name.partition(".")[2] for name in tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["lokr", "--adapter-options", "facter=8"], "'facter=8': expected is option=value; did you mean factor=...?"),
        (["lokr", "--adapter-options", "factor"], "LoKr has factor=-1, decompose_both=False, full_matrix"),
        (["lokr", "--adapter-options", "factor=eight"], "'factor=eight': expected is a whole number"),
        (["lokr", "--adapter-options", "full_matrix=1"], "'full_matrix=1': expected is true or false"),
        (["lokr", "--adapter-options", "factor=8", "factor=4"], "gives factor twice"),
        (["full", "--adapter-options", "factor=8"], "Full has no options"),
        (["norm"], "adapter 'norm' does not go on lora_unet_"),
        (["ia3", "--rank", "8"], "--rank means nothing for --adapter ia3"),
        (["full", "--alpha", "8"], "--alpha means nothing for --adapter full"),
        (["lohaa"], "did you mean loha?"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with contextlib.suppress(SystemExit):
        assert main(command(place, tmp_path / "out", "--adapter", *options)) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told
    assert not (tmp_path / "out").exists()
