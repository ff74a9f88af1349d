"""Canny's edges: those of simple shapes are where they are seen, and OpenCV's rules find the same."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lorasmith.edges import canny

Pixels = NDArray[np.uint8]


def picture(draw: str, box: tuple[int, int, int, int], size: tuple[int, int] = (40, 32)) -> Pixels:
    canvas = Image.new("RGB", size, "black")
    getattr(ImageDraw.Draw(canvas), draw)(box, fill="white")
    return np.asarray(canvas)


def test_a_box_has_a_line_of_one_pixel_along_each_side() -> None:
    edges = canny(picture("rectangle", (10, 8, 29, 23)), 100, 200)
    rows, columns = np.nonzero(edges)
    assert set(columns[rows == 15]) == {9, 29} and set(rows[columns == 20]) == {7, 23}
    assert edges[:6].sum() == edges[:, :8].sum() == edges[25:].sum() == edges[:, 31:].sum() == 0


def test_a_circle_has_a_closed_line_at_its_radius() -> None:
    edges = canny(picture("ellipse", (20, 20, 79, 79), (100, 100)), 100, 200)
    rows, columns = np.nonzero(edges)
    radii = np.hypot(rows - 49.5, columns - 49.5)
    assert abs(radii - 30).max() < 1.5
    angles = np.sort(np.arctan2(rows - 49.5, columns - 49.5))
    assert np.diff(angles).max() < 2 * np.pi / 90  # no gap wider than about two pixels of 188


def test_nothing_has_no_edges_and_neither_has_the_rim() -> None:
    assert not canny(np.full((20, 30, 3), 200, np.uint8), 1, 2).any()


def test_a_step_of_colour_alone_is_an_edge() -> None:
    """Both halves are equally bright; the channels are looked at one by one."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8, 0], pixels[:, 8:, 1] = 200, 200
    assert canny(pixels, 100, 200)[:, 7:9].any(axis=1).all()


def test_a_weak_edge_counts_where_it_continues_a_strong_one() -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[10:] = np.linspace(120, 30, 60, dtype=np.uint8)[None, :, None]  # its strength: four times the step
    whole, strong = canny(pixels, 100, 400), canny(pixels, 400, 400)
    assert whole.any(axis=0).all() and not strong[:, 30:].any()
    pixels[10:] = 30  # weak everywhere
    assert not canny(pixels, 100, 400).any() and canny(pixels, 100, 110).any(axis=0).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_edges_as_by_opencvs_rules_pixel_by_pixel(seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(noise).resize((36, 30), Image.Resampling.BICUBIC))
    expected = slowly(pixels, 80, 160)
    assert 0.02 < expected.mean() < 0.6
    assert (canny(pixels, 80, 160) == expected).all()


def slowly(pixels: Pixels, low: float, high: float) -> NDArray[np.bool_]:
    """Canny's method as OpenCV 4 has it (modules/imgproc/src/canny.cpp), with its angles in fixed point."""
    height, width, _ = pixels.shape
    around = np.pad(pixels.astype(int), ((1, 1), (1, 1), (0, 0)), mode="edge")
    slope = np.zeros((height, width, 2), int)
    for i, j in np.ndindex(height, width):
        window = around[i : i + 3, j : j + 3]
        across = (window[:, 2] - window[:, 0]).T @ [1, 2, 1]
        along = (window[2] - window[0]).T @ [1, 2, 1]
        channel = int(np.argmax(abs(across) + abs(along)))
        slope[i, j] = across[channel], along[channel]
    strength = np.pad(abs(slope).sum(2), 1)
    state = np.zeros((height + 2, width + 2), int)  # 1: may continue an edge, 2: is one
    stack: list[tuple[int, int]] = []
    for i, j in np.ndindex(height, width):
        (dx, dy), here = (int(part) for part in slope[i, j]), strength[i + 1, j + 1]
        x, y = abs(dx) * 13573, abs(dy) << 15  # tan(22.5 degrees) * 2 ** 15
        if y < x:
            is_crest = here > strength[i + 1, j] and here >= strength[i + 1, j + 2]
        elif y > x + (abs(dx) << 16):
            is_crest = here > strength[i, j + 1] and here >= strength[i + 2, j + 1]
        else:
            side = -1 if (dx < 0) != (dy < 0) else 1
            is_crest = here > strength[i, j + 1 - side] and here > strength[i + 2, j + 1 + side]
        if is_crest and here > low:
            state[i + 1, j + 1] = 1 + (here > high)
            stack += [(i + 1, j + 1)] if here > high else []
    while stack:
        i, j = stack.pop()
        for near in ((i + down, j + right) for down in (-1, 0, 1) for right in (-1, 0, 1)):
            if state[near] == 1:
                state[near] = 2
                stack.append(near)
    return state[1:-1, 1:-1] == 2
