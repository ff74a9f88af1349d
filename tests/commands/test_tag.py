"""`lorasmith tag` through the command, with real ONNX graphs whose scores are the pictures' mean colours."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lorasmith import cli
from tests.taggers.tiny import write_tagger

# name, category, weights of the mean red, green, blue, and a constant
TAGS = [
    ("general", 9, (0, 0, 0, 0.4)),
    ("explicit", 9, (0.9, 0, 0, 0)),
    ("red_thing", 0, (1, 0, 0, 0)),
    ("green_thing", 0, (0, 1, 0, 0)),
    ("blue_thing", 0, (0, 0, 1, 0)),
    ("^_^", 0, (0, 0, 0, 0.5)),
    ("saber_(fate)", 4, (0, 0, 0, 0.45)),
]
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "purple": (230, 0, 153)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tagger(tmp_path_factory.mktemp("tagger") / "model", TAGS)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos")


def make_photos(folder: Path) -> Path:
    folder.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (32, 32), colour).save(folder / f"{name}.png")
    return folder


def tag(photos: Path, model: Path, *options: str) -> int:
    return cli.main(["tag", str(photos), "--model", str(model), *options])


def texts(folder: Path, extension: str = ".txt") -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.rglob(f"*{extension}"))}


def test_tags_follow_from_the_colours(photos: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tag(photos, model) == 0
    assert texts(photos) == {
        "red": "red thing, ^_^, saber (fate)\n",
        "green": "green thing, ^_^, saber (fate)\n",
        "blue": "blue thing, ^_^, saber (fate)\n",
        "purple": "red thing, blue thing, ^_^, saber (fate)\n",
    }
    out = capsys.readouterr().out
    assert f"4 pictures tagged beside the pictures in {photos}" in out and "4/4 pictures" in out


@pytest.mark.parametrize(
    "options, purple",
    [
        (["--threshold", "0.7"], "red thing"),
        (["--general-threshold", "0.7"], "red thing, saber (fate)"),
        (["--character-threshold", "0.7"], "red thing, blue thing, ^_^"),
        (["--rating"], "red thing, blue thing, ^_^, saber (fate), explicit"),
        (["--underscores", "keep"], "red_thing, blue_thing, ^_^, saber_(fate)"),
        (["--blacklist", "Red_Thing, saber (fate)"], "blue thing, ^_^"),
        (["--order", "alphabetical"], "^_^, blue thing, red thing, saber (fate)"),
        (["--order", "category"], "saber (fate), red thing, blue thing, ^_^"),
        (["--always-first", "saber (fate), green thing, blue_thing"], "saber (fate), blue thing, red thing, ^_^"),
        (["--replace", "red thing:rose, ^_^:smile"], "rose, blue thing, smile, saber (fate)"),
        (["--replace", "red thing:blue thing"], "blue thing, ^_^, saber (fate)"),
        (["--separator", "; "], "red thing; blue thing; ^_^; saber (fate)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options(photos: Path, model: Path, options: list[str], purple: str) -> None:
    assert tag(photos, model, *options) in (0, 1)
    assert texts(photos)["purple"] == purple + "\n"


def test_lists_in_files(photos: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("red_thing\n^_^\n")
    (tmp_path / "other.txt").write_text("blue thing:sea, sky\n")
    assert tag(photos, model, "--blacklist", str(tmp_path / "bad.txt"), "--replace", str(tmp_path / "other.txt")) == 0
    assert texts(photos)["purple"] == "sea, sky, saber (fate)\n"


@pytest.mark.parametrize("side, batch", [(8, 1), (8, 3), (None, None), (16, None)])
@pytest.mark.parametrize("batch_size", ["1", "4"])
def test_the_size_comes_from_the_graph(
    photos: Path, model: Path, tmp_path: Path, side: int | None, batch: int | None, batch_size: str
) -> None:
    other = write_tagger(tmp_path / "other", TAGS, side=side, batch=batch)
    assert tag(photos, model, "--extension", "one") == 0
    assert tag(photos, other, "--extension", ".two", "--batch-size", batch_size) == 0
    assert texts(photos, ".one") == texts(photos, ".two")


def test_existing_files_are_skipped_overwritten_or_added_to(
    photos: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "red.txt").write_text("sks, RED_thing,\nmore")
    (photos / "green.TXT").write_text("mine")
    (photos / "blue.txt").touch()  # holds nothing, so it is no caption
    assert tag(photos, model) == 0
    assert "2 pictures tagged" in (out := capsys.readouterr().out) and "; 2 had theirs already" in out
    assert (photos / "red.txt").read_text() == "sks, RED_thing,\nmore"
    assert (photos / "blue.txt").read_text() == "blue thing, ^_^, saber (fate)\n"
    for _ in range(2):  # the second time nothing is missing
        assert tag(photos, model, "--existing", "append") == 0
        assert (photos / "red.txt").read_text() == "sks, RED_thing, ^_^, saber (fate)\nmore"
        assert (photos / "green.TXT").read_text() == "mine, green thing, ^_^, saber (fate)\n"
    assert tag(photos, model, "--existing", "overwrite") == 0
    assert (photos / "red.txt").read_text() == "red thing, ^_^, saber (fate)\n"
    assert (photos / "green.TXT").read_text() == "green thing, ^_^, saber (fate)\n"
    assert not (photos / "green.txt").exists() or os.path.samefile(photos / "green.txt", photos / "green.TXT")


def test_adding_to_a_file_that_is_not_utf8_leaves_it_alone(
    photos: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "red.txt").write_bytes("müde".encode("latin-1"))
    assert tag(photos, model, "--existing", "append") == 1
    assert (photos / "red.txt").read_bytes() == "müde".encode("latin-1")
    assert f"{photos / 'red.txt'} is not UTF-8" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_tags_in_one_file(photos: Path, model: Path, tmp_path: Path, kind: str) -> None:
    (photos / "sub").mkdir()
    (photos / "green.png").rename(photos / "sub" / "green.png")
    file = tmp_path / f"meta.{kind}"
    mine = {"caption": "a rose", "tags": "sks"}
    older = {"red": mine} if kind == "json" else {"image_path": "red", **mine}
    file.write_text(json.dumps(older))

    def entries() -> dict[str, dict[str, str]]:
        text = file.read_text(encoding="utf-8")
        return (
            json.loads(text)
            if kind == "json"
            else {e.pop("image_path"): e for e in map(json.loads, text.split("\n")[:-1])}
        )

    options = ["--recursive", "--output", str(file)]
    assert tag(photos, model, *options) == 0
    assert entries() == {
        "blue.png": {"tags": "blue thing, ^_^, saber (fate)"},
        "purple.png": {"tags": "red thing, blue thing, ^_^, saber (fate)"},
        "red": mine,
        "sub/green.png": {"tags": "green thing, ^_^, saber (fate)"},
    }
    before = file.stat().st_mtime_ns
    assert tag(photos, model, *options) == 0 and file.stat().st_mtime_ns == before
    assert tag(photos, model, *options, "--existing", "append") == 0
    assert entries()["red"] == {"caption": "a rose", "tags": "sks, red thing, ^_^, saber (fate)"}
    assert not list(photos.rglob("*.txt"))


def test_shards_share_the_pictures_whoever_starts_them(
    photos: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tag(photos, model, "--extension", ".whole") == 0
    counts = []
    for shard in ("1/3", "2/3", "3/3"):
        assert tag(photos, model, "--shard", shard) == 0
        counts.append(len(texts(photos)))
    assert counts == [2, 3, 4] and texts(photos) == texts(photos, ".whole")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert tag(photos, model, "--extension", ".launched") == 0
        assert tag(photos, model, "--shard", "1/2", "--extension", ".both") == 0
        assert tag(photos, model, "--output", str(tmp_path / "meta.json")) == 0
    assert texts(photos, ".launched") == texts(photos, ".whole")
    assert list(texts(photos, ".both")) == ["blue", "green"]
    parts = [json.loads((tmp_path / f"meta-{i}-of-2.json").read_text()) for i in (1, 2)]
    assert [sorted(part) for part in parts] == [["blue.png", "purple.png"], ["green.png", "red.png"]]


def test_what_cannot_be_tagged_is_listed_and_the_rest_done(
    photos: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n1234")
    (photos / "phone.heic").touch()
    Image.new("RGB", (8, 8)).save(photos / "red.jpg")  # red.txt belongs to red.jpg, which comes first
    assert tag(photos, model, "--threshold", "0.8", "--batch-size", "2") == 1
    out = capsys.readouterr().out
    assert sorted(texts(photos)) == ["blue", "green", "purple"]
    assert f"{photos / 'broken.png'}: " in out and "left out because of what is said of each: 2" in out
    assert f"{photos / 'red.jpg'}: no tag reaches the threshold" in out
    assert "another picture of the same name has the text file: 1 picture" in out and "red.png" in out
    assert "phone.heic" in out


def test_a_module_of_ones_own(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_tagger.py").write_text(
        "from lorasmith.data.tags import ScoredTag\n"
        "def load(options):\n"
        "    assert options.model == 'mine' and options.lowest_score == 0.35\n"
        "    return lambda images: [[ScoredTag(f'{image.width}_wide', 'general', 1.0)] for image in images]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert (
        cli.main(["tag", str(photos), "--tagger", "my_tagger", "--model", "mine"]) == 2
    )  # not dotted: no name of ours
    (tmp_path / "pkg").mkdir()
    (tmp_path / "my_tagger.py").rename(tmp_path / "pkg" / "mine.py")
    assert cli.main(["tag", str(photos), "--tagger", "pkg.mine", "--model", "mine"]) == 0
    assert set(texts(photos).values()) == {"32 wide\n"}


KILLER = """
import os, signal
from lorasmith.data.tags import ScoredTag
number = 0
def load(options):
    return tag
def tag(images):
    global number
    number += 1
    if number == 2 and "SIGNAL" in os.environ:
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    return [[ScoredTag("a", "general", 1.0)] for _ in images]
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_whole_files_and_goes_on(photos: Path, tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "killer.py").write_text(KILLER)
    command = [sys.executable, "-m", "lorasmith", "tag", str(photos), "--tagger", "pkg.killer", "--batch-size", "1"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "SIGNAL": str(int(number))}
    stopped = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if number == signal.SIGINT:
        assert stopped.returncode == 130, stopped.stderr
        assert "2 pictures tagged" in stopped.stdout and "the same command goes on from here" in stopped.stdout
        assert texts(photos) == {"blue": "a\n", "green": "a\n"}
    else:
        assert stopped.returncode == -signal.SIGKILL
        assert texts(photos) == {"blue": "a\n"}
    del environment["SIGNAL"]
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    done = len(COLOURS) - (2 if number == signal.SIGINT else 1)
    assert f"{done} pictures tagged" in again.stdout and f"{len(COLOURS) - done} had theirs already" in again.stdout
    assert texts(photos) == dict.fromkeys(COLOURS, "a\n")


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (["--threshold", "1.5"], "--threshold 1.5: expected a number at least 0 and at most 1"),
        (["--shard", "5/4"], "--shard 5/4: expected part i of n parts, counted from 1"),
        (["--shard", "0/4"], "--shard 0/4: expected part i of n parts, counted from 1"),
        (["--shard", "half"], "--shard half: expected part i of n parts"),
        (["--tagger", "wd41"], "no tagger named 'wd41'; did you mean wd14?"),
        (["--tagger", "blip"], "this makes captions, not tags; it belongs to `lorasmith caption`"),
        (["--tagger", "json.decoder"], "expected a module with a function load(options)"),
        (["--providers", "cdua"], "--providers cdua: expected auto or some of"),
        (["--replace", "a"], "--replace a: expected OLD:NEW"),
        (["--replace", "a:b, A:c"], "A is replaced twice"),
        (["--extension", ".PNG"], "extension .PNG: this cannot be one of text files"),
        (["--output", "tags.txt"], "--output tags.txt: expected a name that ends with .json or .jsonl"),
        (["--output", "nowhere/tags.json"], "there is no folder nowhere"),
        (["--separator", ""], "an empty text separates nothing"),
    ],
)  # fmt: skip
def test_wrong_options(
    photos: Path, model: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tag(photos, model, *options) == 2
    assert message in capsys.readouterr().err and not texts(photos)


def broken_models(folder: Path) -> dict[str, tuple[Path, str]]:
    def made(name: str, **options: object) -> Path:
        return write_tagger(folder / name, TAGS, **options)  # type: ignore[arg-type]

    short = made("short")
    table = (short / "selected_tags.csv").read_text().splitlines(keepends=True)
    (short / "selected_tags.csv").write_text("".join(table[:-1]))
    letters = made("letters")
    (letters / "selected_tags.csv").write_text("".join([*table[:2], "1,explicit,rating,3\n", *table[3:]]))
    lost, damaged = made("lost"), made("damaged")
    (lost / "model.onnx").unlink()
    (damaged / "model.onnx").write_bytes((damaged / "model.onnx").read_bytes()[:100])
    binary = made("binary")
    (binary / "selected_tags.csv").write_bytes(b"\xff\xfe\0\0")
    loud = write_tagger(folder / "loud", TAGS, side=8, clips=False)
    return {
        "missing": (folder / "nowhere", "there is no such folder; give the folder of a model, or a hub id"),
        "file": (short / "model.onnx", "this is a file; give the folder of a model"),
        "short": (short, "lists 6 tags, but model.onnx beside it gives 7 scores"),
        "header": (made("header", header="id,tag,kind,n"), "expected a table with the columns tag_id, name, category"),
        "letters": (letters, "selected_tags.csv, line 3: expected a name and a category such as 0 or 4"),
        "lost": (lost, "lacks model.onnx; give a complete model"),
        "damaged": (damaged, "model.onnx cannot be loaded"),
        "binary": (binary, "is no table in UTF-8"),
        "channels": (made("channels", channels=2), "expected (N, H, H, 3), as the WD14 family has it"),
        "loud": (loud, "expected from 0 to 1; give a model of the WD14 family, which ends with a sigmoid"),
    }


@pytest.mark.parametrize(
    "kind",
    ["missing", "file", "short", "header", "letters", "lost", "damaged", "binary", "channels", "loud"],
)
def test_models_that_are_none(photos: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, message = broken_models(tmp_path / "models")[kind]
    assert tag(photos, model) == 2
    assert message in capsys.readouterr().err and not texts(photos)


def test_a_hub_id_is_asked_for_the_two_files(
    photos: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def fetch(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name == "some/one":
            raise OSError("offline")
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert cli.main(["tag", str(photos)]) == 0
    assert asked == [("SmilingWolf/wd-swinv2-tagger-v3", ["model.onnx*", "selected_tags.csv"])] and texts(photos)
    assert tag(photos, Path("some/one"), "--existing", "overwrite") == 2
    assert "the hub did not give it (offline)" in capsys.readouterr().err


def test_without_onnxruntime(
    photos: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert tag(photos, model) == 2
    assert "pip install 'lorasmith[tag]'" in capsys.readouterr().err


def test_out_of_memory_says_what_to_lower(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "greedy").mkdir()
    (tmp_path / "greedy" / "one.py").write_text(
        "def load(options):\n"
        "    def tag(images): raise RuntimeError('Failed to allocate memory for requested buffer of size 9')\n"
        "    return tag\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["tag", str(photos), "--tagger", "greedy.one", "--batch-size", "64"]) == 2
    assert "out of memory with --batch-size 64: lower it" in capsys.readouterr().err


def test_folders_without_pictures(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tag"]) == 2 and "missing: DIR" in capsys.readouterr().err
    assert tag(tmp_path / "photso", model) == 2 and "there is no folder" in capsys.readouterr().err
    make_photos(tmp_path / "photos")
    assert tag(tmp_path, model) == 2
    assert "4 lie in folders in it: give --recursive" in capsys.readouterr().err


def test_a_metadata_file_that_is_none_stops_before_the_work(
    photos: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "meta.json").write_text("{")
    assert tag(photos, model, "--output", str(tmp_path / "meta.json")) == 2
    assert "meta.json" in capsys.readouterr().err and (tmp_path / "meta.json").read_text() == "{"
