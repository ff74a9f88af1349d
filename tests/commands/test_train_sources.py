"""Other sources than folders, through the command: the same LoRA from the same pictures wherever they lie."""

import contextlib
import io
import os
import shutil
import signal
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from lorasmith import demo
from lorasmith.cli import main
from lorasmith.training_run import session
from tests.commands.test_train_processes import Event, run_two
from tests.data.sources.test_webdataset import pack, png
from tests.tiny import write_tiny

COMMON = [
    "--resolution", "64", "--no-before-after", "--no-tensorboard", "--no-progress", "--workers", "0", "--rank", "2",
    "--save-precision", "float", "--steps", "3", "--train", "unet", "--device", "cpu",
]  # fmt: skip
TEXTS = {"a.png": "a cat, red, small", "b.png": "a dog, blue, tall", "c.png": "a fish, wet, flat"}
PIXELS = {name: png(number, (80, 64)) for number, name in enumerate(TEXTS)}


@pytest.fixture(scope="module", autouse=True)
def patched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        patch.setattr(session, "write_report", lambda folder, contents: folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("base") / "sd1.safetensors", width=8)


def as_folder(folder: Path) -> Path:
    for name, data in PIXELS.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text(TEXTS[name])
    return folder


def as_parquet(folder: Path) -> Path:
    images = [{"bytes": data, "path": name} for name, data in PIXELS.items()]
    rows = datasets.Dataset.from_dict({"image": images, "text": list(TEXTS.values())})
    rows.cast_column("image", datasets.Image()).to_parquet(folder / "train.parquet", batch_size=100)
    return folder


def as_imagefolder(folder: Path) -> Path:
    for name, data in PIXELS.items():
        (folder / name).write_bytes(data)
    lines = [f'{{"file_name": "{name}", "text": "{text}"}}\n' for name, text in TEXTS.items()]
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def members(names: Sequence[str] = tuple(TEXTS)) -> dict[str, bytes]:
    texts = {name.replace(".png", ".txt"): TEXTS[name].encode() for name in names}
    return {name: PIXELS[name] for name in names} | texts


def as_shard(folder: Path) -> Path:
    return pack(folder / "set-0.tar", members())


def as_shards(folder: Path) -> Path:
    for number, name in enumerate(TEXTS):
        pack(folder / f"set-{number}.tar", members([name]))
    return folder / "set-{0..2}.tar"


def words(base: Path, images: Path | str, output: Path, *more: object) -> list[str]:
    return ["train", "--base", str(base), "--images", str(images), "--output", str(output), *COMMON, *map(str, more)]


def run(arguments: Sequence[str]) -> tuple[int, str, str]:
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        code = main(list(arguments))
    return code, " ".join(printed.getvalue().split()), errors.getvalue()


def lora(output: Path) -> bytes:
    return (output / "last.safetensors").read_bytes()


RULES = ["--buckets", "--bucket-min", 32, "--bucket-max", 128, "--bucket-step", 16, "--shuffle-caption",
         "--keep-tokens", 1, "--flip", "--repeats", 2, "--batch-size", 2]  # fmt: skip


def test_the_same_pictures_give_the_same_bytes_from_every_source(base: Path, tmp_path: Path) -> None:
    made = {}
    forms = {as_folder: [], as_parquet: [], as_imagefolder: ["--source", "huggingface"], as_shard: [], as_shards: []}
    for make, options in forms.items():
        folder = tmp_path / make.__name__ / "pictures"
        folder.mkdir(parents=True)
        code, printed, errors = run(words(base, make(folder), tmp_path / f"{make.__name__}-out", *RULES, *options))
        assert code == 0, errors
        assert "3 pictures" in printed and "each 2 times an epoch" in printed
        made[make.__name__] = lora(tmp_path / f"{make.__name__}-out")
    assert len(set(made.values())) == 1, {name: hash(data) for name, data in made.items()}


def test_columns_and_split_are_those_that_are_named(base: Path, tmp_path: Path) -> None:
    """Everything else in the table is of other pictures and words."""
    places = {name: tmp_path / name / "pictures" for name in ("folder", "table")}
    for place in places.values():
        place.mkdir(parents=True)
    as_folder(places["folder"])
    images = [{"bytes": data, "path": name} for name, data in PIXELS.items()]
    right = {"photo": images, "title": list(TEXTS.values())}
    wrong = {"photo": [images[0]] * 3, "title": ["something else"] * 3}
    for split, own in (("train", wrong), ("validation", right)):
        rows = datasets.Dataset.from_dict({**own, "image": [images[1]] * 3, "text": ["something else"] * 3})
        typed = rows.cast_column("image", datasets.Image()).cast_column("photo", datasets.Image())
        typed.to_parquet(places["table"] / f"{split}.parquet", batch_size=100)
    named = ["--image-column", "photo", "--caption-column", "title", "--dataset-split", "validation"]
    for name, options in (("folder", []), ("table", named)):
        code, _, errors = run(words(base, places[name], tmp_path / f"{name}-out", *RULES, *options))
        assert code == 0, errors
    assert lora(tmp_path / "table-out") == lora(tmp_path / "folder-out")


@pytest.mark.parametrize("make", [as_parquet, as_shards])
def test_the_embedded_model_learns_from_every_source(tmp_path: Path, make: Any) -> None:
    (tmp_path / "pictures").mkdir()
    place, model = make(tmp_path / "pictures"), demo.FOLDER / "sd1-mini.safetensors"
    code, _, errors = run(words(model, place, tmp_path / "out", "--no-cache-latents", "--color", "--workers", 2))
    assert code == 0, errors
    assert lora(tmp_path / "out")


@pytest.mark.parametrize("make", [as_parquet, as_shards])
def test_a_stopped_run_goes_on_from_anywhere_to_the_same_bytes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    (tmp_path / "pictures").mkdir()
    place = make(tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    for name, steps in (("whole", 4), ("cut", 2)):
        assert run(words(base, place.relative_to(tmp_path), Path(name), "--steps", steps))[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, _, errors = run(["train", "--resume", str(tmp_path / "cut"), "--steps", "4"])
    assert code == 0, errors
    assert lora(tmp_path / "cut") == lora(tmp_path / "whole")


def test_a_run_may_go_on_with_the_same_pictures_in_another_place(base: Path, tmp_path: Path) -> None:
    for name in ("1", "2"):
        (tmp_path / name / "pictures").mkdir(parents=True)
    folder, shards = as_folder(tmp_path / "1" / "pictures"), as_shards(tmp_path / "2" / "pictures")
    assert run(words(base, folder, tmp_path / "whole", "--steps", 4))[0] == 0
    assert run(words(base, shards, tmp_path / "cut", "--steps", 2))[0] == 0
    again = ["train", "--resume", str(tmp_path / "cut"), "--steps", "4", "--images", str(folder)]
    code, _, errors = run(again)
    assert code == 0, errors
    assert lora(tmp_path / "cut") == lora(tmp_path / "whole")


def test_regularization_pictures_stay_in_a_folder(base: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "prior").mkdir()
    place, prior = as_shards(tmp_path / "shards"), as_folder(tmp_path / "prior")
    code, printed, errors = run(words(base, place, tmp_path / "out", "--dry-run", "--regularization", prior))
    assert code == 0, errors
    assert "regularization: 3 pictures make 3 samples an epoch" in printed


@pytest.mark.parametrize("make", [as_parquet, as_shards])
def test_regularization_pictures_are_drawn_for_pictures_that_lie_in_no_folder(
    base: Path, tmp_path: Path, make: Any
) -> None:
    (tmp_path / "pictures").mkdir()
    options = ["--dry-run", "--regularization", tmp_path / "prior", "--prior-pictures", 2]
    arguments = words(base, make(tmp_path / "pictures"), tmp_path / "out", *options)
    code, _, errors = run(arguments)
    assert code == 2 and "which class is to be drawn? no folder's name says it; give it with --prior-prompt" in errors
    code, printed, errors = run([*arguments, "--prior-prompt", "a thing"])
    assert code == 0, errors
    assert 'the base model first draws 2 pictures of "a thing"' in printed


def test_the_plan_tells_of_shards_and_captions(base: Path, tmp_path: Path) -> None:
    place = as_shards(tmp_path)
    pack(tmp_path / "set-3.tar", {"d.png": png(7), "d.json": b'{"caption": "d", "tags": ["e"]}', "x.txt": b"alone"})
    _, printed, _ = run(words(base, str(place).replace("0..2", "0..3"), tmp_path / "out", "--dry-run"))
    assert (
        "4 shards (set-0.tar, set-1.tar, set-2.tar and 1 more): 4 pictures, each once an epoch; captions: 3 from .txt, "
        "1 from .json" in printed
    )
    assert "1 samples have no picture that is read and are not used (x.txt)" in printed


def test_masks_by_transparency_work_in_shards(base: Path, tmp_path: Path) -> None:
    data = io.BytesIO()
    picture = Image.new("RGBA", (64, 64), (200, 30, 30, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 32, 64))
    picture.save(data, "PNG")
    place = pack(tmp_path / "a.tar", {"a.png": data.getvalue(), "a.txt": b"a cat"})
    code, printed, errors = run(words(base, place, tmp_path / "out", "--dry-run", "--alpha-mask"))
    assert code == 0, errors
    assert "50" in printed.partition("masks")[2]


# ---- two processes, and their own disks ----------------------------------------------------------------------------


@pytest.fixture
def disks(tmp_path: Path) -> Path:
    """Four shards of two pictures; each of two processes has only its own: `disk` leads to another place in each."""
    for number in range(4):
        pixels = {f"{number}{letter}.png": png(number * 2 + i, (80, 64)) for i, letter in enumerate("ab")}
        texts = {name.replace(".png", ".txt"): f"thing {name}".encode() for name in pixels}
        pack(tmp_path / f"disk{number % 2}" / f"set-{number}.tar", pixels | texts)
    return tmp_path


def run_two_on_own_disks(arguments: Sequence[str], place: Path, *events: Event) -> Any:
    return run_two(arguments, place / "logs", *events, folders=(place / "disk0", place / "disk1"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no fork and cannot send signals")
def test_two_processes_read_their_own_shards_and_a_stopped_run_goes_on_to_the_same_bytes(
    base: Path, disks: Path
) -> None:
    pattern = "set-{0..3}.tar"
    ended = run_two_on_own_disks(words(base, pattern, disks / "whole", "--steps", 4), disks)
    assert ended.codes == [0, 0], ended.errors
    page = " ".join(ended.outputs[0].split())
    for process, names in ((0, "set-0.tar, set-2.tar"), (1, "set-1.tar, set-3.tar")):
        assert f"process {process}: 2 shards ({names}): 4 pictures, each once an epoch" in page
    assert "8 samples in 4 steps" in page
    stop = Event(1, 1, signal_number=signal.SIGTERM)
    ended = run_two_on_own_disks(words(base, pattern, disks / "cut", "--steps", 4), disks, stop)
    assert ended.codes == [143, 143], ended.errors
    shutil.copytree(disks / "cut", disks / "alone")
    resumed = ["train", "--resume", str(disks / "cut"), "--images", pattern]
    ended = run_two_on_own_disks(resumed, disks)
    assert ended.codes == [0, 0], ended.errors
    assert lora(disks / "cut") == lora(disks / "whole")
    for number in (1, 3):
        shutil.copy(disks / "disk1" / f"set-{number}.tar", disks / "disk0")
    all_here = str(disks / "disk0" / pattern)
    code, _, errors = run(["train", "--resume", str(disks / "alone"), "--images", all_here, "--batch-size", "2"])
    assert code == 2
    assert "the run was started with 2 processes, and 1 are given now; its pictures lie in tar shards" in errors


@pytest.mark.skipif(os.name == "nt", reason="Windows has no fork and cannot send signals")
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("set-*.tar", "the processes see different shards in set-*.tar: process 0 has 2, process 1 has 2. Where not"),
        ("set-{1..4}.tar", "2 of the 2 shards that process 0 of 2 reads cannot be read:"),
        ("set-{0..0}.tar", "2 processes share 1 shards, so process 1 has none to read"),
        ("gone-{0..3}.tar", "2 of the 2 shards that process 0 of 2 reads cannot be read:"),
    ],
)
def test_what_fails_for_one_process_ends_both_with_one_message(
    base: Path, disks: Path, pattern: str, message: str
) -> None:
    ended = run_two_on_own_disks(words(base, pattern, disks / "out"), disks)
    assert ended.codes == [2, 2], ended.errors
    assert ended.errors[0].startswith(f"lorasmith: {message}") and ended.errors[1] == ""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no fork and cannot send signals")
def test_a_shard_that_only_the_other_process_lacks_ends_both(base: Path, disks: Path) -> None:
    (disks / "disk1" / "set-3.tar").unlink()
    ended = run_two_on_own_disks(words(base, "set-{0..3}.tar", disks / "out"), disks)
    assert ended.codes == [2, 2], ended.errors
    assert "1 of the 2 shards that process 1 of 2 reads cannot be read:" in ended.errors[0] and ended.errors[1] == ""


# ---- mistakes ------------------------------------------------------------------------------------------------------

MISTAKES: list[tuple[list[str], str]] = [
    (["--images", "org/name"], "org/name; check the path; a data set of the Hugging Face hub needs --source"),
    (["--images", "set-{0..9.tar"], "set-{0..9.tar: braces in braces, or one without its partner"),
    (["--images", "gone.tar"], "1 of 1 shards cannot be read:\nlorasmith:   gone.tar: it cannot be opened"),
    (["--images", "packed.tar.gz"], "packed.tar.gz: compressed (gzip)"),
    (["--images", "https://x/a.tar"], "shards are read from the disk only"),
    (["--images", "tars", "--recursive"], "recursive can do nothing for tars, which is read as webdataset; le"),
    (["--images", "tars", "--caption-column", "text"], "caption_column can do nothing for tars, which"),
    (["--images", "photos", "--image-column", "x"], "image_column can do nothing for photos, which is read as folder"),
    (["--images", "table", "--caption-extension", ".txt"], "caption_extension can do nothing for table, which is read"),
    (["--images", "table", "--dataset-split", "val"], "--dataset-split val: table has no such split"),
    (["--images", "table", "--caption-column", "txt"], "--caption-column txt: there is no such column; did you"),
    (["--images", "tars", "--captions", "m.json", "--source", "webdataset"], "source = webdataset has captions of"),
    (["--images", "photos", "--source", "metadata_json"], "photos is to be read as metadata_json, but no"),
    (["--images", "photos", "--source", "webdatset"], "there is no source named 'webdatset'; did you mean webdataset?"),
    (["--images", "photos", "--source", "webdataset"], "no tar shards found for photos; photos holds a.png"),
    (["--images", "nothing", "--source", "huggingface"], "there is no folder nothing"),
    (["--images", "empty", "--source", "huggingface"], "empty cannot be read as a Hugging Face data set"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=[str(number) for number in range(len(MISTAKES))])
def test_mistakes_end_in_one_message(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    for name in ("photos", "table", "tars", "empty"):
        (tmp_path / name).mkdir()
    as_folder(tmp_path / "photos")
    as_parquet(tmp_path / "table")
    as_shard(tmp_path / "tars")
    with tarfile.open(tmp_path / "packed.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "photos", "photos")
    (tmp_path / "m.json").write_text('{"a": {"caption": "x"}}')
    monkeypatch.chdir(tmp_path)
    code, printed, errors = run([*words(base, "photos", tmp_path / "out"), *options])
    assert code == 2 and printed == "" and not (tmp_path / "out").exists()
    assert errors.startswith("lorasmith: ") and "Traceback" not in errors
    assert message in errors
