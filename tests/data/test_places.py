"""Places: which source each is for, and which shards a pattern means."""

from pathlib import Path

import pytest

from lorasmith.data.places import is_hub_id, is_shards, shards_of, source_of
from lorasmith.errors import UserError
from tests.data.conftest import MakePicture


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(place: str | Path) -> list[str]:
    return [path.name for path in shards_of(str(place))]


def test_a_place_is_for_the_source_that_reads_it(tmp_path: Path, picture: MakePicture) -> None:
    touch(tmp_path / "tars" / "a.tar", tmp_path / "hub" / "data" / "train-0.parquet", tmp_path / "one.parquet")
    touch(tmp_path / "saved" / "state.json", tmp_path / "saved" / "data-0.arrow", tmp_path / "empty" / "notes.txt")
    touch(tmp_path / "photos" / "backup.tar", tmp_path / "sets" / "backup.parquet")
    picture("photos/a.png")
    picture("sets/10_sks dog/a.png")
    expected = {
        "tars": "webdataset", "a-{0..9}.tar": "webdataset", "*.tar": "webdataset", "x.tar.gz": "webdataset",
        "hub": "huggingface", "one.parquet": "huggingface", "saved": "huggingface",
        "photos": "folder", "sets": "folder", "empty": "folder", "missing": "folder",
    }  # fmt: skip
    assert {place: source_of(str(tmp_path / place)) for place in expected} == expected


def test_names_of_shards_and_of_hub_data_sets_are_known_by_their_form() -> None:
    assert [place for place in ("a.tar", "a.TGZ", "a.tar.zst", "star", "a.tar/b") if is_shards(place)] == [
        "a.tar", "a.TGZ", "a.tar.zst",
    ]  # fmt: skip
    assert [place for place in ("org/name", "a/b/c", "/a/b", "./b", "name") if is_hub_id(place)] == ["org/name"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("s-{000..002}.tar", ["s-000.tar", "s-001.tar", "s-002.tar"]),
        ("s-{8..11}.tar", ["s-8.tar", "s-9.tar", "s-10.tar", "s-11.tar"]),
        ("{a,b}-{0..1}.tar", ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]),
        ("one.tar", ["one.tar"]),
    ],
)
def test_braces_name_shards_that_need_not_be_here(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    assert names(tmp_path / pattern) == expected


def test_stars_and_folders_give_the_shards_that_are_here_sorted(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("b.tar", "a.tar", "c.txt", "[1].tar")))
    assert names(tmp_path / "?.tar") == ["a.tar", "b.tar"]
    assert names(tmp_path) == ["[1].tar", "a.tar", "b.tar"]
    assert names(tmp_path / "[1].tar") == ["[1].tar"]  # a file of that very name


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("no-*.tar", r"no tar shards found for .*no-\*\.tar; .* holds c\.txt"),
        ("", r"no tar shards found for .*; .* holds c\.txt"),
        ("gone/*.tar", "there is no folder .*gone; check the path"),
        ("s-{9..1}.tar", r"\{9\.\.1\} runs backwards; write \{1\.\.9\}"),
        ("s-{a..c}.tar", r"\{a\.\.c\} is no range of numbers; write \{000\.\.099\} or \{a,b\}"),
        ("s-{000.099}.tar", "is no range of numbers"),
        ("s-{0..9.tar", "braces in braces, or one without its partner"),
        ("{a,a}.tar", r"a\.tar more than once; each shard is given once"),
    ],
)
def test_a_pattern_that_means_nothing_is_refused(tmp_path: Path, pattern: str, message: str) -> None:
    touch(tmp_path / "c.txt")
    with pytest.raises(UserError, match=message):
        shards_of(str(tmp_path / pattern))


def test_shards_elsewhere_than_on_the_disk_are_refused() -> None:
    with pytest.raises(UserError, match="shards are read from the disk only; download them"):
        shards_of("https://example.org/set-{0..9}.tar")
    with pytest.raises(UserError, match="shards are read from the disk only"):
        shards_of(str(Path("https://example.org/a.tar")))
