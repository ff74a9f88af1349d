"""Draws two prompts for each thing with the packed model, in combinations that it was never shown, on one sheet.

    python tools/demo/contact_sheet.py

writes `tools/demo/contact_sheet.png` from the shipped model; `--model` and `--output` say otherwise.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from draw import SIZE, THINGS
from PIL import Image, ImageDraw, ImageFont
from recipe import HELD_OUT, Label

from lorasmith.checkpoint import open_checkpoint
from lorasmith.model_families import load
from lorasmith.sampling import generate

_HERE = Path(__file__).parent
_MODEL = _HERE.parents[1] / "src/lorasmith/demo/sd1-mini.safetensors"
_COLUMNS, _GAP, _LABEL_HEIGHT, _FONT_SIZE = 8, 16, 34, 12
_INK, _PAPER = (40, 40, 46), (250, 250, 248)


def prompts() -> list[str]:
    """Return two different held-out prompts for each thing."""
    rng = random.Random(3)
    labels: list[Label] = [(thing, *pair) for thing in THINGS for pair in rng.sample(sorted(HELD_OUT[thing]), 2)]
    return [f"a {color} {thing} on a {ground} background" for thing, color, ground in labels]


def draw_pictures(model_path: Path, texts: Sequence[str]) -> list[Image.Image]:
    """Return a picture for each text, seeds 0, 1, 2, ...: the first try, none chosen."""
    with open_checkpoint(model_path) as checkpoint:
        model = load(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    return generate(model, texts, seeds=range(len(texts)), size=(SIZE, SIZE), steps=20, guidance=4.0, batch_size=8)


def sheet(texts: Sequence[str], pictures: Sequence[Image.Image]) -> Image.Image:
    """Return the pictures in rows of eight, each with its prompt below."""
    width, height = SIZE + _GAP, SIZE + _LABEL_HEIGHT
    num_rows = -(-len(pictures) // _COLUMNS)
    page = Image.new("RGB", (_COLUMNS * width + _GAP, num_rows * height + _GAP), _PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=_FONT_SIZE)
    for number, (text, picture) in enumerate(zip(texts, pictures, strict=True)):
        left, top = _GAP + number % _COLUMNS * width, _GAP + number // _COLUMNS * height
        page.paste(picture, (left, top))
        pen.text((left, top + SIZE + 2), text.replace(" on a ", "\non a "), _INK, font, spacing=1)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=_MODEL, help="the packed model")
    parser.add_argument("--output", type=Path, default=_HERE / "contact_sheet.png", help="the picture to write")
    given = parser.parse_args()
    texts = prompts()
    sheet(texts, draw_pictures(given.model, texts)).save(given.output, optimize=True)


if __name__ == "__main__":
    main()
