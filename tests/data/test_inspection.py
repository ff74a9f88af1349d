"""What a picture is like: copies are found, however saved; different pictures are told apart; blur is seen."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from lorasmith.data.images import UnreadablePicture, open_image
from lorasmith.data.inspection import alike, inspect, perceptual_hash, sharpness, thumbnail
from lorasmith.demo import FOLDER

DEMO = sorted((FOLDER / "pictures").glob("*/*.png"))


def scene(seed: int, size: tuple[int, int] = (240, 200)) -> Image.Image:
    """Shapes on a shaded ground, as a photograph has large and small things."""
    random = np.random.default_rng(seed)
    ground = random.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    image = Image.fromarray(ground).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(14):
        x, y = int(random.integers(0, size[0])), int(random.integers(0, size[1]))
        r = int(random.integers(6, 50))
        draw.ellipse((x - r, y - r, x + r, y + r), tuple(int(c) for c in random.integers(0, 256, 3)))
    return image


def recompressed(image: Image.Image, quality: int, kind: str = "JPEG") -> Image.Image:
    file = BytesIO()
    image.save(file, kind, quality=quality)
    return Image.open(file).convert("RGB")


def scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)


def pairs(images: list[Image.Image]) -> dict[int, int]:
    return alike([perceptual_hash(image) for image in images], [thumbnail(image) for image in images])


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "jpeg 30": lambda image: recompressed(image, 30),
    "webp 30": lambda image: recompressed(image, 30, "WEBP"),
    "half": lambda image: scaled(image, 0.5),
    "a third": lambda image: scaled(image, 1 / 3),
    "larger": lambda image: scaled(image, 2.3),
    "odd size": lambda image: image.resize((317, 259)),
    "half and jpeg 40": lambda image: recompressed(scaled(image, 0.5), 40),
    "a little brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.04),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_copy_is_found_whatever_was_done_to_it(change: Callable[[Image.Image], Image.Image]) -> None:
    originals = [scene(seed) for seed in range(12)] + [Image.open(path).convert("RGB") for path in DEMO]
    number = len(originals)
    assert pairs(originals + [change(image) for image in originals]) == {number + i: i for i in range(number)}


def test_different_pictures_are_told_apart() -> None:
    assert pairs([scene(seed) for seed in range(150)]) == {}


def test_pictures_of_one_thing_on_one_ground_are_told_apart() -> None:
    assert len(DEMO) >= 10
    assert pairs([Image.open(path).convert("RGB") for path in DEMO]) == {}


def test_the_same_shapes_in_other_colours_are_another_picture() -> None:
    image = scene(1)
    red, green, blue = image.split()
    assert pairs([image, Image.merge("RGB", (blue, red, green))]) == {}


def test_a_mirrored_picture_is_another_one() -> None:
    assert pairs([scene(2), scene(2).transpose(Image.Transpose.FLIP_LEFT_RIGHT)]) == {}


def test_pictures_without_a_pattern_are_compared_by_their_colour() -> None:
    red, dark = (Image.new("RGB", (90, 60), colour) for colour in ("red", "#200000"))
    assert pairs([red, dark, recompressed(red, 20), scaled(dark, 2)]) == {2: 0, 3: 1}


def test_of_a_chain_enough_stay_that_none_is_like_another() -> None:
    chain = [ImageEnhance.Brightness(scene(3)).enhance(1 + 0.03 * i) for i in range(12)]
    found = pairs(chain)
    assert 0 < len(found) < 11
    assert all(first not in found for first in found.values())
    kept = [image for i, image in enumerate(chain) if i not in found]
    assert pairs(kept) == {}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1100), st.integers(1, 600), st.randoms(use_true_random=False))
def test_a_search_in_blocks_equals_one_by_one(number: int, kinds: int, random: object) -> None:
    """Random patterns, many of them equal; an earlier one is compared with only if it is like none before it."""
    seed = hash(str(random)) % 1000
    rng = np.random.default_rng(seed)
    hashes, small = rng.random((kinds, 63)) > 0.5, rng.integers(0, 256, (kinds, 16, 16, 3), dtype=np.uint8)
    drawn = rng.integers(0, kinds, number)
    first: dict[int, int] = {}
    expected = {i: first[kind] for i, kind in enumerate(drawn.tolist()) if first.setdefault(kind, i) != i}
    assert alike([hashes[kind] for kind in drawn], [small[kind] for kind in drawn]) == expected


# ---- sharpness -----------------------------------------------------------------------------------------------------


def noise(size: tuple[int, int] = (512, 512)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_sharpness_falls_with_every_blur() -> None:
    image = scene(4, (512, 512))
    values = [sharpness(image.filter(ImageFilter.GaussianBlur(radius))) for radius in (0, 1, 2, 3)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 20 > values[3]


def test_sharpness_does_not_depend_on_the_pictures_size() -> None:
    large = scene(5, (2048, 2048)).filter(ImageFilter.GaussianBlur(16))
    assert sharpness(large) < 20 < sharpness(scene(5, (2048, 2048)))


def test_a_blurred_background_is_no_fault() -> None:
    image = scene(6, (512, 512)).filter(ImageFilter.GaussianBlur(10))
    assert sharpness(image) < 20
    image.paste(scene(7, (128, 128)), (256, 128))
    assert sharpness(image) > 20


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    image = noise((64, 64))
    grey = np.asarray(image.convert("L"), dtype=np.float64)
    laplacian = np.zeros_like(grey)
    for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        for y in range(64):
            for x in range(64):
                laplacian[y, x] += grey[y, x] - grey[min(max(y + dy, 0), 63), min(max(x + dx, 0), 63)]
    parts = [laplacian[y : y + 16, x : x + 16].var() for y in range(0, 64, 16) for x in range(0, 64, 16)]
    assert sharpness(image) == pytest.approx(max(parts), rel=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (700, 1), (1, 4000)])
def test_the_smallest_and_the_narrowest_pictures_are_no_trouble(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "red")
    assert sharpness(image) == 0
    assert pairs([image, image]) == {1: 0}


# ---- files ---------------------------------------------------------------------------------------------------------


def write(path: Path, image: Image.Image, kind: str, **options: object) -> Path:
    image.save(path, kind, **options)
    return path


def test_a_look_is_of_the_upright_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    path = write(tmp_path / "a.jpg", scene(8), "JPEG", exif=exif)
    look = inspect(path)
    assert look.size == open_image(path).size == (200, 240)
    assert np.array_equal(look.hash_bits, perceptual_hash(open_image(path)))
    assert look.conversions == ("turned upright",)


@pytest.mark.parametrize(
    ("mode", "kind", "conversions"),
    [
        ("RGB", "JPEG", ()), ("L", "PNG", ()), ("P", "PNG", ()), ("RGBA", "PNG", ()), ("RGB", "WEBP", ()),
        ("CMYK", "JPEG", ("CMYK to 8-bit RGB",)), ("I;16", "PNG", ("I;16 to 8-bit RGB",)),
        ("RGB", "TIFF", ("TIFF to PNG",)), ("F", "TIFF", ("TIFF to PNG", "F to 8-bit RGB")),
        ("P", "GIF", ("GIF to PNG",)),
    ],
)  # fmt: skip
def test_what_other_programs_might_stumble_over(
    tmp_path: Path, mode: str, kind: str, conversions: tuple[str, ...]
) -> None:
    image = scene(9).convert("L").convert("I").convert("I;16") if mode == "I;16" else scene(9).convert(mode)
    look = inspect(write(tmp_path / "a.picture", image, kind))
    assert look.conversions == conversions
    assert (look.num_frames, look.has_transparency) == (1, False)


def test_transparency_counts_only_where_there_is_some(tmp_path: Path) -> None:
    image = scene(10).convert("RGBA")
    assert not inspect(write(tmp_path / "a.png", image, "PNG")).has_transparency
    image.putpixel((3, 3), (0, 0, 0, 254))
    assert inspect(write(tmp_path / "b.png", image, "PNG")).has_transparency


def test_unreadable_pictures_are_told_as_everywhere(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(UnreadablePicture, match="0 bytes"):
        inspect(tmp_path / "a.jpg")
