"""Pictures: every mode people have, colour profiles, broken files, and what becomes of the pixels."""

import hashlib
import random
import re
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageCms

from lorasmith.data.buckets import cover_and_crop
from lorasmith.data.images import (
    Draws,
    UnreadablePicture,
    advice_for_foreign,
    extensions,
    foreign_pictures_in,
    open_image,
    pictures_in,
    prepare,
    probe,
    probe_all,
    set_pixel_limit,
)
from lorasmith.errors import UserError

Size = tuple[int, int]


def smooth(size: Size = (40, 24), phase: float = 0.0) -> Image.Image:
    """A picture without hard edges, so that codecs and filters keep it; no two corners are alike."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    channels = [255 * x, 255 * y * (1 - x / 2), 127 + 120 * np.sin(3 * x + phase)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def difference(a: Image.Image, b: Image.Image) -> float:
    assert a.mode == b.mode == "RGB" and a.size == b.size
    return float(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).mean())


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".PNG", ".JPG", ".Webp"])
def test_common_kinds_are_found_and_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    smooth().save(path)
    assert pictures_in(tmp_path) == [path]
    assert difference(open_image(path), smooth()) < 5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_all_orientations_give_the_same_upright_picture(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)  # what the camera did, which the viewer undoes
    stored = smooth()
    if undo > 1:
        stored = stored.transpose(
            {
                2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
                4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
                7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
            }[undo]
        )  # fmt: skip
    path = tmp_path / "a.png"
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 98}, "AVIF": {"quality": 98}}.get(kind, {})
    path.write_bytes(encoded(stored, kind, exif=exif, **options))
    assert probe(path)[0] == (40, 24)
    assert difference(open_image(path), smooth()) < (3 if kind in ("JPEG", "AVIF") else 1e-9)


def test_damaged_exif_does_not_spoil_a_sound_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(smooth(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage"))
    assert probe(path)[0] == (40, 24)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(tmp_path: Path, mode: str) -> None:
    opaque = smooth().convert("L")
    image = Image.merge("RGBA", [opaque] * 3 + [Image.new("L", opaque.size, 0)])
    image.paste(Image.merge("RGBA", [opaque] * 3 + [Image.new("L", opaque.size, 255)]).crop((0, 0, 20, 24)), (0, 0))
    path = tmp_path / "a.png"
    (image if mode == "RGBA" else image.convert("LA").convert(mode)).save(path)
    values = np.asarray(open_image(path))
    assert (values[:, 20:] == 255).all()
    assert np.abs(values[:, :20, 0].astype(int) - np.asarray(opaque)[:, :20]).max() <= 1


def test_a_transparent_palette_colour_becomes_white(tmp_path: Path) -> None:
    image = Image.new("P", (4, 2), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    path = tmp_path / "a.png"
    image.save(path, transparency=0)
    result = open_image(path)
    assert result.getpixel((0, 0)) == (255, 255, 255) and result.getpixel((1, 0)) == (200, 100, 50)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_grey_is_scaled_to_eight(tmp_path: Path, suffix: str) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    assert (np.asarray(open_image(path)) == grey[..., None]).all()


def deep_png(values: np.ndarray, transparent: tuple[int, ...] = ()) -> bytes:
    """A PNG of 16 bit, which Pillow cannot write in colour; values (height, width, channels), transparent: its tRNS."""
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    key = chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)) if transparent else b""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + header + key + data + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bit_gradients_keep_their_order_and_their_ends(tmp_path: Path, channels: int) -> None:
    gradient = np.linspace(0, 65535, 700).astype(np.int64)
    values = np.repeat(gradient[None, :, None], channels, axis=2)
    if channels in (2, 4):
        values[..., -1] = 65535
    (tmp_path / "a.png").write_bytes(deep_png(values))
    seen = np.asarray(open_image(tmp_path / "a.png")).astype(int)[0]
    assert (np.diff(seen, axis=0) >= 0).all() and seen[0].tolist() == [0] * 3 and seen[-1].tolist() == [255] * 3
    assert np.abs(seen - gradient[:, None] / 257).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_the_transparent_colour_of_a_sixteen_bit_picture_is_seen_through(tmp_path: Path, channels: int) -> None:
    values = np.repeat(np.array([1000, 40000])[None, :, None], channels, axis=2)
    (tmp_path / "a.png").write_bytes(deep_png(values, (40000,) * channels))
    seen = open_image(tmp_path / "a.png", alpha_color="#ff0000")
    assert seen.getpixel((1, 0)) == (255, 0, 0) and max(np.asarray(seen)[0, 0]) <= 4


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF", "TIFF", "GIF"])
def test_transparency_is_laid_on_the_colour_of_choice(tmp_path: Path, kind: str) -> None:
    image = smooth().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 20, 24))
    options = {"lossless": True} if kind == "WEBP" else {"quality": 98} if kind == "AVIF" else {}
    (tmp_path / "a.png").write_bytes(encoded(image, kind, **options))
    for colour, value in (("#10c040", (0x10, 0xC0, 0x40)), ("black", (0, 0, 0))):
        seen = open_image(tmp_path / "a.png", alpha_color=colour)
        assert np.abs(np.asarray(seen)[:, :16].astype(int) - value).max() <= (4 if kind == "AVIF" else 0)
        assert difference(seen.crop((24, 0, 40, 24)), smooth().crop((24, 0, 40, 24))) < 10


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.uint8, (3, 3, 4)), st.tuples(*[st.integers(0, 255)] * 3))
def test_half_transparent_pixels_are_mixed(
    tmp_path_factory: pytest.TempPathFactory, values: np.ndarray, colour: tuple[int, int, int]
) -> None:
    path = tmp_path_factory.getbasetemp() / "mixed.png"
    Image.fromarray(values).save(path)
    alpha = values[..., 3:] / 255
    expected = values[..., :3] * alpha + np.array(colour) * (1 - alpha)
    seen = np.asarray(open_image(path, alpha_color="#{:02x}{:02x}{:02x}".format(*colour)))
    assert np.abs(seen - expected).max() <= 1


@pytest.mark.parametrize("largest", [1.0, 255.0])
def test_floating_point_grey_is_scaled_to_eight(tmp_path: Path, largest: float) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = tmp_path / "a.tif"
    Image.fromarray((grey / 255 * largest).astype(np.float32)).save(path)
    assert (np.asarray(open_image(path)) == grey[..., None]).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    image = smooth().convert(mode)
    path = tmp_path / "a.tif"
    image.save(path)
    assert difference(open_image(path), image.convert("RGB")) == 0


def test_lab_becomes_the_rgb_it_was_made_from(tmp_path: Path) -> None:
    image = smooth()
    lab = ImageCms.profileToProfile(
        image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    lab.save(tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as stored:
        assert stored.mode == "LAB"
    assert difference(open_image(tmp_path / "a.tif"), image) < 2


@pytest.mark.parametrize("kind", ["PSD", "PCX", "SGI", "DDS", "ICNS", "PPM", "TGA", "QOI", "JPEG2000", "BMP", "ICO"])
def test_rarer_kinds_are_read_and_found_by_their_names(tmp_path: Path, kind: str) -> None:
    image = smooth((32, 32))
    path = tmp_path / f"a{next(ext for ext, name in Image.registered_extensions().items() if name == kind)}"
    path.write_bytes(psd(image) if kind == "PSD" else encoded(image, kind))
    assert pictures_in(tmp_path) == [path]
    seen = open_image(path)
    assert difference(seen.resize((32, 32)), image) < 8


def psd(image: Image.Image) -> bytes:
    """A flat PSD, which Pillow reads but does not write."""
    header = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, image.height, image.width, 8, 3)
    planes = b"".join(channel.tobytes() for channel in image.split())
    return header + bytes(12) + struct.pack(">H", 0) + planes


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF"])
def test_of_an_animation_the_first_frame_is_taken_and_that_is_said(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (40, 24), colour) for colour in ("red", "blue")]
    path = tmp_path / "moving.png"
    path.write_bytes(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert difference(open_image(path), frames[0]) < 3
    _, notes = probe_all([path], skip_unreadable=False)
    assert notes == ["animated pictures, of which only the first frame is used (1): moving.png"]
    path.write_bytes(encoded(frames[0], kind))
    assert probe_all([path], skip_unreadable=False)[1] == []


# ---- colour profiles -----------------------------------------------------------------------------------------------

# Primaries as columns of XYZ at D50, from the profiles' specifications, and tone curves: encoded -> linear
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])


def srgb_curve(encoded: np.ndarray) -> np.ndarray:
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def adobe_curve(encoded: np.ndarray) -> np.ndarray:
    return encoded**2.19921875


SPACES = {"adobe": (ADOBE, adobe_curve), "p3": (DISPLAY_P3, srgb_curve), "linear": (SRGB, lambda values: values)}


def encoded_by(curve: object, linear: np.ndarray) -> np.ndarray:
    """Undo a tone curve, by looking the values up."""
    steps = np.linspace(0, 1, 20001)
    return np.interp(linear, curve(steps), steps)  # type: ignore[operator]


def profile(space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    """An ICC profile, version 2, written by hand."""
    numbers = {b"desc": text("test"), b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz(0.9642, 1, 0.8249), **tags}
    table, body, offset = struct.pack(">I", len(numbers)), b"", 132 + 12 * len(numbers)
    for name, data in numbers.items():
        padded = data + bytes(-len(data) % 4)
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += padded
    header = struct.pack(">I4sI4s4s4s12x4s24x", offset + len(body), b"lcms", 0x02400000, kind, space, pcs, b"acsp")
    header += struct.pack(">iii", *(round(v * 65536) for v in (0.9642, 1, 0.8249)))
    return header + bytes(128 - len(header)) + table + body


def text(words: str) -> bytes:
    return b"desc\0\0\0\0" + struct.pack(">I", len(words) + 1) + words.encode() + bytes(79)


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(value * 65536) for value in values))


def curve_tag(curve: object) -> bytes:
    values = (curve(np.linspace(0, 1, 4096)) * 65535).round().astype(">u2")  # type: ignore[operator]
    return b"curv\0\0\0\0" + struct.pack(">I", 4096) + values.tobytes()


def rgb_profile(name: str) -> bytes:
    matrix, curve = SPACES[name]
    columns = {tag: xyz(*matrix[:, i]) for i, tag in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    return profile(b"RGB ", {**columns, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve_tag(curve))})


def in_space(image: Image.Image, name: str) -> Image.Image:
    """The numbers that stand for an sRGB picture's colours in another space, by the definition of the spaces."""
    matrix, curve = SPACES[name]
    linear = srgb_curve(np.asarray(image) / 255) @ SRGB.T @ np.linalg.inv(matrix).T
    return Image.fromarray((encoded_by(curve, linear.clip(0, 1)) * 255).round().astype(np.uint8))


@pytest.mark.parametrize("space", ["adobe", "p3"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF"])
def test_a_picture_in_another_colour_space_comes_out_as_the_srgb_it_shows(
    tmp_path: Path, space: str, kind: str
) -> None:
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 98}, "AVIF": {"quality": 98}}.get(kind, {})
    path = tmp_path / "a.png"
    path.write_bytes(encoded(in_space(smooth(), space), kind, icc_profile=rgb_profile(space), **options))
    assert difference(in_space(smooth(), space), smooth()) > 5
    assert difference(open_image(path), smooth()) < 2
    note = "converted to sRGB by their colour profile (1): a.png"
    assert probe_all([path], skip_unreadable=False)[1] == [note]


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.uint8, (4, 4, 3)), st.sampled_from(["adobe", "p3"]))
def test_any_colour_comes_back_from_another_space(
    tmp_path_factory: pytest.TempPathFactory, values: np.ndarray, space: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "profiled.png"
    in_space(Image.fromarray(values), space).save(path, icc_profile=rgb_profile(space))
    # 8 bits of another space are coarser than those of sRGB, in dark colours most
    linear = np.abs(srgb_curve(np.asarray(open_image(path)) / 255) - srgb_curve(values / 255))
    assert linear.max() < 0.02


def test_a_profile_that_is_srgb_changes_no_pixel_and_needs_no_word(tmp_path: Path) -> None:
    for name, data in (
        ("lcms.png", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        ("own.png", rgb_profile("p3").replace(rgb_profile("p3")[128:], profile_body_of_srgb())),
    ):
        smooth().save(tmp_path / name, icc_profile=data)
        assert difference(open_image(tmp_path / name), smooth()) == 0
        assert probe_all([tmp_path / name], skip_unreadable=False)[1] == []


def profile_body_of_srgb() -> bytes:
    columns = {tag: xyz(*SRGB[:, i]) for i, tag in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    tags = {**columns, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve_tag(srgb_curve))}
    return profile(b"RGB ", tags)[128:]


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "L"])
def test_profiles_work_in_all_modes(tmp_path: Path, mode: str) -> None:
    """Grey is grey in every space, only lighter or darker: a linear profile must lighten it."""
    grey = Image.linear_gradient("L").resize((40, 24))
    image = grey.convert("RGB").convert("RGBA").convert(mode) if mode != "P" else grey.convert("P")
    image.save(tmp_path / "a.png", icc_profile=rgb_profile("linear"))
    seen = np.asarray(open_image(tmp_path / "a.png"))[..., 1] / 255
    expected = encoded_by(srgb_curve, np.asarray(grey) / 255)
    assert np.abs(seen - expected).max() < 0.02


def test_a_grey_profile_is_followed(tmp_path: Path) -> None:
    grey = Image.linear_gradient("L").resize((40, 24))
    data = profile(b"GRAY", {b"kTRC": curve_tag(lambda values: values**1.2)})
    for name, image in (("a.png", grey), ("deep.png", Image.fromarray(np.asarray(grey).astype(np.uint16) * 257))):
        image.save(tmp_path / name, icc_profile=data)
        seen = np.asarray(open_image(tmp_path / name)).astype(float)
        assert np.abs(seen - encoded_by(srgb_curve, (np.asarray(grey) / 255) ** 1.2)[..., None] * 255).max() < 4


INKS = {"white": (0, 0, 0, 0), "black": (0, 0, 0, 255), "red": (0, 255, 255, 0), "blue": (255, 255, 0, 0)}
LAB = {"white": (100, 0, 0), "black": (0, 0, 0), "red": (45, 50, 30), "blue": (30, 10, -35)}


def cmyk_profile() -> bytes:
    """A printer's profile that knows the colours of the INKS; other corners are grey or black."""
    nodes = []
    for index in range(16):
        inks = tuple(255 * (index >> shift & 1) for shift in (3, 2, 1, 0))
        known = next((LAB[name] for name, value in INKS.items() if value == inks), (0 if inks[3] else 50, 0, 0))
        nodes += [round(known[0] * 2.55), known[1] + 128, known[2] + 128]
    ramp = bytes(range(256))
    identity = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4 + bytes(nodes) + ramp * 3
    return profile(b"CMYK", {b"A2B0": table, b"A2B1": table}, pcs=b"Lab ", kind=b"prtr")


def srgb_of(lab: tuple[int, int, int]) -> np.ndarray:
    """The definition of CIELAB, turned around."""
    fy = (lab[0] + 16) / 116
    f = np.array([fy + lab[1] / 500, fy, fy - lab[2] / 200])
    white = np.array([0.9642, 1, 0.8249])
    absolute = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * white
    return encoded_by(srgb_curve, (np.linalg.inv(SRGB) @ absolute).clip(0, 1)) * 255


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_inks_are_converted_by_the_printers_profile(tmp_path: Path, kind: str) -> None:
    for name, inks in INKS.items():
        image = Image.new("CMYK", (16, 16), inks)
        (tmp_path / "a.tif").write_bytes(encoded(image, kind, icc_profile=cmyk_profile()))
        seen = np.asarray(open_image(tmp_path / "a.tif"))[8, 8]
        assert np.abs(seen - srgb_of(LAB[name])).max() < 6, name


@pytest.mark.parametrize(
    "broken", [b"garbage", rgb_profile("p3")[:200], rgb_profile("p3")[:128] + bytes(600), cmyk_profile(), b"\0" * 128]
)
def test_a_broken_profile_is_told_of_and_otherwise_ignored(tmp_path: Path, broken: bytes) -> None:
    smooth().save(tmp_path / "a.png", icc_profile=broken)
    assert difference(open_image(tmp_path / "a.png"), smooth()) == 0
    _, notes = probe_all([tmp_path / "a.png"], skip_unreadable=False)
    assert len(notes) == 1 and "profile that is broken" in notes[0] and notes[0].endswith("a.png")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["adobe", "cmyk"]), st.data())
def test_no_damage_to_a_profile_makes_a_picture_unreadable(
    tmp_path_factory: pytest.TempPathFactory, space: str, data: st.DataObject
) -> None:
    content = bytearray(cmyk_profile() if space == "cmyk" else rgb_profile("adobe"))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, min(len(content), 400) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged-profile.tif"
    image = smooth().convert("CMYK") if space == "cmyk" else smooth()
    image.save(path, icc_profile=bytes(content[: data.draw(st.integers(1, len(content)))]))
    assert open_image(path).size == (40, 24)


# ---- JPEG XL -------------------------------------------------------------------------------------------------------


@pytest.fixture
def jxl(tmp_path: Path) -> Path:
    pytest.importorskip("pillow_jxl")
    path = tmp_path / "a.jxl"
    smooth().save(path, lossless=True)
    return path


def test_jpeg_xl_is_read_with_its_extra(jxl: Path) -> None:
    assert pictures_in(jxl.parent) == [jxl] and not foreign_pictures_in(jxl.parent)
    assert difference(open_image(jxl), smooth()) == 0
    image = smooth().convert("RGBA")
    image.putalpha(0)
    image.save(jxl, lossless=True)
    assert np.asarray(open_image(jxl, alpha_color="blue"))[3, 3].tolist() == [0, 0, 255]


def test_jpeg_xl_is_not_turned_twice(jxl: Path) -> None:
    """Its EXIF repeats what the decoder has already done; a JPEG packed into one is not turned by the decoder."""
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth().save(jxl, lossless=True, exif=exif.tobytes())
    assert open_image(jxl).size == (40, 24)
    smooth().save(jxl.with_suffix(".jpg"), exif=exif)
    with Image.open(jxl.with_suffix(".jpg")) as image, pytest.warns(UserWarning, match="reconstruction"):
        image.save(jxl)
    assert difference(open_image(jxl), open_image(jxl.with_suffix(".jpg"))) == 0 and open_image(jxl).size == (24, 40)


def test_without_the_extra_one_line_tells_what_to_install(jxl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(Image.OPEN, "JXL")
    assert foreign_pictures_in(jxl.parent) == [jxl] and not pictures_in(jxl.parent)
    assert advice_for_foreign([jxl]).startswith("pip install 'lorasmith[jxl]'")
    assert advice_for_foreign([Path("a.heic")]) == "make them JPEG or PNG"
    assert "lorasmith[jxl]" in advice_for_foreign([jxl, Path("a.heic")]) and "others" in advice_for_foreign(
        [jxl, Path("a.heic")]
    )
    renamed = jxl.rename(jxl.with_suffix(".png"))
    with pytest.raises(UnreadablePicture, match=r"a JPEG XL picture; pip install 'lorasmith\[jxl\]'"):
        probe(renamed)


# ---- broken files, and the limit -----------------------------------------------------------------------------------


def test_the_probe_gives_size_and_hash_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    smooth().save(path)
    assert probe(path) == ((40, 24), hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def limit() -> Iterator[None]:
    before = Image.MAX_IMAGE_PIXELS
    yield
    Image.MAX_IMAGE_PIXELS = before


@pytest.mark.usefixtures("limit")
def test_the_limit_of_size_is_a_choice(tmp_path: Path) -> None:
    Image.new("L", (1100, 1000)).save(tmp_path / "a.png")
    set_pixel_limit(1)
    with pytest.raises(UnreadablePicture, match=r"a\.png: more than 1 million pixels.*--max-megapixels"):
        probe(tmp_path / "a.png")
    set_pixel_limit(2)
    assert probe(tmp_path / "a.png")[0] == (1100, 1000)


def chunk(kind: bytes, data: bytes) -> bytes:
    """A part of a PNG."""
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def bomb() -> bytes:
    """A PNG of 30 KB that would unpack to 20000 x 20000 pixels."""
    header = (20000).to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


BROKEN = {
    "empty.png": (b"", "the file is empty"),
    "zeros.png": (bytes(100), "nothing but zeros"),
    "text.jpg": (b"<html>404</html>", "not a picture.*<html>"),
    "heic.jpg": (b"\0\0\0\x18ftypheic" + bytes(20), "HEIC.*convert"),
    "bomb.png": (bomb(), "more than 179 million pixels"),
    "eps.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a picture"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_picture_is_named_with_its_reason(tmp_path: Path, name: str) -> None:
    data, reason = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UnreadablePicture, match=f"(?s){re.escape(name)}.*{reason}"):
        probe(tmp_path / name)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_cut_off_files_are_unreadable(tmp_path: Path, kind: str, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    (tmp_path / "a.png").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UnreadablePicture, match=r"a\.png"):
        probe(tmp_path / "a.png")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "GIF"]), st.data())
def test_no_damage_makes_anything_but_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    content = bytearray(encoded(smooth(), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    try:
        assert open_image(path).mode == "RGB"
    except UnreadablePicture as error:
        assert error.reason and str(path) in str(error)


def test_a_missing_file_and_a_dead_link_are_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UnreadablePicture, match="cannot be opened"):
        open_image(tmp_path / "gone.png")
    try:
        (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    except OSError:
        pytest.skip("links need a right on Windows")
    assert pictures_in(tmp_path) == [tmp_path / "link.png"]


def test_all_unreadable_pictures_are_listed_at_once(tmp_path: Path) -> None:
    smooth().save(tmp_path / "good.png")
    for name, (data, _) in BROKEN.items():
        (tmp_path / name).write_bytes(data)
    paths = pictures_in(tmp_path)
    with pytest.raises(UserError, match=r"6 of 7 pictures cannot be read.*--skip-unreadable") as caught:
        probe_all(paths, skip_unreadable=False)
    for name, (_, reason) in BROKEN.items():
        assert re.search(f"{re.escape(str(tmp_path / name))}: .*{reason}", str(caught.value))
    probed, notes = probe_all(paths, skip_unreadable=True)
    assert list(probed) == [tmp_path / "good.png"] and probed[tmp_path / "good.png"][0] == (40, 24)
    assert len(notes) == 1 and all(name in notes[0] for name in BROKEN)


def test_skipping_does_not_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="none is left"):
        probe_all([tmp_path / "a.png"], skip_unreadable=True)


def test_hidden_files_folders_and_other_files_are_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "sub.png").mkdir()
    for name in ("._a.png", "a.txt", "b.HEIC", "c.nef"):
        (tmp_path / name).touch()
    assert pictures_in(tmp_path) == []
    assert [path.name for path in foreign_pictures_in(tmp_path)] == ["b.HEIC", "c.nef"]
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"} <= extensions()
    assert not {".eps", ".pdf", ".wmf", ".mpg"} & extensions()


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(8, 150), st.integers(8, 150)), st.tuples(st.integers(8, 64), st.integers(8, 64)))
def test_prepared_as_resizing_and_then_cropping_would(size: Size, shape: Size) -> None:
    image, plan = smooth(size), cover_and_crop(size, shape)
    expected = np.asarray(image.resize(plan.resize, Image.Resampling.LANCZOS).crop(plan.crop), dtype=np.float32)
    pixels = prepare(image, plan, draws=Draws.of(random.Random(0)))
    assert pixels.shape == (3, shape[1], shape[0]) and pixels.dtype.is_floating_point
    ours = (pixels.numpy().transpose(1, 2, 0) + 1) * 127.5
    # Pillow rounds to 8 bit between its two passes, at other places when it is given the crop
    assert np.abs(ours - expected).max() <= 2.01 and np.abs(ours - expected).mean() < 0.5


def test_pixels_span_minus_one_to_one() -> None:
    image = Image.fromarray(np.array([[[0, 128, 255]] * 8] * 8, dtype=np.uint8))
    pixels = prepare(image, cover_and_crop((8, 8), (8, 8)), draws=Draws.of(random.Random(0)))
    assert pixels[:, 3, 3].tolist() == pytest.approx([-1, 128 / 127.5 - 1, 1], abs=1e-6)


def test_a_very_long_picture_needs_no_memory_for_what_is_cropped_away() -> None:
    plan = cover_and_crop((60000, 1), (64, 64))
    assert plan.resize == (3840000, 64)
    assert prepare(Image.new("RGB", (60000, 1), "red"), plan, draws=Draws.of(random.Random(0))).shape == (3, 64, 64)


def test_flip_mirrors_half_of_the_samples() -> None:
    image, plan = smooth((16, 16)), cover_and_crop((16, 16), (16, 16))
    plain = prepare(image, plan, draws=Draws.of(random.Random(0)))
    flipped = [prepare(image, plan, draws=Draws.of(random.Random(seed)), flip=True) for seed in range(200)]
    is_mirrored = [bool((pixels == plain.flip(2)).all()) for pixels in flipped]
    assert all(mirrored or (pixels == plain).all() for mirrored, pixels in zip(is_mirrored, flipped, strict=True))
    assert 70 < sum(is_mirrored) < 130


def test_random_crop_reaches_both_ends_and_shows_a_true_part() -> None:
    image, plan = smooth((64, 16)), cover_and_crop((64, 16), (16, 16))
    whole = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
    lefts = set()
    for seed in range(300):
        part = prepare(image, plan, draws=Draws.of(random.Random(seed)), random_crop=True).numpy()
        matches = [left for left in range(49) if np.allclose(whole[:, :, left : left + 16], part, atol=1e-5)]
        assert len(matches) == 1
        lefts |= set(matches)
    assert min(lefts) == 0 and max(lefts) == 48


def test_one_augmentation_does_not_change_another() -> None:
    image, plan = smooth((64, 16)), cover_and_crop((64, 16), (16, 16))
    for seed in range(20):
        cropped = prepare(image, plan, draws=Draws.of(random.Random(seed)), random_crop=True)
        both = prepare(image, plan, draws=Draws.of(random.Random(seed)), random_crop=True, flip=True)
        assert (both == cropped).all() or (both == cropped.flip(2)).all()


brightness_weights = np.array([[1 / 3, 1 / 3, 1 / 3], [0.299, 0.587, 0.114]])


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(np.uint8, (8, 8, 3), elements=st.integers(0, 255), fill=st.integers(0, 255)),
    st.integers(0, 2**32),
)
def test_colour_changes_no_pictures_mean_brightness_by_two_percent(values: np.ndarray, seed: int) -> None:
    image, plan = Image.fromarray(values), cover_and_crop((8, 8), (8, 8))
    plain = (prepare(image, plan, draws=Draws.of(random.Random(0))).double().numpy() + 1) / 2
    coloured = (prepare(image, plan, draws=Draws.of(random.Random(seed)), colour=True).double().numpy() + 1) / 2
    before, after = (brightness_weights @ pixels.mean(axis=(1, 2)) for pixels in (plain, coloured))
    assert (np.abs(after - before) <= 0.02 * before + 1e-6).all()
    assert coloured.min() >= -1e-6 and coloured.max() <= 1 + 1e-6


def test_colour_changes_a_third_of_the_samples_visibly_but_weakly() -> None:
    image, plan = smooth((32, 32)), cover_and_crop((32, 32), (32, 32))
    plain = prepare(image, plan, draws=Draws.of(random.Random(0)))
    changes = [
        float((prepare(image, plan, draws=Draws.of(random.Random(seed)), colour=True) - plain).abs().max()) / 2
        for seed in range(300)
    ]
    changed = [change for change in changes if change > 0]
    assert 70 < len(changed) < 130
    assert 0.02 < max(changed) < 0.25  # share of the full range, at the pixel that changes most


def test_white_stays_white_and_black_stays_black() -> None:
    plan = cover_and_crop((8, 8), (8, 8))
    for colour, value in (("white", 1.0), ("black", -1.0)):
        for seed in range(50):
            pixels = prepare(Image.new("RGB", (8, 8), colour), plan, draws=Draws.of(random.Random(seed)), colour=True)
            assert float((pixels - value).abs().max()) < 1e-5
