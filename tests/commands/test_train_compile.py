"""`lorasmith train --compile`: what is compiled, and that it trains as it does without."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from lorasmith.cli import main
from lorasmith.training_run import session
from tests.tiny import write_tiny

WORDS = [
    "--resolution", "128", "--buckets", "--bucket-min", "64", "--no-tensorboard", "--no-progress", "--workers", "0",
    "--caption", "a thing", "--rank", "2", "--save-precision", "float", "--device", "cpu", "--sample-steps", "1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def quick_and_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "write_report", lambda folder, contents: folder)  # takes long
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    write_tiny(folder / "tiny.safetensors", "sd1", width=8)
    (folder / "pictures").mkdir()
    for number, size in enumerate([(128, 128), (64, 256)]):
        Image.effect_noise(size, 40 + 20 * number).convert("RGB").save(folder / "pictures" / f"{number}.png")
    return folder


@pytest.fixture
def train(place: Path) -> Callable[..., int]:
    def run(output: Path, *more: str) -> int:
        given = ["--base", place / "tiny.safetensors", "--images", place / "pictures", "--output", output]
        return main(["train", *map(str, given), *WORDS, *more])

    return run


@pytest.mark.parametrize(
    ("part", "expected"),
    [("unet", ["UNet2DConditionModel"]), ("both", ["UNet2DConditionModel", "CLIPTextModel"])],
)
def test_what_gradients_run_through_is_compiled_and_samples_are_drawn_without(
    train: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    part: str,
    expected: list[str],
) -> None:
    compiled: list[Any] = []
    stances: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compiled.append((module, options)))
    set_stance = torch.compiler.set_stance
    monkeypatch.setattr(torch.compiler, "set_stance", lambda name: (stances.append(name), set_stance(name))[1])
    assert train(tmp_path, "--compile", "aot_eager", "--train", part, "--steps", "1") == 0
    assert [type(module).__name__ for module, _ in compiled] == expected
    assert all(options == {"backend": "aot_eager", "dynamic": False} for _, options in compiled)
    assert set(stances) == {"force_eager"} and len(stances) >= 3  # two drawings and a save
    assert "compiled by aot_eager for 2 shapes of batch" in " ".join(capsys.readouterr().out.split())


def test_shapes_are_counted_as_steps_have_them(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, size in enumerate([(128, 128), (128, 128), (64, 256), (64, 256), (64, 256)]):
        Image.effect_noise(size, 40).convert("RGB").save(tmp_path / f"{number}.png")
    given = ["--base", str(place / "tiny.safetensors"), "--images", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(["train", *given, *WORDS, "--compile", "eager", "--batch-size", "2", "--dry-run"]) == 0
    # two of the one, two of the other and a last one alone
    assert "compiled by eager for 3 shapes of batch," in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--train", "unet"], ["--train", "text_encoder", "--gradient-checkpointing"]])
def test_it_trains_as_without_and_resumes_to_the_same_bytes(
    train: Callable[..., int], tmp_path: Path, more: list[str]
) -> None:
    more = [*more, "--steps", "3", "--no-before-after", "--state-every-steps", "1", "--keep-states", "3"]
    assert train(tmp_path / "plain", *more) == 0
    torch.compiler.reset()
    assert train(tmp_path / "compiled", *more, "--compile", "aot_eager") == 0
    saved = tmp_path / "compiled" / "last.safetensors"
    whole, expected = load_file(saved), load_file(tmp_path / "plain" / "last.safetensors")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    for name, tensor in expected.items():
        torch.testing.assert_close(whole[name], tensor, atol=1e-5, rtol=1e-4)
    before = saved.read_bytes()
    torch.compiler.reset()
    assert main(["train", "--resume", str(tmp_path / "compiled" / "states" / "step-00000002")]) == 0
    assert saved.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--neuron-dropout", "0.1", "--module-dropout", "0.1"], "but neuron_dropout and module_dropout would change"),
        (["--network-module", "my.module"], "but network_module would change"),
    ],
)
def test_what_changes_at_every_step_is_refused(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    assert train(tmp_path, "--dry-run", "--compile", "inductor", *options) == 2
    assert told in " ".join(capsys.readouterr().err.split())
