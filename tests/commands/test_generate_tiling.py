"""The VAE in tiles: large pictures are close to the whole, no tile is larger than it may be, small ones the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorasmith.cli import main
from lorasmith.commands import generate
from lorasmith.picture_run import drawing
from tests.tiny import write_tiny

Drawn = Callable[..., tuple[Any, list[tuple[int, ...]]]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "mini.safetensors", resolution=64)


@pytest.fixture
def draw(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """Run the command and return the picture, and the sizes (h, w) of all that the VAE has worked on, in pixels."""
    count, load, seen = iter(range(100)), generate.load, []

    def watched(*given: Any) -> Any:
        model: Any = load(*given)
        model.vae.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
        model.vae.decoder.register_forward_hook(lambda *_: seen.append(tuple(_[2].shape[2:])))
        return model

    monkeypatch.setattr(generate, "load", watched)

    def run(size: str, *arguments: object) -> tuple[Any, list[tuple[int, ...]]]:
        folder = tmp_path / f"out{next(count)}"
        options = ["--base", base, "--output", folder, "--size", size, "--seed", 7, "--device", "cpu"]
        seen.clear()
        assert main(["generate", "a cat --s 1 --l 1", *map(str, options), *map(str, arguments)]) == 0
        return np.asarray(Image.open(next(folder.iterdir()))).astype(float), list(seen)

    return run


def test_a_large_picture_in_tiles_is_close_to_the_whole(draw: Drawn, tmp_path: Path) -> None:
    """Decoded and encoded; 200 pixels from a seam tiles know nothing of each other, and in between all is blended."""
    noise = np.random.default_rng(0).integers(0, 255, (8, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((720, 64)).save(tmp_path / "init.png")
    for options in ([], ["--init", tmp_path / "init.png", "--denoise", 1]):
        whole, _ = draw("720,64", "--vae-tiling", "off", *options)
        tiled, sizes = draw("720,64", "--vae-tiling", "on", *options)
        assert max(width for _, width in sizes) == 512 and len(sizes) == (4 if options else 2)
        assert 0 < np.abs(tiled - whole).mean() < 0.15 * whole.std()
        step = np.abs(np.diff(tiled, axis=1)).mean(axis=(0, 2))  # from column to column: no seam
        assert step.max() < 1.3 * np.abs(np.diff(whole, axis=1)).mean(axis=(0, 2)).max()


def test_small_pictures_are_the_same_to_the_byte(draw: Drawn) -> None:
    whole, small = (draw("512,64", "--vae-tiling", tiling)[0] for tiling in ("off", "on"))
    assert (whole == small).all()


def test_left_out_only_what_is_very_large_is_tiled(draw: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    assert draw("720,64")[1] == [(64, 720)]
    monkeypatch.setattr(drawing, "_TILE_ABOVE", 720 * 64 - 1)
    assert len(draw("720,64")[1]) == 2 and len(draw("712,64")[1]) == 1
