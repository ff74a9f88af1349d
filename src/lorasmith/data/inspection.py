"""What a picture is like: sharp or not, like another one or not, plain or in need of conversion.

Each picture is decoded once by `images.open_image`, as training does it; only what is needed to compare is kept.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from lorasmith.data.images import FORMATS, open_image

_ORIENTATION = 0x0112  # EXIF tag
_PLAIN_MODES = {"1", "L", "LA", "P", "RGB", "RGBA"}
_PLAIN_FORMATS = {"JPEG", "MPO", "PNG", "WEBP", "BMP"}
_WITH_FRAMES = {"GIF", "PNG", "WEBP", "AVIF", "FLI", "TIFF"}  # elsewhere further frames are layers, sizes or previews

_DCT_SIDE, _HASH_SIDE, _THUMB_SIDE = 32, 8, 16
_NO_PATTERN = 100.0  # DCT coefficients below this are noise: a gradient over a quarter of a grey level
# Over 45 photographs and drawings, saved again at quality 30, halved, enlarged: at most 8 bits and 9 levels.
# Different ones: the nearest pair has 6 bits and 18 levels, the next 12 bits and 11 levels.
_MOST_BITS, _MOST_LEVELS = 8, 10.0
_BLOCK = 512

_SHARPNESS_SIDE, _TILES = 512, 4


@dataclass(frozen=True, eq=False)
class Look:
    """What is known of a picture after it was decoded.

    size: (width, height), upright. content_hash: SHA-256 of the file. hash_bits: (63,) bool, its coarse pattern.
    thumbnail: (16, 16, 3) uint8. conversions: what other programs might stumble over, in plain words.
    """

    size: tuple[int, int]
    content_hash: str
    hash_bits: np.ndarray
    thumbnail: np.ndarray
    sharpness: float
    has_transparency: bool
    num_frames: int
    conversions: tuple[str, ...]


def inspect(path: Path) -> Look:
    """Decode a picture and return what it is like.

    Raises:
        UnreadablePicture: as `images.open_image`.
    """
    image = open_image(path)
    has_transparency, num_frames, conversions = _container(path)
    return Look(
        image.size,
        hashlib.sha256(path.read_bytes()).hexdigest(),
        perceptual_hash(image),
        thumbnail(image),
        sharpness(image),
        has_transparency,
        num_frames,
        conversions,
    )


def _container(path: Path) -> tuple[bool, int, tuple[str, ...]]:
    """Return (transparent anywhere, number of frames, what to convert), from a file that is known to be readable."""
    with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
        num_frames = _num_frames(image)
        conversions = []
        if image.format not in _PLAIN_FORMATS:
            conversions.append(f"{image.format} to PNG")
        if image.mode not in _PLAIN_MODES:
            conversions.append(f"{image.mode} to 8-bit RGB")
        if num_frames > 1:
            conversions.append("first frame")
        if _is_turned(image):
            conversions.append("turned upright")
        has_transparency = image.has_transparency_data and _lowest_alpha(image) < 255
    return has_transparency, num_frames, tuple(conversions)


def _num_frames(image: Image.Image) -> int:
    if image.format not in _WITH_FRAMES:
        return 1
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # damage behind the first frame does not matter
        return 1


def _is_turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_ORIENTATION, 1) in range(2, 9)
    except Exception:  # damaged EXIF in a sound picture
        return False


def _lowest_alpha(image: Image.Image) -> int:
    return int(np.asarray(image.convert("RGBA").getchannel("A")).min())


def perceptual_hash(image: Image.Image) -> np.ndarray:
    """Return 63 bits (bool) of the coarse pattern of a picture: its lowest cosine frequencies, above the median or not.

    Sizes, compression and brightness hardly change them. A picture without a pattern has none set.
    """
    grey = np.asarray(_shrunk(image.convert("L"), (_DCT_SIDE, _DCT_SIDE)), dtype=np.float32)
    cosines = _cosines()
    low = (cosines @ grey @ cosines.T).ravel()[1:]  # (63,): without the mean brightness
    return low > np.median(low) if np.abs(low).max() > _NO_PATTERN else np.zeros(low.size, dtype=bool)


def thumbnail(image: Image.Image) -> np.ndarray:
    """Return (16, 16, 3) uint8: where the colours are."""
    return np.asarray(_shrunk(image.convert("RGB"), (_THUMB_SIDE, _THUMB_SIDE)))


def alike(hashes: Sequence[np.ndarray], thumbnails: Sequence[np.ndarray]) -> dict[int, int]:
    """Return for each picture that looks like an earlier one, that one: same pattern and same colours.

    An earlier one is only compared with if it is like none before it: what is returned can all be removed.
    """
    if not hashes:
        return {}
    signs = np.array([np.where(bits, 1, -1) for bits in hashes], dtype=np.float32)
    least = signs.shape[1] - 2 * _MOST_BITS  # a product of signs is the number of equal bits less the others
    small = np.array(thumbnails, dtype=np.int16).reshape(len(hashes), -1)
    found: dict[int, int] = {}
    for begin in range(0, len(signs), _BLOCK):
        block = signs[begin : begin + _BLOCK] @ signs[: begin + _BLOCK].T >= least
        for row in range(len(block)):
            number = begin + row
            candidates = np.flatnonzero(block[row, :number])
            candidates = candidates[[int(other) not in found for other in candidates]]
            if candidates.size:
                levels = np.abs(small[candidates] - small[number]).mean(axis=1)
                if levels.min() <= _MOST_LEVELS:
                    found[number] = int(candidates[levels.argmin()])
    return found


def sharpness(image: Image.Image) -> float:
    """Return the variance of the Laplacian in the sharpest of 4 x 4 parts of a picture, at most 512 pixels long.

    The sharpest part, because a blurred background is no fault. A picture below 512 pixels is judged as it is.
    """
    grey = image.convert("L")
    scale = _SHARPNESS_SIDE / max(grey.size)
    if scale < 1:
        grey = _shrunk(grey, (max(1, round(grey.width * scale)), max(1, round(grey.height * scale))))
    pixels = np.pad(np.asarray(grey, dtype=np.float32), 1, mode="edge")
    middle = pixels[1:-1, 1:-1]
    sides = pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:]
    rows = np.array_split(4 * middle - sides, _TILES, axis=0)
    parts = [part for row in rows for part in np.array_split(row, _TILES, axis=1)]
    return max(float(part.var()) for part in parts if part.size)


def _shrunk(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)


@lru_cache(maxsize=1)
def _cosines() -> np.ndarray:
    """Return (8, 32): the lowest rows of the discrete cosine transform (type II)."""
    n, k = np.arange(_DCT_SIDE), np.arange(_HASH_SIDE)[:, None]
    return np.cos(np.pi * (2 * n + 1) * k / (2 * _DCT_SIDE)).astype(np.float32)
