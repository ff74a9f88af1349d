"""`lorasmith train --dataset-config`: what a file says is trained as options say it; resumed, refused, saved."""

import contextlib
import io
import itertools
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from lorasmith import demo
from lorasmith.cli import main
from lorasmith.training_run import session
from tests.commands.test_train_options import write_pictures
from tests.tiny import write_tiny

COMMON = [
    "--no-before-after", "--no-tensorboard", "--no-progress", "--rank", "2", "--workers", "0", "--save-precision",
    "float", "--learning-rate", "0.001",
]  # fmt: skip
TAGS = ["red, sks, small", "blue, sks, round", "green, sks, new"]


class Place:
    """A model, a folder `photos` with captions and one `reg` without, and runs on dataset files there."""

    def __init__(self, path: Path) -> None:
        self.path, self.base, self._numbers = path, write_tiny(path / "sd1.safetensors", width=8), itertools.count()
        write_pictures(path / "photos", dict(enumerate(TAGS)))
        write_pictures(path / "reg", dict.fromkeys(range(2)))

    def write(self, tables: dict[str, Any], suffix: str = ".toml") -> Path:
        path = self.path / f"sets{next(self._numbers)}{suffix}"
        path.write_text(tomli_w.dumps(tables) if suffix == ".toml" else json.dumps(tables), encoding="utf-8")
        return path

    def run(self, *options: object) -> tuple[int, str, str, Path]:
        """Return exit code, what was printed, what was told of mistakes, and the output folder."""
        output, printed, errors = self.path / f"out{next(self._numbers)}", io.StringIO(), io.StringIO()
        words = ["--base", self.base, *COMMON, "--output", output, "--resolution", 64, *options]
        words += [] if "--steps" in options else ["--steps", 2]
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            code = main(["train", *map(str, words)])
        return code, " ".join(printed.getvalue().split()), errors.getvalue(), output

    def learned(self, *options: object) -> dict[str, torch.Tensor]:
        code, _, errors, output = self.run(*options)
        assert code == 0, errors
        return load_file(output / "last.safetensors")

    def plan(self, *options: object) -> str:
        code, printed, errors, output = self.run("--dry-run", *options)
        assert code == 0 and not output.exists(), errors
        return printed

    def refusal(self, *options: object) -> str:
        code, printed, errors, output = self.run(*options)
        assert code == 2 and not output.exists() and "Traceback" not in errors, printed
        return errors

    def metadata(self, *options: object) -> dict[str, str]:
        code, _, errors, output = self.run(*options)
        assert code == 0, errors
        with safe_open(output / "last.safetensors", "pt") as file:
            return file.metadata()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SOURCE_DATE_EPOCH", "1700000000")
        patched.setattr(session, "write_report", lambda folder, contents: folder)
        place = Place(tmp_path_factory.mktemp("place"))
        patched.chdir(place.path)
        yield place


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def one(**subset: Any) -> dict[str, Any]:
    """Return a file with one subset, of `photos` unless it is said otherwise."""
    return {"datasets": [{"subsets": [{"image_dir": "photos", **subset}]}]}


# ---- what is trained -----------------------------------------------------------------------------------------------


def test_a_file_trains_what_options_train(place: Place) -> None:
    """TOML, JSON, options, and half in the file and half options: the same to the last bit."""
    rules = {"num_repeats": 2, "shuffle_caption": True, "keep_tokens": 1, "caption_prefix": "a photo,"}
    options = ["--repeats", 2, "--shuffle-caption", "--keep-tokens", 1, "--caption-prefix", "a photo,"]
    expected = place.learned("--images", "photos", *options, "--batch-size", 2)
    everything = {"general": {"batch_size": 2, "resolution": 64}, **one(**rules)}
    assert same(place.learned("--dataset-config", place.write(everything), "--resolution", 32), expected)
    assert same(place.learned("--dataset-config", place.write(everything, ".json")), expected)
    assert same(place.learned("--dataset-config", place.write(one()), *options, "--batch-size", 2), expected)
    assert not same(place.learned("--dataset-config", place.write(one()), "--batch-size", 2), expected)


def test_regularization_and_metadata_are_subsets(place: Place) -> None:
    (place.path / "meta.json").write_text(json.dumps({str(n): {"caption": text} for n, text in enumerate(TAGS)}))
    expected = place.learned("--images", "photos", "--batch-size", 2, "--regularization", prior(place))
    subsets = [{"image_dir": "photos"}, {"image_dir": "reg", "is_reg": True, "class_tokens": "thing"}]
    file = place.write({"datasets": [{"batch_size": 2, "subsets": subsets}]})
    assert same(place.learned("--dataset-config", file), expected)
    subsets[0]["metadata_file"] = "meta.json"
    file = place.write({"datasets": [{"batch_size": 2, "subsets": subsets}]})
    assert same(place.learned("--dataset-config", file), expected)


def prior(place: Place) -> Path:
    """Return the folder `reg` as the command line takes it."""
    parent = place.path / "regs"
    if not parent.exists():
        shutil.copytree(place.path / "reg", parent / "1_thing")
    return parent


def test_a_folders_name_means_nothing(place: Place) -> None:
    shutil.copytree(place.path / "reg", place.path / "10_sks dog")
    named, plain = (place.write(one(image_dir=name, class_tokens="a cat")) for name in ("10_sks dog", "reg"))
    assert same(place.learned("--dataset-config", named), place.learned("--dataset-config", plain))
    plan = place.plan("--dataset-config", named)
    assert "10_sks dog: 2 pictures x 1, 2 samples an epoch" in plan and '"a cat" (2 pictures)' in plan
    assert "10_sks dog: the 10 in this name says nothing in a dataset file" in plan


def test_folders_in_folders_are_used_where_a_subset_says_so(place: Place) -> None:
    shutil.copytree(place.path / "reg", place.path / "deep" / "3_in")
    shutil.copytree(place.path / "reg", place.path / "deep" / "out")
    file = place.write(one(image_dir="deep", recursive=True, class_tokens="a cat"))
    assert "deep: 4 pictures x 1, 4 samples an epoch" in place.plan("--dataset-config", file)
    shutil.copy(place.path / "reg" / "0.png", place.path / "deep")
    file = place.write(one(image_dir="deep", class_tokens="a cat"))
    plan = place.plan("--dataset-config", file)
    assert "deep: 1 picture x 1" in plan and "not used; recursive = true would use them" in plan


def test_the_bucket_rule_is_said_on_the_command_line(place: Place) -> None:
    shape = {"enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128, "bucket_reso_steps": 16}
    (place.path / "wide").mkdir(exist_ok=True)
    Image.new("RGB", (100, 76), "red").save(place.path / "wide" / "a.png")
    file = place.write({"general": shape, **one(image_dir="wide", class_tokens="red")})
    assert "1 picture as 64x48" in place.plan("--dataset-config", file)
    assert "1 picture as 64x64" in place.plan("--dataset-config", file, "--bucket-rule", "sd-scripts")
    assert "64x64, batch 1, buckets from 32 to 128 in steps of 16" in place.plan("--dataset-config", file)


def test_masks_are_of_one_subset(place: Place) -> None:
    half = Image.new("L", (80, 64))
    half.paste(255, (0, 0, 40, 64))
    (place.path / "halves").mkdir()
    for number in range(3):
        half.save(place.path / "halves" / f"{number}.png")
    expected = place.learned("--images", "photos", "--masks", "halves")
    assert same(place.learned("--dataset-config", place.write(one(conditioning_data_dir="halves"))), expected)
    assert not same(place.learned("--dataset-config", place.write(one())), expected)
    message = place.refusal("--dataset-config", place.write(one(alpha_mask=True)))
    assert "none of the 3 pictures has any" in message


def test_shards_are_a_subset(place: Place) -> None:
    with tarfile.open(place.path / "set.tar", "w") as archive:
        for path in sorted((place.path / "photos").iterdir()):
            archive.add(path, path.name)
    expected = place.learned("--images", "set.tar")
    assert same(place.learned("--dataset-config", place.write(one(image_dir="set.tar", source="webdataset"))), expected)
    assert "set.tar: 3 pictures x 1" in place.plan("--dataset-config", place.write(one(image_dir="set.tar")))


def test_an_empty_caption_may_be_asked_for(place: Place) -> None:
    file = place.write(one(image_dir="reg", class_tokens=""))
    assert '"" (2 pictures)' in place.plan("--dataset-config", file)


def test_a_validation_split_is_of_one_data_set(place: Place) -> None:
    file = place.write({"datasets": [{"validation_split": 0.3, "subsets": [{"image_dir": "photos"}]}]})
    assert "held out for validation, never trained on: 1 of 3" in place.plan("--dataset-config", file)
    assert "1 of 3" in place.plan("--dataset-config", place.write(one()), "--validation-split", 0.3)


# ---- two data sets on the embedded model ---------------------------------------------------------------------------

TWO = """\
[general]
caption_extension = ".txt"
enable_bucket = false

[[datasets]]
resolution = 64
batch_size = 2
shuffle_caption = true

  [[datasets.subsets]]
  image_dir = "photos"
  num_repeats = 2
  keep_tokens = 1

  [[datasets.subsets]]
  image_dir = "reg"
  class_tokens = "thing"
  is_reg = true
  shuffle_caption = false

[[datasets]]
resolution = [96, 64]
batch_size = 1

  [[datasets.subsets]]
  image_dir = "photos"
  caption_prefix = "large,"
  flip_aug = true
  caption_dropout_rate = 0.5
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures and a dataset file of two data sets, from which all runs are started."""
    path = tmp_path_factory.mktemp("two")
    write_pictures(path / "photos", dict(enumerate(TAGS)))
    write_pictures(path / "reg", dict.fromkeys(range(2)))
    (path / "sets.toml").write_text(TWO)
    return path


def test_two_data_sets_are_trained_and_gone_on_with_to_the_same_bytes(
    two: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setattr(session, "write_report", lambda folder, contents: folder)
    monkeypatch.chdir(two)
    base = str(demo.FOLDER / "sd1-mini.safetensors")
    words = ["train", "--base", base, "--dataset-config", "sets.toml", *COMMON, "--steps", "4", "--train", "unet"]
    assert main([*words, "--output", "whole"]) == 0
    plan = " ".join(capsys.readouterr().out.split())
    assert (
        "data set 1: 64x64, batch 2, no buckets photos: 3 pictures x 2, 6 samples an epoch reg, regularization: 2"
        in plan
    )
    assert "data set 2: 96x64, batch 1, no buckets photos: 3 pictures x 1, 3 samples an epoch" in plan
    assert main([*words, "--output", "cut", "--state-every-steps", "1", "--keep-states", "9"]) == 0
    whole = (two / "whole" / "last.safetensors").read_bytes()
    monkeypatch.chdir("/")
    for done in (1, 2, 3):
        (two / "cut" / "last.safetensors").unlink()
        assert main(["train", "--resume", str(two / "cut" / "states" / f"step-{done:08d}")]) == 0
        assert (two / "cut" / "last.safetensors").read_bytes() == whole
    with safe_open(two / "whole" / "last.safetensors", "pt") as file:
        assert len(file.keys()) == 3 * 192
        check_metadata(file.metadata())


def check_metadata(metadata: dict[str, str]) -> None:
    """What sd-scripts writes of such a file (train_network.py), and nothing of what it writes of a folder only."""
    first, second = json.loads(metadata["ss_datasets"])
    subsets = [first.pop("subsets"), second.pop("subsets")]
    tags = {"photos": {tag: TAGS[0].count(tag) or 1 for text in TAGS for tag in text.split(", ")} | {"sks": 3}}
    common = {
        "is_dreambooth": True, "enable_bucket": False, "min_bucket_reso": None, "max_bucket_reso": None,
        "bucket_info": None, "resize_interpolation": None, "tag_frequency": tags,
    }  # fmt: skip
    shapes = [
        {"batch_size_per_device": 2, "num_train_images": 6, "num_reg_images": 6, "resolution": [64, 64]},
        {"batch_size_per_device": 1, "num_train_images": 3, "num_reg_images": 0, "resolution": [96, 64]},
    ]
    assert [first, second] == [{**common, **shape} for shape in shapes]
    plain = {
        "color_aug": False, "flip_aug": False, "random_crop": False, "shuffle_caption": False, "keep_tokens": 0,
        "keep_tokens_separator": None, "secondary_separator": None, "enable_wildcard": False, "caption_prefix": None,
        "caption_suffix": None, "resize_interpolation": None, "is_reg": False, "class_tokens": None,
        "image_dir": "photos", "img_count": 3, "num_repeats": 1,
    }  # fmt: skip
    prior = {**plain, "image_dir": "reg", "class_tokens": "thing", "is_reg": True, "img_count": 2}
    own = {**plain, "num_repeats": 2, "keep_tokens": 1, "shuffle_caption": True}
    assert subsets == [[own, prior], [{**plain, "flip_aug": True, "caption_prefix": "large,"}]]
    assert json.loads(metadata["ss_tag_frequency"]) == tags
    dirs = {"photos": {"n_repeats": 2, "img_count": 3}, "photos (2)": {"n_repeats": 1, "img_count": 3}}
    assert json.loads(metadata["ss_dataset_dirs"]) == dirs
    of_folders = {
        "ss_resolution",
        "ss_batch_size_per_device",
        "ss_bucket_info",
        "ss_keep_tokens",
        "ss_reg_dataset_dirs",
    }
    assert not of_folders & metadata.keys()


def test_nothing_of_captions_and_folders_is_shared_if_not_wanted(place: Place) -> None:
    file = place.write(one(caption_prefix="a secret", class_tokens="hidden"))
    shared = place.metadata("--dataset-config", file)
    assert "secret" in str(shared) and "photos" in str(shared) and "hidden" in str(shared)
    kept = str(place.metadata("--dataset-config", file, "--no-share-captions"))
    assert not any(word in kept for word in ("secret", "hidden", "photos", "sks"))


def test_buckets_and_metadata_files_are_in_the_metadata(place: Place) -> None:
    (place.path / "words.json").write_text(json.dumps({str(n): {"tags": text} for n, text in enumerate(TAGS)}))
    shape = {"enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128, "bucket_reso_steps": 16}
    file = place.write({"general": shape, **one(metadata_file="words.json")})
    metadata = place.metadata("--dataset-config", file)
    (dataset,) = json.loads(metadata["ss_datasets"])
    assert dataset["bucket_info"] == {"buckets": {"0": {"resolution": [64, 48], "count": 3}}}
    assert (dataset["enable_bucket"], dataset["min_bucket_reso"], dataset["max_bucket_reso"]) == (True, 32, 128)
    (subset,) = dataset["subsets"]
    assert not dataset["is_dreambooth"] and "is_reg" not in subset and "class_tokens" not in subset
    assert (subset["image_dir"], subset["metadata_file"]) == ("photos", "words.json")
    assert json.loads(metadata["ss_tag_frequency"]).keys() == {"words.json"}


# ---- going on ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"datasets": [{"subsets": [{"image_dir": "photos", "keep_tokens": 1}]}]},
        {"datasets": [{"subsets": [{"image_dir": "photos", "num_repeats": 2}]}]},
        {"datasets": [{"resolution": [64, 128], "subsets": [{"image_dir": "photos"}]}]},
        {"datasets": [{"batch_size": 2, "subsets": [{"image_dir": "photos"}]}]},
        {"datasets": [{"subsets": [{"image_dir": "photos"}]}, {"subsets": [{"image_dir": "photos"}]}]},
    ],
)
def test_a_run_is_not_gone_on_with_under_other_rules(
    place: Place, changed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    file = place.write(one())
    code, _, errors, output = place.run("--dataset-config", file)
    assert code == 0, errors
    file.write_text(tomli_w.dumps(changed))
    assert main(["train", "--resume", str(output), "--steps", "3"]) == 2
    told = capsys.readouterr().err
    assert "the dataset file or .npz files say something else" in told or "pictures at once" in told


def test_a_run_is_gone_on_with_from_a_file_that_was_moved(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = place.write(one())
    code, _, errors, output = place.run("--dataset-config", file)
    assert code == 0, errors
    shutil.copytree(place.path / "photos", tmp_path / "photos")
    file.rename(tmp_path / "moved.toml")
    again = ["train", "--resume", str(output), "--steps", "3"]
    assert main(again) == 2
    assert "the run's dataset_config, is not there any more" in capsys.readouterr().err
    moved = ["--dataset-config", str(tmp_path / "moved.toml"), "--dataset-root", str(tmp_path)]
    assert main([*again, *moved]) == 0


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--images", "photos"], "dataset_config names folders and captions by itself, but images is given too"),
        (["--regularization", "reg", "--captions", "m.json"], "regularization and captions are given too"),
        (["--caption", "a cat"], "caption is given too"),
        (["--prior-loss-weight", 0.5], "no subset of"),
        (["--validate-every-steps", 1], "validation_split, their share, is missing in"),
        (["--keep-tokens-separator", "|||"], "keep_tokens = 1 and keep_tokens_separator = ||| both say"),
        (["--cache-latents"], "but color in"),
    ],
)
def test_options_that_contradict_the_file_are_refused(place: Place, options: list[object], part: str) -> None:
    file = place.write(one(keep_tokens=1, color_aug=True))
    assert part in place.refusal("--dataset-config", file, *options)


def test_a_root_without_a_file_is_refused(place: Place) -> None:
    assert "dataset_config, the file, is missing" in place.refusal("--images", "photos", "--dataset-root", "photos")


def test_a_mistake_in_the_file_is_told_with_its_line_and_the_file_is_left_alone(place: Place) -> None:
    file = place.write(one())
    file.write_text("[[datasets]]\n\n  [[datasets.subsets]]\n  image_dir = 'photos'\n  flip_augg = true\n")
    before = file.read_bytes()
    message = place.refusal("--dataset-config", file)
    assert message == f"lorasmith: {file}, line 5: flip_augg = true: there is no such key; did you mean flip_aug?\n"
    assert file.read_bytes() == before


def test_messages_speak_of_the_keys_of_the_file(place: Place) -> None:
    message = place.refusal("--dataset-config", place.write(one(image_dir="reg")))
    assert 'or write class_tokens = "your words" for all of them' in message and "--caption" not in message
    (place.path / "none").mkdir(exist_ok=True)
    message = place.refusal("--dataset-config", place.write(one(image_dir="none")))
    assert "no pictures found in none (looked for" in message
    (place.path / "empty.json").write_text('{"0": {}}')
    message = place.refusal("--dataset-config", place.write(one(metadata_file="empty.json")))
    assert 'or give class_tokens = "your words" for all of them' in message
    plan = place.plan("--dataset-config", place.write(one(class_tokens="a cat")))
    assert 'class_tokens = "a cat" is not used: every picture has one of its own' in plan
