"""Pictures as people have them, through the command: what is trained, what the plan says of it, what is refused."""

import contextlib
import io
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageCms
from safetensors.torch import load_file

from lorasmith.cli import main
from lorasmith.training_run import session
from tests.tiny import write_tiny

COMMON = [
    "--resolution", "64", "--no-before-after", "--no-tensorboard", "--no-progress", "--workers", "0", "--rank", "2",
    "--state-every-steps", "0", "--save-precision", "float", "--steps", "1", "--train", "unet",
]  # fmt: skip


class Place:
    """A model, and runs on folders of pictures."""

    def __init__(self, path: Path) -> None:
        self.path, self.base = path, write_tiny(path / "sd1.safetensors", width=8)
        self._count = 0

    def folder(self, **pictures: Image.Image) -> Path:
        """Write pictures as PNG in a new DreamBooth folder; return it."""
        self._count += 1
        folder = self.path / f"set{self._count}" / "1_sks thing"
        folder.mkdir(parents=True)
        for name, picture in pictures.items():
            picture.save(folder / f"{name}.png", icc_profile=picture.info.get("icc_profile"))
        return folder

    def run(self, folder: Path, *options: object) -> tuple[int, str, str, Path]:
        """Return exit code, what was printed, and the output folder."""
        self._count += 1
        output = self.path / f"out{self._count}"
        words = ["--base", self.base, "--images", folder, *COMMON, "--output", output, *options]
        printed, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            code = main(["train", *map(str, words)])
        return code, " ".join(printed.getvalue().split()), errors.getvalue(), output

    def learned(self, folder: Path, *options: object) -> dict[str, torch.Tensor]:
        code, _, errors, output = self.run(folder, *options)
        assert code == 0, errors
        return load_file(output / "last.safetensors")

    def plan(self, folder: Path, *options: object) -> str:
        code, printed, errors, _ = self.run(folder, "--dry-run", *options)
        assert code == 0, errors
        return printed

    def refusal(self, folder: Path, *options: object) -> str:
        code, _, errors, output = self.run(folder, *options)
        assert code == 2 and not output.exists() and "Traceback" not in errors
        return errors


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    before = Image.MAX_IMAGE_PIXELS
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SOURCE_DATE_EPOCH", "1700000000")
        patched.setattr(session, "write_report", lambda folder, contents: folder)
        yield Place(tmp_path_factory.mktemp("place"))
    Image.MAX_IMAGE_PIXELS = before


def shapes(plan: str) -> set[str]:
    """Return what the plan says that pictures are brought to."""
    return set(re.findall(r"\d+ pictures? as (\d+x\d+)", plan))


def noise(size: tuple[int, int] = (80, 64), seed: int = 0) -> Image.Image:
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3))


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("caching", ["--cache-latents", "--no-cache-latents"])
def test_transparency_is_trained_on_the_colour_of_choice(place: Place, caching: str) -> None:
    transparent = noise().convert("RGBA")
    transparent.paste((0, 0, 0, 0), (0, 0, 40, 64))
    for options, colour in (([], "white"), (["--alpha-color", "#2040ff"], "#2040ff")):
        opaque = noise()
        opaque.paste(colour, (0, 0, 40, 64))
        expected = place.learned(place.folder(a=opaque), caching)
        assert same(place.learned(place.folder(a=transparent), caching, *options), expected)


def test_an_unknown_colour_is_refused_with_those_known(place: Place) -> None:
    message = place.refusal(place.folder(a=noise()), "--alpha-color", "whitish")
    assert "'whitish' is no colour" in message and "#ff8000" in message and "white, black" in message


def test_the_alpha_color_stays_when_a_run_is_resumed(place: Place) -> None:
    folder = place.folder(a=noise())
    code, _, _, output = place.run(folder, "--steps", 2)
    assert code == 0
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        assert main(["train", "--resume", str(output), "--steps", "3", "--alpha-color", "black"]) == 2
    assert "data.alpha_color was white, now black" in errors.getvalue()


def test_the_plan_tells_of_what_is_not_plain(place: Place) -> None:
    folder = place.folder(plain=noise())
    noise().save(folder / "moving.gif", save_all=True, append_images=[noise(seed=1)])
    noise().save(folder / "odd.png", icc_profile=b"nonsense")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise().save(folder / "srgb.png", icc_profile=srgb)
    plan = place.plan(folder)
    assert "animated pictures, of which only the first frame is used (1): moving.gif" in plan
    assert "colour profile that is broken" in plan and "taken as sRGB (1): odd.png" in plan
    assert "srgb.png" not in plan


def test_a_picture_over_the_limit_is_named_with_the_way_out(place: Place) -> None:
    folder = place.folder(large=Image.new("RGB", (1100, 1000)))
    message = place.refusal(folder, "--max-megapixels", 1)
    assert "large.png: more than 1 million pixels" in message and "raise --max-megapixels" in message
    assert "1 picture" in place.plan(folder, "--max-megapixels", 2)


def test_avif_is_trained_like_png(place: Place) -> None:
    plain = noise((64, 64)).resize((4, 4)).resize((64, 64))
    folder = place.folder()
    plain.save(folder / "a.avif", quality=100, subsampling="4:4:4")
    with Image.open(folder / "a.avif") as image:
        decoded = image.convert("RGB")
    assert same(place.learned(folder), place.learned(place.folder(a=decoded)))


# ---- buckets -------------------------------------------------------------------------------------------------------

FINE = ["--buckets", "--bucket-min", 32, "--bucket-max", 128, "--bucket-step", 16]


def test_the_bucket_rule_is_a_choice_and_the_default_crops_less(place: Place) -> None:
    folder = place.folder(a=noise((100, 76)))
    default, theirs = place.plan(folder, *FINE), place.plan(folder, *FINE, "--bucket-rule", "sd-scripts")
    assert shapes(place.plan(folder, *FINE, "--bucket-rule", "less-crop")) == shapes(default)
    assert shapes(default) == {"64x48"} and shapes(theirs) == {"64x64"}

    def cropped(plan: str) -> int:
        found = re.search(r"cuts away (\d+)%", plan)
        return int(found[1]) if found else 0

    assert cropped(default) < cropped(theirs)
    assert not same(place.learned(folder, *FINE), place.learned(folder, *FINE, "--bucket-rule", "sd-scripts"))


def test_small_pictures_are_not_enlarged_when_asked(place: Place) -> None:
    folder = place.folder(small=noise((40, 33)), large=noise((300, 290)))
    assert "enlarged: small.png" in place.plan(folder, *FINE)
    own = ["--buckets", "--bucket-step", 16, "--bucket-no-upscale"]
    for rule in ("less-crop", "sd-scripts"):
        plan = place.plan(folder, *own, "--bucket-rule", rule)
        assert "enlarged" not in plan and shapes(plan) == {"32x32", {"less-crop": "64x64", "sd-scripts": "48x48"}[rule]}
    small = place.folder(small=noise((40, 33)))
    assert same(place.learned(small, *own), place.learned(small, "--resolution", "32"))


def test_a_picture_below_the_step_is_named(place: Place) -> None:
    folder = place.folder(tiny=noise((40, 9)), large=noise((80, 80)))
    message = place.refusal(folder, "--buckets", "--bucket-step", 16, "--bucket-no-upscale")
    assert "tiny.png: 40x9" in message and "large.png" not in message and "bucket_step = 16" in message


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--bucket-rule", "sd-scripts"], ["bucket_rule would change the buckets, but they are off", "add buckets"]),
        (["--bucket-no-upscale"], ["bucket_no_upscale would change the buckets, but they are off"]),
        (["--buckets", "--bucket-no-upscale", "--bucket-max", 512], ["own sizes, so bucket_max would have no effect"]),
        (["--buckets", "--bucket-rule", "best"], ["--bucket-rule best", "one of less-crop, sd-scripts"]),
        (["--buckets", "--bucket-no-upscale", "--bucket-step", 72], ["bucket_step = 72", "64x64", "lower the step"]),
    ],
)
def test_bucket_options_that_cannot_be_meant_are_refused(place: Place, options: list[object], parts: list[str]) -> None:
    message = place.refusal(place.folder(a=noise((300, 300))), *options)
    assert all(part in message for part in parts), message


# ---- faces, and what can be cached ---------------------------------------------------------------------------------


def with_face(place: Place, *, width: int = 200) -> tuple[Path, Image.Image]:
    """A folder with a picture whose name tells of a face 32 pixels wide at (150, 40), and that picture."""
    picture = noise((width, 100))
    return place.folder(girl_150_40_32_20=picture), picture


def test_a_face_crop_of_one_size_is_that_part_and_can_be_cached(place: Place) -> None:
    folder, picture = with_face(place)
    part = place.folder(a=picture.crop((118, 8, 182, 72)))  # 64 = 2 faces across: no resizing, the face in the middle
    options = ["--face-crop-aug-range", "2,2"]
    expected = place.learned(part)
    assert same(place.learned(folder, *options), expected) and not same(place.learned(folder), expected)
    assert same(place.learned(folder, *options, "--no-cache-latents"), place.learned(part, "--no-cache-latents"))
    plan = place.plan(folder, *options)
    assert "cropped around a face: 1 of 1" in plan and "latents cached; face_crop_aug_range works with that" in plan


def test_a_face_crop_of_several_sizes_varies_and_is_not_cached(place: Place) -> None:
    folder, _ = with_face(place)
    options = ["--face-crop-aug-range", "1,3"]
    plan = place.plan(folder, *options)
    assert "encoded anew for every step, since face_crop_aug_range give other pixels each time" in plan
    assert "cropped around a face, differently each time: 1 of 1" in plan
    assert not same(place.learned(folder, *options), place.learned(folder, "--no-cache-latents"))
    assert same(place.learned(folder, *options), place.learned(folder, *options, "--workers", 2))
    message = place.refusal(folder, *options, "--cache-latents")
    assert "face_crop_aug_range would change it every time" in message


def test_pictures_without_a_face_are_cropped_as_usual_but_one_must_have_one(place: Place) -> None:
    folder, _ = with_face(place)
    noise((80, 64), seed=3).save(folder / "other.png")
    assert "cropped around a face: 1 of 2" in place.plan(folder, "--face-crop-aug-range", "2,2")
    message = place.refusal(place.folder(a=noise()), "--face-crop-aug-range", "2,2")
    assert "no picture's name ends with" in message and "name_300_200_64_80.png" in message and "a.png" in message


@pytest.mark.parametrize("value", ["2", "4,2", "0,1", "a,b", "1,2,3"])
def test_a_range_is_two_numbers_in_order(place: Place, value: str) -> None:
    message = place.refusal(with_face(place)[0], "--face-crop-aug-range", value)
    assert "--face-crop-aug-range" in message and "two numbers above 0, the smaller first" in message


def test_the_plan_says_what_keeps_latents_from_being_cached(place: Place) -> None:
    folder = place.folder(a=noise())
    assert "since color and random_crop give other pixels" in place.plan(folder, "--color", "--random-crop")
    assert "since cache_latents is off" in place.plan(folder, "--no-cache-latents")
    assert "latents cached cache" in place.plan(folder)
