"""Small picture files for the tests of the data side."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

MakePicture = Callable[..., Path]


@pytest.fixture
def picture(tmp_path: Path) -> MakePicture:
    """A function that writes a picture at a path below tmp_path, each with other contents, and returns its path."""

    def make(name: str, size: tuple[int, int] = (12, 8)) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shade = sum(map(ord, name)) % 256
        kind = {".jpg": "JPEG", ".webp": "WEBP"}.get(path.suffix.lower(), "PNG")
        Image.new("RGB", size, (shade, 255 - shade, 40)).save(path, kind)
        return path

    return make
