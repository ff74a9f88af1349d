"""The folder of pictures that are compared: nothing of anyone's is replaced; what was drawn before is used again."""

from pathlib import Path

import pytest
from PIL import Image

from lorasmith.errors import UserError
from lorasmith.picture_run.comparison_folder import PAGE, ComparisonFolder

MARKS = {"a.png": "1", "b.png": "2"}


def begun(path: Path, marks: dict[str, str], *names: str) -> ComparisonFolder:
    folder = ComparisonFolder(path, marks)
    for name in names:
        folder.add(name, Image.new("RGB", (4, 4), "red"), "text")
    return folder


def test_a_grid_goes_on_where_it_was_begun(tmp_path: Path) -> None:
    begun(tmp_path / "grid", MARKS, "a.png")
    (tmp_path / "grid" / "cells" / ".b.png.x1").write_bytes(b"killed while writing")
    again = ComparisonFolder(tmp_path / "grid", MARKS)
    assert again.path == tmp_path / "grid" and again.drawn == {"a.png": again.file("a.png")}
    with Image.open(again.file("a.png")) as picture:
        assert picture.info["parameters"] == "text"


@pytest.mark.parametrize(
    "what", ["other mark", "other picture", "foreign file", "broken", "page", "file", "no picture"]
)
def test_another_folder_is_taken_where_anything_else_lies(what: str, tmp_path: Path) -> None:
    place = tmp_path / "grid"
    if what == "file":
        place.write_text("mine")
    else:
        begun(place, {**MARKS, "c.png": "3"} if what == "other picture" else MARKS, "a.png", "b.png")
    if what == "other mark":
        begun(tmp_path / "grid-2", MARKS)
    elif what == "other picture":
        begun(place, {**MARKS, "c.png": "3"}, "c.png")
    elif what == "foreign file":
        (place / "notes.txt").write_text("mine")
    elif what == "broken":
        (place / "cells" / "a.png").write_bytes((place / "cells" / "a.png").read_bytes()[:-20])
    elif what == "page":
        (place / PAGE).write_text("mine")
    elif what == "no picture":
        (place / "cells" / "a.png").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    marks = {**MARKS, "a.png": "other"} if what == "other mark" else MARKS
    folder = ComparisonFolder(place, marks)
    folder.take_over()
    folder.add("b.png", Image.new("RGB", (4, 4)), "")
    assert folder.path == tmp_path / "grid-2"
    assert before.items() <= {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}.items()


def test_sheets_of_a_whole_grid_are_drawn_again(tmp_path: Path) -> None:
    """It was stopped while it wrote them, before the page."""
    place = tmp_path / "grid"
    begun(place, MARKS, "a.png", "b.png")
    Image.new("RGB", (4, 4)).save(place / "sheet-1.png")
    assert ComparisonFolder(place, MARKS).path == place
    (place / "cells" / "b.png").unlink()
    assert ComparisonFolder(place, MARKS).path == tmp_path / "grid-2"


def test_pictures_of_a_grid_that_is_done_are_taken_over(tmp_path: Path) -> None:
    place = tmp_path / "grid"
    done = begun(place, MARKS, "a.png", "b.png")
    (place / PAGE).write_text("page")
    more = ComparisonFolder(place, {"a.png": "1", "b.png": "changed", "c.png": "3"})
    assert more.path == tmp_path / "grid-2" and more.drawn == {"a.png": done.file("a.png")}
    more.take_over()
    assert more.file("a.png").read_bytes() == done.file("a.png").read_bytes() and not more.file("b.png").exists()
    assert ComparisonFolder(place, {"a.png": "1", "b.png": "changed", "c.png": "3"}).path == more.path


def test_a_folder_without_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    assert ComparisonFolder(Path("."), MARKS).path == Path(".")
    (place / "mine").write_text("")
    assert ComparisonFolder(Path("."), MARKS).path == tmp_path / "work-2"
    with pytest.raises(UserError, match="there is no free folder of this name"):
        ComparisonFolder(Path("/"), MARKS)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no folder can be made there"):
        ComparisonFolder(tmp_path / "file" / "grid", MARKS).take_over()
