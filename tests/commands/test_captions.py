"""`lorasmith captions` through the command: what is merged, cleaned and written, and that nothing is written over."""

import contextlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import lorasmith.demo
from lorasmith.cli import main
from lorasmith.data.metadata_files import read
from lorasmith.data.sources.metadata_json import find_pictures
from tests.data.test_metadata_files import BAD_METADATA

MODEL = lorasmith.demo.FOLDER / "sd1-mini.safetensors"
PIXEL = io.BytesIO()
Image.new("RGB", (64, 64), "red").save(PIXEL, "PNG")
Run = Callable[..., str]


def put(folder: Path, files: dict[str, str | None]) -> Path:
    """Write files by their names: None is a picture."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PIXEL.getvalue() if text is None else text.encode())
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return put(
        tmp_path / "photos",
        {
            "a.png": None, "a.caption": "Arafed  woman, , smiling,\n", "a.txt": "long_hair, hair, rating:safe, ^_^",
            "b.jpg": None, "b.txt": "long_hair,\nsolo\n", "c.v2.png": None, "c.v2.CAPTION": "a cat", "d.png": None,
            "sub/e.png": None, "sub/e.txt": "solo", "stray.txt": "x", ".hidden/f.png": None,
        },
    )  # fmt: skip


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: object, code: int = 0) -> str:
        """Run the command; return what it prints, the error if there should be one."""
        assert main(["captions", *map(str, words)]) == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    return run


def metadata(path: Path) -> dict[str, dict[str, str]]:
    return json.loads(path.read_text("utf-8"))


# ---- merging -------------------------------------------------------------------------------------------------------


def test_without_rules_the_files_are_taken_to_the_letter(run: Run, photos: Path, tmp_path: Path) -> None:
    before, meta = tree(photos), tmp_path / "meta.json"
    told = run(photos, "--output", meta)
    assert metadata(meta) == {
        "a": {"caption": "Arafed  woman, , smiling,", "tags": "long_hair, hair, rating:safe, ^_^"},
        "b": {"tags": "long_hair, solo"},
        "c.v2": {"caption": "a cat"},
        "d": {},
    }
    assert tree(photos) == before
    assert "4 pictures; 2 with caption, 2 with tags, 1 with neither" in told
    assert f"without caption and tags\n  {photos / 'd.png'}\n" in told and "no changes" in told
    assert "1 .txt file without a picture of that name, not used (stray.txt)" in told
    assert "1 picture in folders inside, not used; --recursive takes them" in told


def test_recursive_full_path_and_lines(run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(photos, "--output", tmp_path / "a.json", "--recursive")
    assert list(metadata(tmp_path / "a.json")) == ["a", "b", "c.v2", "d", "sub/e"]
    monkeypatch.chdir(tmp_path)
    run("photos", "--output", "b.json", "--recursive", "--full-path")
    assert list(metadata(tmp_path / "b.json"))[-1] == (photos / "sub" / "e.png").as_posix()
    run("photos", "--output", "c.jsonl", "--recursive")
    lines = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert lines[1] == {"image_path": "b.jpg", "tags": "long_hair, solo"} and lines[-1]["image_path"] == "sub/e.png"


def test_the_extensions_say_what_is_a_caption_and_what_are_tags(run: Run, photos: Path, tmp_path: Path) -> None:
    meta = tmp_path / "meta.json"
    run(photos, "--output", meta, "--caption-extension", "TXT")
    assert metadata(meta)["b"] == {"caption": "long_hair,"} and "caption" not in metadata(meta)["c.v2"]
    told = run(photos, "--output", meta, "--overwrite", "--caption-extension", ".txt", "--tag-extension", ".caption")
    assert metadata(meta)["c.v2"] == {"tags": "a cat"}
    assert "only the first line is used of 1 caption file (b.txt)" in told


def test_files_of_one_kind_alone(run: Run, photos: Path, tmp_path: Path) -> None:
    run(photos, "--output", tmp_path / "a.json", "--read", "captions")
    assert metadata(tmp_path / "a.json")["a"] == {"caption": "Arafed  woman, , smiling,"}
    told = run(photos, "--output", tmp_path / "b.json", "--read", "tags")
    assert metadata(tmp_path / "b.json")["a"] == {"tags": "long_hair, hair, rating:safe, ^_^"}
    assert "0 with caption, 2 with tags" in told and "read as captions" not in told
    told = run(photos, "--dry-run", "--read", "tags", "--caption-extension", ".txt", code=2)
    assert "caption_extension can do nothing where only tags are read" in told


def test_a_metadata_file_is_cleaned_without_its_pictures(run: Run, tmp_path: Path) -> None:
    older, new = tmp_path / "old.json", tmp_path / "new.json"
    older.write_text(
        '{"a": {"caption": "anime anime", "tags": "long_hair, rating:safe", "image_size": [8, 8]}, "b": {}}'
    )
    told = run("--input", older, "--output", new, "--clean")
    assert metadata(new) == {"a": {"caption": "anime", "tags": "long hair", "image_size": [8, 8]}, "b": {}}
    assert f"{older}: 2 entries; 1 with caption, 1 with tags, 1 with neither" in told and "--images FOLDER" in told
    assert "recursive and write_files can do nothing without DIR" in run(
        "--input", older, "--recursive", "--write-files", tmp_path / "x", code=2
    )


def test_an_older_file_is_kept_and_updated(run: Run, photos: Path, tmp_path: Path) -> None:
    older = tmp_path / "old.jsonl"
    older.write_text(
        '{"image_key": "elsewhere/x", "tags": "kept"}\n'
        '{"image_path": "a.png", "caption": "old", "tags": "old", "image_size": [8, 8]}\n'
        '{"file_name": "d.png", "caption": "only here"}\n'
    )
    told = run(photos, "--input", older, "--output", tmp_path / "new.json")
    new = metadata(tmp_path / "new.json")
    assert list(new) == ["elsewhere/x", "a.png", "d.png", "b", "c.v2"]
    assert new["elsewhere/x"] == {"tags": "kept"} and new["d.png"] == {"caption": "only here"}
    assert new["a.png"]["caption"].startswith("Arafed") and new["a.png"]["image_size"] == [8, 8]
    assert "old.jsonl: 3 entries, 2 for these pictures; 1 other without a picture here, kept as well" in told
    again = run(photos, "--input", tmp_path / "new.json", "--output", tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "new.json").read_bytes() and "no changes" in again


NAMES = st.lists(
    st.tuples(st.sampled_from(["", "x/", "x/y/"]), st.sampled_from(["a", "a.png", "a.jpg", "b c", "ä", "b.v2"]),
              st.sampled_from([".png", ".jpg", ".PNG"])).map("".join),
    min_size=1, unique_by=str.lower,
)  # fmt: skip


@given(names=NAMES, form=st.sampled_from([["--full-path"], []]), kind=st.sampled_from([".json", ".jsonl"]))
@settings(max_examples=25)
def test_every_picture_is_found_by_its_key(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], form: list[str], kind: str
) -> None:
    place = tmp_path_factory.mktemp("keys")
    put(place / "p", dict.fromkeys(names))
    meta = place / f"m{kind}"
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["captions", str(place / "p"), "--output", str(meta), "--recursive", *form]) == 0
    found = find_pictures(meta, read(meta), place / "p")
    assert sorted(path.relative_to(place / "p").as_posix() for path in found.values()) == sorted(names)


# ---- cleaning ------------------------------------------------------------------------------------------------------


def test_cleaning_tells_what_each_rule_changed(run: Run, photos: Path, tmp_path: Path) -> None:
    told = run(photos, "--output", tmp_path / "meta.json", "--clean")
    assert metadata(tmp_path / "meta.json") == {
        "a": {"caption": "woman, smiling", "tags": "long hair, ^_^"},
        "b": {"tags": "long hair, solo"},
        "c.v2": {"caption": "a cat"},
        "d": {},
    }
    rows = {row[2:].partition("  ")[0]: row.split() for row in told.splitlines()}
    assert rows["underscores"][1:] == ["2", "long_hair", "->", "long", "hair"]
    assert rows["removed tags"][2:] == ["1", "-", "rating:safe"]
    assert "- hair (long hair)" in told and "most frequent of 3 tags\n  long hair 2, " in told


def test_rules_given_on_the_command_line(run: Run, photos: Path, tmp_path: Path) -> None:
    words = [
        "--remove-tags",
        "rating:safe",
        "^_^",
        "--replace",
        "hair:fur",
        "woman:person",
        "--add-tags",
        "sks_x, solo",
    ]
    told = run(photos, "--output", tmp_path / "meta.json", *words)
    assert metadata(tmp_path / "meta.json") == {
        "a": {"caption": "Arafed person, smiling", "tags": "sks_x, solo, long_hair, fur"},
        "b": {"tags": "sks_x, solo, long_hair"},
        "c.v2": {"caption": "a cat", "tags": "sks_x, solo"},
        "d": {"tags": "sks_x, solo"},
    }
    assert "1 with neither" in told and f"of their own\n  {photos / 'd.png'}" in told
    run(photos, "--output", tmp_path / "b.json", "--clean", *words, "--min-count", 2)
    assert metadata(tmp_path / "b.json")["a"]["tags"] == "sks_x, solo, long hair"
    run(photos, "--output", tmp_path / "c.json", "--max-tags", 1)
    assert metadata(tmp_path / "c.json")["a"]["tags"] == "long_hair"


def test_a_table_of_ones_own(run: Run, photos: Path, tmp_path: Path) -> None:
    rules = tmp_path / "my.toml"
    rules.write_text('[tags.rename]\n"long hair" = "mane"\n[captions.replace]\n"woman" = "girl"\n')
    run(photos, "--output", tmp_path / "meta.json", "--clean", "--rules", rules)
    assert metadata(tmp_path / "meta.json")["a"] == {"caption": "girl, smiling", "tags": "mane, hair, ^_^"}
    rules.write_text('[tags]\nremov = ["x"]\n')
    told = run(photos, "--output", tmp_path / "n.json", "--clean", "--rules", rules, code=2)
    assert f'{rules}, line 2: there is no "remov" in [tags]; did you mean remove?' in told


TAGS = st.lists(
    st.sampled_from(["long_hair", "hair", "^_^", "(a, b:1.2)", "rating:safe", "x_y", "z", "Z ", "", "grey eyes"])
)
TEXT = st.tuples(st.sampled_from(["", "arafed girl girl girl", "a , , b,"]), TAGS.map(",".join))


@given(
    texts=st.lists(TEXT, min_size=1, max_size=6),
    options=st.lists(
        st.sampled_from([("--min-count", "2"), ("--max-tags", "3"), ("--remove-tags", "z"), ("--replace", "girl:boy"),
                         ("--add-tags", "sks_x", "hair")]),
        unique=True,
    ).map(lambda given: [word for option in given for word in option]),
    cleaning=st.sampled_from([["--clean"], []]),
)  # fmt: skip
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_a_second_time_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str]], options: list[str], cleaning: list[str]
) -> None:
    place = tmp_path_factory.mktemp("twice")
    put(place / "p", {f"{number}.png": None for number in range(len(texts))})
    first = {str(number): {"caption": caption, "tags": tags} for number, (caption, tags) in enumerate(texts)}
    (place / "0.json").write_text(json.dumps(first))
    for number in (0, 1):
        words = ["--input", place / f"{number}.json", "--output", place / f"{number + 1}.json"]
        with contextlib.redirect_stdout(io.StringIO()) as told:
            assert main(["captions", str(place / "p"), *map(str, words), *cleaning, *options]) == 0
    assert (place / "2.json").read_bytes() == (place / "1.json").read_bytes() and "no changes" in told.getvalue()


# ---- writing -------------------------------------------------------------------------------------------------------


def test_a_dry_run_shows_the_table_and_writes_nothing(run: Run, photos: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    told = run(photos, "--dry-run", "--clean")
    assert "long_hair -> long hair" in told and "nothing is written" in told
    run(photos, "--dry-run", "--output", tmp_path / "m.json", "--write-files", tmp_path / "new")
    assert tree(tmp_path) == before and not (tmp_path / "new").exists()


def test_an_existing_output_is_kept(run: Run, photos: Path, tmp_path: Path) -> None:
    meta = put(tmp_path, {"meta.json": "first"}) / "meta.json"
    assert "this exists already, and nothing is overwritten" in run(photos, "--output", meta, code=2)
    assert meta.read_text() == "first"
    assert f"before: {meta}.bak" in run(photos, "--output", meta, "--overwrite")
    second = meta.read_bytes()
    assert f"before: {meta}.bak2" in run(photos, "--output", meta, "--overwrite", "--clean")
    assert Path(f"{meta}.bak").read_text() == "first" and Path(f"{meta}.bak2").read_bytes() == second
    assert metadata(meta)["b"]["tags"] == "long hair, solo"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "meta.json",
        "meta.json.bak",
        "meta.json.bak2",
        "photos",
    ]


def test_text_files_in_a_new_folder_are_what_is_trained(run: Run, photos: Path, tmp_path: Path) -> None:
    before, new = tree(photos), tmp_path / "new"
    told = run(photos, "--recursive", "--clean", "--write-files", new)
    assert tree(new) == {
        "a.txt": b"woman, smiling, long hair, ^_^\n", "b.txt": b"long hair, solo\n", "c.v2.txt": b"a cat\n",
        os.path.join("sub", "e.txt"): b"solo\n",
    }  # fmt: skip
    assert tree(photos) == before and "4 text files in" in told
    assert "this exists already" in run(photos, "--write-files", new, code=2)


def test_text_files_beside_the_pictures_only_where_there_are_none(run: Run, photos: Path, tmp_path: Path) -> None:
    before = tree(photos)
    told = run(photos, "--add-tags", "sks", "--write-files", photos)
    assert tree(photos) == {**before, "d.txt": b"sks\n"} and "1 text file beside pictures that had none" in told


def test_pictures_that_would_share_a_text_file(run: Run, tmp_path: Path) -> None:
    folder = put(tmp_path / "p", {"a.png": None, "a.jpg": None, "a.txt": "x"})
    run(folder, "--write-files", tmp_path / "same")
    assert tree(tmp_path / "same") == {"a.txt": b"x\n"}
    (tmp_path / "m.json").write_text('{"a.png": {"caption": "y"}}')
    told = run(folder, "--input", tmp_path / "m.json", "--write-files", tmp_path / "new", code=2)
    assert "a.txt would be the text file of several pictures, but their captions differ" in told


def test_the_result_is_trained_on(run: Run, photos: Path, tmp_path: Path) -> None:
    """The plan of a run on the embedded model names the pictures and takes the cleaned text."""
    (photos / "d.caption").write_text("a dog")
    for name in ("meta.json", "meta.jsonl"):
        run(photos, "--recursive", "--clean", "--output", tmp_path / name)
        words = ["train", "--base", MODEL, "--images", photos, "--captions", tmp_path / name, "--resolution", 64]
        words += ["--output", tmp_path / "lora", "--dry-run", "--shuffle-caption"]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert main([str(word) for word in words]) == 0
        plan = " ".join(printed.getvalue().split())
        assert f"{name}: 5 pictures of {photos}" in plan and '"woman, smiling, long hair, ^_^" becomes' in plan


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", BAD_METADATA)
def test_a_bad_metadata_file_is_told(run: Run, photos: Path, tmp_path: Path, case: str) -> None:
    name, content, message = BAD_METADATA[case]
    (tmp_path / name).write_bytes(content)
    before = tree(tmp_path)
    told = run(photos, "--input", tmp_path / name, "--output", tmp_path / "new.json", code=2)
    assert message in told and str(tmp_path / name) in told
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone"], "there is no folder"),
        (["photos"], "nothing says where the result goes; give --output meta.json"),
        (["photos", "--output", "meta.txt"], "expected a name that ends with .json or .jsonl"),
        (["photos", "--output", "gone/meta.json"], "there is no folder gone"),
        (["photos", "--dry-run", "--rules", "x.toml"], "cleaning is off; add --clean"),
        (["photos", "--dry-run", "--replace", "a"], "--replace 'a': expected what to replace, a colon"),
        (["photos", "--dry-run", "--replace", "a:b:c"], "tags with a colon can be renamed in a file of --rules"),
        (["photos", "--dry-run", "--replace", "a:b", "b:a"], "rename tags in a circle"),
        (["photos", "--dry-run", "--add-tags", "a", "--remove-tags", "A"], "add_tags and remove_tags both name A"),
        (["photos", "--dry-run", "--add-tags", "a", "b", "--max-tags", "1"], "max_tags = 1 leaves room for fewer"),
        (["photos", "--dry-run", "--min-count", "0"], "--min-count 0: expected a whole number above 0"),
        (["photos", "--dry-run", "--caption-extension", "txt", "--tag-extension", ".TXT"], "are both .txt"),
        (["photos", "--dry-run", "--input", "gone.json"], "cannot be opened"),
        (["photos/.hidden/..", "--dry-run", "--input", "other.json"], "both mean"),
        (["inside", "--dry-run"], "no pictures found in inside; the folders in it hold 1 picture: add --recursive"),
        (["heic", "--dry-run"], "x.heic: pictures of a kind that is not read"),
        (["empty", "--dry-run", "--recursive"], "no pictures found in empty; check the path"),
        (["latin", "--dry-run"], "1 caption files are not UTF-8"),
    ],
)
def test_mistakes(
    run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, {"inside/x/a.png": None, "heic/x.heic": "x", "empty/.x/a.png": None, "latin/a.png": None})
    (tmp_path / "latin" / "a.txt").write_bytes("schön".encode("latin-1"))
    (tmp_path / "other.json").write_text('{"a": {}, "a.png": {}}')
    before = tree(tmp_path)
    assert message in run(*words, code=2)
    assert tree(tmp_path) == before


def test_the_folder_is_missing(run: Run) -> None:
    assert "missing: DIR" in run("--dry-run", code=2)
