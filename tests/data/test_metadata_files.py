"""Metadata files: both forms say the same, what is written is read again, and each mistake is told with its place."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.data.metadata_files import Entry, lines_to_write, read
from lorasmith.errors import UserError

GOOD = '{"image_path": "a.png", "caption": "a cat"}\n'
# name and content of a bad file -> what is said of it; tests/commands/test_captions.py gives them to the command too
BAD_METADATA: dict[str, tuple[str, bytes, str]] = {
    "empty": ("m.jsonl", b"\n \n", "it holds nothing"),
    "broken line": ("m.jsonl", f'{GOOD}{{"image_path": "b.png", "caption": "x}}\n'.encode(), "at line 2, column 36"),
    "cut off": ("m.jsonl", f'{GOOD}\n{{"image_path": "b.p'.encode(), "at line 3, column 16"),
    "two on a line": ("m.jsonl", f"{GOOD.strip()} {GOOD}".encode(), "Extra data at line 1, column 45"),
    "an array": ("m.jsonl", b'[{"image_path": "a.png"}]', 'line 1, column 1: expected an object such as {"image_path"'),
    "spread over lines": ("m.jsonl", b'{\n"a": {"caption": "x"}\n}', "must end with .json if it is one object"),
    "picture not named": ("m.jsonl", f'{GOOD}{{"caption": "x"}}'.encode(), "line 2, column 1: no picture is named"),
    "picture misnamed": ("m.jsonl", b'{"imagepath": "a.png"}', '"imagepath" is none of them'),
    "named twice": (
        "m.jsonl", b'{"image_path": "a.png", "image_key": "a"}', 'column 25: "image_path" and "image_key" both name',
    ),
    "picture is a number": ("m.jsonl", b'{"image_key": 7}', "column 15: image_key must be a picture's path as text"),
    "twice in the file": ("m.jsonl", f"{GOOD}\n{GOOD}".encode(), 'line 3, column 2: "a.png" stands in line 1 already'),
    "misspelt field": (
        "m.jsonl", b'{"file_name": "a.png", "captoin": "x"}', 'line 1, column 24: there is no field "captoin"; did you '
        "mean caption?",
    ),
    "another program's field": ("m.jsonl", b'{"file_name": "a.png", "text": "x"}', "did you mean caption?"),
    "unknown field": ("m.jsonl", b'{"file_name": "a.png", "q": 1}', "known are image_path, image_key, file_name, capt"),
    "caption is a number": (
        "m.jsonl", b'{"file_name": "a.png",\t"caption": 3}', "line 1, column 35: expected an object such as",
    ),
    "caption is a list": ("m.jsonl", b'{"file_name": "a.png", "caption": ["x"]}', "found caption = ['x']; caption is"),
    "tags with a number": ("m.jsonl", b'{"file_name": "a.png", "tags": ["x", 1]}', "tags is a text or a list of texts"),
    "field twice": ("m.jsonl", b'{"file_name": "a.png", "tags": "x", "tags": "y"}', '"tags" is given twice'),
    "half a character": ("m.jsonl", b'{"file_name": "a.png", "caption": "\\ud83d"}', "\\ud83d is half of a character"),
    "not UTF-8": ("m.jsonl", '{"file_name": "é.png"}'.encode("latin-1"), "is not UTF-8 (byte 15)"),
    "UTF-16": ("m.jsonl", GOOD.encode("utf-16"), "is not UTF-8 (byte 0)"),
    "JSON: lines": ("m.json", (GOOD + GOOD.replace("a.png", "b.png")).encode(), "the file's name must end with .jsonl"),
    "JSON: a list": ("m.json", b'[{"image_path": "a.png"}]', "it holds a list; a list of entries is written as .jsonl"),
    "JSON: unknown field": (
        "m.json", b'{"a": {"tags": "x"},\n "b": {\n  "tag": "x"}}',
        'line 3, column 3, key "b": there is no field "tag"; did you mean tags?',
    ),
    "JSON: a key twice": (
        "m.json", b'{"a": {"tags": "x"},\n "a": {"tags": "x"}}',
        'line 2, column 2, key "a": the same key more than once: a (first in line 1)',
    ),
    "JSON: no object": ("m.json", b'{"a":\n "x"}', "line 2, column 2, key \"a\": expected an object such as"),
    "JSON: an object too deep": ("m.json", b'{"a": {"caption": {"en": "x"}}}', "found caption = an object"),
    "JSON: no key": ("m.json", b'{"": {"caption": "x"}}', "an empty key names no picture"),
    "JSON: a comma too many": ("m.json", b'{"a": {"tags": "x"},}', "Expecting property name enclosed in double quotes"),
    "JSON: no colon": ("m.json", b'{"a" {"tags": "x"}}', "Expecting ':' delimiter at line 1, column 6"),
    "JSON: without end": ("m.json", b'{"a": {"tags": ' + b"[" * 100_000, "values that cannot be read"),
    "JSON: a huge number": ("m.json", b'{"a": {"image_size": 1' + b"0" * 100_000 + b"}}", "values that cannot be read"),
}  # fmt: skip


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("case", BAD_METADATA)
def test_each_mistake_is_told_with_its_place(tmp_path: Path, case: str) -> None:
    name, content, message = BAD_METADATA[case]
    with pytest.raises(UserError) as error:
        read(write(tmp_path, name, content))
    told = str(error.value)
    assert message in told and str(tmp_path / name) in told and "\n" not in told


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
KEYS = TEXTS.filter(lambda text: text.strip())
ENTRIES = st.builds(Entry, st.just("") | TEXTS, st.just("") | TEXTS, st.just({}) | st.just({"image_size": [8, 8]}))


@given(entries=st.dictionaries(KEYS, ENTRIES, min_size=1), name=st.sampled_from(["m.json", "m.jsonl", "m.JSONL"]))
def test_what_is_written_is_read_again_in_its_order(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, Entry], name: str
) -> None:
    path = write(tmp_path_factory.mktemp("files"), name, "".join(lines_to_write(Path(name), entries)))
    again = read(path)
    assert [(key, e.caption, e.tags, e.others) for key, e in again.items()] == [
        (key, e.caption, e.tags, e.others) for key, e in entries.items()
    ]
    if name == "m.json":
        assert json.loads(path.read_text("utf-8")).keys() == entries.keys()  # as other programs read it
    lines = path.read_text("utf-8").split("\n")
    assert all(json.dumps(key, ensure_ascii=False) in lines[entry.line - 1] for key, entry in again.items())


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
    cut=st.integers(0, 200),
)
def test_any_other_json_is_refused_in_words(tmp_path_factory: pytest.TempPathFactory, value: Any, cut: int) -> None:
    folder = tmp_path_factory.mktemp("files")
    for name in ("m.json", "m.jsonl"):
        for content in (json.dumps({"a": value})[:cut], json.dumps(value), json.dumps(value, indent=1)[:cut]):
            try:
                entries = read(write(folder, name, content))
            except UserError as error:
                assert str(folder / name) in str(error)
            else:  # then it is a metadata file: `json` reads the same out of it
                assert name == "m.json" and entries.keys() == json.loads(content).keys()


def test_the_keys_of_a_line_and_what_is_passed_over(tmp_path: Path) -> None:
    lines = [
        '{"image_path": "sub/a.png", "caption": "a cat", "tags": ["cat", "sofa"], "image_size": [8, 8]}', "", "  \r",
        '{"image_key": "b", "tags": "dog", "caption": null, "train_resolution": [512, 512]}\r',
        '  {"caption": "line\\u2028separators are no line ends", "file_name": "c.png"}',
    ]  # fmt: skip
    entries = read(write(tmp_path, "m.jsonl", b"\xef\xbb\xbf" + "\n".join(lines).encode()))
    assert {key: (entry.text, entry.line) for key, entry in entries.items()} == {
        "sub/a.png": ("a cat, cat, sofa", 1),
        "b": ("dog", 4),
        "c.png": ("line\u2028separators are no line ends", 5),
    }
    assert entries["sub/a.png"].others == {"image_size": [8, 8]}
    assert read(write(tmp_path, "raw.jsonl", '{"file_name": "a", "tags": "x\u2028y"}'))["a"].tags == "x\u2028y"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be opened"):
        read(tmp_path / "gone.jsonl")
