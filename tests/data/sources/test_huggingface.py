"""Hugging Face data sets, made by the library itself: every form, columns guessed and named, mistakes in one line."""

import io
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from lorasmith.data.captions import CaptionOptions
from lorasmith.data.images import open_record
from lorasmith.data.records import Scan
from lorasmith.data.sources.huggingface import scan_subset
from lorasmith.data.subsets import Subset
from lorasmith.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


def png(seed: int = 0, size: tuple[int, int] = (12, 8)) -> bytes:
    data = io.BytesIO()
    Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3)).save(data, "PNG")
    return data.getvalue()


def pictures(number: int = 2) -> list[dict[str, Any]]:
    return [{"bytes": png(i), "path": f"{i}.png"} for i in range(number)]


def table(columns: dict[str, Any], **features: Any) -> datasets.Dataset:
    """Return rows, the column `image` (if there is one) of type Image."""
    made = datasets.Dataset.from_dict(columns)
    if isinstance(columns.get("image", [b""])[0], dict):
        features.setdefault("image", datasets.Image())
    for name, feature in features.items():
        made = made.cast_column(name, feature)
    return made


def parquet(folder: Path, columns: dict[str, Any], **features: Any) -> Path:
    folder.mkdir(exist_ok=True)
    table(columns, **features).to_parquet(folder / "train-00000-of-00001.parquet", batch_size=100)
    return folder


def scan(place: Path | str, **options: Any) -> Scan:
    return scan_subset(Subset(place=str(place), source="huggingface", **options))


def texts(found: Scan) -> list[str]:
    return [record.caption for record in found.records]


def imagefolder(folder: Path, lines: str) -> Path:
    folder.mkdir()
    for i in range(2):
        (folder / f"{i}.png").write_bytes(png(i))
    (folder / "metadata.jsonl").write_text(lines)
    return folder


LINES = '{"file_name": "0.png", "text": "zero"}\n{"file_name": "1.png", "text": "one"}\n'
ROWS: dict[str, Any] = {"image": pictures(), "text": ["zero", "one"]}


def as_csv(folder: Path) -> Path:
    imagefolder(folder, "")
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,text\n0.png,zero\n1.png,one\n")
    return folder


def as_saved(folder: Path) -> Path:
    table(ROWS).save_to_disk(folder)
    return folder


def as_saved_splits(folder: Path) -> Path:
    datasets.DatasetDict({"train": table(ROWS)}).save_to_disk(folder)
    return folder


def as_file(folder: Path) -> Path:
    return parquet(folder, ROWS) / "train-00000-of-00001.parquet"


FORMS: list[Callable[[Path], Path]] = [
    lambda folder: imagefolder(folder, LINES), as_csv, as_saved, as_saved_splits, as_file,
    lambda folder: parquet(folder, ROWS),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=["jsonl", "csv", "saved", "saved splits", "file", "parquet"])
def test_every_form_gives_the_same_pictures(tmp_path: Path, form: Callable[[Path], Path]) -> None:
    found = scan(form(tmp_path / "set"), repeats=3)
    assert [(record.path.name, record.caption, record.size, record.repeats) for record in found.records] == [
        ("0.png", "zero", (12, 8), 3), ("1.png", "one", (12, 8), 3),
    ]  # fmt: skip
    for i, record in enumerate(found.records):
        assert record.data is not None and record.data.read() == png(i)
        with Image.open(io.BytesIO(png(i))) as image:
            assert open_record(record).tobytes() == image.tobytes()
    assert "2 pictures from the column image, each 3 times an epoch; captions: 2 from text" in found.notes[0]


def test_no_picture_is_loaded_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = parquet(tmp_path / "set", {"image": pictures(3), "text": ["a"] * 3})
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("decoded by datasets"))
    record = scan(place).records[0]
    assert record.data is not None
    before = pyarrow.total_allocated_bytes()
    assert record.data.read() == png(0)
    assert pyarrow.total_allocated_bytes() - before < len(png(0)) + 4096


@pytest.mark.parametrize(
    ("columns", "options", "expected"),
    [
        ({"caption": ["a", "b"], "tags": ["x, y", None]}, {}, ["a, x, y", "b"]),
        ({"caption": ["a", "b"], "tags": [["x", "y"], []]}, {}, ["a, x, y", "b"]),
        ({"tags": [["x", "y"], ["z"]]}, {}, ["x, y", "z"]),
        ({"text": ["a", "b"], "tags": ["x", "y"]}, {}, ["a", "b"]),
        ({"Prompt": ["a\nb", " c "]}, {}, ["a", "c"]),
        ({"text": [["a", "b"], ["c"]]}, {}, ["a", "c"]),
        ({"text": [["a", "b"], ["c"]]}, {"captions": CaptionOptions(wildcards=True)}, ["a\nb", "c"]),
        ({"text": ["a", "b"], "blip": ["c", "d"]}, {"caption_column": "blip"}, ["c", "d"]),
        ({"text": ["a", None]}, {"caption": "default"}, ["a", "default"]),
        ({"number": [1, 2]}, {"caption": "default"}, ["default", "default"]),
    ],
)
def test_captions_are_found(tmp_path: Path, columns: Any, options: Any, expected: list[str]) -> None:
    assert texts(scan(parquet(tmp_path / "set", {"image": pictures(), **columns}), **options)) == expected


def test_names_of_classes_are_captions_when_asked_for(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["cat", "dog"])
    place = parquet(tmp_path / "set", {"image": pictures(), "label": [1, 0]}, label=names)
    assert texts(scan(place, caption_column="label")) == ["dog", "cat"]
    with pytest.raises(UserError, match=r"no column is named text, caption[\s\S]*image: Image\n  label: ClassLabel"):
        scan(place)


@pytest.mark.parametrize("kind", ["binary", "files", "struct"])
def test_columns_of_other_types_are_pictures_when_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / "x.png").write_bytes(png(5))
    values = {
        "binary": [png(5)], "files": [str(tmp_path / "x.png")], "struct": [{"bytes": png(5), "path": None}],
    }  # fmt: skip
    (tmp_path / "set").mkdir()
    written = pyarrow.table({"photo": values[kind], "text": ["a"]})
    pyarrow.parquet.write_table(written, tmp_path / "set" / "a.parquet")
    (record,) = scan(tmp_path / "set", image_column="photo").records
    assert record.data is not None and record.data.read() == png(5)
    assert record.path.name == ("x.png" if kind == "files" else "row 0")


def test_another_split_is_taken_when_asked_for(tmp_path: Path) -> None:
    parquet(tmp_path / "set", {"image": pictures(), "text": ["a", "b"]})
    table({"image": pictures(1), "text": ["t"]}).to_parquet(tmp_path / "set" / "test-00000-of-00001.parquet")
    assert texts(scan(tmp_path / "set")) == ["a", "b"]
    assert texts(scan(tmp_path / "set", dataset_split="test")) == ["t"]


def test_an_edited_data_set_is_read_anew(tmp_path: Path) -> None:
    place = imagefolder(tmp_path / "set", LINES)
    assert texts(scan(place)) == ["zero", "one"]
    (place / "metadata.jsonl").write_text(LINES.replace("one", "another"))
    assert texts(scan(place)) == ["zero", "another"]


TWO: dict[str, Any] = {"image": pictures(), "text": ["a", "b"]}
BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {**TWO, "caption": ["a", "b"]},
        {},
        r"text and caption may both be .*--caption-column\.\n  image: Image\n  text: st",
    ),
    ({"image": pictures()}, {}, r"no column is named text, caption, prompt or tags; .*--caption .*\n  image: Image"),
    (TWO, {"caption_column": "txt"}, r"--caption-column txt: there is no such column; did you mean text\?\n  image"),
    ({**TWO, "n": [1, 2]}, {"caption_column": "n"}, r"the column n is of type int64, but captions are texts, lists of"),
    (TWO, {"image_column": "x"}, r"--image-column x: there is no such column; take one of these\.\n  image: Image"),
    ({**TWO, "n": [1, 2]}, {"image_column": "n"}, r"--image-column n is of type int64, but pictures are of type Image"),
    (
        {"photo": [b"", b""], "text": ["a", "b"]},
        {},
        r"no column is of type Image; name .*--image-column\.\n  photo: bin",
    ),
    ({"image": pictures(), "text": ["a", " "]}, {}, r"1 of 2 rows have no text in text \(rows 1, counted from 0\)"),
    (TWO, {"dataset_split": "val"}, r"--dataset-split val: .* has no such split\. .*'train'"),
    (
        {"image": [{"bytes": b"x", "path": "a.png"}], "text": ["a"]},
        {},
        r"1 of 1 .*\n  .*row 0.a\.png: not a picture in",
    ),
    ({"image": [*pictures(1), None], "text": ["a", "b"]}, {}, r"row 1: its bytes cannot .*the row holds no picture"),
    (
        {"image": [{"bytes": None, "path": "http://x/a.png"}], "text": ["a"]},
        {},
        r"names http://x/a\.png, and nothing is",
    ),
    ({"image": [{"bytes": None, "path": "/gone/a.png"}], "text": ["a"]}, {}, r"row 0.a\.png: its bytes .*No such file"),
]


@pytest.mark.parametrize(("columns", "options", "message"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_what_cannot_be_meant_is_refused(tmp_path: Path, columns: Any, options: Any, message: str) -> None:
    place = parquet(tmp_path / "set", columns)
    with pytest.raises(UserError, match=message):
        scan(place, **options)


def test_several_columns_of_pictures_are_to_be_told_apart(tmp_path: Path) -> None:
    columns = {"image": pictures(), "mask": pictures(), "text": ["a", "b"]}
    place = parquet(tmp_path / "set", columns, mask=datasets.Image())
    with pytest.raises(UserError, match="2 columns hold pictures, image, mask; name the one to train on"):
        scan(place)
    assert len(scan(place, image_column="mask").records) == 2


def test_rows_that_cannot_be_read_are_left_out_when_asked_for(tmp_path: Path) -> None:
    rows = [*pictures(1), {"bytes": b"x", "path": None}, None]
    place = parquet(tmp_path / "set", {"image": rows, "text": ["a", "b", "c"]})
    found = scan(place, skip_unreadable=True)
    assert texts(found) == ["a"]
    assert any("row 1: not a picture" in note and "row 2: its bytes" in note for note in found.notes)


def test_places_that_hold_no_data_set_are_told_of_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.parquet").write_bytes(b"nonsense")
    for name in ("empty", "broken"):
        with pytest.raises(UserError, match=f"{name} cannot be read as a Hugging Face data set .* with parquet files"):
            scan(tmp_path / name)
    with pytest.raises(UserError, match=r"there is no folder .*gone"):
        scan(tmp_path / "gone")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"there is no folder org/name, and the Hugging Face hub does not .*\(.*\); check"
    ):
        scan("org/name")
    assert capfd.readouterr() == ("", "")


def test_without_the_library_the_way_to_get_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"not installed: pip install 'lorasmith\[datasets\]'"):
        scan(tmp_path)
