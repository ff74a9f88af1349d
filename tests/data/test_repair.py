"""The repaired copy: every picture and caption gets a place of its own, and nothing is lost or overwritten."""

from pathlib import Path, PurePath

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lorasmith.data.repair import Source, plan, require_new, write
from lorasmith.errors import UserError

_sources = st.builds(
    Source,
    picture=st.sampled_from(["a.jpg", "a.png", "A.png", "a-2.png", "b.gif"]).map(lambda name: Path("photos") / name),
    folder=st.sampled_from([PurePath("."), PurePath("10_sks dog")]),
    caption=st.sampled_from([None, Path("photos/a.txt"), Path("photos/a.TXT")]),
    caption_extension=st.just(".txt"),
    is_converted=st.booleans(),
)


@given(st.lists(_sources, max_size=12))
def test_no_two_things_go_to_one_place_and_a_caption_goes_with_its_picture(sources: list[Source]) -> None:
    copies = plan(sources)
    assert [copy.source for copy in copies] == sources
    places = [str(place).lower() for copy in copies for place in (copy.picture, copy.caption) if place is not None]
    assert len(places) == len(set(places))
    stems = [(copy.picture.parent, copy.picture.stem.lower()) for copy in copies]
    assert len(stems) == len(set(stems))  # two pictures of one name would share a caption
    for copy in copies:
        assert copy.picture.parent == copy.source.folder
        assert copy.picture.suffix == (".png" if copy.source.is_converted else copy.source.picture.suffix)
        if copy.caption is not None:
            assert copy.caption == copy.picture.with_suffix(".txt")


def source(path: Path, caption: Path | None = None, *, is_converted: bool = False) -> Source:
    return Source(path, PurePath("1_a"), caption, ".txt", is_converted)


def test_bytes_are_copied_and_conversions_made(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 6), (9, 80, 70, 0)).save(tmp_path / "print.tif")
    (tmp_path / "photo.jpg").write_bytes(b"as it is")
    (tmp_path / "photo.TXT").write_bytes("caf\xe9".encode("utf-16"))
    (tmp_path / "print.txt").write_bytes("caf\xe9".encode("cp1252"))
    sources = [
        source(tmp_path / "photo.jpg", tmp_path / "photo.TXT"),
        source(tmp_path / "print.tif", tmp_path / "print.txt", is_converted=True),
    ]
    write(plan(sources), tmp_path / "new", num_threads=2)
    folder = tmp_path / "new" / "1_a"
    assert (folder / "photo.jpg").read_bytes() == b"as it is"
    assert (folder / "photo.txt").read_text(encoding="utf-8") == "caf\xe9"
    assert (folder / "print.txt").read_bytes() == "caf\xe9".encode("cp1252")
    with Image.open(folder / "print.png") as image:
        assert (image.mode, image.size) == ("RGB", (8, 6))


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_nothing_is_overwritten(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "new"
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "absent")
    with pytest.raises(UserError, match="exists already"):
        require_new(target)
    with pytest.raises(UserError, match="exists already"):
        write([], target, num_threads=1)


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write(plan([source(tmp_path / "absent.jpg")]), tmp_path / "new", num_threads=1)
    assert list(tmp_path.iterdir()) == []
