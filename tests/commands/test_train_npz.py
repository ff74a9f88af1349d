"""sd-scripts' .npz files through `lorasmith train`: used when asked for and where they fit, else not."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from lorasmith.cli import main
from lorasmith.data.dataset import Batch, Dataset
from lorasmith.models.sd import LATENT_SCALE, StableDiffusion
from lorasmith.training_run import session
from tests.commands.test_prepare import AS_TRAINED, TRAINING, picture
from tests.commands.test_train_processes import run_two
from tests.tiny import write_tiny

SIZES = [(80, 64), (64, 96)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SOURCE_DATE_EPOCH", "1700000000")
        patched.setattr(session, "write_report", lambda folder, contents: folder)
        yield write_tiny(tmp_path_factory.mktemp("models") / "sd1.safetensors", width=8)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number, size in enumerate(SIZES):
        picture(tmp_path / "photos" / f"{number}.png", number, size).with_suffix(".txt").write_text("a cat")
    return tmp_path / "photos"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    given: list[Tensor] = []
    encode_image = StableDiffusion.encode_image

    def counted(self: StableDiffusion, pixels: Tensor) -> tuple[Tensor, Tensor]:
        given.append(pixels)
        return encode_image(self, pixels)

    monkeypatch.setattr(StableDiffusion, "encode_image", counted)
    return given


def words(photos: Path, base: Path, *options: object) -> list[str]:
    output = photos.parent / "out"
    given = ["--base", base, "--images", photos, *AS_TRAINED, *TRAINING, "--output", output, *options]
    return ["train", *map(str, given)]


def run(photos: Path, base: Path, *options: object) -> bytes:
    assert main(words(photos, base, "--overwrite", *options)) == 0
    return (photos.parent / "out" / "last.safetensors").read_bytes()


def plan(photos: Path, base: Path, capsys: pytest.CaptureFixture[str], *options: object) -> str:
    """The plan's paragraph on latents, as one line."""
    capsys.readouterr()
    assert main(words(photos, base, "--npz", "--dry-run", "--overwrite", *options)) == 0
    page = " ".join(capsys.readouterr().out.split())
    return page[page.index("latents cached") : page.index(" cache /")]


def prepared(photos: Path, base: Path, *options: object) -> None:
    assert main(["prepare", *map(str, [photos, "--base", base, *AS_TRAINED, "--npz", *options])]) == 0


@pytest.mark.parametrize("form", ["today", "2022"])
def test_the_files_are_what_is_trained_on_and_nothing_is_encoded(
    photos: Path, base: Path, encoded: list[Tensor], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(photos, base, "--flip")
    prepared(photos, base, "--flip", "--npz-form", form)
    assert run(photos, base, "--flip") == plain  # off unless asked
    encoded.clear()
    with_files = run(photos, base, "--flip", "--npz")
    assert encoded == [] and with_files != plain

    # the same run by a VAE that gives these values, without any doubt, for these pictures
    files = iter(sorted(photos.glob("*.npz")))

    def from_files(self: StableDiffusion, pixels: Tensor) -> tuple[Tensor, Tensor]:
        stored = values.pop(0)
        return torch.from_numpy(stored)[None] * LATENT_SCALE, torch.zeros(1, *stored.shape)

    names = ["latents", "latents_flipped"] if form == "today" else ["arr_0"]
    values = [np.load(file)[name] for file in files for name in names]
    monkeypatch.setattr(StableDiffusion, "encode_image", from_files)
    expected = load(run(photos, base, "--flip", "--no-disk-cache"))
    assert values == []
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(with_files).items())


def test_pictures_without_a_fitting_file_are_encoded_and_counted(
    photos: Path, base: Path, encoded: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(photos, base)
    everything = plan(photos, base, capsys)
    assert "2 of 2 pictures from .npz files, one frozen draw each; which VAE made them" in everything
    assert "encoded" not in everything
    picture(photos / "1.png", 7, (64, 80))  # another size, so that the file's name does not fit
    assert "1 of 2 pictures from .npz files" in (told := plan(photos, base, capsys))
    assert "encoded, as no .npz file fits: 1.png (no file)" in told
    encoded.clear()
    run(photos, base, "--npz")
    assert len(encoded) == 1
    assert "latents is of shape (4, 8, 8) instead of (4, 16, 16)" in plan(photos, base, capsys, "--resolution", "128")
    assert "it holds no latents_flipped" in plan(photos, base, capsys, "--flip")
    next(photos.glob("0_*.npz")).write_bytes(b"PK")
    assert "0 of 2 pictures" in (told := plan(photos, base, capsys)) and "0_0080x0064_sd.npz: it is damaged" in told


def test_files_in_a_folder_of_their_own(
    photos: Path, base: Path, tmp_path: Path, encoded: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "2_sks cat").mkdir()
    for path in photos.glob("*.*"):
        path.rename(photos / "2_sks cat" / path.name)
    prepared(photos, base, "--npz-dir", tmp_path / "npz")
    assert len(list((tmp_path / "npz" / "2_sks cat").glob("*.npz"))) == 2 and not list(photos.rglob("*.npz"))
    assert "0 of 2" in plan(photos, base, capsys)
    assert "2 of 2" in plan(photos, base, capsys, "--npz-dir", tmp_path / "npz")


def test_a_mask_in_a_file_is_said_to_be_without_use(
    photos: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(photos, base)
    file = next(photos.glob("0_*.npz"))
    with np.load(file) as stored:
        arrays = {**stored, "alpha_mask": np.zeros((64, 64), np.float32)}
    np.savez(file, **arrays)
    assert "the alpha_mask in .npz files is not used; --alpha-mask takes the pictures' own: 0.png" in plan(
        photos, base, capsys
    )


def test_crops_around_faces_are_not_in_any_file(photos: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for ending in (".png", ".txt"):
        (photos / f"1{ending}").rename(photos / f"1_32_20_16_16{ending}")
    prepared(photos, base)
    told = plan(photos, base, capsys, "--face-crop-aug-range", "2,2")
    assert "1 of 2 pictures" in told and "another part than the middle" in told


def test_pictures_in_archives_have_no_files(photos: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared(photos, base)
    with tarfile.open(photos.parent / "set.tar", "w") as archive:
        for path in sorted(photos.iterdir()):
            archive.add(path, path.name)
    told = plan(photos.parent / "set.tar", base, capsys)
    assert "0 of 2 pictures" in told and "0.png (it is no file of its own)" in told


def test_a_run_goes_on_with_the_same_files_only_wherever_they_lie(
    photos: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(photos, base, "--npz-dir", tmp_path / "npz")
    expected = run(photos, base, "--npz", "--npz-dir", tmp_path / "npz", "--steps", "2")
    run(photos, base, "--npz", "--npz-dir", tmp_path / "npz", "--steps", "1")
    (tmp_path / "npz").rename(tmp_path / "moved")
    resumed = ["train", "--resume", str(tmp_path / "out"), "--steps", "2"]
    assert main(resumed) == 2
    assert "the run's npz_dir, is not there any more; give its new place with --npz" in capsys.readouterr().err
    resumed += ["--npz-dir", str(tmp_path / "moved")]
    file = next((tmp_path / "moved").glob("0_*.npz"))
    before = file.read_bytes()
    with np.load(file) as stored:
        arrays = {**stored, "latents": stored["latents"] + 1}
    np.savez(file, **arrays)
    assert main(resumed) == 2
    assert "or .npz files say something else of them" in capsys.readouterr().err
    file.write_bytes(before)
    assert main(resumed) == 0
    assert (tmp_path / "out" / "last.safetensors").read_bytes() == expected


def test_a_file_that_changes_while_training_ends_the_run(
    photos: Path, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(photos, base)
    read = Dataset.batch

    def batch(self: Dataset, step: int, process_index: int) -> list[Batch]:
        for file in photos.glob("*.npz"):
            file.unlink()
        return read(self, step, process_index)

    monkeypatch.setattr(Dataset, "batch", batch)
    assert main(words(photos, base, "--npz")) == 2
    assert "has changed during the run (no file)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--npz-dir", "npz"], "npz_dir says where npz files are, but npz, to use them, is missing"),
        (["--npz", "--random-crop"], "npz files hold pictures as they were cut, but random_crop would change them"),
        (["--npz", "--no-cache-latents"], "npz takes latents that were encoded once, but cache_latents is off"),
    ],
)
def test_options_that_cannot_both_be_meant(
    photos: Path, base: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(words(photos, base, *options)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_processes_that_see_other_files_do_not_begin(photos: Path, base: Path, tmp_path: Path) -> None:
    folders = tmp_path / "here", tmp_path / "there"
    for folder in folders:
        folder.mkdir()
    prepared(photos, base, "--npz-dir", folders[0] / "npz")
    given = words(photos, base, "--npz", "--npz-dir", "npz")
    ended = run_two(given, tmp_path / "logs", folders=folders)
    assert ended.codes == [2, 2]
    assert "the processes see different .npz files" in ended.errors[0]
    prepared(photos, base, "--npz-dir", folders[1] / "npz")
    ended = run_two([*given, "--overwrite"], tmp_path / "logs", folders=folders)
    assert ended.codes == [0, 0], ended.errors
