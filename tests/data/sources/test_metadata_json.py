"""Metadata JSON: keys of every form, and what is said about keys and pictures that do not meet."""

import json
from pathlib import Path
from typing import Any

import pytest

from lorasmith.data.records import Scan
from lorasmith.data.sources.metadata_json import scan
from lorasmith.errors import UserError

from ..conftest import MakePicture


def write(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "meta.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def captions(result: Scan) -> dict[str, str]:
    return {record.path.name: record.caption for record in result.records}


def test_keys_may_be_stems_names_and_paths(tmp_path: Path, picture: MakePicture) -> None:
    for name in ("stem.png", "name.jpg", "absolute.png", "without.png", "sub/relative.png", "moved.png", "dot.v2.png"):
        picture(f"images/{name}")
    folder = tmp_path / "images"
    keys = {
        "stem": "stem.png",
        "name.jpg": "name.jpg",
        str(folder / "absolute.png"): "absolute.png",
        str(folder / "without"): "without.png",
        "sub\\relative": "relative.png",
        "C:\\old\\computer\\moved.png": "moved.png",
        "dot.v2": "dot.v2.png",
    }
    metadata = write(tmp_path, {key: {"caption": f"caption of {name}"} for key, name in keys.items()})
    result = scan(metadata, folder)
    assert captions(result) == {name: f"caption of {name}" for name in keys.values()}
    assert result.records == sorted(result.records, key=lambda record: record.path.as_posix())


@pytest.mark.parametrize(
    "entry, expected",
    [
        ({"caption": "a cat", "tags": "cat, sofa"}, "a cat, cat, sofa"),
        ({"caption": "a cat"}, "a cat"),
        ({"tags": "cat, sofa"}, "cat, sofa"),
        ({"caption": None, "tags": ["cat", "sofa"], "train_resolution": [512, 512]}, "cat, sofa"),
        ({"caption": " a cat\n", "tags": ""}, "a cat"),
    ],
)
def test_caption_and_tags_are_joined(
    tmp_path: Path, picture: MakePicture, entry: dict[str, Any], expected: str
) -> None:
    picture("a.png")
    record = scan(write(tmp_path, {"a": entry}), tmp_path, repeats=3).records[0]
    assert (record.caption, record.repeats, record.size, record.is_prior) == (expected, 3, (12, 8), False)
    assert record.group == tmp_path.name and len(record.content_hash) == 64


def test_keys_and_pictures_that_do_not_meet_are_reported(tmp_path: Path, picture: MakePicture) -> None:
    for name in ("a.png", "left.png"):
        picture(name)
    result = scan(write(tmp_path, {"a": {"tags": "x"}, "gone": {"tags": "y"}}), tmp_path)
    assert captions(result) == {"a.png": "x"}
    assert any("1 keys have no picture" in note and "gone" in note for note in result.notes)
    assert any("1 pictures in" in note and "left.png" in note for note in result.notes)


def test_pictures_without_text_need_a_default(tmp_path: Path, picture: MakePicture) -> None:
    for name in ("a.png", "b.png"):
        picture(name)
    metadata = write(tmp_path, {"a": {"tags": "x"}, "b": {"caption": " "}})
    with pytest.raises(UserError, match=r"1 pictures have neither caption nor tags[\s\S]*b\.png"):
        scan(metadata, tmp_path)
    result = scan(metadata, tmp_path, caption="a default")
    assert captions(result) == {"a.png": "x", "b.png": "a default"}
    assert any('1 pictures have neither caption nor tags and get "a default"' in note for note in result.notes)


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"a": {"caption": "x"},\n "b" {}}', "not valid JSON: .* at line 2, column 6"),
        ("", "not valid JSON: .* at line 1, column 1"),
        ('["a"]', "must hold an object .*a list"),
        ("{}", "must hold an object .*nothing"),
        ('{"a": "x"}', "key \"a\": expected an object .*found 'x'"),
        ('{"a": {"caption": 3}}', 'key "a": expected .*caption = 3'),
        ('{"a": {"tags": "x"}, "a": {"tags": "y"}}', "same key more than once: a"),
        ('{"a": {"tags": "x"}, "a.png": {"tags": "y"}}', 'the keys "a" and "a.png" both mean'),
        ('{"b": {"tags": "x"}}', 'none of the 1 keys .*"b".*has a picture in .*1 pictures, e.g. a.png'),
    ],
)
def test_a_broken_file_is_explained(tmp_path: Path, picture: MakePicture, content: str, message: str) -> None:
    picture("a.png")
    with pytest.raises(UserError, match=message):
        scan(write(tmp_path, content), tmp_path)


def test_a_stem_of_two_pictures_is_ambiguous(tmp_path: Path, picture: MakePicture) -> None:
    picture("a.jpg")
    picture("a.png")
    with pytest.raises(UserError, match=r'"a" fits a\.jpg and a\.png; write it with the extension'):
        scan(write(tmp_path, {"a": {"tags": "x"}}), tmp_path)
    assert captions(scan(write(tmp_path, {"a.jpg": {"tags": "x"}}), tmp_path)) == {"a.jpg": "x"}


def test_missing_and_wrongly_encoded_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be opened"):
        scan(tmp_path / "gone.json", tmp_path)
    (tmp_path / "meta.json").write_bytes('{"a": {"tags": "ä"}}'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        scan(tmp_path / "meta.json", tmp_path)


def test_unreadable_pictures_stop_or_are_left_out(tmp_path: Path, picture: MakePicture) -> None:
    picture("a.png")
    picture("b.png").write_bytes(b"")
    metadata = write(tmp_path, {"a": {"tags": "x"}, "b": {"tags": "y"}})
    with pytest.raises(UserError, match=r"1 of 2 pictures cannot be read[\s\S]*b\.png"):
        scan(metadata, tmp_path)
    assert captions(scan(metadata, tmp_path, skip_unreadable=True)) == {"a.png": "x"}


def test_lines_and_an_object_give_the_same(tmp_path: Path, picture: MakePicture) -> None:
    for name in ("a.png", "sub/b.jpg"):
        picture(name)
    lines = tmp_path / "meta.jsonl"
    lines.write_text('{"image_path": "a.png", "tags": "x"}\n\n{"image_key": "sub/b", "caption": "y"}\n', "utf-8")
    expected = scan(write(tmp_path, {"a": {"tags": "x"}, "sub/b.jpg": {"caption": "y"}}), tmp_path)
    assert scan(lines, tmp_path).records == expected.records
    lines.write_text('{"image_path": "a.png", "tags": "x"}\n{"image_key": "a", "caption": "y"}\n', "utf-8")
    with pytest.raises(UserError, match=r'jsonl, line 2: the keys "a.png" and "a" both mean .*\(.* in line 1\)'):
        scan(lines, tmp_path)


def test_a_bare_name_finds_its_picture_in_folders_inside_if_there_is_one(tmp_path: Path, picture: MakePicture) -> None:
    for name in (
        "i/x/one.png",
        "i/y/two.png",
        "i/z/two.png",
        "i/two.png",
        "i/x/three.png",
        "i/y/three.png",
        "i/.h/h.png",
    ):
        picture(name)
    folder = tmp_path / "i"
    keys = {"one": {"tags": "1"}, "two": {"tags": "2"}, "/elsewhere/z/two.png": {"tags": "3"}, "h": {"tags": "4"}}
    result = scan(write(tmp_path, keys), folder)
    assert {record.path.relative_to(folder).as_posix(): record.caption for record in result.records} == {
        "x/one.png": "1", "two.png": "2", "z/two.png": "3",
    }  # fmt: skip
    with pytest.raises(
        UserError, match=r'line 1: the key "three" fits .*x.three\.png and .*; write it with its folder'
    ):
        scan(write(tmp_path, {"three": {"tags": "x"}}), folder)
    with pytest.raises(UserError, match="none of the 1 keys"):  # a folder that is not there is not guessed
        scan(write(tmp_path, {"gone/one.png": {"tags": "x"}}), folder)
