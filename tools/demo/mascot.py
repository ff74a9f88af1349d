"""The demo's second set: sixteen captioned pictures of a robot, which the embedded model has never seen.

    python tools/demo/mascot.py

writes `src/lorasmith/demo/pictures/10_sks robot/`: four poses, several sizes and tilts, six backgrounds. The
other four are left out, so that a test can ask for the robot where it was never shown.
"""

import random
from pathlib import Path

from draw import COLORS, SIZE, Color, Pen, background, jitter
from PIL import Image

FOLDER = Path(__file__).parents[2] / "src/lorasmith/demo/pictures/10_sks robot"
NUM_PICTURES = 16
SHOWN_GROUNDS = ("blue", "yellow", "green", "white", "purple", "red")
UNSEEN_GROUNDS = tuple(ground for ground in COLORS if ground not in SHOWN_GROUNDS)
POSES = {  # the ends of the left and the right arm, and of the left and the right leg
    "standing": ((-0.8, 0.5), (0.8, 0.5), (-0.27, 0.93), (0.27, 0.93)),
    "waving": ((-0.8, 0.5), (0.88, -0.3), (-0.27, 0.93), (0.27, 0.93)),
    "cheering": ((-0.88, -0.3), (0.88, -0.3), (-0.3, 0.93), (0.3, 0.93)),
    "walking": ((-0.88, 0.3), (0.8, 0.5), (-0.42, 0.9), (0.36, 0.93)),
}
_METAL: Color = (176, 186, 198)
_DARK: Color = (62, 70, 84)
_BODY: Color = (240, 120, 40)


def robot(pen: Pen, pose: str) -> None:
    """Draw it in unit coordinates: limbs, body, antenna, head."""
    shoulders, hips = ((-0.4, 0.12), (0.4, 0.12)), ((-0.24, 0.5), (0.24, 0.5))
    for start, end in zip((*shoulders, *hips), POSES[pose], strict=True):
        pen.line([start, end], 0.26, _METAL)
    pen.box(-0.5, -0.06, 0.5, 0.62, _BODY)
    pen.line([(0, -0.78), (0, -0.96)], 0.14, _METAL)
    pen.circle(0, -0.98, 0.17, _BODY)
    pen.box(-0.68, -0.84, 0.68, -0.1, _METAL)
    for x in (-0.3, 0.3):
        pen.circle(x, -0.48, 0.2, _DARK)


def draw_mascot(ground: str, pose: str, rng: random.Random) -> Image.Image:
    """Return a picture (SIZE x SIZE, RGB) of "a sks robot on a {ground} background"."""
    image = background(jitter(COLORS[ground], rng), rng)
    side = image.width
    scale = side * rng.uniform(0.34, 0.43)
    center = (side / 2 + side * rng.uniform(-0.05, 0.05), side * 0.52 + side * rng.uniform(-0.03, 0.03))
    robot(Pen(image, center, scale, rng.uniform(-0.14, 0.14), rng.random() < 0.5), pose)
    return image.reduce(side // SIZE)


def write(folder: Path = FOLDER) -> None:
    """Write the set: `robot-01.png` and so on, each with its caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(NUM_PICTURES):
        rng = random.Random(f"mascot {number}")
        ground, pose = SHOWN_GROUNDS[number % len(SHOWN_GROUNDS)], list(POSES)[number % len(POSES)]
        stem = folder / f"robot-{number + 1:02d}"
        draw_mascot(ground, pose, rng).save(stem.with_suffix(".png"), optimize=True)
        stem.with_suffix(".txt").write_text(f"a sks robot on a {ground} background\n", encoding="utf-8")


if __name__ == "__main__":
    write()
