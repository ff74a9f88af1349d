"""Pictures: found, fully decoded, turned upright, and brought to the tensor that is trained.

Reading happens once for all pictures before training (`probe_all`), so that a broken file is known at the start and
not an hour later. Only plain picture formats are decoded, whatever a file's name says: Pillow would otherwise hand a
renamed EPS to Ghostscript. docs/pictures.md tells users what becomes of which kind.
"""

import base64
import contextlib
import difflib
import hashlib
import importlib
import math
import os
import random
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, fields
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from lorasmith.cache_folder import Say, cannot_write
from lorasmith.data.buckets import CropPlan, Size
from lorasmith.data.faces import Face, FaceDraws, crop_around
from lorasmith.data.records import ByteRange, ImageRecord, PictureData
from lorasmith.errors import UserError
from lorasmith.file_facts import FileFacts

# All that Pillow decodes and knows by its first bytes, but for EPS and WMF, which other programs draw. TGA has no such
# bytes and is tried last.
FORMATS = (
    "PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "JXL", "JPEG2000", "PPM", "ICO", "QOI", "PSD",
    "ICNS", "CUR", "DDS", "PCX", "DCX", "SGI", "SUN", "XBM", "XPM", "FLI", "FITS", "PCD", "BLP", "FTEX", "MSP", "PIXAR",
    "GBR", "TGA",
)  # fmt: skip
# Kinds that people do have in their folders and that are not read: worth a word rather than silence.
_FOREIGN = {".heic", ".heif", ".avif", ".jxl", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".raw"}
_HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1"}
_JXL_BEGINNINGS = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")
_GET_JXL = "pip install 'lorasmith[jxl]' to read JPEG XL, or convert it to JPEG or PNG"
_ANIMATIONS = {"GIF", "PNG", "WEBP", "AVIF", "FLI"}  # elsewhere further frames are pages, layers or previews

_IS_ANIMATED = "animated pictures, of which only the first frame is used"
_IS_CONVERTED = "converted to sRGB by their colour profile"
_HAS_BAD_PROFILE = "with a colour profile that is broken or for other kinds of pictures, and taken as sRGB"
_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
_SAME_COLOUR = 2  # of 255: a profile that changes none by more is sRGB in other words
_NO_DATA: Mapping[Path, PictureData] = {}
_COLOUR_SPACES = {"RGB": ("RGB", "L"), "GRAY": ("L",), "CMYK": ("CMYK",)}  # of profiles: the modes that they fit

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
with contextlib.suppress(ImportError):
    importlib.import_module("pillow_jxl")  # the extra `jxl`: importing it tells Pillow of the format


class UnreadablePicture(UserError):
    """One picture cannot be decoded; `reason` says why, without the path."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Draws:
    """All that is drawn for one sample of a picture, used or not, so that no augmentation changes another's draws.

    across, down: where a random crop lies, in [0, 1). hue_or_gamma: how strong, in [-1, 1].
    """

    across: float
    down: float
    is_mirrored: bool
    is_coloured: bool
    is_hue: bool
    hue_or_gamma: float
    face: FaceDraws

    @classmethod
    def of(cls, rng: random.Random) -> "Draws":
        """Draw."""
        across, down, is_mirrored = rng.random(), rng.random(), rng.random() < 0.5
        is_coloured, is_hue, amount = rng.random() < _COLOUR_SHARE, rng.random() < 0.5, rng.uniform(-1, 1)
        face = FaceDraws(rng.random(), (rng.random(), rng.random()), (rng.random(), rng.random()))
        return cls(across, down, is_mirrored, is_coloured, is_hue, amount, face)


@dataclass(frozen=True)
class _Decoded:
    """An upright 8-bit RGB picture, how opaque it was (L), and what is worth saying of its file: for notes."""

    image: Image.Image
    alpha: Image.Image | None
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class _Probed:
    size: Size
    content_hash: str
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class _Remembered:
    facts: FileFacts
    archives: FileFacts  # of each archive: facts of the pictures in it, by their places
    cache: Path
    say: Say


_FACTS: ContextVar[_Remembered | None] = ContextVar("_FACTS", default=None)


def set_pixel_limit(megapixels: int) -> None:
    """Refuse pictures of more than so many million pixels from now on, in the whole process: Pillow has one limit."""
    Image.MAX_IMAGE_PIXELS = megapixels * 1_000_000 // 2  # Pillow warns from it on and refuses from its double on


def extensions() -> set[str]:
    """Return the lower-case file extensions that are taken for pictures, as far as the installed Pillow reads them."""
    readable = {name for name in FORMATS if name in Image.OPEN}
    return {extension for extension, name in Image.registered_extensions().items() if name in readable}


def pictures_in(folder: Path) -> list[Path]:
    """Return the files directly in a folder that are pictures by their extension, sorted by name; hidden ones not."""
    return _visible_files(folder, extensions())


def folders_within(folder: Path) -> list[Path]:
    """Return a folder and all folders in it, however deep, sorted; hidden ones not."""
    found = []
    for place, inner, _ in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        found.append(Path(place))
    return found


def foreign_pictures_in(folder: Path) -> list[Path]:
    """Return the files directly in a folder that are pictures of kinds which are not read, such as HEIC."""
    return _visible_files(folder, _FOREIGN - extensions())


def advice_for_foreign(pictures: Sequence[Path]) -> str:
    """Return what to do with pictures of kinds that are not read."""
    kinds = {path.suffix.lower() for path in pictures}
    others = "make them JPEG or PNG"
    return others if ".jxl" not in kinds else f"{_GET_JXL}" + (f"; the others: {others}" if len(kinds) > 1 else "")


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
        if not near and len(folder.parts) == 2 and not folder.is_absolute():
            hint = "check the path; a data set of the Hugging Face hub needs --source huggingface."
        raise UserError(f"there is no folder {folder}; {hint}")
    try:
        next(folder.iterdir(), None)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be listed ({error.strerror}); check its permissions.") from error


def _visible_files(folder: Path, wanted: Collection[str]) -> list[Path]:
    """Return a folder's files of these extensions, sorted by name; a folder may hold many others."""
    # A link to nothing is no file but must not vanish silently: it will be reported as unreadable.
    with os.scandir(folder) as found:
        names = [one.name for one in found if not one.name.startswith(".") and not one.is_dir()]
    return [folder / name for name in sorted(names) if os.path.splitext(name)[1].lower() in wanted]


def open_image(path: Path, *, alpha_color: str = "white") -> Image.Image:
    """Return a picture as 8-bit sRGB, upright by its EXIF orientation, transparency laid on a colour.

    16-bit values are scaled to 8 bit; palettes, CMYK and LAB are converted, by the colour profile where there is one;
    of an animation the first frame is taken.

    Raises:
        UnreadablePicture: missing, empty, truncated, not a picture, or larger than the limit.
    """
    return _decode(path, _read(path), alpha_color).image


def thumbnail_url(path: Path, side: int = 256) -> str:
    """Return a picture, made small enough for a square of `side` pixels, as a `data:` URL of a JPEG.

    Raises:
        UnreadablePicture: as `open_image`.
    """
    picture, stream = open_image(path), BytesIO()
    picture.thumbnail((side, side))
    picture.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def open_record(record: ImageRecord, *, alpha_color: str = "white") -> Image.Image:
    """Return a record's picture as `open_image` does, wherever its bytes are.

    Raises:
        UnreadablePicture: as `open_image`.
    """
    return open_with_alpha(record, alpha_color=alpha_color)[0]


def open_with_alpha(record: ImageRecord, *, alpha_color: str = "white") -> tuple[Image.Image, Image.Image | None]:
    """Return a record's picture as `open_record` does, and how opaque its places are (L), None without such a channel.

    Raises:
        UnreadablePicture: as `open_image`.
    """
    decoded = _decode(record.path, _bytes_of(record), alpha_color)
    return decoded.image, decoded.alpha


def open_as_stored(path: Path) -> tuple[Image.Image, str]:
    """Return a picture in 8-bit RGB with the values that stand in the file, transparency on black, and its SHA-256.

    Its numbers are meant, not its colours, so no colour profile changes them.

    Raises:
        UnreadablePicture: as `open_image`.
    """
    data = _read(path)
    return _decode(path, data, "black", to_srgb=False).image, hashlib.sha256(data).hexdigest()


def _bytes_of(record: ImageRecord) -> bytes:
    return _bytes_at(record.path, record.data)


def _bytes_at(path: Path, data: PictureData | None) -> bytes:
    if data is None:
        return _read(path)
    try:
        return data.read()
    except OSError as error:
        raise UnreadablePicture(path, f"its bytes cannot be read ({error.strerror or error})") from error


def probe(path: Path) -> tuple[Size, str]:
    """Decode a picture completely and return its upright (width, height) and the SHA-256 of the file.

    Raises:
        UnreadablePicture: as `open_image`.
    """
    probed = _probe(path)
    return probed.size, probed.content_hash


def probe_readable(paths: Sequence[Path]) -> tuple[dict[Path, tuple[Size, str]], list[UnreadablePicture]]:
    """Return what `probe` says of each picture that can be read, and the others."""
    found = _probe_each(paths, _NO_DATA)
    errors = [one for one in found.values() if isinstance(one, UnreadablePicture)]
    return {path: (one.size, one.content_hash) for path, one in found.items() if isinstance(one, _Probed)}, errors


def probe_all(
    paths: Sequence[Path], *, skip_unreadable: bool, data: Mapping[Path, PictureData] = _NO_DATA
) -> tuple[dict[Path, tuple[Size, str]], list[str]]:
    """Probe all pictures and return what `probe` says of each readable one, with notes on those that are not plain.

    Args:
        data: where the bytes are of those that have no file of their own.

    Raises:
        UserError: some cannot be read and are not to be skipped, or none can; lists every one with its reason.
    """
    results = _probe_each(paths, data)
    errors = [result for result in results.values() if isinstance(result, UnreadablePicture)]
    readable = {path: result for path, result in results.items() if not isinstance(result, UnreadablePicture)}
    probed = {path: (result.size, result.content_hash) for path, result in readable.items()}
    notes = _remark_notes({path: result.remarks for path, result in readable.items()})
    if not errors:
        return probed, notes
    listed = "".join(f"\n  {error}" for error in errors)
    if not skip_unreadable or not probed:
        advice = "none is left to train on" if not probed else "or leave them out with --skip-unreadable"
        raise UserError(
            f"{len(errors)} of {len(paths)} pictures cannot be read; repair or remove them, {advice}:{listed}"
        )
    reasons = "; ".join(map(str, errors))
    return probed, [*notes, f"left out because they cannot be read ({len(errors)} of {len(paths)}): {reasons}"]


@contextlib.contextmanager
def remembering(cache: Path | None, say: Say) -> Iterator[None]:
    """Let `probe_all` in this block spare the pictures of which the cache keeps facts; None: there is no cache.

    Args:
        say: tells that the cache cannot be written to.
    """
    remembered = None
    if cache is not None:
        place, made_with = cache / "facts", _made_with()
        remembered = _Remembered(FileFacts(place, made_with), FileFacts(place, ["archives", made_with]), cache, say)
    token = _FACTS.set(remembered)
    try:
        yield
    finally:
        _FACTS.reset(token)


def _made_with() -> list[object]:
    """Return what else facts of pictures depend on: programs that decode, and which facts there are."""
    readable = [name for name in FORMATS if name in Image.OPEN]
    return ["pictures 1", PIL.__version__, readable, [field.name for field in fields(_Probed)]]


_ArchiveFacts = dict[Path, dict[str, list[Any]]]  # archive -> place in it -> facts of the picture there


def _known(paths: Sequence[Path], ranges: Mapping[Path, ByteRange]) -> tuple[dict[Path, _Probed], _ArchiveFacts]:
    """Return the facts of pictures that are known and did not change, and all that is known of their archives.

    Args:
        paths: files. ranges: pictures in archives.
    """
    if (remembered := _FACTS.get()) is None:
        return {}, {}
    facts = remembered.facts.known(paths)
    archives = remembered.archives.known({source.path for source in ranges.values()})
    for path, source in ranges.items():
        if (found := archives.get(source.path, {}).get(_place_of(source))) is not None:
            facts[path] = found
    known = {path: _Probed(tuple(size), sha256, tuple(remarks)) for path, (size, sha256, remarks) in facts.items()}
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # today's
    return {path: one for path, one in known.items() if math.prod(one.size) <= limit}, archives


def _remember(probed: Mapping[Path, _Probed], ranges: Mapping[Path, ByteRange], archives: _ArchiveFacts) -> None:
    """Keep what was found out besides what was known of the archives."""
    if (remembered := _FACTS.get()) is None:
        return
    facts = {path: [one.size, one.content_hash, one.remarks] for path, one in probed.items()}
    added: _ArchiveFacts = {}
    for path, source in ranges.items():
        if path in facts:
            known = added.setdefault(source.path, dict(archives.get(source.path, {})))
            known[_place_of(source)] = facts.pop(path)
    try:
        remembered.facts.remember(facts)
        remembered.archives.remember(added)
    except (OSError, UserError) as error:
        remembered.say(cannot_write(remembered.cache, error))


def _place_of(source: ByteRange) -> str:
    return f"{source.offset}+{source.size}"


def _remark_notes(remarks: Mapping[Path, Sequence[str]]) -> list[str]:
    notes = []
    for remark in sorted({remark for found in remarks.values() for remark in found}):
        names = [path.name for path, found in remarks.items() if remark in found]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        notes.append(f"{remark} ({len(names)}): {', '.join(names[:3])}{more}")
    return notes


def _probe(path: Path, source: PictureData | None = None) -> _Probed:
    data = _bytes_at(path, source)
    decoded = _decode(path, data, "white")
    return _Probed(decoded.image.size, hashlib.sha256(data).hexdigest(), decoded.remarks)


def _probe_each(paths: Sequence[Path], data: Mapping[Path, PictureData]) -> dict[Path, _Probed | UnreadablePicture]:
    ranges = {path: source for path in paths if isinstance(source := data.get(path), ByteRange)}
    known, archives = _known([path for path in paths if path not in data], ranges)
    results: dict[Path, _Probed | UnreadablePicture] = {**known}
    unknown = [path for path in paths if path not in results]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results.update(zip(unknown, pool.map(_probe_or_error, unknown, map(data.get, unknown)), strict=True))
    new = {path: result for path in unknown if isinstance(result := results[path], _Probed)}
    _remember(new, ranges, archives)
    return {path: results[path] for path in paths}


def _probe_or_error(path: Path, source: PictureData | None) -> _Probed | UnreadablePicture:
    try:
        return _probe(path, source)
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


def _decode(path: Path, data: bytes, alpha_color: str, *, to_srgb: bool = True) -> _Decoded:
    try:
        with Image.open(BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            remarks = [_IS_ANIMATED] if _is_animated(image) else []
            image.load()
            profile = image.info.get("icc_profile")
            image = _plain_mode(_upright(image))
            colours, alpha = _without_alpha(image)
            if profile and to_srgb:
                colours, remark = _converted_to_srgb(colours, profile)
                remarks += [remark] if remark else []
            colours = colours.convert("RGB")
            if alpha is not None:
                colours = Image.composite(colours, Image.new("RGB", colours.size, alpha_color), alpha)
            return _Decoded(colours, alpha, tuple(remarks))
    except UnidentifiedImageError as error:
        raise UnreadablePicture(path, _unidentified(data)) from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise UnreadablePicture(
            path,
            f"more than {limit:.0f} million pixels, the limit against files that fill the memory; make it smaller, or "
            "raise --max-megapixels if it is what it should be",
        ) from error
    except Exception as error:  # a damaged file can trip a decoder in any way there is
        raise UnreadablePicture(path, f"damaged or cut off ({error or type(error).__name__})") from error


def _unidentified(data: bytes) -> str:
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS:
        return "a HEIC picture, whatever its name says; convert it to JPEG or PNG"
    if data.startswith(_JXL_BEGINNINGS) and "JXL" not in Image.OPEN:
        return f"a JPEG XL picture; {_GET_JXL}"
    if not data.strip(b"\0"):
        return f"nothing but zeros ({len(data)} bytes), as an interrupted copy leaves behind"
    return f"not a picture in a format that is read ({len(data)} bytes, beginning with {data[:8]!r})"


def _is_animated(image: Image.Image) -> bool:
    if image.format not in _ANIMATIONS:
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # damage behind the first frame does not matter
        return False


def _upright(image: Image.Image) -> Image.Image:
    # The decoder of JPEG XL turns the picture itself, but for a JPEG that was packed into one
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return image
    # ImageOps.exif_transpose also rewrites the EXIF block, and stumbles over damaged ones
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF in a sound picture
        return image
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def _plain_mode(image: Image.Image) -> Image.Image:
    """Return the picture in one of the modes L, LA, RGB, RGBA, CMYK."""
    if image.mode.startswith("I"):  # 16-bit grey; 32-bit "I" is how Pillow opens some of it
        values = np.asarray(image).astype(np.int64)
        grey = Image.fromarray(((values.clip(0, 65535) + 128) // 257).astype(np.uint8))
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
        return grey
    if image.mode == "F":  # floating-point TIFF: 0..1, or else 0..255
        values = np.nan_to_num(np.asarray(image))
        scale = 255.0 if values.max() <= 1 else 1.0
        return Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, tuple) and max(transparent) > 255:  # of 16 bit, but the picture is of 8 by now
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if image.has_transparency_data:
        return image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")


def _without_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    if image.mode not in ("LA", "RGBA"):
        return image, None
    return image.convert(image.mode[:-1]), image.getchannel("A")


def _converted_to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, str]:
    """Return the picture in sRGB by its colour profile, and a remark on it, "" when nothing is changed."""
    try:
        transform = _transform_to_srgb(profile, image.mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image, _HAS_BAD_PROFILE
    if transform is None:
        return image, ""
    source = image if image.mode == transform.input_mode else image.convert(transform.input_mode)
    converted = ImageCms.applyTransform(source, transform)
    assert converted is not None
    return converted, _IS_CONVERTED


@lru_cache(maxsize=32)  # a memory only: the pictures of one camera share their profile
def _transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return what converts pictures of this mode; None where the profile is sRGB in other words.

    Raises:
        PyCMSError, OSError, ValueError: the profile is damaged or for other modes.
    """
    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    space = source.profile.xcolor_space.strip()  # pyright: ignore[reportAttributeAccessIssue]  (it is what was opened)
    if mode not in _COLOUR_SPACES.get(space, ()):
        raise ValueError(f"a profile for {space}, but the picture is {mode}")
    transform = ImageCms.buildTransform(
        source,
        _SRGB,
        _COLOUR_SPACES[space][0],
        "RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    sample = _sample_colours(_COLOUR_SPACES[space][0])
    if sample is None:
        return transform
    converted = ImageCms.applyTransform(sample, transform)
    assert converted is not None
    difference = np.asarray(converted).astype(int) - np.asarray(sample.convert("RGB"))
    return None if np.abs(difference).max() <= _SAME_COLOUR else transform


def _sample_colours(mode: str) -> Image.Image | None:
    """Return a picture of colours from all over a mode's space; None for CMYK, which can never be sRGB."""
    if mode == "CMYK":
        return None
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
    return Image.fromarray(grid if mode == "RGB" else np.arange(256, dtype=np.uint8).reshape(16, 16))


def prepare(
    image: Image.Image,
    crop: CropPlan,
    *,
    draws: Draws,
    flip: bool = False,
    colour: bool = False,
    random_crop: bool = False,
    face: Face | None = None,
    face_portions: tuple[float, float] | None = None,
) -> Tensor:
    """Return a picture's pixels (3, H, W), float32 in [-1, 1], resized and cropped as planned.

    Args:
        colour: in a third of the cases turn the hue or change the gamma weakly.
        flip, random_crop, face, face_portions: see `cut_out`.
    """
    image = cut_out(
        image, crop, draws=draws, flip=flip, random_crop=random_crop, face=face, face_portions=face_portions
    )
    pixels = np.asarray(image, dtype=np.float32) / 255  # (H, W, 3)
    if colour and draws.is_coloured:
        amount = draws.hue_or_gamma
        changed = _turn_hue(pixels, amount) if draws.is_hue else pixels ** (1 + amount * _GAMMA)
        pixels = _keep_brightness(pixels, changed)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1) * 2 - 1))


def cut_out(
    image: Image.Image,
    crop: CropPlan,
    *,
    draws: Draws,
    flip: bool = False,
    random_crop: bool = False,
    face: Face | None = None,
    face_portions: tuple[float, float] | None = None,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> Image.Image:
    """Return the part of a picture, or of its mask, that is trained, resized as planned.

    Args:
        flip: mirror left to right in half of the cases.
        random_crop: crop anywhere instead of where the plan says.
        face, face_portions: if both are given, crop around the face; see `faces.crop_around`.
    """
    shape, is_face = crop.shape, face is not None and face_portions is not None
    if face is not None and face_portions is not None:
        crop = crop_around(face, image.size, shape, face_portions, draws.face, random_crop=random_crop)
    left, top = crop.crop[:2]
    width, height = crop.resize
    if random_crop and not is_face:
        left, top = int(draws.across * (width - shape[0] + 1)), int(draws.down * (height - shape[1] + 1))
    image = _resize_and_crop(image, crop.resize, (left, top), shape, resample)
    return ImageOps.mirror(image) if flip and draws.is_mirrored else image


def _resize_and_crop(
    image: Image.Image, resize: Size, corner: tuple[int, int], shape: Size, resample: Image.Resampling
) -> Image.Image:
    """Resize only what the crop keeps: the same pixels as resizing all, without the memory for a very long picture."""
    per_x, per_y = image.width / resize[0], image.height / resize[1]
    left, top = corner[0] * per_x, corner[1] * per_y
    right, bottom = min(left + shape[0] * per_x, image.width), min(top + shape[1] * per_y, image.height)
    return image.resize(shape, resample, box=(left, top, right, bottom))


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
