"""What `lorasmith demo` brings along: a small trained model, pictures of a robot, and a judge of the results.

`tools/demo/` made all of it.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
THINGS = (
    "star", "heart", "moon", "cloud", "tree", "house", "car", "boat", "fish", "flower", "mushroom", "umbrella", "cup",
    "key", "arrow", "duck",
)  # fmt: skip
MASCOT = "robot"
COLORS = {
    "red": (216, 38, 38),
    "orange": (246, 140, 30),
    "yellow": (252, 216, 52),
    "green": (44, 158, 70),
    "blue": (36, 90, 216),
    "purple": (132, 58, 184),
    "pink": (250, 150, 192),
    "brown": (122, 74, 42),
    "black": (26, 26, 30),
    "white": (246, 246, 246),
}  # sRGB
