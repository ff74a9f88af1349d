"""Pictures: every mode people have, broken files, and what becomes of the pixels."""

import hashlib
import random
import re
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageOps

from lorasmith.data.buckets import cover_and_crop
from lorasmith.data.images import (
    UnreadablePicture,
    extensions,
    foreign_pictures_in,
    open_image,
    pictures_in,
    prepare,
    probe,
    probe_all,
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
def test_turned_upright_by_exif(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    smooth().save(path, exif=exif)
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert difference(open_image(path), expected) == 0
    assert probe(path)[0] == expected.size == ((40, 24) if orientation < 5 else (24, 40))


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


@pytest.mark.parametrize("largest", [1.0, 255.0])
def test_floating_point_grey_is_scaled_to_eight(tmp_path: Path, largest: float) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = tmp_path / "a.tif"
    Image.fromarray((grey / 255 * largest).astype(np.float32)).save(path)
    assert (np.asarray(open_image(path)) == grey[..., None]).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    image = smooth().convert(mode)
    path = tmp_path / "a.tif"
    image.save(path)
    assert difference(open_image(path), image.convert("RGB")) == 0


def test_the_probe_gives_size_and_hash_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    smooth().save(path)
    assert probe(path) == ((40, 24), hashlib.sha256(path.read_bytes()).hexdigest())


def bomb() -> bytes:
    """A PNG of 30 KB that would unpack to 20000 x 20000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

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
    pixels = prepare(image, plan, rng=random.Random(0))
    assert pixels.shape == (3, shape[1], shape[0]) and pixels.dtype.is_floating_point
    ours = (pixels.numpy().transpose(1, 2, 0) + 1) * 127.5
    # Pillow rounds to 8 bit between its two passes, at other places when it is given the crop
    assert np.abs(ours - expected).max() <= 2.01 and np.abs(ours - expected).mean() < 0.5


def test_pixels_span_minus_one_to_one() -> None:
    image = Image.fromarray(np.array([[[0, 128, 255]] * 8] * 8, dtype=np.uint8))
    pixels = prepare(image, cover_and_crop((8, 8), (8, 8)), rng=random.Random(0))
    assert pixels[:, 3, 3].tolist() == pytest.approx([-1, 128 / 127.5 - 1, 1], abs=1e-6)


def test_a_very_long_picture_needs_no_memory_for_what_is_cropped_away() -> None:
    plan = cover_and_crop((60000, 1), (64, 64))
    assert plan.resize == (3840000, 64)
    assert prepare(Image.new("RGB", (60000, 1), "red"), plan, rng=random.Random(0)).shape == (3, 64, 64)


def test_flip_mirrors_half_of_the_samples() -> None:
    image, plan = smooth((16, 16)), cover_and_crop((16, 16), (16, 16))
    plain = prepare(image, plan, rng=random.Random(0))
    flipped = [prepare(image, plan, rng=random.Random(seed), flip=True) for seed in range(200)]
    is_mirrored = [bool((pixels == plain.flip(2)).all()) for pixels in flipped]
    assert all(mirrored or (pixels == plain).all() for mirrored, pixels in zip(is_mirrored, flipped, strict=True))
    assert 70 < sum(is_mirrored) < 130


def test_random_crop_reaches_both_ends_and_shows_a_true_part() -> None:
    image, plan = smooth((64, 16)), cover_and_crop((64, 16), (16, 16))
    whole = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
    lefts = set()
    for seed in range(300):
        part = prepare(image, plan, rng=random.Random(seed), random_crop=True).numpy()
        matches = [left for left in range(49) if np.allclose(whole[:, :, left : left + 16], part, atol=1e-5)]
        assert len(matches) == 1
        lefts |= set(matches)
    assert min(lefts) == 0 and max(lefts) == 48


def test_one_augmentation_does_not_change_another() -> None:
    image, plan = smooth((64, 16)), cover_and_crop((64, 16), (16, 16))
    for seed in range(20):
        cropped = prepare(image, plan, rng=random.Random(seed), random_crop=True)
        both = prepare(image, plan, rng=random.Random(seed), random_crop=True, flip=True)
        assert (both == cropped).all() or (both == cropped.flip(2)).all()


brightness_weights = np.array([[1 / 3, 1 / 3, 1 / 3], [0.299, 0.587, 0.114]])


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(np.uint8, (8, 8, 3), elements=st.integers(0, 255), fill=st.integers(0, 255)),
    st.integers(0, 2**32),
)
def test_colour_changes_no_pictures_mean_brightness_by_two_percent(values: np.ndarray, seed: int) -> None:
    image, plan = Image.fromarray(values), cover_and_crop((8, 8), (8, 8))
    plain = (prepare(image, plan, rng=random.Random(0)).double().numpy() + 1) / 2
    coloured = (prepare(image, plan, rng=random.Random(seed), colour=True).double().numpy() + 1) / 2
    before, after = (brightness_weights @ pixels.mean(axis=(1, 2)) for pixels in (plain, coloured))
    assert (np.abs(after - before) <= 0.02 * before + 1e-6).all()
    assert coloured.min() >= -1e-6 and coloured.max() <= 1 + 1e-6


def test_colour_changes_a_third_of_the_samples_visibly_but_weakly() -> None:
    image, plan = smooth((32, 32)), cover_and_crop((32, 32), (32, 32))
    plain = prepare(image, plan, rng=random.Random(0))
    changes = [
        float((prepare(image, plan, rng=random.Random(seed), colour=True) - plain).abs().max()) / 2
        for seed in range(300)
    ]
    changed = [change for change in changes if change > 0]
    assert 70 < len(changed) < 130
    assert 0.02 < max(changed) < 0.25  # share of the full range, at the pixel that changes most


def test_white_stays_white_and_black_stays_black() -> None:
    plan = cover_and_crop((8, 8), (8, 8))
    for colour, value in (("white", 1.0), ("black", -1.0)):
        for seed in range(50):
            pixels = prepare(Image.new("RGB", (8, 8), colour), plan, rng=random.Random(seed), colour=True)
            assert float((pixels - value).abs().max()) < 1e-5
