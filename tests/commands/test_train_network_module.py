"""`lorasmith train --network-module ...`: lycoris.kohya itself, and a module of a user's, which is this file."""

import json
import random
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorasmith import model_families
from lorasmith.checkpoint import open_checkpoint
from lorasmith.cli import main
from lorasmith.formats import kohya
from lorasmith.training_run import session
from tests.tiny import write_tiny

COMMON = [
    "--resolution", "64", "--no-before-after", "--no-tensorboard", "--no-progress", "--workers", "0",
    "--learning-rate", "0.01", "--caption", "a thing", "--save-precision", "float", "--rank", "2",
]  # fmt: skip
OWN = ["--network-module", __name__, "--network-args"]
LYCORIS = ["--network-module", "lycoris.kohya", "--network-args"]
needs_lycoris = pytest.mark.skipif(find_spec("lycoris") is None, reason="LyCORIS is not installed (extra lycoris)")


# ---- a network of a user's, as small as the protocol lets it be -----------------------------------------------------

calls: list[Any] = []


class Scaled(nn.Module):
    """A factor for each output of a layer, written as IA3 is: its own forward in place of the layer's."""

    def __init__(self, layer: nn.Linear, dropout: float) -> None:
        super().__init__()
        self.layer, self.dropout = [layer], dropout
        self.weight = nn.Parameter(torch.randn(layer.out_features) * 0.01)
        self.register_buffer("on_input", torch.tensor(False))

    def apply_to(self) -> None:
        self.original = self.layer[0].forward
        self.layer[0].forward = self.forward  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        y = self.original(x)
        if self.training and (torch.rand(()) < self.dropout or random.random() < self.dropout):
            return y
        return y * (1 + self.weight)


class ScaledNetwork(nn.Module):
    def __init__(self, text_encoder: nn.Module, unet: nn.Module, dropout: float) -> None:
        super().__init__()
        self.parts = [("lora_te", text_encoder), ("lora_unet", unet)]
        self.dropout = dropout

    def apply_to(self, text_encoder: nn.Module, unet: nn.Module, apply_te: bool, apply_unet: bool) -> None:
        calls.append(("apply_to", apply_te, apply_unet))
        for (prefix, part), is_on in zip(self.parts, (apply_te, apply_unet), strict=True):
            for name, layer in part.named_modules():
                if is_on and name.endswith(("to_k", "q_proj")):
                    self.add_module(f"{prefix}_{name}".replace(".", "_"), Scaled(layer, self.dropout))  # type: ignore
        for child in self.children():
            child.apply_to()  # type: ignore[operator]

    def prepare_optimizer_params(self, text_encoder_lr: float, unet_lr: float) -> list[dict[str, Any]]:
        rates = {"lora_te": text_encoder_lr, "lora_unet": unet_lr}
        named = {start: [p for name, p in self.named_parameters() if name.startswith(start)] for start in rates}
        return [{"params": named[start], "lr": rate} for start, rate in rates.items() if named[start]]

    def prepare_grad_etc(self, text_encoder: nn.Module, unet: nn.Module) -> None:
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder: nn.Module, unet: nn.Module) -> None:
        calls.append("epoch")
        self.train()

    def load_weights(self, file: str) -> None:
        self.load_state_dict(load_file(file))

    def save_weights(self, file: str, dtype: torch.dtype | None) -> None:
        save_file(self.state_dict(), file)


def create_network(
    multiplier: float, network_dim: int, network_alpha: float, vae: Any, text_encoder: Any, unet: Any,
    neuron_dropout: float | None = None, answer: str = "network", scale: str = "1",
) -> Any:  # fmt: skip
    calls.append(("create", multiplier, network_dim, network_alpha, type(vae).__name__, neuron_dropout, scale))
    if answer == "none":
        return None
    if answer == "error":
        raise KeyError("answer")
    return ScaledNetwork(text_encoder, unet, neuron_dropout or 0.0)


# ---- the tests ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_calls(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    if request.node.function is not test_lycoris_trains_resumes_to_the_same_bytes_and_its_file_is_like_ours:
        monkeypatch.setattr(session, "write_report", lambda folder, contents: folder)  # takes long
    calls.clear()
    yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modules")
    write_tiny(folder / "tiny.safetensors", "sd1", width=8)
    (folder / "pictures").mkdir()
    for number in range(2):
        Image.effect_noise((64, 64), 40 + 20 * number).convert("RGB").save(folder / "pictures" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def layers(place: Path) -> SimpleNamespace:
    with open_checkpoint(place / "tiny.safetensors") as checkpoint:
        model = model_families.load(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    return SimpleNamespace(targets=set(model.adapter_targets()), all=set(model.adaptable_layers()))


@pytest.fixture
def train(place: Path) -> Callable[..., int]:
    def run(output: Path, *more: str | Path) -> int:
        given = ["--base", place / "tiny.safetensors", "--images", place / "pictures", "--output", output]
        return main(["train", *map(str, given), *COMMON, *map(str, more)])

    return run


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def layers_of(tensors: dict[str, Tensor]) -> set[str]:
    return {name.partition(".")[0] for name in tensors}


@needs_lycoris
def test_lycoris_trains_resumes_to_the_same_bytes_and_its_file_is_like_ours(
    train: Callable[..., int], tmp_path: Path, layers: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it draws at random is a function of the step; its own sizes and scalars go on as they were."""
    arguments = ["preset=attn-mlp", "use_scalar=true", "dropout=0.2", "rank_dropout=0.2", "module_dropout=0.2"]
    more = [*LYCORIS, *arguments, "--ema-decay", "0.5", "--state-every-steps", "2", "--keep-states", "2"]
    assert train(tmp_path, *more, "--steps", "3") == 0
    plan = " ".join(capsys.readouterr().out.split())
    assert "lycoris.kohya, preset=attn-mlp, use_scalar=true" in plan and "rank 2, alpha 2" in plan
    saved = tmp_path / "last.safetensors"
    whole, said = saved.read_bytes(), metadata(saved)
    file = kohya.read(saved)
    assert layers_of(file.tensors) == layers.targets
    assert sum(norm > 0 for norm in kohya.norms(file.tensors).values()) > 200  # the others were left out each time
    assert said["ss_network_module"] == "lycoris.kohya" and said["ss_network_dim"] == "2"
    assert json.loads(said["ss_network_args"]) == dict(word.split("=") for word in arguments)
    saved.unlink()
    torch.manual_seed(99)
    random.seed(99)
    assert main(["train", "--resume", str(tmp_path / "states" / "step-00000002")]) == 0
    assert saved.read_bytes() == whole
    assert main(["inspect", str(saved)]) == 0


@needs_lycoris
def test_lycoris_learns_what_we_learn_from_the_same_weights(
    train: Callable[..., int], tmp_path: Path, place: Path
) -> None:
    assert train(tmp_path / "first", "--steps", "1") == 0
    start = ["--weights", tmp_path / "first" / "last.safetensors", "--steps", "2", "--seed", "7"]
    start += ["--optimizer", "sgd"]  # adamw makes a whole step of the rounding in a gradient that is almost nothing
    assert train(tmp_path / "ours", *start) == 0
    assert train(tmp_path / "theirs", *start, *LYCORIS, "preset=attn-mlp") == 0
    first, ours, theirs = (load_file(tmp_path / name / "last.safetensors") for name in ("first", "ours", "theirs"))
    assert ours.keys() == theirs.keys()
    learned = {name: float((ours[name] - first[name]).abs().max()) for name in ours}
    assert sum(change > 0 for change in learned.values()) > len(learned) / 2  # all but alphas, and keys of one place
    for name, change in learned.items():
        torch.testing.assert_close(theirs[name], ours[name], atol=2e-3 * change, rtol=0)


@needs_lycoris
def test_the_usual_preset_of_lycoris_works_and_is_drawn_with(
    train: Callable[..., int], tmp_path: Path, place: Path, layers: SimpleNamespace
) -> None:
    from lycoris.config import PRESET
    from lycoris.kohya import LycorisNetworkKohya

    before = {name: value for name, value in vars(LycorisNetworkKohya).items() if name.isupper()}
    assert train(tmp_path, *LYCORIS, "algo=lokr", "factor=2", "--steps", "1", "--train", "unet") == 0
    assert before == {name: value for name, value in vars(LycorisNetworkKohya).items() if name.isupper()}
    assert "TimestepEmbedding" in PRESET["full"]["unet_target_module"]
    found = layers_of(load_file(tmp_path / "last.safetensors"))
    assert {"lora_unet_conv_in", "lora_unet_time_embedding_linear_1"} <= found <= layers.all
    assert {name for name in layers.targets if name.startswith("lora_unet")} <= found
    drawn = ["generate", "a", "--base", place / "tiny.safetensors", "--lora", tmp_path / "last.safetensors", "--output",
             tmp_path / "drawn", "--size", "64", "--steps", "1", "--no-progress"]  # fmt: skip
    assert main(list(map(str, drawn))) == 0


@needs_lycoris
@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [["algo=full"], ["algo=loha"], ["algo=diag-oft"], ["algo=lora", "dora_wd=true"], ["algo=glora"],
     ["train_norm=true"], ["algo=dylora"]],
)  # fmt: skip
def test_every_algorithm_of_lycoris_resumes_to_the_same_bytes(
    train: Callable[..., int], tmp_path: Path, arguments: list[str]
) -> None:
    more = [*LYCORIS, *arguments, "--state-every-steps", "1", "--keep-states", "2", "--rank", "4"]
    assert train(tmp_path, *more, "--steps", "2") == 0
    whole = (tmp_path / "last.safetensors").read_bytes()
    assert main(["train", "--resume", str(tmp_path / "states" / "step-00000001")]) == 0
    assert (tmp_path / "last.safetensors").read_bytes() == whole


def test_a_module_of_ones_own_is_called_as_the_protocol_says(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [*OWN, "scale=2=3", "--neuron-dropout", "0.5", "--text-encoder-lr", "0", "--epochs", "2", "--precision"]
    options = ["--gradient-accumulation", "1", "--alpha", "1", "--state-every-steps", "3", "--keep-states", "2"]
    assert train(tmp_path, *more, "bf16", *options) == 0
    assert calls == [("create", 1.0, 2, 1.0, "AutoencoderKL", 0.5, "2=3"), ("apply_to", True, True), "epoch", "epoch"]
    saved = tmp_path / "last.safetensors"
    tensors, whole = load_file(saved), saved.read_bytes()
    assert metadata(saved)["ss_network_module"] == __name__
    assert metadata(saved)["ss_network_dropout"] == "0.5"
    assert {"lora_te_text_model_encoder_layers_0_self_attn_q_proj",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k"} <= layers_of(tensors)  # fmt: skip
    random.seed(99)
    assert main(["train", "--resume", str(tmp_path / "states" / "step-00000003")]) == 0
    assert saved.read_bytes() == whole
    capsys.readouterr()
    assert main(["inspect", str(saved)]) == 0 and "IA3" in capsys.readouterr().out
    # a learning rate of 0 leaves the text encoder's half as it was
    start = ["--weights", saved, "--steps", "1", "--text-encoder-lr", "0"]
    assert train(tmp_path / "next", *OWN[:2], *start, "--overwrite") == 0
    after = load_file(tmp_path / "next" / "last.safetensors")
    changed = {name for name in tensors if not torch.equal(after[name], tensors[name])}
    assert changed == {name for name in tensors if "unet" in name and name.endswith("weight")}


def test_one_part_alone_is_asked_for(train: Callable[..., int], tmp_path: Path) -> None:
    assert train(tmp_path, *OWN[:2], "--train", "unet", "--steps", "1") == 0
    assert ("apply_to", False, True) in calls
    assert all(name.startswith("lora_unet") for name in load_file(tmp_path / "last.safetensors"))


def test_a_missing_lycoris_is_told_with_its_package(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lycoris", "lycoris.kohya"):
        monkeypatch.setitem(sys.modules, name, None)
    assert train(tmp_path, "--dry-run", *LYCORIS[:2]) == 2
    assert "pip install 'lorasmith[lycoris]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--network-module", "no.such"], "no module named 'no' is installed"),
        (["--network-module", "json"], "has no create_network"),
        ([*OWN, "scale"], "'scale': expected is key=value"),
        ([*OWN, "scale=1", "scale=2"], "is given twice"),
        ([*OWN, "size=1"], "unexpected keyword argument 'size'"),
        ([*OWN, "network_dim=1"], "multiple values for argument 'network_dim'"),
        (["--network-args", "a=1"], "network_args are for network_module"),
        ([*OWN[:2], "--adapter", "lokr", "--conv-rank", "2"], "so adapter and conv_rank cannot be meant"),
        ([*OWN[:2], "--module-dropout", "0.1"], "so module_dropout cannot be meant"),
        ([*OWN[:2], "--lora-plus-ratio", "4"], "so lora_plus_ratio cannot be meant"),
        ([*OWN[:2], "--weights", "nothing.safetensors"], "nothing.safetensors"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    assert train(tmp_path, "--dry-run", *options) == 2
    assert expected in " ".join(capsys.readouterr().err.split())
    assert calls == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([*OWN, "answer=none"], "gave NoneType, no torch module"),
        ([*OWN, "answer=error"], "failed with these arguments: KeyError: 'answer'"),
        ([*OWN[:2], "--max-norm", "1"], "has no apply_max_norm_regularization, and max_norm needs it"),
        ([*OWN[:2], "--gradient-checkpointing"], "has no enable_gradient_checkpointing"),
    ],
)
def test_what_a_module_cannot_do_is_told_before_the_first_step(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    assert train(tmp_path, "--steps", "1", *options) == 2
    assert expected in " ".join(capsys.readouterr().err.split())
