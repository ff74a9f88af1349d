"""`lorasmith generate` where memory runs out: the same pictures with less of it, or an end that says what to do."""

from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lorasmith.cli import main
from lorasmith.models.sd import StableDiffusion
from tests.tiny import build_tiny_control, write_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "mini.safetensors", resolution=64)


def draw(base: Path, output: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the pictures by their files' names."""
    common = ["--base", str(base), "--output", str(output), "--steps", "2", "--seed", "7", "--device", "cpu"]
    code = main(["generate", "a cat", "--images", "3", *common, *options])
    return code, {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(output.glob("*"))}


def limit(monkeypatch: pytest.MonkeyPatch, *, rows: int, heads: int) -> list[int]:
    """Have memory for so many texts at once in the U-Net, and so many heads in its attention; return what is tried."""
    tried: list[int] = []
    forward, attend = StableDiffusion.forward, torch.nn.functional.scaled_dot_product_attention

    def forward_with_less(self: Any, x_t: Any, *rest: Any, **options: Any) -> Any:
        tried.append(len(x_t))
        if len(x_t) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, x_t, *rest, **options)

    def attend_with_less(query: Any, *rest: Any, **options: Any) -> Any:
        if query.shape[1] > heads and query.shape[2] != 77:  # the U-Net's
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB")
        return attend(query, *rest, **options)

    monkeypatch.setattr(StableDiffusion, "forward", forward_with_less)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend_with_less)
    return tried


def test_the_same_pictures_are_drawn_with_less_memory(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, plenty = draw(base, tmp_path / "plenty", "--batch-size", "3")
    assert code == 0 and "out of memory" not in capsys.readouterr().out
    tried = limit(monkeypatch, rows=2, heads=1)
    code, scarce = draw(base, tmp_path / "scarce", "--batch-size", "3")
    told = [line for line in capsys.readouterr().out.splitlines() if "ran out of memory" in line]
    assert code == 0 and tried[:3] == [6, 2, 2]
    assert [line.rpartition("with ")[2] for line in told] == ["--batch-size 1.", "--attention sliced."]
    assert plenty.keys() == scarce.keys() and len(plenty) == 3
    assert max(np.abs(plenty[name] - scarce[name]).max() for name in plenty) <= 1


def test_both_passes_are_drawn_again_where_the_second_has_too_little(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With all that acts in both: a ControlNet, perturbed attention, and a sampler that draws on the way."""
    build_tiny_control().save_pretrained(tmp_path / "lines")
    Image.linear_gradient("L").resize((64, 64)).save(tmp_path / "picture.png")
    options = ["--batch-size", "3", "--highres-scale", "1.5", "--sampler", "euler_a", "--pag-scale", "2"]
    options += ["--control", str(tmp_path / "lines"), "--control-picture", str(tmp_path / "picture.png")]
    _, plenty = draw(base, tmp_path / "plenty", *options)
    forward = StableDiffusion.forward

    def forward_with_less(self: Any, x_t: Any, *rest: Any) -> Any:
        if len(x_t) > 2 and x_t.shape[-1] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x_t, *rest)

    monkeypatch.setattr(StableDiffusion, "forward", forward_with_less)
    code, scarce = draw(base, tmp_path / "scarce", *options)
    assert code == 0 and "goes on with --batch-size 1." in capsys.readouterr().out
    assert plenty.keys() == scarce.keys() and len(plenty) == 3
    assert max(np.abs(plenty[name] - scarce[name]).max() for name in plenty) <= 1


def test_a_picture_that_is_drawn_on_from_is_encoded_again_with_less_memory(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.linear_gradient("L").resize((64, 64)).save(tmp_path / "picture.png")
    encode, num_tried = StableDiffusion.encode_image, count(1)

    def encode_at_second(self: Any, pixels: Any) -> Any:
        if next(num_tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, pixels)

    monkeypatch.setattr(StableDiffusion, "encode_image", encode_at_second)
    code, found = draw(base, tmp_path / "out", "--batch-size", "2", "--init", str(tmp_path / "picture.png"))
    assert code == 0 and len(found) == 3 and "goes on with --batch-size 1." in capsys.readouterr().out
    assert next(num_tried) == 3  # once for all of them


def test_slices_of_attention_can_be_asked_for_and_reach_controlnets(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build_tiny_control().save_pretrained(tmp_path / "lines")
    Image.linear_gradient("L").resize((64, 64)).save(tmp_path / "picture.png")
    options = ["--batch-size", "3", "--control", str(tmp_path / "lines")]
    options += ["--control-picture", str(tmp_path / "picture.png")]
    _, usual = draw(base, tmp_path / "usual", *options)
    assert "float32" not in caplog.text  # diffusers' warning of modules to keep in it, of which it has none
    limit(monkeypatch, rows=6, heads=1)
    code, sliced = draw(base, tmp_path / "sliced", *options, "--attention", "sliced", "--on-out-of-memory", "stop")
    assert code == 0 and max(np.abs(usual[name] - sliced[name]).max() for name in usual) <= 1


@pytest.mark.parametrize("options, num_tries", [([], 3), (["--on-out-of-memory", "stop"], 1)])
def test_it_ends_where_nothing_fits(
    options: list[str], num_tries: int, base: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    tried = limit(monkeypatch, rows=0, heads=0)
    code, found = draw(base, tmp_path / "out", "--batch-size", "4", "--highres-scale", "2", *options)
    error = capsys.readouterr().err
    assert code == 2 and not found and len(tried) == num_tries
    assert "--highres-scale than 2" in error and "--precision bf16" in error
    assert "Traceback" not in error and "2.00 GiB" in error
    assert ("--on-out-of-memory retry" in error and "--batch-size than 4" in error) == bool(options)
