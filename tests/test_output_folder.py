"""The folder of a run: the document's names, nothing overwritten, nothing of the user's own touched."""

from pathlib import Path

import pytest

from lorasmith.errors import UserError
from lorasmith.output_folder import OutputFolder, check_free, move_aside


def folder(path: Path, name: str | None = None, extension: str = "safetensors") -> OutputFolder:
    return OutputFolder(path, name, extension)


def everything_of(run: OutputFolder) -> list[Path]:
    return [run.run_file, run.loss_log, run.tensorboard / "events", run.samples / "sheet.png", run.states / "a" / "b",
            run.report / "index.html", run.last(), run.epoch(1), run.epoch(123456), run.step(7)]  # fmt: skip


def write(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)


def contents(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


def test_files_are_called_as_in_the_document() -> None:
    run = folder(Path("out"))
    assert [run.last().name, run.epoch(1).name] == ["last.safetensors", "epoch-000001.safetensors"]
    named = folder(Path("out"), "dog", "pt")
    assert [named.last().name, named.epoch(12).name, named.step(34).name] == [
        "dog.pt", "dog-000012.pt", "dog-step00000034.pt",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [None, "dog"])
def test_no_two_files_of_a_run_share_a_place(name: str | None) -> None:
    run = folder(Path("out"), name)
    paths = [run.last(), *(make(number) for make in (run.epoch, run.step) for number in (1, 2, 10, 100))]
    assert len(set(paths)) == len(paths)
    assert {path.parent for path in paths} == {Path("out")}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_free_place_is_accepted_and_nothing_is_made(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "there").mkdir()
    for path in (tmp_path / "there", tmp_path / "not" / "yet"):
        check_free(folder(path), overwrite=overwrite)
        assert move_aside(folder(path)) is None
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


@pytest.mark.parametrize("name", [None, "dog"])
@pytest.mark.parametrize("number", range(10))
def test_any_one_thing_of_a_run_makes_the_place_taken(tmp_path: Path, name: str | None, number: int) -> None:
    run = folder(tmp_path / "my lora", name)
    path = everything_of(run)[number]
    write(path)
    if path == run.run_file:
        return check_free(run, overwrite=False)  # it ended before it saved anything
    with pytest.raises(UserError) as error:
        check_free(run, overwrite=False)
    top = path.relative_to(run.path).parts[0]
    assert all(part in str(error.value) for part in (str(run.path), top, "--resume", "--overwrite"))
    check_free(run, overwrite=True)
    assert path.is_file()
    return None


def test_what_ended_before_it_saved_anything_is_moved_aside_and_no_hindrance(tmp_path: Path) -> None:
    run = folder(tmp_path)
    write(run.run_file, run.loss_log, run.samples / "step-00000000" / "00.png")
    before = contents(tmp_path)
    check_free(run, overwrite=False)
    assert move_aside(run) == tmp_path / "old-1"
    assert contents(tmp_path / "old-1") == before


@pytest.mark.parametrize("name", [None, "dog"])
def test_an_older_run_is_moved_aside_whole_to_a_fresh_name_each_time(tmp_path: Path, name: str | None) -> None:
    run = folder(tmp_path, name)
    for number in (1, 2, 3):
        write(*everything_of(run))
        before = contents(tmp_path)
        assert move_aside(run) == tmp_path / f"old-{number}"
        moved = {name: text for name, text in before.items() if not name.startswith("old-")}
        assert contents(tmp_path / f"old-{number}") == moved
        assert not [path for path in everything_of(run) if path.exists()]
        assert {name: text for name, text in before.items() if name.startswith("old-")}.items() <= contents(
            tmp_path
        ).items()
        check_free(run, overwrite=False)


@pytest.mark.parametrize(
    ("name", "others"),
    [
        (None, ["notes.txt", "epoch-000001.txt", "dog.safetensors", "old-1/last.safetensors", "model.safetensors"]),
        (None, ["epoch-final.safetensors", "step-by-step.pt", "last.one.safetensors"]),
        ("dog", ["last.safetensors", "dogs.safetensors", "dog.png", "mydog.safetensors"]),
        ("dog", ["dog-v2.safetensors", "dog-style-000001.safetensors", "dog-step1.safetensors", "dog.v2.safetensors"]),
        ("d*g", ["dog.safetensors", "d*gs.safetensors"]),
        ("d.g", ["dog.safetensors", "dog-000001.safetensors"]),
    ],
)
def test_what_no_run_of_this_name_would_write_over_is_left_alone(
    tmp_path: Path, name: str | None, others: list[str]
) -> None:
    write(*(tmp_path / other for other in others))
    before = contents(tmp_path)
    check_free(folder(tmp_path, name), overwrite=False)
    assert move_aside(folder(tmp_path, name)) is None
    assert contents(tmp_path) == before


def test_a_file_in_another_format_belongs_to_the_run_too(tmp_path: Path) -> None:
    write(tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"last\.pt"):
        check_free(folder(tmp_path), overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_file_in_the_way_is_told(tmp_path: Path, overwrite: bool, below: str) -> None:
    write(tmp_path / "taken")
    with pytest.raises(UserError, match="is a file, not a folder"):
        check_free(folder(tmp_path / "taken" / below), overwrite=overwrite)


def test_a_place_that_cannot_be_written_to_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lorasmith.output_folder.tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match=r"cannot be written to \(Permission denied\)"):
        check_free(folder(tmp_path / "new"), overwrite=False)


def test_a_place_that_may_not_even_be_looked_at_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(UserError, match=r"cannot be written to \(Permission denied\)"):
        check_free(folder(tmp_path / "new"), overwrite=False)


def test_a_name_too_long_for_the_disk_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written to"):
        check_free(folder(tmp_path / ("x" * 300)), overwrite=False)


def test_a_drive_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda _: False)  # as on Windows: Z:\ has no parent but itself
    with pytest.raises(UserError, match="there is no such drive"):
        check_free(folder(Path("/no/such/drive")), overwrite=False)


def test_checking_a_place_leaves_nothing_there(tmp_path: Path) -> None:
    check_free(folder(tmp_path), overwrite=False)
    assert list(tmp_path.iterdir()) == []
