"""Pictures of nothing in particular: shapes of all kinds and colors, which the VAE learns from first, so that it draws
what it has not seen as well (a LoRA's new thing, a user's picture) and not only the recipe's things.
"""

import math
import random
from collections.abc import Callable, Iterable

from PIL import Image, ImageDraw

Color = tuple[int, int, int]
_OVERSAMPLING = 4
_COLORS: list[Color] = [
    (214, 40, 40), (244, 140, 32), (252, 214, 48), (46, 160, 72), (38, 92, 214), (130, 60, 180), (248, 150, 190),
    (122, 76, 44), (24, 24, 28), (246, 246, 246), (140, 144, 150),
]  # fmt: skip
Pencil = ImageDraw.ImageDraw
Place = tuple[float, float, float]  # x and y of the center, half the size; pixels


def picture(rng: random.Random, size: int = 64) -> Image.Image:
    """Return (size x size) of one to six shapes on a ground that is plain or shaded."""
    side = size * _OVERSAMPLING
    image = _ground(side, rng)
    pencil = ImageDraw.Draw(image)
    main = _color(rng)
    for _ in range(rng.choice([1, 2, 2, 3, 3, 4, 6])):
        color = _near_or_other(main, rng)
        x, y = rng.uniform(-0.1, 1.1) * side, rng.uniform(-0.1, 1.1) * side
        half = rng.choice([0.08, 0.15, 0.25, 0.4, 0.6, 0.9]) * side * rng.uniform(0.8, 1.2)
        _SHAPES[rng.randrange(len(_SHAPES))](pencil, (x, y, half), side, color, rng)
    return image.reduce(_OVERSAMPLING)


def _ground(side: int, rng: random.Random) -> Image.Image:
    color = _color(rng)
    plain = Image.new("RGB", (side, side), color)
    if rng.random() >= 0.5:
        return plain
    other = Image.new("RGB", (side, side), _shade(color, rng.choice([0.88, 0.94, 1.08, 1.15])))
    mask = Image.linear_gradient("L").resize((side, side))
    if rng.random() < 0.3:
        mask = mask.rotate(rng.choice([90, 180, 270]))
    return Image.composite(other, plain, mask)


def _color(rng: random.Random) -> Color:
    color = rng.choice(_COLORS)
    kind = rng.random()
    if kind < 0.6:
        return _triple(max(0, min(255, value + rng.randint(-10, 10))) for value in color)
    if kind < 0.85:
        return _shade(color, rng.choice([0.6, 0.75, 1.3, 1.55]))
    return _triple(rng.randint(0, 255) for _ in range(3))


def _near_or_other(main: Color, rng: random.Random) -> Color:
    if rng.random() < 0.5:
        return main
    if rng.random() < 0.6:
        return _shade(main, rng.choice([0.65, 0.8, 1.3, 1.6]))
    return _color(rng)


def _shade(color: Color, factor: float) -> Color:
    """Darken (factor < 1) or lighten towards white. Not `draw.shade`: that one rounds."""
    return _triple(
        int(max(0, min(255, value * factor if factor < 1 else value + (255 - value) * (factor - 1)))) for value in color
    )


def _triple(values: Iterable[int]) -> Color:
    red, green, blue = values
    return red, green, blue


def _around(place: Place, turns: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return points from (angle, part of the radius) about a place."""
    x, y, half = place
    return [(x + half * r * math.cos(a), y + half * r * math.sin(a)) for a, r in turns]


def _ellipse(pencil: Pencil, place: Place, side: int, color: Color, rng: random.Random) -> None:
    x, y, half = place
    pencil.ellipse((x - half, y - half * rng.uniform(0.5, 1), x + half, y + half * rng.uniform(0.5, 1)), fill=color)


def _polygon(pencil: Pencil, place: Place, side: int, color: Color, rng: random.Random) -> None:
    corners, start = rng.choice([3, 3, 4, 5, 6]), rng.uniform(0, 7)
    pencil.polygon(_around(place, [(start + 2 * math.pi * i / corners, 1) for i in range(corners)]), fill=color)


def _star(pencil: Pencil, place: Place, side: int, color: Color, rng: random.Random) -> None:
    points, start, inner = rng.choice([4, 5, 5, 6, 8]), rng.uniform(0, 7), rng.uniform(0.35, 0.6)
    turns = [(start + math.pi * i / points, 1 if i % 2 else inner) for i in range(2 * points)]
    pencil.polygon(_around(place, turns), fill=color)


def _box(pencil: Pencil, place: Place, side: int, color: Color, rng: random.Random) -> None:
    x, y, half = place
    box = (x - half, y - half * rng.uniform(0.3, 1), x + half, y + half * rng.uniform(0.3, 1))
    pencil.rounded_rectangle(box, radius=rng.choice([0, half * 0.1, half * 0.25]), fill=color)


def _stroke(pencil: Pencil, place: Place, side: int, color: Color, rng: random.Random) -> None:
    x, y, half = place
    ends = [(x + half * rng.uniform(-2, 2), y + half * rng.uniform(-2, 2)) for _ in range(2)]
    pencil.line([(x, y), *ends], fill=color, width=int(side * rng.uniform(0.03, 0.14)), joint="curve")


def _bow(pencil: Pencil, place: Place, side: int, color: Color, rng: random.Random) -> None:
    x, y, half = place
    start, end = rng.uniform(0, 360), rng.uniform(360, 600)
    box = (x - half, y - half, x + half, y + half)
    pencil.arc(box, start, end, fill=color, width=int(side * rng.uniform(0.03, 0.15)))


def _slice(pencil: Pencil, place: Place, side: int, color: Color, rng: random.Random) -> None:
    x, y, half = place
    start = rng.uniform(0, 360)
    end = start + rng.choice([90, 180, 180, 270])
    pencil.pieslice((x - half, y - half, x + half, y + half), start, end, fill=color)


def _blob(pencil: Pencil, place: Place, side: int, color: Color, rng: random.Random) -> None:
    x, y, half = place
    angles = [2 * math.pi * i / 9 for i in range(9)]
    points = [
        (x + half * rng.uniform(0.5, 1) * math.cos(a), y + half * rng.uniform(0.5, 1) * math.sin(a)) for a in angles
    ]
    pencil.polygon(points, fill=color)


_SHAPES: list[Callable[[Pencil, Place, int, Color, random.Random], None]] = [
    _ellipse, _polygon, _star, _box, _stroke, _bow, _slice, _blob,
]  # fmt: skip
