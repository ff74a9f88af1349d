"""The pictures of the embedded model, drawn by code: things in one colour on a background of another.

Everything is drawn at four times the size and box-reduced, in a unit square centred on the thing, so each drawing is a
few shapes with coordinates from -1 to 1.
"""

import math
import random
from collections.abc import Callable

from PIL import Image, ImageDraw

from lorasmith.demo import COLORS

Color = tuple[int, int, int]
Point = tuple[float, float]
SIZE, _OVERSAMPLING = 128, 4


class Pen:
    """Draws in unit coordinates, moved, turned, mirrored and scaled."""

    def __init__(self, image: Image.Image, center: Point, scale: float, angle: float, is_mirrored: bool) -> None:
        self._draw, self._center, self._scale = ImageDraw.Draw(image), center, scale
        self._cos, self._sin, self._sign = math.cos(angle), math.sin(angle), -1 if is_mirrored else 1

    def _map(self, x: float, y: float) -> Point:
        x *= self._sign
        x, y = x * self._cos - y * self._sin, x * self._sin + y * self._cos
        return self._center[0] + x * self._scale, self._center[1] + y * self._scale

    def polygon(self, points: list[Point], color: Color) -> None:
        self._draw.polygon([self._map(*point) for point in points], fill=color)

    def ellipse(self, x: float, y: float, rx: float, ry: float, color: Color) -> None:
        self.polygon(arc(x, y, rx, ry, 0, 360), color)

    def circle(self, x: float, y: float, r: float, color: Color) -> None:
        self.ellipse(x, y, r, r, color)

    def box(self, left: float, top: float, right: float, bottom: float, color: Color) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], color)

    def line(self, points: list[Point], width: float, color: Color) -> None:
        """A stroke with round joints and ends."""
        mapped = [self._map(*point) for point in points]
        self._draw.line(mapped, fill=color, width=round(width * self._scale), joint="curve")
        for x, y in (mapped[0], mapped[-1]):
            r = width * self._scale / 2
            self._draw.ellipse((x - r, y - r, x + r, y + r), fill=color)


def arc(x: float, y: float, rx: float, ry: float, start: float, end: float, steps: int = 48) -> list[Point]:
    """Points of an elliptic arc; degrees, clockwise from the right as y goes down."""
    angles = [math.radians(start + (end - start) * i / steps) for i in range(steps + 1)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def shade(color: Color, factor: float) -> Color:
    """Darken (factor < 1) or lighten towards white (factor > 1)."""
    if factor <= 1:
        return tuple(round(v * factor) for v in color)  # type: ignore[return-value]
    return tuple(round(v + (255 - v) * (factor - 1)) for v in color)  # type: ignore[return-value]


def detail(color: Color) -> Color:
    """The second tone of a thing: darker where it is bright, lighter where it is dark."""
    return shade(color, 0.62) if sum(color) > 300 else shade(color, 1.45)


def star(pen: Pen, c: Color) -> None:
    corners = [(1.0 if i % 2 == 0 else 0.44, math.pi * i / 5) for i in range(10)]
    pen.polygon([(r * math.sin(a), -r * math.cos(a) + 0.06) for r, a in corners], c)


_HEART = ((1, 13), (2, -5), (3, -2), (4, -1))  # cosines of the well-known heart curve: (frequency, factor)


def heart(pen: Pen, c: Color) -> None:
    turns = [2 * math.pi * i / 90 for i in range(90)]
    heights = [sum(factor * math.cos(n * t) for n, factor in _HEART) / 16.5 for t in turns]
    pen.polygon([(0.98 * math.sin(t) ** 3, -y - 0.08) for t, y in zip(turns, heights, strict=True)], c)


def moon(pen: Pen, c: Color) -> None:
    outer = arc(0, 0, 0.95, 0.95, 50, 310)
    x, y = outer[-1]
    inner_center, r = 0.42, math.hypot(x - 0.42, y)
    a = math.degrees(math.atan2(y, x - inner_center))
    pen.polygon(outer + arc(inner_center, 0, r, r, a, -360 - a if a < -180 else -a - 360, 60), c)


def cloud(pen: Pen, c: Color) -> None:
    pen.circle(-0.52, 0.15, 0.42, c)
    pen.circle(-0.05, -0.18, 0.55, c)
    pen.circle(0.52, 0.1, 0.46, c)
    pen.polygon([(-0.55, 0.1), (0.55, 0.1), (0.52, 0.56), (-0.52, 0.57)], c)


def tree(pen: Pen, c: Color) -> None:
    pen.box(-0.15, 0.3, 0.15, 1.0, detail(c))
    pen.circle(0, -0.55, 0.45, c)
    pen.circle(-0.42, -0.08, 0.42, c)
    pen.circle(0.42, -0.08, 0.42, c)
    pen.circle(0, -0.1, 0.5, c)


def house(pen: Pen, c: Color) -> None:
    pen.box(-0.72, -0.1, 0.72, 0.9, c)
    pen.polygon([(-1.0, -0.08), (0, -0.95), (1.0, -0.08)], detail(c))
    pen.box(-0.2, 0.3, 0.2, 0.9, detail(c))


def car(pen: Pen, c: Color) -> None:
    pen.polygon([(-0.6, -0.05), (-0.36, -0.52), (0.36, -0.52), (0.66, -0.05)], c)
    pen.polygon([(-0.42, -0.05), (-0.26, -0.38), (0.0, -0.38), (0.0, -0.05)], detail(c))
    pen.polygon([(0.12, -0.05), (0.12, -0.38), (0.28, -0.38), (0.46, -0.05)], detail(c))
    pen.polygon([(-1.0, 0.0), (-0.85, -0.1), (0.85, -0.1), (1.0, 0.05), (1.0, 0.4), (-1.0, 0.4)], c)
    for x in (-0.52, 0.52):
        pen.circle(x, 0.4, 0.27, detail(c))
        pen.circle(x, 0.4, 0.1, c)


def boat(pen: Pen, c: Color) -> None:
    pen.polygon([(-0.98, 0.36), (0.98, 0.36), (0.62, 0.85), (-0.62, 0.85)], c)
    pen.polygon([(0.0, -0.95), (0.0, 0.22), (0.82, 0.22)], detail(c))
    pen.polygon([(-0.12, -0.6), (-0.12, 0.22), (-0.72, 0.22)], c)


def fish(pen: Pen, c: Color) -> None:
    pen.polygon([(0.35, 0.0), (1.0, -0.55), (0.86, 0.0), (1.0, 0.55)], detail(c))
    pen.ellipse(-0.2, 0, 0.78, 0.52, c)
    pen.polygon([(-0.15, -0.3), (0.2, -0.75), (0.3, -0.3)], detail(c))
    pen.circle(-0.58, -0.12, 0.11, detail(c))


def flower(pen: Pen, c: Color) -> None:
    for i in range(5):
        a = 2 * math.pi * i / 5 - math.pi / 2
        pen.circle(0.52 * math.cos(a), 0.52 * math.sin(a), 0.4, c)
    pen.circle(0, 0, 0.3, detail(c))


def mushroom(pen: Pen, c: Color) -> None:
    pen.polygon([(-0.26, 0.0), (0.26, 0.0), (0.34, 0.92), (-0.34, 0.92)], detail(c))
    pen.polygon([*arc(0, 0.1, 0.98, 0.98, 180, 360), (0.98, 0.2), (-0.98, 0.2)], c)
    for x, y, r in ((-0.45, -0.25, 0.17), (0.1, -0.5, 0.19), (0.5, -0.12, 0.15)):
        pen.circle(x, y, r, detail(c))


def umbrella(pen: Pen, c: Color) -> None:
    pen.line([(0, -0.1), (0, 0.7), *arc(0.2, 0.7, 0.2, 0.2, 180, 0, 12)], 0.14, detail(c))
    pen.polygon(
        [
            *arc(0, 0.05, 1.0, 0.95, 180, 360),
            *arc(0.667, 0.05, 0.333, 0.2, 360, 180, 12),
            *arc(0, 0.05, 0.333, 0.2, 360, 180, 12),
            *arc(-0.667, 0.05, 0.333, 0.2, 360, 180, 12),
        ],
        c,
    )


def cup(pen: Pen, c: Color) -> None:
    pen.line(arc(0.5, 0.08, 0.4, 0.34, -80, 80, 20), 0.17, c)
    pen.polygon([(-0.8, -0.5), (0.55, -0.5), (0.42, 0.7), (-0.67, 0.7)], c)
    pen.ellipse(-0.125, -0.5, 0.675, 0.16, detail(c))


def key(pen: Pen, c: Color) -> None:
    pen.line([(0.0, 0.0), (0.92, 0.0)], 0.2, c)
    pen.line([(0.88, 0.0), (0.88, 0.34)], 0.18, c)
    pen.line([(0.56, 0.0), (0.56, 0.28)], 0.18, c)
    pen.line(arc(-0.48, 0, 0.36, 0.36, 0, 360), 0.24, c)


def arrow(pen: Pen, c: Color) -> None:
    pen.polygon([(-1.0, -0.26), (0.1, -0.26), (0.1, -0.72), (1.0, 0.0), (0.1, 0.72), (0.1, 0.26), (-1.0, 0.26)], c)


def duck(pen: Pen, c: Color) -> None:
    pen.polygon([(-0.55, -0.5), (-1.0, -0.38), (-0.55, -0.22)], detail(c))
    pen.circle(-0.36, -0.45, 0.4, c)
    pen.ellipse(0.1, 0.35, 0.82, 0.5, c)
    pen.polygon([(0.6, 0.2), (1.0, -0.25), (0.9, 0.45)], c)
    pen.ellipse(0.2, 0.3, 0.4, 0.24, detail(c))
    pen.circle(-0.45, -0.52, 0.09, detail(c))


THINGS: dict[str, Callable[[Pen, Color], None]] = {
    "star": star, "heart": heart, "moon": moon, "cloud": cloud, "tree": tree, "house": house, "car": car, "boat": boat,
    "fish": fish, "flower": flower, "mushroom": mushroom, "umbrella": umbrella, "cup": cup, "key": key,
    "arrow": arrow, "duck": duck,
}  # fmt: skip
_TURNS = {"star": 0.3, "heart": 0.2, "arrow": 0.25, "key": 0.3, "flower": 0.5, "moon": 0.3}
_MIRRORS = {"fish", "car", "boat", "cup", "duck"}


def background(color: Color, rng: random.Random) -> Image.Image:
    """A plain ground, a little lighter towards the top."""
    size = (SIZE * _OVERSAMPLING, SIZE * _OVERSAMPLING)
    strength = rng.uniform(0.0, 0.14)
    dark, light = (Image.new("RGB", size, shade(color, 1 + part * strength)) for part in (-0.5, 1.0))
    return Image.composite(dark, light, Image.linear_gradient("L").resize(size))


def jitter(color: Color, rng: random.Random, most: int = 6) -> Color:
    return tuple(min(255, max(0, v + rng.randint(-most, most))) for v in color)  # type: ignore[return-value]


def draw(thing: str, color: str, ground: str, rng: random.Random) -> Image.Image:
    """Return a picture (SIZE x SIZE, RGB) of "a {color} {thing} on a {ground} background"."""
    image = background(jitter(COLORS[ground], rng), rng)
    side = SIZE * _OVERSAMPLING
    scale = side * rng.uniform(0.30, 0.41)
    center = (side / 2 + side * rng.uniform(-0.07, 0.07), side / 2 + side * rng.uniform(-0.07, 0.07))
    angle = rng.uniform(-1, 1) * _TURNS.get(thing, 0.08)
    pen = Pen(image, center, scale, angle, thing in _MIRRORS and rng.random() < 0.5)
    THINGS[thing](pen, jitter(COLORS[color], rng))
    return image.reduce(_OVERSAMPLING)
