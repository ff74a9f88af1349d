"""Draws `docs/crops.png`: what `lorasmith check --preview` shows of pictures of many shapes.

    python tools/crops_picture.py

The pictures are the demo's, each on a wider or higher ground of its corner's colour.
"""

import tempfile
from pathlib import Path

from PIL import Image

from lorasmith.cli import main
from lorasmith.demo import FOLDER

_ROOT = Path(__file__).resolve().parent.parent
_SIZES = [(640, 480), (480, 640), (1200, 500), (512, 512), (300, 200), (400, 900)]


def _on_ground(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    ground = Image.new("RGB", size, picture.getpixel((0, 0)))
    side = min(size)
    ground.paste(picture.resize((side, side)), ((size[0] - side) // 2, (size[1] - side) // 2))
    return ground


def write(path: Path) -> None:
    """Write the sheet of crops to a square."""
    with tempfile.TemporaryDirectory() as folder:
        for number, (size, source) in enumerate(
            zip(_SIZES, sorted((FOLDER / "pictures").rglob("*.png")), strict=False)
        ):
            _on_ground(Image.open(source).convert("RGB"), size).save(Path(folder) / f"{number}.png")
        main(["check", folder, "--caption", "sks robot", "--preview", str(path)])


if __name__ == "__main__":
    write(_ROOT / "docs" / "crops.png")
