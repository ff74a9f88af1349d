"""Folders of pictures: the three layouts, and what is said about everything that is not used."""

import hashlib
from pathlib import Path

import pytest

from lorasmith.data.records import Scan
from lorasmith.data.sources.folder import scan
from lorasmith.errors import UserError

from ..conftest import MakePicture


def has_note(result: Scan, *parts: str) -> bool:
    return any(all(part in note for part in parts) for note in result.notes)


def test_a_parent_of_dreambooth_folders(tmp_path: Path, picture: MakePicture) -> None:
    for name in ("10_sks dog/b.png", "10_sks dog/a.JPG", "3_cat_of_mine/c.webp"):
        picture(name)
    (tmp_path / "10_sks dog" / "b.txt").write_text("a dog on grass")
    result = scan(tmp_path)
    rows = [(r.path.relative_to(tmp_path).as_posix(), r.caption, r.repeats, r.group) for r in result.records]
    assert rows == [
        ("10_sks dog/a.JPG", "sks dog", 10, "10_sks dog"),
        ("10_sks dog/b.png", "a dog on grass", 10, "10_sks dog"),
        ("3_cat_of_mine/c.webp", "cat_of_mine", 3, "3_cat_of_mine"),
    ]
    record = result.records[0]
    assert (record.size, record.is_prior) == ((12, 8), False)
    assert record.content_hash == hashlib.sha256(record.path.read_bytes()).hexdigest()
    assert has_note(result, "10_sks dog: 2 pictures, each 10 times", "1 caption from .txt files", '"sks dog"')
    assert has_note(
        result, "3_cat_of_mine: 1 picture, each 3 times", '1 caption from the folder\'s name, "cat_of_mine"'
    )


def test_one_dreambooth_folder_itself(tmp_path: Path, picture: MakePicture, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = picture("5_sks dog/a.png").parent
    for given in (folder, tmp_path / "5_sks dog" / "."):
        record = scan(given).records[0]
        assert (record.caption, record.repeats, record.group) == ("sks dog", 5, "5_sks dog")
    monkeypatch.chdir(folder)
    assert scan(Path(".")).records[0].caption == "sks dog"


def test_a_leaf_keeps_to_its_own_pictures(picture: MakePicture) -> None:
    folder = picture("5_dog/a.png").parent
    picture("5_dog/1_old/b.png")
    result = scan(folder)
    assert [record.path.name for record in result.records] == ["a.png"]
    assert has_note(result, "1_old: 1 picture in this subfolder, not used")


def test_a_plain_folder_with_caption_files_and_a_default(tmp_path: Path, picture: MakePicture) -> None:
    picture("a.png").with_suffix(".txt").write_text("a cat")
    picture("b.png")
    result = scan(tmp_path, caption="a default", repeats=4)
    assert [(r.caption, r.repeats, r.group) for r in result.records] == [
        ("a cat", 4, tmp_path.name),
        ("a default", 4, tmp_path.name),
    ]
    assert has_note(result, "each 4 times", "1 caption from .txt files", '1 caption from the default, "a default"')
    assert not has_note(result, "not used")


def test_pictures_without_any_caption_are_never_trained_silently(tmp_path: Path, picture: MakePicture) -> None:
    picture("a.png").with_suffix(".txt").write_text("a cat")
    picture("b.png")
    picture("c.png")
    with pytest.raises(UserError, match=r"2 pictures have no caption.*\.caption or \.txt.*--caption") as caught:
        scan(tmp_path)
    assert str(tmp_path / "b.png") in str(caught.value) and str(tmp_path / "c.png") in str(caught.value)
    with pytest.raises(UserError, match="1_your words") as caught:
        scan(tmp_path, is_prior=True)
    assert "--caption" not in str(caught.value)
    assert [record.caption for record in scan(tmp_path, caption="").records] == ["a cat", "", ""]


def test_regularization_pictures_take_the_name_of_their_folder(tmp_path: Path, picture: MakePicture) -> None:
    picture("1_dog/a.png")
    records = scan(tmp_path, is_prior=True).records
    assert [(r.caption, r.is_prior, r.repeats) for r in records] == [("dog", True, 1)]


def test_what_is_left_aside_is_said(tmp_path: Path, picture: MakePicture) -> None:
    for name in ("1_dog/a.png", "loose.png", "other/b.png", "0_none/c.png"):
        picture(name)
    (tmp_path / "2_empty").mkdir()
    for name in ("photo.HEIC", "b.txt"):
        (tmp_path / "1_dog" / name).write_bytes(b"words")
    (tmp_path / "1_dog" / "a.caption").write_text("first\nsecond")
    result = scan(tmp_path)
    assert [record.path.name for record in result.records] == ["a.png"]
    for parts in (
        ["1 picture directly in", "loose.png"],
        ["other: 1 picture", "N_identifier class"],
        ["0_none: 1 picture", "N from 1"],
        ["2_empty: holds no pictures"],
        ["1_dog: 1 picture of a kind that is not read", "photo.HEIC"],
        ["1_dog: 1 text file not used", "b.txt"],
        ["1_dog: only the first line is used of 1 caption file ", "a.caption"],
    ):
        assert has_note(result, *parts), parts


def test_a_narrowed_extension_shows_what_it_passes_over(tmp_path: Path, picture: MakePicture) -> None:
    picture("1_dog/a.png").with_suffix(".txt").write_text("words")
    result = scan(tmp_path, caption_extension=".caption")
    assert result.records[0].caption == "dog"
    assert has_note(result, "1 text file not used", "a.txt")


def test_an_option_that_changes_nothing_is_said(tmp_path: Path, picture: MakePicture) -> None:
    picture("2_dog/a.png")
    result = scan(tmp_path, caption="a default", repeats=7)
    assert (result.records[0].caption, result.records[0].repeats) == ("dog", 2)
    assert has_note(result, 'caption = "a default" is not used') and has_note(result, "repeats = 7 is not used")
    picture("plain/a.png").with_suffix(".txt").write_text("words")
    result = scan(tmp_path / "plain", caption="a default", repeats=7)
    assert has_note(result, 'caption = "a default" is not used') and not has_note(result, "repeats = 7")


@pytest.mark.parametrize(
    "pictures, given, expected, number",
    [
        (["set/10_dog/a.png", "set/10_dog/b.png"], ".", "set", 2),  # one too high
        (["10_dog/a.png", "5_cat/b.png", "5_cat/c.png"], "10_dog/masks", "10_dog", 1),  # one too low
        (["a.png", "b.png", "c.png"], "masks", ".", 3),
        (["photos/a.png"], ".", "photos", 1),
        (["10_dog/a.png", "5_cat/b.png"], "7_empty", ".", 2),
    ],
)
def test_no_pictures_says_where_there_are_some(
    tmp_path: Path, picture: MakePicture, pictures: list[str], given: str, expected: str, number: int
) -> None:
    for name in pictures:
        picture(name)
    (tmp_path / given).mkdir(exist_ok=True)
    with pytest.raises(UserError, match="no pictures found in") as caught:
        scan(tmp_path / given)
    assert f"{(tmp_path / expected).resolve()} holds {number}" in str(caught.value)


def test_no_pictures_anywhere(tmp_path: Path) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    with pytest.raises(UserError, match=r"looked for .*.png.*check the path"):
        scan(tmp_path / "x" / "y")
    (tmp_path / "x" / "y" / "a.heic").touch()
    with pytest.raises(UserError, match=r"a\.heic: pictures of a kind that is not read"):
        scan(tmp_path / "x" / "y")


def test_a_missing_folder_suggests_its_neighbour(tmp_path: Path, picture: MakePicture) -> None:
    path = picture("photos/a.png")
    with pytest.raises(UserError, match=r"no folder .*photo; did you mean .*photos\?"):
        scan(tmp_path / "photo")
    with pytest.raises(UserError, match="check the path"):
        scan(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(UserError, match="is a file"):
        scan(path)


def test_unreadable_pictures_stop_or_are_left_out(tmp_path: Path, picture: MakePicture) -> None:
    picture("1_dog/good.png")
    bad = picture("1_dog/bad.png")
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(UserError, match=r"1 of 2 pictures cannot be read[\s\S]*bad\.png"):
        scan(tmp_path)
    result = scan(tmp_path, skip_unreadable=True)
    assert [record.path.name for record in result.records] == ["good.png"]
    assert has_note(result, "left out because they cannot be read (1 of 2)", "bad.png")


@pytest.mark.parametrize(("name", "is_doubted"), [("2023_holiday", True), ("200_holiday", False)])
def test_a_year_that_is_taken_for_repeats_is_said(
    tmp_path: Path, picture: MakePicture, name: str, is_doubted: bool
) -> None:
    picture(f"{name}/a.png")
    assert has_note(scan(tmp_path), name, "taken as the number of repeats", "rename") == is_doubted


def test_folders_in_folders_follow_the_nearest_name_above_them(picture: MakePicture) -> None:
    root = picture("set/top.png").parent
    picture("set/plain/deep/one.png")
    picture("set/20_sks dog/two.png")
    picture("set/20_sks dog/closeups/three.png")
    picture("set/20_sks dog/3_sks puppy/four.png")
    picture("set/.hidden/five.png")
    found = {
        record.path.name: (record.caption, record.repeats, record.group)
        for record in scan(root, caption="a thing", repeats=2, recursive=True).records
    }
    assert found == {
        "top.png": ("a thing", 2, "set"),
        "one.png": ("a thing", 2, "plain/deep"),
        "two.png": ("sks dog", 20, "20_sks dog"),
        "three.png": ("sks dog", 20, "20_sks dog/closeups"),
        "four.png": ("sks puppy", 3, "20_sks dog/3_sks puppy"),
    }
    left_aside = scan(root / "plain" / "deep", caption="a thing", recursive=True)
    assert [record.path.name for record in left_aside.records] == ["one.png"]
