"""finetune/*.py: the guide's lines do what lorasmith's own commands do, option by option."""

import json
import os
import random
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorasmith.cli import main
from lorasmith.compat import entry
from lorasmith.compat.table import Values
from tests.compat.running import run
from tests.taggers.tiny import write_blip, write_tagger
from tests.tiny import write_tiny

CAPTION, TAG = "finetune/make_captions.py", "finetune/tag_images_by_wd14_tagger.py"
MERGE, MERGE_TAGS = "finetune/merge_captions_to_metadata.py", "finetune/merge_dd_tags_to_metadata.py"
CLEAN, PREPARE = "finetune/clean_captions_and_tags.py", "finetune/prepare_buckets_latents.py"
GOLDEN = Path(__file__).parent / "golden" / "finetune.txt"
TAGS = [
    ("general", 9, (0, 0, 0, 0.4)), ("explicit", 9, (0.9, 0, 0, 0)), ("red_thing", 0, (1, 0, 0, 0)),
    ("^_^", 0, (0, 0, 0, 0.5)), ("saber_(fate)", 4, (0, 0, 0, 0.45)),
]  # fmt: skip


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures in the working folder's `photos`."""
    monkeypatch.chdir(tmp_path)
    folder = Path("photos")
    folder.mkdir()
    for number, size in enumerate([(80, 64), (64, 96), (70, 70)]):
        Image.frombytes("RGB", size, random.Random(number).randbytes(size[0] * size[1] * 3)).save(
            folder / f"{number}.png"
        )
    return folder


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text("utf-8") for path in sorted(folder.iterdir()) if path.suffix != ".png"}


def split(line: str) -> list[str]:
    """Return the words of a line in which a backslash is a character like any other."""
    words = shlex.shlex(line, posix=True, punctuation_chars="")
    words.escape, words.commenters, words.whitespace_split = "", "", True
    return list(words)


def values(script: str, line: str) -> Values:
    return entry.translate(entry.SCRIPTS[script], entry.read(entry.SCRIPTS[script], split(line)))


def lines_of(file: Path) -> list[tuple[str, str, str]]:
    """Return script, old words and new command line of each pair of lines in a golden file."""
    lines = [line for line in file.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    pairs = zip(lines[::2], lines[1::2], strict=True)
    return [(old.split()[1], old.split(maxsplit=2)[2], new) for old, new in pairs]


@pytest.mark.parametrize(("script", "old", "new"), lines_of(GOLDEN))
def test_a_line_is_this_in_our_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, old: str, new: str
) -> None:
    monkeypatch.chdir(tmp_path)
    table = entry.SCRIPTS[script]
    given = entry.read(table, split(old))
    assert new in entry.page(table, given, entry.translate(table, given)).splitlines()


# ---- captions and tags made by models ------------------------------------------------------------------------------


def test_captions_are_those_of_lorasmith_caption(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_blip(Path("blip"))
    given = {
        "--seed 3 --max_length 8 --min_length 4": "--top-p 0.9 --seed 3 --max-length 8 --min-length 4",
        "--beam_search --num_beams=2 --max_length=8 --top_p 0.5": "--beams 2 --max-length 8",
    }
    for old, new in given.items():
        assert run(CAPTION, photos, "--caption_weights", model, *old.split(), "--caption_extension=.old") == 0
        assert main(["caption", str(photos), "--model", str(model), *new.split(), "--caption-extension", ".new"]) == 0
        found = texts(photos)
        assert [found[f"{n}.old"] for n in range(3)] == [found[f"{n}.new"] for n in range(3)]
        for path in photos.glob("*.[on]*"):
            if path.suffix != ".png":
                path.unlink()
    assert "note: --top_p does nothing with --beam_search." in capsys.readouterr().out


def test_what_is_written_already_stays(photos: Path) -> None:
    model = write_blip(Path("blip"))
    (photos / "0.caption").write_text("mine")
    words = [CAPTION, photos, "--caption_weights", model, "--max_length=8"]
    assert run(*words) == 0 and texts(photos)["0.caption"] == "mine" and texts(photos)["1.caption"]
    assert run(*words, "--existing", "overwrite") == 0 and texts(photos)["0.caption"] != "mine"


def test_weights_in_blips_own_layout_are_refused(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(CAPTION, photos, "--caption_weights=other.pth") == 2
    assert "--caption_weights other.pth: weights in BLIP's own layout are not read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", "--underscores keep"),
        ("--remove_underscore --thresh 0.46", "--threshold 0.46"),
        ("--general_threshold=0.2", "--underscores keep --general-threshold 0.2"),
        ("--character_threshold 1.1", "--underscores keep --character-threshold 1"),
        ("--undesired_tags=^_^,Saber_(fate)", "--underscores keep --blacklist ^_^,saber_(fate)"),
        ("--use_rating_tags_as_last_tag --character_tags_first", "--underscores keep --rating --order category"),
        ("--tag_replacement=red_thing,a\\,b:c;^_^,face", "--underscores keep --replace red_thing:a\\,b\\:c,^_^:face"),
        ("--always_first_tags saber_(fate),^_^", "--underscores keep --always-first saber_(fate),^_^"),
        ("--caption_sep ; --undesired ^_^;red_thing", "--underscores keep --separator ; --blacklist ^_^,red_thing"),
    ],
)  # fmt: skip
def test_tags_are_those_of_lorasmith_tag(photos: Path, old: str, new: str) -> None:
    model = write_tagger(Path("tagger"), TAGS)
    assert run(TAG, photos, "--repo_id", model, *old.split(), "--caption_extension=.old") == 0
    assert main(["tag", str(photos), "--model", str(model), *new.split(), "--extension", ".new"]) == 0
    found = texts(photos)
    assert [found[f"{n}.old"] for n in range(3)] == [found[f"{n}.new"] for n in range(3)]
    assert len(found) == 6


def test_the_rating_comes_first_where_that_is_asked_for(photos: Path) -> None:
    model = write_tagger(Path("tagger"), TAGS)
    assert run(TAG, photos, "--repo_id", model, "--use_rating_tags", "--always_first_tags=^_^") == 0
    assert texts(photos)["0.txt"].startswith(("^_^, general, ", "^_^, explicit, "))


def test_a_tagger_that_sd_scripts_has_downloaded_is_used(photos: Path) -> None:
    write_tagger(Path("models") / "a_b", TAGS)
    assert run(TAG, photos, "--repo_id=a/b", "--model_dir", ".\\models", "--onnx", "--append_tags") == 0
    assert len(texts(photos)) == 3
    assert values(TAG, "photos --repo_id=a/b --model_dir=models --force_download")["model"] == "a/b"
    assert values(TAG, "photos --model_dir=elsewhere")["model"] == "SmilingWolf/wd-v1-4-convnext-tagger-v2"


@pytest.mark.parametrize("option", ["--meta_threshold=0.3", "--use_quality_tags", "--character_tag_expand"])
def test_what_no_tagger_here_can_do_is_refused(photos: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert run(TAG, photos, option) == 2
    assert f"{option.partition('=')[0]} is refused: " in capsys.readouterr().err


# ---- one file of all captions and tags -----------------------------------------------------------------------------


def test_the_guides_three_steps_are_one_of_ours(photos: Path) -> None:
    for number in range(3):
        (photos / f"{number}.caption").write_text(f"anime anime {number}\n")
        (photos / f"{number}.txt").write_text(f"long_hair, tag {number}, rating:safe\n")
    assert run(MERGE, photos, "meta_cap.json") == 0
    assert json.loads(Path("meta_cap.json").read_text())["1"] == {"caption": "anime anime 1"}
    assert run(MERGE_TAGS, "--in_json", "meta_cap.json", photos, "meta_dd.json") == 0
    assert run(CLEAN, "meta_dd.json", "meta_clean.json") == 0
    assert main(["captions", str(photos), "--clean", "--output", "own.json"]) == 0
    assert Path("meta_clean.json").read_bytes() == Path("own.json").read_bytes()
    assert json.loads(Path("own.json").read_text())["1"] == {"caption": "anime 1", "tags": "long hair, tag 1"}
    assert run(CLEAN, photos, "meta_dd.json", "three_words.json") == 0  # as it was typed before 2023
    assert Path("three_words.json").read_bytes() == Path("own.json").read_bytes()


def test_a_file_that_is_there_is_added_to_and_kept(photos: Path) -> None:
    Path("meta.json").write_text('{"elsewhere": {"caption": "x"}}')
    (photos / "0.cap").write_text("a cat")
    (photos / "sub").mkdir()
    Image.new("RGB", (8, 8)).save(photos / "sub" / "s.png")
    assert run(MERGE, photos, "meta.json", "--caption_extention=.cap", "--recursive", "--full_path") == 0
    found = json.loads(Path("meta.json").read_text())
    assert found.pop("elsewhere") == {"caption": "x"}
    assert found.pop(Path("photos/0.png").absolute().as_posix()) == {"caption": "a cat"}
    assert Path("photos/sub/s.png").absolute().as_posix() in found
    assert Path("meta.json.bak").read_text() == '{"elsewhere": {"caption": "x"}}'


# ---- pictures encoded ahead ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "sd1.safetensors", width=8)


def test_latents_are_those_of_lorasmith_prepare(photos: Path, base: Path) -> None:
    Path("in.json").write_text(json.dumps({str(number): {"caption": "x"} for number in range(3)}))
    sizes = ["--max_resolution=64,64", "--min_bucket_reso", "32", "--max_bucket_reso=128", "--bucket_reso_steps", "16"]
    line = [
        PREPARE,
        photos,
        "in.json",
        "out.json",
        base,
        *sizes,
        "--flip_aug",
        "--batch_size=4",
        "--mixed_precision=fp16",
    ]
    assert run(*line) == 0
    own = [
        "--captions", "in.json", "--output", "own.json", "--base", base, "--resolution", "64,64", "--bucket-min", "32",
        "--bucket-max", "128", "--bucket-step", "16", "--buckets", "--bucket-rule", "sd-scripts", "--flip", "--npz",
        "--npz-form", "2022", "--npz-dir", "own",
    ]  # fmt: skip
    assert main(["prepare", str(photos), *map(str, own)]) == 0
    assert Path("out.json").read_bytes() == Path("own.json").read_bytes()
    assert json.loads(Path("out.json").read_text())["1"]["train_resolution"] != [64, 64]
    names = [f"{number}{flip}.npz" for number in range(3) for flip in ("", "_flip")]
    for name in names:
        assert np.array_equal(np.load(photos / name)["arr_0"], np.load(Path("own") / name)["arr_0"])
    os.truncate(photos / "0.npz", 3)
    assert run(*line, "--skip_existing") == 1  # it is told that it does not fit, and left
    assert (photos / "0.npz").stat().st_size == 3
    assert run(*line) == 0 and np.load(photos / "0.npz")["arr_0"].shape[0] == 4


def test_words_that_are_missing_are_named(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(PREPARE, photos, "in.json") == 2
    assert "missing: out_json, model_name_or_path" in capsys.readouterr().err
