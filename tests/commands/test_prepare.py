"""`lorasmith prepare` through the command: what it encodes is what training needs, once, on any number of machines.

What is encoded is counted where it happens, so no test looks at a clock.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasmith import cache_folder, model_families
from lorasmith.checkpoint import open_checkpoint
from lorasmith.cli import main
from lorasmith.commands import prepare
from lorasmith.models.sd import StableDiffusion
from lorasmith.training_run import session
from tests.tiny import write_tiny

SIZES = [(80, 64), (64, 96), (70, 70), (130, 66), (66, 120)]
TRAINING = [
    "--no-before-after", "--no-tensorboard", "--no-progress", "--workers", "0", "--rank", "2", "--train", "unet",
    "--state-every-steps", "0", "--save-precision", "float", "--steps", "3",
]  # fmt: skip
AS_TRAINED = ["--resolution", "64", "--device", "cpu"]


def picture(path: Path, seed: int, size: tuple[int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = "RGBA" if seed % 2 else "RGB"
    Image.frombytes(mode, size, random.Random(seed).randbytes(size[0] * size[1] * len(mode))).save(path)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SOURCE_DATE_EPOCH", "1700000000")
        patched.setattr(session, "write_report", lambda folder, contents: folder)
        yield write_tiny(tmp_path_factory.mktemp("models") / "sd1.safetensors", width=8)


@pytest.fixture(scope="module")
def vae(base: Path) -> Path:
    return write_tiny(base.parent / "other.safetensors", width=8, seed=1)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number, size in enumerate(SIZES):
        picture(tmp_path / "photos" / f"{number}.png", number, size).with_suffix(".txt").write_text("a cat")
    return tmp_path / "photos"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the VAE was given, in order."""
    given: list[Tensor] = []
    encode_image = StableDiffusion.encode_image

    def counted(self: StableDiffusion, pixels: Tensor) -> tuple[Tensor, Tensor]:
        given.append(pixels)
        return encode_image(self, pixels)

    monkeypatch.setattr(StableDiffusion, "encode_image", counted)
    return given


def run(folder: Path, base: Path, *options: object) -> int:
    return main(["prepare", *map(str, [folder, "--base", base, *AS_TRAINED, *options])])


def train_lora(folder: Path, base: Path, output: Path, *options: object) -> bytes:
    words = ["--base", base, "--images", folder, *AS_TRAINED, *TRAINING, "--output", output, *options]
    assert main(["train", *map(str, words)]) == 0
    return (output / "last.safetensors").read_bytes()


def found(folder: Path, base: Path, capsys: pytest.CaptureFixture[str], *options: object) -> str:
    """What the plan of a training run says of its latents in the cache."""
    words = ["--base", base, "--images", folder, *AS_TRAINED, *TRAINING, "--output", folder.parent / "out", *options]
    capsys.readouterr()
    assert main(["train", *map(str, words), "--dry-run"]) == 0
    return next(line.strip() for line in capsys.readouterr().out.splitlines() if "latents:" in line)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.npz"))}


# ---- into the cache ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--buckets", "--bucket-min", "32", "--bucket-max", "128", "--bucket-step", "16", "--flip"),
        pytest.param(
            ("--buckets", "--bucket-step", "8", "--bucket-rule", "sd-scripts", "--bucket-no-upscale"),
            marks=pytest.mark.slow,
        ),
        pytest.param(("--alpha-color", "red", "--vae"), marks=pytest.mark.slow),
    ],
)
def test_training_after_it_encodes_nothing_and_gives_the_same_bytes(
    photos: Path, base: Path, vae: Path, tmp_path: Path, encoded: list[Tensor], options: tuple[str, ...]
) -> None:
    own = [*options, vae] if "--vae" in options else options
    expected = train_lora(photos, base, tmp_path / "without", *own, "--no-disk-cache")
    encoded.clear()
    assert run(photos, base, *own) == 0
    assert len(encoded) == len(SIZES) * (2 if "--flip" in options else 1) and all(len(one) == 1 for one in encoded)
    encoded.clear()
    assert train_lora(photos, base, tmp_path / "with", *own) == expected
    assert encoded == []


def test_it_takes_the_pictures_that_training_takes(
    base: Path, tmp_path: Path, encoded: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    parent = tmp_path / "parent"
    for number, name in enumerate(("2_sks cat/a.png", "1_cat/b.png", "loose.png", "other/c.png", "2_sks cat/in/d.png")):
        picture(parent / name, number, (64, 64))
    (parent / "1_cat" / "e.heic").write_bytes(b"x")
    assert run(parent, base) == 0
    assert len(encoded) == 2 and "e.heic" in capsys.readouterr().out
    assert found(parent, base, capsys) == "latents: 2 of 2 are there"
    assert run(parent, base, "--recursive") == 0
    assert len(encoded) == 5
    assert found(parent, base, capsys, "--recursive", "--caption", "cat") == "latents: 5 of 5 are there"


def test_a_metadata_file_says_which_pictures(
    photos: Path, base: Path, tmp_path: Path, encoded: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "meta.json").write_text(json.dumps({"0": {"tags": "cat"}, "3": {"tags": "dog"}}))
    assert run(photos, base, "--captions", tmp_path / "meta.json") == 0
    assert len(encoded) == 2
    assert found(photos, base, capsys, "--captions", tmp_path / "meta.json") == "latents: 2 of 2 are there"


def test_what_is_there_is_not_done_again_and_no_model_is_loaded(
    photos: Path, base: Path, encoded: list[Tensor], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(photos, base) == 0
    assert "5 pictures encoded, 10.2 kB into the cache folder" in capsys.readouterr().out
    picture(photos / "new.png", 9, (64, 64))
    assert run(photos, base) == 0
    assert "1 pictures encoded" in (out := capsys.readouterr().out) and "; 5 had theirs already" in out
    assert len(encoded) == 6
    monkeypatch.setattr(model_families, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    assert run(photos, base) == 0
    assert "0 pictures encoded" in (out := capsys.readouterr().out) and "; 6 had theirs already" in out


def test_copies_of_a_picture_are_encoded_once(photos: Path, base: Path, encoded: list[Tensor]) -> None:
    shutil.copy(photos / "0.png", photos / "copy.png")
    assert run(photos, base) == 0
    assert len(encoded) == len(SIZES)


@pytest.mark.parametrize("is_launched", [False, True])
def test_parts_make_the_whole_and_no_picture_twice(
    photos: Path,
    base: Path,
    encoded: list[Tensor],
    capsys: pytest.CaptureFixture[str],
    is_launched: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for index in range(3):
        if is_launched:
            monkeypatch.setenv("RANK", str(index))
            monkeypatch.setenv("WORLD_SIZE", "3")
        assert run(photos, base, *([] if is_launched else ["--shard", f"{index + 1}/3"])) == 0
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert len(encoded) == len(SIZES)
    assert found(photos, base, capsys) == "latents: 5 of 5 are there"


def test_a_part_without_pictures_is_no_mistake(photos: Path, base: Path, encoded: list[Tensor]) -> None:
    assert run(photos, base, "--shard", "6/6") == 0 and encoded == []


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
@pytest.mark.parametrize(
    "options", [(), pytest.param(("--npz", "--flip", "--npz-form", "2022"), marks=pytest.mark.slow)]
)
def test_a_killed_start_leaves_whole_files_and_the_next_goes_on(
    photos: Path, base: Path, encoded: list[Tensor], capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    words = ["prepare", photos, "--base", base, *AS_TRAINED, *options]
    ended = subprocess.run([sys.executable, "-c", _KILLED, *map(str, words)], capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    written = files(photos)
    assert len(written) == (2 if options else 0)
    assert run(photos, base, *options) == 0
    assert len(encoded) == (8 if options else 2)  # two images of each picture; or of five, three were there
    assert files(photos).items() >= written.items()
    if not options:
        assert found(photos, base, capsys) == "latents: 5 of 5 are there"


def test_ctrl_c_ends_after_the_picture_and_the_same_command_goes_on(
    photos: Path, base: Path, encoded: list[Tensor], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_image = StableDiffusion.encode_image

    def interrupted(self: StableDiffusion, pixels: Tensor) -> tuple[Tensor, Tensor]:
        if len(encoded) == 1:
            signal.raise_signal(signal.SIGINT)
        return encode_image(self, pixels)

    monkeypatch.setattr(StableDiffusion, "encode_image", interrupted)
    assert run(photos, base) == 130
    assert "2 pictures encoded" in (out := capsys.readouterr().out) and "the same command goes on from here" in out
    assert run(photos, base) == 0
    assert len(encoded) == len(SIZES)


def test_pictures_that_cannot_be_read_are_listed_and_the_others_done(
    photos: Path, base: Path, encoded: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "broken.jpg").write_bytes((photos / "0.png").read_bytes()[:200])
    (photos / "empty.png").touch()
    assert run(photos, base) == 1
    out = capsys.readouterr().out
    assert "left out because of what is said of each: 2" in out and len(encoded) == len(SIZES)
    assert f"{photos / 'broken.jpg'}: damaged or cut off" in out and f"{photos / 'empty.png'}: the file is empty" in out
    assert run(photos, base, "--max-megapixels", "1", "--npz") == 1
    assert len(files(photos)) == len(SIZES)


def test_a_picture_that_is_changed_meanwhile_is_not_taken_for_the_older_one(
    photos: Path,
    base: Path,
    tmp_path: Path,
    encoded: list[Tensor],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = train_lora(photos, base, tmp_path / "without", "--no-disk-cache")
    before = shutil.copytree(photos, tmp_path / "before" / "photos")
    probe = prepare.probe_readable

    def probe_and_change(paths: Any) -> Any:
        found = probe(paths)
        shutil.copy(picture(tmp_path / "changed.png", 10, SIZES[0]), photos / "0.png")
        (photos / "2.png").unlink()
        return found

    monkeypatch.setattr(prepare, "probe_readable", probe_and_change)
    assert run(photos, base) == 1
    out = capsys.readouterr().out
    assert f"{photos / '0.png'}: it was changed while this command ran" in out
    assert f"{photos / '2.png'}: the file cannot be opened any more" in out
    encoded.clear()
    assert train_lora(before, base, tmp_path / "with") == expected
    assert len(encoded) == 2


# ---- into .npz files -----------------------------------------------------------------------------------------------


def moments(encoded: list[Tensor], base: Path) -> list[tuple[Tensor, Tensor]]:
    """What the VAE says of what it was given, unscaled."""
    with open_checkpoint(base) as checkpoint:
        model = model_families.load(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    vae: Any = model.vae
    found = [vae.encode(pixels).latent_dist for pixels in encoded]
    return [(one.mean[0], one.std[0]) for one in found]


def test_todays_files_hold_one_unscaled_draw_of_each(photos: Path, base: Path, encoded: list[Tensor]) -> None:
    options = ["--buckets", "--bucket-min", "32", "--bucket-max", "128", "--bucket-step", "16"]
    assert run(photos, base, "--npz", "--flip", *options) == 0
    expected = moments(encoded, base)
    assert sorted(files(photos)) == [f"{n}_{w:04d}x{h:04d}_sd.npz" for n, (w, h) in enumerate(SIZES)]
    deviations = []
    for number, name in enumerate(files(photos)):
        with np.load(photos / name) as stored:
            assert sorted(stored) == ["crop_ltrb", "latents", "latents_flipped", "original_size"]
            assert tuple(stored["original_size"]) == SIZES[number]
            for key, (mean, std) in zip(("latents", "latents_flipped"), expected[2 * number :][:2], strict=True):
                deviations.append((torch.from_numpy(stored[key]) - mean) / std)
    noise = torch.cat([one.flatten() for one in deviations])
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1  # of 2400 numbers
    assert len({one.flatten()[0].item() for one in deviations}) == len(deviations)


def test_the_draw_belongs_to_the_picture_whatever_the_part_the_name_and_the_start(
    photos: Path, base: Path, tmp_path: Path
) -> None:
    assert run(photos, base, "--npz", "--npz-dir", tmp_path / "whole") == 0
    for part in ("2/2", "1/2"):
        assert run(photos, base, "--npz", "--npz-dir", tmp_path / "parts", "--shard", part) == 0
    assert files(tmp_path / "parts") == files(tmp_path / "whole") and len(files(tmp_path / "whole")) == len(SIZES)
    assert not files(photos)
    (tmp_path / "renamed").mkdir()
    shutil.copy(photos / "0.png", tmp_path / "renamed" / "z.png")
    assert run(tmp_path / "renamed", base, "--npz") == 0
    assert files(tmp_path / "renamed")["z_0080x0064_sd.npz"] == files(tmp_path / "whole")["0_0080x0064_sd.npz"]


def test_the_files_of_2022_and_their_metadata(
    photos: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.json").write_text(json.dumps({str(n): {"caption": f"cat {n}"} for n in range(4)}))
    options = ["--buckets", "--bucket-min", "32", "--bucket-max", "128", "--bucket-step", "16", "--npz", "--flip"]
    options += ["--npz-form", "2022", "--captions", str(tmp_path / "in.json"), "--output", str(tmp_path / "out.json")]
    assert run(photos, base, *options) == 0
    assert sorted(files(photos)) == sorted([f"{n}{end}.npz" for n in range(4) for end in ("", "_flip")])
    entries = json.loads((tmp_path / "out.json").read_text())
    assert [entry["caption"] for entry in entries.values()] == [f"cat {n}" for n in range(4)]
    for key, entry in entries.items():
        with np.load(photos / f"{key}.npz") as plain, np.load(photos / f"{key}_flip.npz") as flipped:
            width, height = entry["train_resolution"]
            assert plain.files == flipped.files == ["arr_0"] and plain["arr_0"].dtype == np.float32
            assert plain["arr_0"].shape == flipped["arr_0"].shape == (4, height // 8, width // 8)
    assert len({tuple(entry["train_resolution"]) for entry in entries.values()}) > 1
    found(photos, base, capsys, "--captions", tmp_path / "out.json")  # it can be trained with


def test_an_older_metadata_file_is_added_to_under_its_own_keys(photos: Path, base: Path, tmp_path: Path) -> None:
    older = {"0.png": {"tags": "cat"}, "gone": {"caption": "a dog"}, "1": {"caption": "x", "train_resolution": [8, 8]}}
    (tmp_path / "meta.json").write_text(json.dumps(older))
    assert run(photos, base, "--npz", "--output", tmp_path / "meta.json") == 0
    found = json.loads((tmp_path / "meta.json").read_text())
    size = {"train_resolution": [64, 64]}
    expected = {"0.png": {"tags": "cat", **size}, "gone": {"caption": "a dog"}, "1": {"caption": "x", **size}}
    assert found == {**expected, "2": size, "3": size, "4": size}
    assert run(photos, base, "--npz", "--output", tmp_path / "new.jsonl", "--shard", "2/2") == 0
    lines = (tmp_path / "new-2-of-2.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"image_path": f"{n}.png", **size} for n in (1, 3)]


@pytest.mark.parametrize("form", ["today", "2022"])
def test_files_that_fit_stay_and_others_are_written_over_only_when_told(
    photos: Path, base: Path, encoded: list[Tensor], capsys: pytest.CaptureFixture[str], form: str
) -> None:
    options = ["--npz", "--npz-form", form]
    assert run(photos, base, *options) == 0
    before = files(photos)
    (photos / next(iter(before))).unlink()
    assert run(photos, base, *options) == 0
    assert "1 pictures encoded" in (out := capsys.readouterr().out) and "; 4 had theirs already" in out
    assert files(photos) == before and len(encoded) == len(SIZES) + 1
    assert run(photos, base, *options, "--resolution", "128") == 1
    out = capsys.readouterr().out
    assert "is of shape (4, 8, 8) instead of (4, 16, 16); --overwrite writes it anew" in out
    assert files(photos) == before and len(encoded) == len(SIZES) + 1
    assert run(photos, base, *options, "--resolution", "128", "--overwrite") == 0
    assert files(photos).keys() == before.keys() and len(encoded) == 2 * len(SIZES) + 1
    assert run(photos, base, *options, "--resolution", "128") == 0
    assert len(encoded) == 2 * len(SIZES) + 1


def test_todays_file_without_the_mirror_image_is_not_filled_up_in_silence(
    photos: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(photos, base, "--npz") == 0
    before = files(photos)
    assert run(photos, base, "--npz", "--flip") == 1
    assert "it holds no latents_flipped, but latents, original_size, crop_ltrb; --overwrite" in capsys.readouterr().out
    assert files(photos) == before


def test_two_pictures_never_write_one_file(
    photos: Path, base: Path, capsys: pytest.CaptureFixture[str], encoded: list[Tensor]
) -> None:
    picture(photos / "0.bmp", 20, SIZES[0])
    picture(photos / "1_flip.png", 22, (64, 64))
    assert run(photos, base, "--npz", "--npz-form", "2022", "--flip", "--shard", "1/2") == 0  # 0.bmp 1.png 2.png 4.png
    assert run(photos, base, "--npz", "--npz-form", "2022", "--flip", "--shard", "2/2") == 1
    out = capsys.readouterr().out
    assert f"{photos / '0.png'}: its file would be called as that of {photos / '0.bmp'}; rename one of them" in out
    assert f"{photos / '1_flip.png'}: its file would be called as that of {photos / '1.png'}; rename one of them" in out
    assert len(encoded) == 2 * len(SIZES)


# ---- mistakes ------------------------------------------------------------------------------------------------------


def full_disk(target: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(target, name, refuse)


def test_a_full_disk_ends_it_and_says_what_to_do(
    photos: Path, base: Path, capsys: pytest.CaptureFixture[str], encoded: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_folder, "_MOST_BYTES", 1)
    with monkeypatch.context() as patched:
        full_disk(cache_folder, "write_safetensors", patched)
        assert run(photos, base) == 2
    error = capsys.readouterr().err
    assert "cannot be written to (No space left on device)" in error and "going on in memory" not in error
    assert "takes nothing more, so this stops; what it has stays" in error
    with monkeypatch.context() as patched:
        full_disk(np, "savez", patched)
        assert run(photos, base, "--npz") == 2
    assert "full" in capsys.readouterr().err and not files(photos)
    assert len(encoded) == 2  # it does not go on through all pictures
    assert run(photos, base) == 0


def test_out_of_memory_says_what_to_do(
    photos: Path, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode_image(self: StableDiffusion, pixels: Tensor) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(StableDiffusion, "encode_image", encode_image)
    assert run(photos, base) == 2
    assert "out of memory with one picture on cpu: a lower --resolution" in capsys.readouterr().err


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_tells_the_mistakes_that_only_it_meets(
    photos: Path, base: Path, capsys: pytest.CaptureFixture[str], rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    picture(photos / f"{rank}.png", 30, (20, 20))  # of five pictures each process has every second one
    assert run(photos, base, "--buckets", "--bucket-no-upscale", "--bucket-step", "64", "--bucket-max", "1024") == 2
    assert "1 pictures have a side below bucket_step = 64" in capsys.readouterr().err


def lora_for(path: Path) -> Path:
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, path)
    return path


def without_vae(path: Path, base: Path) -> Path:
    save_file({name: t for name, t in load_file(base).items() if not name.startswith("first_stage")}, path)
    return path


MISTAKES: dict[str, tuple[Callable[[Path, Path, Path], list[object]], str]] = {
    "nothing at all": (lambda *_: [], "missing: DIR (the folder of pictures), --base (the model"),
    "no base": (lambda photos, *_: [photos], "missing: --base (the model that you will train for). For example"),
    "no such folder": (lambda photos, base, _: [photos.parent / "photo", "--base", base], "did you mean"),
    "a file": (lambda photos, base, _: [photos / "0.png", "--base", base], "is a file, but a folder of pictures"),
    "no pictures": (lambda photos, base, tmp: [empty(tmp), "--base", base], "no pictures found in"),
    "only deeper": (lambda photos, base, tmp: [photos.parent, "--base", base], "photos holds 5"),
    "no such model": (lambda photos, *_: [photos, "--base", "sd.safetensors"], "there is no such file or folder"),
    "a LoRA": (lambda photos, _, tmp: [photos, "--base", lora_for(tmp / "l.safetensors")], "is a LoRA, not a base"),
    "no VAE": (
        lambda photos, base, tmp: [photos, "--base", without_vae(tmp / "n.safetensors", base)],
        "has no VAE in it; give one with --vae",
    ),
    "a VAE that is none": (
        lambda photos, base, tmp: [photos, "--base", base, "--vae", lora_for(tmp / "l.safetensors")],
        "holds no VAE of Stable Diffusion",
    ),
    "no such part": (lambda photos, base, _: [photos, "--base", base, "--shard", "5/4"], "expected part i of n parts"),
    "part 0": (lambda photos, base, _: [photos, "--base", base, "--shard", "0/4"], "--shard 0/4: expected part i"),
    "no such device": (lambda photos, base, _: [photos, "--base", base, "--device", "cuda:9"], "cuda:9: not here"),
    "odd resolution": (lambda photos, base, _: [photos, "--base", base, "--resolution", "100"], "use 96 or 104"),
    "bucket options alone": (
        lambda photos, base, _: [photos, "--base", base, "--bucket-step", "32"],
        "bucket_step would change the buckets, but they are off",
    ),
    "odd step": (
        lambda photos, base, _: [photos, "--base", base, "--buckets", "--bucket-step", "12"],
        "bucket_step = 12 is not a multiple of 8",
    ),
    "small pictures": (
        lambda photos, base, _: [photos, "--base", base, "--buckets", "--bucket-no-upscale", "--bucket-step", "72"],
        "5 pictures have a side below bucket_step = 72",
    ),
    "metadata and recursive": (
        lambda photos, base, _: [photos, "--base", base, "--captions", "m.json", "--recursive"],
        "captions names the pictures, so recursive can do nothing",
    ),
    "no metadata": (lambda photos, base, _: [photos, "--base", base, "--captions", "m.json"], "cannot be opened"),
    "npz options alone": (
        lambda photos, base, _: [photos, "--base", base, "--npz-form", "2022", "--overwrite"],
        "npz_form and overwrite can do nothing without npz; add it",
    ),
    "npz folder inside": (
        lambda photos, base, _: [photos, "--base", base, "--npz", "--npz-dir", photos / "npz"],
        "itself; leave it out to have the files beside the pictures",
    ),
    "npz folder a file": (
        lambda photos, base, _: [photos, "--base", base, "--npz", "--npz-dir", base],
        "this is a file; give a folder",
    ),
    "output of another kind": (
        lambda photos, base, _: [photos, "--base", base, "--npz", "--output", "meta.txt"],
        "expected a name that ends with .json or .jsonl",
    ),
    "output nowhere": (
        lambda photos, base, _: [photos, "--base", base, "--npz", "--output", "none/meta.json"],
        "there is no folder none",
    ),
    "a cache that is none": (
        lambda photos, base, _: [photos, "--base", base, "--cache-dir", photos],
        "is to be the cache folder, but holds other things",
    ),
    "a cache that cannot be": (
        lambda photos, base, _: [photos, "--base", base, "--cache-dir", base / "cache"],
        "nothing that is encoded could be kept; give another cache folder",
    ),
    "a misspelt option": (
        lambda photos, base, _: [photos, "--base", base, "--bucket-rules", "x"],
        "did you mean --bucket-rule?",
    ),
}  # fmt: skip


def empty(path: Path) -> Path:
    (path / "inner" / "empty").mkdir(parents=True)
    return path / "inner" / "empty"


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_are_told_before_anything_is_encoded(
    photos: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], encoded: list[Tensor], kind: str
) -> None:
    make, message = MISTAKES[kind]
    assert main(["prepare", *map(str, make(photos, base, tmp_path))]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert encoded == [] and not files(photos)
