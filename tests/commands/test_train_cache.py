"""The cache folder through `lorasmith train`: what is found in it, what never is, and that no byte depends on it.

What is encoded is counted where it happens, so no test looks at a clock.
"""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorasmith import cache_folder, file_facts
from lorasmith.cli import main
from lorasmith.data import images
from lorasmith.data.dataset import Batch, Dataset
from lorasmith.models.sd import StableDiffusion
from lorasmith.training_run import session
from tests.commands.test_train_processes import run_two
from tests.tiny import write_tiny

COMMON = [
    "--resolution", "64", "--no-before-after", "--no-tensorboard", "--no-progress", "--workers", "0", "--rank", "2",
    "--state-every-steps", "0", "--save-precision", "float", "--steps", "2", "--train", "unet", "--device", "cpu",
]  # fmt: skip


def picture(path: Path, seed: int, size: tuple[int, int] = (80, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random.Random(seed).randbytes(size[0] * size[1] * 3)
    Image.frombytes("RGB", size, pixels).save(path, compress_level=0)  # so that all are of the same length
    return path


@dataclass
class Encoded:
    """How many pictures and captions were encoded."""

    pictures: int = 0
    captions: int = 0


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Encoded:
    counts, image, text = Encoded(), StableDiffusion.encode_image, StableDiffusion.encode_text

    def encode_image(self: StableDiffusion, pixels: Any) -> Any:
        counts.pictures += len(pixels)
        return image(self, pixels)

    def encode_text(self: StableDiffusion, captions: list[str]) -> Any:
        counts.captions += len(captions)
        return text(self, captions)

    monkeypatch.setattr(StableDiffusion, "encode_image", encode_image)
    monkeypatch.setattr(StableDiffusion, "encode_text", encode_text)
    return counts


class Place:
    """A model, two pictures with captions, a cache that knows both, and runs on them."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self.base = write_tiny(path / "sd1.safetensors", width=8)
        self.vae = write_tiny(path / "other.safetensors", width=8, seed=1)
        self.photos, self.warm = path / "photos", path / "warm"
        for number, name in enumerate(("a_50_32_20_20", "b_30_20_16_16")):
            picture(self.photos / f"{name}.png", number)
            (self.photos / f"{name}.txt").write_text(f"{'a cat' if number else 'a dog'}, on a sofa")
        self.bytes = self.run(self.photos, self.warm)

    def run(self, photos: Path, cache: Path | None, *options: object) -> bytes:
        """Train, and return the LoRA."""
        output = self.output()
        cached = ["--no-disk-cache"] if cache is None else ["--cache-dir", cache]
        words = ["--base", self.base, "--images", photos, *COMMON, "--output", output, *cached, *options]
        assert main(["train", *map(str, words)]) == 0
        return (output / "last.safetensors").read_bytes()

    def output(self) -> Path:
        self.count += 1
        return self.path / f"out{self.count}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SOURCE_DATE_EPOCH", "1700000000")
        patched.setattr(session, "write_report", lambda folder, contents: folder)
        yield Place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def cache(place: Place, tmp_path: Path) -> Path:
    """A copy of the cache that knows both pictures and captions."""
    return Path(shutil.copytree(place.warm, tmp_path / "cache"))


@pytest.fixture
def photos(place: Place, tmp_path: Path) -> Path:
    """A copy of the pictures, elsewhere."""
    return Path(shutil.copytree(place.photos, tmp_path / "moved"))


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock goes ahead, so that files that were just made are not young."""
    now = time.time_ns
    monkeypatch.setattr(file_facts.time, "time_ns", lambda: now() + 10**10)


# ---- what decides an entry -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "pictures", "captions"),
    [
        # nothing that an entry is made from
        (
            [
                "--learning-rate",
                "0.5",
                "--rank",
                "3",
                "--seed",
                "7",
                "--batch-size",
                "2",
                "--workers",
                "2",
                "--repeats",
                "3",
                "--gradient-checkpointing",
                "--weight-decay",
                "0",
                "--max-megapixels",
                "7",
            ],
            0,
            0,
        ),
        # of pictures
        (["--vae", "OTHER"], 2, 0),
        (["--resolution", "72"], 2, 0),
        (["--buckets", "--bucket-min", "8", "--bucket-step", "8"], 2, 0),
        (["--face-crop-aug-range", "2,2"], 2, 0),
        (["--alpha-color", "black"], 2, 0),
        (["--flip"], 2, 0),  # the mirrored ones; the others are there
        # of captions
        (["--precision", "bf16"], 0, 2),
        (["--clip-skip", "2"], 0, 2),
        (["--max-token-length", "150"], 0, 2),
        (["--weighted-captions"], 0, 2),
        (["--attention", "plain"], 0, 2),
        (["--caption-prefix", "photo:"], 0, 2),
        # of both
        (["--base", "OTHER"], 2, 2),
    ],
)
def test_an_option_costs_what_it_makes_anew_and_nothing_else(
    place: Place, cache: Path, encoded: Encoded, options: list[str], pictures: int, captions: int
) -> None:
    options = [str(place.vae) if word == "OTHER" else word for word in options]
    place.run(place.photos, cache, *options)
    assert encoded == Encoded(pictures, captions)


@pytest.mark.parametrize("options", [["--flip", "--steps", "3"], ["--precision", "bf16", "--batch-size", "2"]])
def test_with_a_cold_cache_a_warm_one_and_none_the_bytes_are_the_same(
    place: Place, tmp_path: Path, encoded: Encoded, options: list[str]
) -> None:
    cold = place.run(place.photos, tmp_path / "cache", *options)
    counts = Encoded(encoded.pictures, encoded.captions)
    assert cold == place.run(place.photos, tmp_path / "cache", *options)
    assert encoded == counts
    assert cold == place.run(place.photos, None, *options)


def test_the_weights_decide_not_the_name_of_the_file(
    place: Place, cache: Path, encoded: Encoded, tmp_path: Path
) -> None:
    base = tmp_path / "renamed.safetensors"
    shutil.copy(place.base, base)
    place.run(place.photos, cache, "--base", base)
    assert encoded == Encoded(0, 0)
    stat = base.stat()
    shutil.copy(place.vae, base)
    os.utime(base, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    place.run(place.photos, cache, "--base", base)
    assert encoded == Encoded(2, 2)


@pytest.mark.usefixtures("later")
def test_an_edited_picture_is_encoded_again_though_size_and_time_are_the_old_ones(
    place: Place, cache: Path, photos: Path, encoded: Encoded
) -> None:
    place.run(photos, cache)  # facts of the moved pictures are kept now
    assert encoded == Encoded(0, 0)
    file = photos / "a_50_32_20_20.png"
    before = file.stat()
    picture(file, seed=9)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    edited = place.run(photos, cache)
    assert encoded == Encoded(1, 0)
    assert edited == place.run(photos, None) != place.bytes


def test_moved_renamed_and_copied_pictures_are_found(place: Place, cache: Path, photos: Path, encoded: Encoded) -> None:
    for old, new in {"a_50_32_20_20": "z", "b_30_20_16_16": "y"}.items():
        for suffix in (".png", ".txt"):
            (photos / f"{old}{suffix}").rename(photos / f"{new}{suffix}")
    for suffix in (".png", ".txt"):
        shutil.copy(photos / f"z{suffix}", photos / f"copy{suffix}")
    place.run(photos, cache, "--steps", 3)
    assert encoded == Encoded(0, 0)


def test_an_edited_caption_alone_is_encoded_again(place: Place, cache: Path, photos: Path, encoded: Encoded) -> None:
    (photos / "a_50_32_20_20.txt").write_text("a fish, on a sofa")
    place.run(photos, cache)
    assert encoded == Encoded(0, 1)


def test_captions_that_vary_stay_out_of_the_cache(place: Place, cache: Path, encoded: Encoded) -> None:
    before = sorted((cache / "text").rglob("*.safetensors"))
    place.run(place.photos, cache, "--shuffle-caption", "--tag-dropout", "0.3")
    assert encoded.captions == 2 and sorted((cache / "text").rglob("*.safetensors")) == before


def test_a_trained_text_encoder_leaves_no_text_in_the_cache(place: Place, tmp_path: Path) -> None:
    place.run(place.photos, tmp_path / "cache", "--train", "both")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        "facts", "latents", "lorasmith-cache.json",
    ]  # fmt: skip


def test_held_out_pictures_and_dropped_captions_are_cached_too(place: Place, tmp_path: Path, encoded: Encoded) -> None:
    options = ["--validation-split", "0.5", "--caption-dropout", "0.9"]
    first = place.run(place.photos, tmp_path / "cache", *options)
    assert encoded.pictures == 2 and encoded.captions > 0
    counts = Encoded(encoded.pictures, encoded.captions)
    assert place.run(place.photos, tmp_path / "cache", *options) == first
    assert encoded == counts


# ---- the plan ------------------------------------------------------------------------------------------------------


def plan(place: Place, capsys: pytest.CaptureFixture[str], photos: Path, *options: object) -> str:
    words = ["--base", place.base, "--images", photos, *COMMON, "--output", place.output(), "--dry-run", *options]
    capsys.readouterr()
    assert main(["train", *map(str, words)]) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("later")
def test_the_plan_says_where_how_much_is_there_and_how_much_comes(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--cache-dir", tmp_path / "cache"]
    text = plan(place, capsys, place.photos, *where)
    assert f"cache {tmp_path / 'cache'} latents: not looked for yet" in text and "at most 4.1 kB" in text
    place.run(place.photos, tmp_path / "cache")
    text = plan(place, capsys, place.photos, *where)
    assert "latents: 2 of 2 are there text embeddings: 2 of 2 are there steps" in text
    text = plan(place, capsys, place.photos, *where, "--flip", "--caption-prefix", "my")
    assert "latents: 2 of 4 are there, 4.1 kB to add text embeddings: 0 of 2 are there, 14.8 kB to add" in text
    text = plan(place, capsys, place.photos, *where, "--no-cache-latents", "--train", "both")
    assert "latents:" not in text and "text embeddings" not in text
    text = plan(place, capsys, place.photos, "--no-disk-cache")
    assert "latents cached cache none: what is encoded stays in memory steps" in text


def test_the_bytes_that_the_plan_names_are_those_that_come(place: Place, tmp_path: Path) -> None:
    place.run(place.photos, tmp_path / "cache")
    for kind, size in (("latents", 2 * 2 * 4 * 8 * 8 * 4), ("text", 2 * 77 * 24 * 4)):
        (segment,) = (tmp_path / "cache" / kind).rglob("*.safetensors")
        header = int.from_bytes(segment.read_bytes()[:8], "little") + 8
        assert segment.stat().st_size - header == size


# ---- facts of pictures ---------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the pictures that were decoded."""
    names: list[str] = []
    decode: Callable[..., Any] = images._decode
    monkeypatch.setattr(
        images, "_decode", lambda path, *more, **options: (names.append(path.name), decode(path, *more, **options))[1]
    )
    return names


@pytest.mark.usefixtures("later")
def test_pictures_that_did_not_change_are_not_decoded_again_and_the_plan_is_the_same(
    place: Place, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], decoded: list[str]
) -> None:
    where = ["--cache-dir", tmp_path / "cache"]
    Image.new("RGB", (1200, 1000)).save(photos / "large.gif", save_all=True, append_images=[Image.new("L", (9, 9))])
    (photos / "large.txt").write_text("an animation")
    first = plan(place, capsys, photos, *where)
    assert sorted(decoded) == ["a_50_32_20_20.png", "b_30_20_16_16.png", "large.gif"]
    decoded.clear()
    assert plan(place, capsys, photos, *where).partition("out")[0] == first.partition("out")[0]
    assert decoded == []
    picture(photos / "b_30_20_16_16.png", seed=5, size=(96, 64))
    plan(place, capsys, photos, *where)
    assert decoded == ["b_30_20_16_16.png"]
    plan(place, capsys, photos, "--no-disk-cache")
    assert len(decoded) == 4
    assert main(["train", "--base", str(place.base), "--images", str(photos), *COMMON, "--output",
                 str(place.output()), *map(str, where), "--max-megapixels", "1"]) == 2  # fmt: skip
    assert "large.gif: more than 1 million pixels" in capsys.readouterr().err


@pytest.mark.usefixtures("later")
def test_a_picture_that_was_broken_is_looked_at_again(
    place: Place, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (photos / "a_50_32_20_20.png").read_bytes()
    (photos / "a_50_32_20_20.png").write_bytes(whole[:3000])
    where = ["--cache-dir", tmp_path / "cache", "--skip-unreadable"]
    for _ in range(2):
        assert "left out because they cannot be read (1 of 2)" in plan(place, capsys, photos, *where)
    (photos / "a_50_32_20_20.png").write_bytes(whole)
    assert "left out" not in plan(place, capsys, photos, *where)


# ---- trouble -------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_used_is_told_of_and_the_run_goes_on(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert place.run(place.photos, tmp_path / "file" / "cache") == place.bytes
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and "cannot be used" in errors[0] and "going on in memory" in errors[0]


def test_a_folder_with_other_things_is_refused(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").touch()
    words = ["--base", place.base, "--images", place.photos, *COMMON, "--output", place.output()]
    assert main(["train", *map(str, words), "--cache-dir", str(tmp_path)]) == 2
    assert "holds other things (notes.txt)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_full_disk_is_told_of_and_costs_no_work(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], encoded: Encoded
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_folder, "write_safetensors", full)
    monkeypatch.setattr(file_facts, "atomic_file", full)
    assert place.run(place.photos, tmp_path / "cache") == place.bytes
    assert encoded == Encoded(2, 2)
    errors = capsys.readouterr().err.splitlines()
    told = f"cache: {tmp_path / 'cache'} cannot be written to (No space left on device); going on in memory"
    assert errors == [told]


@pytest.mark.parametrize("damage", ["cut", "bit"])
def test_a_damaged_segment_is_told_of_in_one_line_and_filled_again(
    place: Place, cache: Path, capsys: pytest.CaptureFixture[str], encoded: Encoded, damage: str
) -> None:
    (segment,) = (cache / "latents").rglob("*.safetensors")
    data = segment.read_bytes()
    segment.write_bytes(data[:-7] if damage == "cut" else data[:-7] + bytes([data[-7] ^ 32]) + data[-6:])
    assert place.run(place.photos, cache) == place.bytes
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and "damaged" in errors[0] and "made anew" in errors[0]
    assert encoded == Encoded(2 if damage == "cut" else 1, 0)
    assert place.run(place.photos, cache) == place.bytes
    assert capsys.readouterr().err == ""
    assert encoded == Encoded(2 if damage == "cut" else 1, 0)


def test_pruning_while_a_run_reads_does_not_break_it(
    place: Place, cache: Path, monkeypatch: pytest.MonkeyPatch, encoded: Encoded
) -> None:
    read = Dataset.batch

    def batch(self: Dataset, step: int, process_index: int) -> list[Batch]:
        if step == 1:
            assert main(["cache", "prune", "--all", "--cache-dir", str(cache)]) == 0
        return read(self, step, process_index)

    monkeypatch.setattr(Dataset, "batch", batch)
    assert place.run(place.photos, cache) == place.bytes
    assert encoded == Encoded(1, 1)  # what the second step needs


_KILLED = """
import os, signal, sys
from lorasmith import cache_folder
from lorasmith.cli import main
from lorasmith.models.sd import StableDiffusion
cache_folder._MOST_BYTES = 1  # each picture is written at once
encode, number = StableDiffusion.encode_image, iter(range(9))
def encode_image(self, pixels):
    if next(number) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, pixels)
StableDiffusion.encode_image = encode_image
main(sys.argv[1:])
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_run_leaves_what_it_had_written(place: Place, photos: Path, tmp_path: Path, encoded: Encoded) -> None:
    for number in range(3):
        picture(photos / f"{number}.png", seed=10 + number)
        (photos / f"{number}.txt").write_text("a cat")
    words = ["train", "--base", place.base, "--images", photos, *COMMON, "--output", place.output()]
    words += ["--cache-dir", tmp_path / "cache"]
    ended = subprocess.run([sys.executable, "-c", _KILLED, *map(str, words)], capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    again = place.run(photos, tmp_path / "cache")
    assert encoded.pictures == 2  # of five, three were there
    assert again == place.run(photos, None)


# ---- several processes ---------------------------------------------------------------------------------------------


def five(tmp_path: Path) -> Path:
    for number in range(5):
        picture(tmp_path / "1_a cat" / f"{number}.png", seed=number)
    return tmp_path / "1_a cat"


def two_processes(place: Place, photos: Path, tmp_path: Path, *options: object, folders: Any = None) -> list[str]:
    words = ["--base", place.base, "--images", photos, *COMMON, "--progress", "--output", tmp_path / "out",
             "--overwrite", *options]  # fmt: skip
    more = {} if folders is None else {"folders": folders}
    ended = run_two(["train", *map(str, words)], tmp_path / "logs", **more)
    assert ended.codes == [0, 0], ended.errors
    return [line for line in ended.outputs[0].splitlines() if line.startswith("caching latents")]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no fork")
def test_two_processes_fill_one_cache_and_both_find_all(place: Place, tmp_path: Path, encoded: Encoded) -> None:
    photos, cache = five(tmp_path), tmp_path / "cache"
    assert two_processes(place, photos, tmp_path, "--no-disk-cache") == ["caching latents: 3 to do"]
    expected = (tmp_path / "out" / "last.safetensors").read_bytes()
    assert two_processes(place, photos, tmp_path, "--cache-dir", cache) == ["caching latents: 3 to do"]
    assert (tmp_path / "out" / "last.safetensors").read_bytes() == expected
    assert two_processes(place, photos, tmp_path, "--cache-dir", cache) == []
    assert (tmp_path / "out" / "last.safetensors").read_bytes() == expected
    place.run(photos, cache)
    assert encoded.pictures == 0


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no fork")
def test_machines_without_a_common_folder_give_each_other_what_they_miss(
    place: Place, tmp_path: Path, encoded: Encoded
) -> None:
    photos, folders = five(tmp_path), (tmp_path / "here", tmp_path / "there")
    for folder in folders:
        folder.mkdir()
    options = ["--cache-dir", "cache"]
    assert two_processes(place, photos, tmp_path, *options, folders=folders) == ["caching latents: 3 to do"]
    first = (tmp_path / "out" / "last.safetensors").read_bytes()
    assert two_processes(place, photos, tmp_path, *options, folders=folders) == []
    assert (tmp_path / "out" / "last.safetensors").read_bytes() == first
    two_processes(place, photos, tmp_path, "--no-disk-cache")
    assert (tmp_path / "out" / "last.safetensors").read_bytes() == first
    place.run(photos, folders[1] / "cache")
    assert encoded.pictures == 3  # it had made two of the five itself


def test_a_resumed_run_may_have_another_cache_or_none(place: Place, cache: Path, tmp_path: Path) -> None:
    output = place.output()
    words = ["--base", place.base, "--images", place.photos, *COMMON, "--output", output, "--cache-dir", cache]
    assert main(["train", *map(str, words), "--steps", "1"]) == 0
    resumed = ["train", "--resume", str(output), "--steps", "2"]
    assert main([*resumed, "--cache-dir", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "latents").is_dir()
    assert (output / "last.safetensors").read_bytes() == place.bytes


def test_a_place_for_the_cache_and_no_cache_cannot_both_be_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--cache-dir", str(tmp_path), "--no-disk-cache"]) == 2
    assert "cache_dir says where the cache folder is, but disk_cache is off" in capsys.readouterr().err
