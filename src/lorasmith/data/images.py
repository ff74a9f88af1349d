"""Pictures: found, fully decoded, turned upright, and brought to the tensor that is trained.

Reading happens once for all pictures before training (`probe_all`), so that a broken file is known at the start and
not an hour later. Only plain picture formats are decoded, whatever a file's name says: Pillow would otherwise hand a
renamed EPS to Ghostscript.
"""

import difflib
import hashlib
import os
import random
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lorasmith.data.buckets import CropPlan, Size
from lorasmith.errors import UserError

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO", "QOI")
# Kinds that people do have in their folders and that are not read: worth a word rather than silence.
_FOREIGN = {".heic", ".heif", ".jxl", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".raw"}
_HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1"}

_ORIENTATION = 0x0112  # EXIF tag
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_COLOUR_SHARE = 1 / 3  # as in sd-scripts: a third of the samples, hue or gamma
_HUE_DEGREES, _GAMMA = 16, 0.05  # strongest turn (8 in OpenCV's units of 2 degrees), strongest change of the exponent
_MAX_BRIGHTNESS_CHANGE = 0.015  # of the picture's own mean brightness
_BRIGHTNESS = np.array([[1 / 3, 1 / 3, 1 / 3], [0.299, 0.587, 0.114]], dtype=np.float32)  # mean, and luma (Rec. 601)

# Pillow warns from half of the size on that it refuses; that size is refused here in words, and a large photograph
# is fine.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
Image.init()


class UnreadablePicture(UserError):
    """One picture cannot be decoded; `reason` says why, without the path."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


def extensions() -> set[str]:
    """Return the lower-case file extensions that are taken for pictures, as far as the installed Pillow reads them."""
    readable = {name for name in FORMATS if name in Image.OPEN}
    return {extension for extension, name in Image.registered_extensions().items() if name in readable}


def pictures_in(folder: Path) -> list[Path]:
    """Return the files directly in a folder that are pictures by their extension, sorted by name; hidden ones not."""
    wanted = extensions()
    return [path for path in _visible_files(folder) if path.suffix.lower() in wanted]


def foreign_pictures_in(folder: Path) -> list[Path]:
    """Return the files directly in a folder that are pictures of kinds which are not read, such as HEIC."""
    return [path for path in _visible_files(folder) if path.suffix.lower() in _FOREIGN - extensions()]


def require_folder(folder: Path) -> None:
    """Check that a folder of pictures is there and can be listed.

    Raises:
        UserError: it is missing (a folder with a like name is suggested), a file, or not readable.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file, but a folder of pictures is expected; give the folder it lies in.")
    if not folder.is_dir():
        beside = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        near = difflib.get_close_matches(folder.name, beside, n=1)
        hint = f"did you mean {folder.parent / near[0]}?" if near else "check the path."
        raise UserError(f"there is no folder {folder}; {hint}")
    try:
        next(folder.iterdir(), None)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be listed ({error.strerror}); check its permissions.") from error


def _visible_files(folder: Path) -> list[Path]:
    # A link to nothing is no file but must not vanish silently: it will be reported as unreadable.
    files = (path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_dir())
    return sorted(files, key=lambda path: path.name)


def open_image(path: Path) -> Image.Image:
    """Return a picture as 8-bit RGB, upright by its EXIF orientation, transparency laid on white.

    16-bit grey is scaled to 8 bit, palettes and CMYK are converted; of an animation the first frame is taken.

    Raises:
        UnreadablePicture: missing, empty, truncated, not a picture, or larger than Pillow's safe limit.
    """
    return _decode(path, _read(path))


def probe(path: Path) -> tuple[Size, str]:
    """Decode a picture completely and return its upright (width, height) and the SHA-256 of the file.

    Raises:
        UnreadablePicture: as `open_image`.
    """
    data = _read(path)
    return _decode(path, data).size, hashlib.sha256(data).hexdigest()


def probe_all(paths: Sequence[Path], *, skip_unreadable: bool) -> tuple[dict[Path, tuple[Size, str]], list[str]]:
    """Probe all pictures and return what `probe` says of each readable one, with notes on those left out.

    Raises:
        UserError: some cannot be read and are not to be skipped, or none can; lists every one with its reason.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = dict(zip(paths, pool.map(_probe_or_error, paths), strict=True))
    errors = [result for result in results.values() if isinstance(result, UnreadablePicture)]
    probed = {path: result for path, result in results.items() if not isinstance(result, UnreadablePicture)}
    if not errors:
        return probed, []
    listed = "".join(f"\n  {error}" for error in errors)
    if not skip_unreadable or not probed:
        advice = "none is left to train on" if not probed else "or leave them out with --skip-unreadable"
        raise UserError(
            f"{len(errors)} of {len(paths)} pictures cannot be read; repair or remove them, {advice}:{listed}"
        )
    reasons = "; ".join(map(str, errors))
    return probed, [f"left out because they cannot be read ({len(errors)} of {len(paths)}): {reasons}"]


def _probe_or_error(path: Path) -> tuple[Size, str] | UnreadablePicture:
    try:
        return probe(path)
    except UnreadablePicture as error:
        return error


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadablePicture(path, f"the file cannot be opened ({error.strerror})") from error
    if not data:
        raise UnreadablePicture(path, "the file is empty (0 bytes)")
    return data


def _decode(path: Path, data: bytes) -> Image.Image:
    try:
        with Image.open(BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            image.load()
            return _to_rgb(_upright(image))
    except UnidentifiedImageError as error:
        raise UnreadablePicture(path, _unidentified(data)) from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise UnreadablePicture(path, f"more than {limit:.0f} million pixels; make it smaller first") from error
    except Exception as error:  # a damaged file can trip a decoder in any way there is
        raise UnreadablePicture(path, f"damaged or cut off ({error or type(error).__name__})") from error


def _unidentified(data: bytes) -> str:
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS:
        return "a HEIC picture, whatever its name says; convert it to JPEG or PNG"
    if not data.strip(b"\0"):
        return f"nothing but zeros ({len(data)} bytes), as an interrupted copy leaves behind"
    return f"not a picture in a format that is read ({len(data)} bytes, beginning with {data[:8]!r})"


def _upright(image: Image.Image) -> Image.Image:
    # ImageOps.exif_transpose also rewrites the EXIF block, and stumbles over damaged ones
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF in a sound picture
        return image
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; 32-bit "I" is how Pillow opens some of it
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode == "F":  # floating-point TIFF: 0..1, or else 0..255
        values = np.nan_to_num(np.asarray(image))
        scale = 255.0 if values.max() <= 1 else 1.0
        image = Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def prepare(
    image: Image.Image,
    crop: CropPlan,
    *,
    rng: random.Random,
    flip: bool = False,
    colour: bool = False,
    random_crop: bool = False,
) -> Tensor:
    """Return a picture's pixels (3, H, W), float32 in [-1, 1], resized and cropped as planned.

    Every draw is made whether it is used or not, so that turning one augmentation on does not change another.

    Args:
        flip: mirror left to right in half of the cases.
        colour: in a third of the cases turn the hue or change the gamma weakly.
        random_crop: crop anywhere instead of where the plan says.
    """
    across, down, is_flipped = rng.random(), rng.random(), rng.random() < 0.5
    is_coloured, is_hue, amount = rng.random() < _COLOUR_SHARE, rng.random() < 0.5, rng.uniform(-1, 1)
    left, top = crop.crop[:2]
    (width, height), shape = crop.resize, crop.shape
    if random_crop:
        left, top = int(across * (width - shape[0] + 1)), int(down * (height - shape[1] + 1))
    image = _resize_and_crop(image, crop.resize, (left, top), shape)
    if flip and is_flipped:
        image = ImageOps.mirror(image)
    pixels = np.asarray(image, dtype=np.float32) / 255  # (H, W, 3)
    if colour and is_coloured:
        pixels = _keep_brightness(pixels, _turn_hue(pixels, amount) if is_hue else pixels ** (1 + amount * _GAMMA))
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1) * 2 - 1))


def _resize_and_crop(image: Image.Image, resize: Size, corner: tuple[int, int], shape: Size) -> Image.Image:
    """Resize only what the crop keeps: the same pixels as resizing all, without the memory for a very long picture."""
    per_x, per_y = image.width / resize[0], image.height / resize[1]
    left, top = corner[0] * per_x, corner[1] * per_y
    right, bottom = min(left + shape[0] * per_x, image.width), min(top + shape[1] * per_y, image.height)
    return image.resize(shape, Image.Resampling.LANCZOS, box=(left, top, right, bottom))


def _turn_hue(pixels: np.ndarray, amount: float) -> np.ndarray:
    """Rotate colours about the grey axis by amount * 16 degrees (Rodrigues' formula), which keeps R + G + B."""
    angle = np.deg2rad(amount * _HUE_DEGREES)
    u = np.sqrt(1 / 3)
    cross = np.array([[0, -u, u], [u, 0, -u], [-u, u, 0]])
    turn = np.cos(angle) * np.eye(3) + (1 - np.cos(angle)) / 3 + np.sin(angle) * cross
    return (pixels @ turn.T.astype(np.float32)).clip(0, 1)


def _keep_brightness(pixels: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """Go from `pixels` towards `changed` as far as the mean brightness stays within 1.5 % of what it was.

    A weak colour change must not become a strong one of brightness in dark or very colourful pictures.
    """
    before = _BRIGHTNESS @ pixels.mean(axis=(0, 1), dtype=np.float64)  # (2,)
    change = np.abs(_BRIGHTNESS @ changed.mean(axis=(0, 1), dtype=np.float64) - before).max(initial=0)
    part = min(1.0, _MAX_BRIGHTNESS_CHANGE * before.min() / change) if change else 1.0
    return pixels + np.float32(part) * (changed - pixels)
