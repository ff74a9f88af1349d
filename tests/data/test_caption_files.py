"""Caption files: which file belongs to a picture, its first line, and every mistake named."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from lorasmith.data.caption_files import accepted_extensions, caption_problems, read_caption_files
from lorasmith.data.records import ImageRecord
from lorasmith.data.sources.folder import scan
from lorasmith.errors import UserError

from .conftest import MakePicture


def caption_of(picture: Path, given: str | None = None) -> str | None:
    found = read_caption_files(picture.parent, [picture], accepted_extensions(given))
    return found.first_lines.get(picture)


def captions(records: Sequence[ImageRecord]) -> dict[str, str]:
    return {record.path.name: record.caption for record in records}


@pytest.mark.parametrize("suffix", [".caption", ".txt", ".TXT", ".Caption"])
@pytest.mark.parametrize(
    "content",
    [b"a cat", b"a cat\n", b"  a cat \r\nsecond", b"\xef\xbb\xbfa cat\n", b"a cat\rsecond"],
)
def test_the_first_line_in_utf8_with_or_without_mark(picture: MakePicture, suffix: str, content: bytes) -> None:
    path = picture("a.png")
    path.with_suffix(suffix).write_bytes(content)
    assert caption_of(path) == "a cat"


def test_any_language_is_read(picture: MakePicture) -> None:
    path = picture("a.png")
    path.with_suffix(".txt").write_text("猫, Käthe, \u2028кот", encoding="utf-8")
    assert caption_of(path) == "猫, Käthe, \u2028кот"


def test_caption_comes_before_txt_and_a_given_extension_narrows(picture: MakePicture) -> None:
    path = picture("a.png")
    path.with_suffix(".txt").write_text("from txt")
    assert caption_of(path, ".caption") is None
    path.with_suffix(".caption").write_text("from caption")
    path.with_suffix(".tags").write_text("from tags")
    assert caption_of(path) == "from caption"
    assert caption_of(path, "txt") == caption_of(path, ".TXT") == "from txt"
    assert caption_of(path, "tags") == "from tags"


def test_two_pictures_of_one_name_share_a_file(picture: MakePicture) -> None:
    both = [picture("a.jpg"), picture("a.png")]
    both[0].with_suffix(".txt").write_bytes(b"\xff")
    found = read_caption_files(both[0].parent, both, accepted_extensions(None))
    assert list(found.files) == both and len(found.wrong_encoding) == 1
    both[0].with_suffix(".txt").write_text("shared")
    assert captions(scan(both[0].parent).records) == {"a.jpg": "shared", "a.png": "shared"}


WRONG = {
    "latin1": "Käthe".encode("latin-1"),
    "utf16": "a cat".encode("utf-16"),
    "utf16_without_mark": "a cat".encode("utf-16-le"),
    "shift_jis": "猫".encode("shift-jis"),
}


def test_all_files_in_another_encoding_are_named_with_the_fix(picture: MakePicture) -> None:
    for name, content in WRONG.items():
        picture(f"{name}.png").with_suffix(".txt").write_bytes(content)
    folder = picture("good.png").parent
    (folder / "good.txt").write_text("fine")
    (folder / "empty.txt").write_text("not of a picture")
    with pytest.raises(UserError, match="4 caption files are not UTF-8; save them again as UTF-8") as caught:
        scan(folder)
    assert all(str(folder / f"{name}.txt") in str(caught.value) for name in WRONG)
    assert "good.txt" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n", b" \r\nsecond line", b"\xef\xbb\xbf"])
def test_empty_captions_are_refused_with_the_fix(picture: MakePicture, content: bytes) -> None:
    path = picture("1_cat/a.png")
    path.with_suffix(".txt").write_bytes(content)
    found = read_caption_files(path.parent, [path], accepted_extensions(None))
    assert found.empty == [path.with_suffix(".txt")]
    assert "empty first line" in caption_problems([found])[0]
    with pytest.raises(UserError, match=r"1 caption files have an empty first line.*delete the file"):
        scan(path.parent)


def test_all_kinds_of_mistakes_are_said_at_once(picture: MakePicture) -> None:
    picture("a.png").with_suffix(".txt").write_bytes(b"\xff\xfe")
    picture("b.png").with_suffix(".txt").write_bytes(b"")
    folder = picture("c.png").parent
    with pytest.raises(UserError, match=r"(?s)not UTF-8.*a\.txt.*empty first line.*b\.txt.*no caption.*c\.png"):
        scan(folder)


def test_pictures_cut_around_a_face_share_the_caption_of_their_picture(picture: MakePicture) -> None:
    path = picture("photo_300_200_64_80.png")
    assert caption_of(path) is None
    (path.parent / "photo.txt").write_text("a woman", encoding="utf-8")
    assert caption_of(path) == "a woman"
    (path.parent / "photo_300_200_64_80.txt").write_text("a face", encoding="utf-8")
    assert caption_of(path) == "a face"
    other = picture("photo_a_b_c_d.png")  # no face: four words
    assert caption_of(other) is None
