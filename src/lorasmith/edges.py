"""Edges of a picture by Canny's method (A Computational Approach to Edge Detection, PAMI 1986), which ControlNets read.

As OpenCV computes it, with which these were trained, so that thresholds mean the same: 3 x 3 Sobel gradients of the
channel that changes most, |dx| + |dy| as their strength, no blur before.
"""

import numpy as np
from numpy.typing import NDArray

_TAN_22 = np.tan(np.pi / 8)
_TAN_67 = np.tan(3 * np.pi / 8)


def canny(pixels: NDArray[np.uint8], low: float, high: float) -> NDArray[np.bool_]:
    """Return where edges are, (H, W), in a picture (H, W, 3).

    Args:
        low: strength above which a pixel is an edge where it continues one.
        high: strength above which a pixel is an edge anyway; a step of 1 grey level has the strength 4.
    """
    dx, dy = _gradients(pixels)
    strength = np.pad(np.abs(dx) + np.abs(dy), 1)  # (H + 2, W + 2)
    thin = np.pad(_is_crest(strength, dx, dy), 1)
    return _continued(thin & (strength > high), thin & (strength > low))[1:-1, 1:-1]


def _gradients(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return dx and dy, each (H, W), of the channel where they are strongest."""
    around = np.pad(pixels.astype(np.int32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = around[:-2] + 2 * around[1:-1] + around[2:]  # (H, W + 2, 3)
    columns = around[:, :-2] + 2 * around[:, 1:-1] + around[:, 2:]  # (H + 2, W, 3)
    dx, dy = rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]
    channel = (np.abs(dx) + np.abs(dy)).argmax(axis=2)[..., None]
    return np.take_along_axis(dx, channel, 2)[..., 0], np.take_along_axis(dy, channel, 2)[..., 0]


def _is_crest(strength: NDArray[np.int32], dx: NDArray[np.int32], dy: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return where the strength, padded by 1, is highest along the gradient; of equal neighbours, the first."""
    height, width = dx.shape

    def at(down: int, right: int) -> NDArray[np.int32]:
        return strength[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    here, steep = at(0, 0), np.abs(dy) / np.maximum(np.abs(dx), 1e-9)
    across = (here > at(0, -1)) & (here >= at(0, 1))
    along = (here > at(-1, 0)) & (here >= at(1, 0))
    falling = (here > at(-1, -1)) & (here > at(1, 1))
    rising = (here > at(-1, 1)) & (here > at(1, -1))
    slanted = np.where(dx * dy < 0, rising, falling)
    return np.where(steep < _TAN_22, across, np.where(steep > _TAN_67, along, slanted))


def _continued(strong: NDArray[np.bool_], weak: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the strong pixels, and the weak ones that a chain of neighbours joins to them; the rim is never any."""
    width = strong.shape[1]
    neighbours = np.array([-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1])
    found, open_to = strong.ravel().copy(), weak.ravel()
    front = np.flatnonzero(found)
    while front.size:
        near = np.unique(front[:, None] + neighbours)
        front = near[open_to[near] & ~found[near]]
        found[front] = True
    return found.reshape(strong.shape)
