"""`lorasmith check` through the command: every mistake gets its message, good folders none, and nothing is changed."""

import hashlib
import json
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from lorasmith import cli

SIDE = 96
DOG, CAT, YEAR = "10_sks dog", "1_mia cat", "2021_uvw house"


def drawing(seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """A sharp picture unlike that of any other seed."""
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.NEAREST)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def put(path: Path, content: bytes | str, caption: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def png_of_size(width: int, height: int) -> bytes:
    """The beginning of a PNG that announces so many pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 9) + b"IDAT" + zlib.compress(b"")


def frames(kind: str, seed: int) -> bytes:
    return encoded(drawing(seed), kind, save_all=True, append_images=[drawing(seed + 500)])


def see_through(seed: int) -> Image.Image:
    image = drawing(seed).convert("RGBA")
    image.putalpha(Image.new("L", image.size, 255))
    image.paste((0, 0, 0, 0), (0, 0, 20, 20))
    return image


HEIC = b"\0\0\0\x18ftypheic" + bytes(100)
SOUND = encoded(drawing(0), "JPEG", quality=95)


@dataclass(frozen=True)
class Mistake:
    """A bad file: what it is called, what is in it, the caption beside it, and what must be said of it."""

    path: str
    content: bytes | str
    kind: str
    said: str
    caption: str | None = None


def mistake(
    path: str, content: bytes | str | Image.Image, kind: str, said: str = "", caption: str | None = None
) -> Mistake:
    return Mistake(path, encoded(content, "PNG") if isinstance(content, Image.Image) else content, kind, said, caption)


PICTURES = [
    mistake(f"{DOG}/empty.jpg", b"", "unreadable", "the file is empty (0 bytes)"),
    mistake(f"{DOG}/zeros.jpg", bytes(5000), "unreadable", "nothing but zeros (5000 bytes)"),
    mistake(f"{DOG}/cut.jpg", half(SOUND), "unreadable", "damaged or cut off"),
    mistake(f"{DOG}/cut.png", half(encoded(drawing(1), "PNG")), "unreadable", "damaged or cut off"),
    mistake(f"{DOG}/cut.gif", half(encoded(drawing(2), "GIF")), "unreadable", "damaged or cut off"),
    mistake(f"{DOG}/cut.webp", half(encoded(drawing(3), "WEBP", lossless=True)), "unreadable", "damaged or cut off"),
    mistake(f"{DOG}/cut.bmp", half(encoded(drawing(4), "BMP")), "unreadable", "damaged or cut off"),
    mistake(f"{DOG}/cut.tif", half(encoded(drawing(5), "TIFF")), "unreadable", "damaged or cut off"),
    mistake(f"{DOG}/page.jpg", "<!DOCTYPE html><html></html>", "unreadable", "not a picture in a format that is read"),
    mistake(f"{DOG}/words.png", "these are words", "unreadable", "beginning with b'these ar'"),
    mistake(f"{DOG}/document.jpeg", b"%PDF-1.7 ...", "unreadable", "not a picture in a format that is read"),
    mistake(f"{DOG}/postscript.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n", "unreadable", "not a picture"),
    mistake(f"{DOG}/phone.jpg", HEIC, "unreadable", "a HEIC picture, whatever its name says"),
    mistake(f"{DOG}/huge.png", png_of_size(60_000, 60_000), "unreadable", "million pixels"),
    mistake(f"{DOG}/IMG_0001.HEIC", HEIC, "kind-not-read"),
    mistake(f"{DOG}/photo.heif", HEIC, "kind-not-read"),
    mistake(f"{CAT}/raw.CR2", b"II*\0", "kind-not-read"),
    mistake(f"{CAT}/raw.dng", b"II*\0", "kind-not-read"),
    mistake(f"{DOG}/drawing.svg", "<svg/>", "kind-not-read"),
    mistake("direct.jpg", SOUND, "unused-picture"),
    mistake("holiday/beach.jpg", SOUND, "unused-picture"),
    mistake("0_never shown/a.jpg", SOUND, "unused-picture"),
    mistake(f"{DOG}/inside/deep.png", drawing(6), "unused-picture"),
    mistake(f"{DOG}/small.png", drawing(10, (40, 40)), "too-small", "40x40, enlarged 1.6 times"),
    mistake(f"{DOG}/icon.png", drawing(11, (16, 16)), "too-small", "16x16, enlarged 4.0 times"),
    mistake(f"{DOG}/panorama.png", drawing(12, (400, 100)), "extreme-aspect", "a crop would cut 75% away"),
    mistake(f"{DOG}/tower.png", drawing(13, (64, 320)), "extreme-aspect", "64x320, a crop would cut 80% away"),
    mistake(f"{DOG}/blurred.png", drawing(14).filter(ImageFilter.GaussianBlur(8)), "blurred", "below 20"),
    mistake(f"{DOG}/grey.png", Image.new("RGB", (SIDE, SIDE), "grey"), "blurred", "sharpness 0"),
    mistake(f"{DOG}/cut-out.png", see_through(15), "transparent"),
    mistake(f"{DOG}/moving.gif", frames("GIF", 16), "animated", "2 frames"),
    mistake(f"{DOG}/moving.webp", frames("WEBP", 17), "animated", "2 frames"),
    mistake(f"{DOG}/pages.tif", frames("TIFF", 18), "animated", "2 frames"),
    mistake(f"{DOG}/zz copy.png", drawing(100), "duplicate", f"the same file as {DOG}/good-00.png"),
    mistake(f"{CAT}/zz copy.png", drawing(101), "duplicate", "good-01.png, with another caption"),
    mistake(f"{DOG}/zz saved.jpg", encoded(drawing(102), "JPEG", quality=40), "near-duplicate", "good-02.png"),
    mistake(f"{DOG}/zz half.png", drawing(103, (300, 300)).resize((80, 80)), "near-duplicate", "good-03.png"),
    mistake(f"{DOG}/zz other kind.bmp", encoded(drawing(104), "BMP"), "near-duplicate", "good-04.png"),
    mistake(f"{CAT}/zz large.png", drawing(105, (211, 211)), "near-duplicate", f"looks like {DOG}/good-05.png"),
]  # fmt: skip

CAPTIONS = [
    mistake("nothing.txt", "", "caption-empty"),
    mistake("spaces.txt", "  \t \n", "caption-empty"),
    mistake("second.txt", "\nsks dog", "caption-empty"),
    mistake("utf16.txt", "sks dog".encode("utf-16"), "caption-encoding"),
    mistake("utf16-bare.txt", "sks dog".encode("utf-16-le"), "caption-encoding"),
    mistake("windows.txt", "sks dog, caf\xe9".encode("cp1252"), "caption-encoding"),
    mistake("lines.txt", "sks dog\nand a cat", "caption-several-lines"),
    mistake("capitals.TXT", "sks dog", "caption-capitals", "should be capitals.txt"),
    mistake("double.png.txt", "sks dog", "caption-not-read", f"should be double.txt, for {DOG}/double.png"),
    mistake("twice.txt.txt", "sks dog", "caption-not-read", "should be twice.txt"),
    mistake("other.text", "sks dog", "caption-not-read", "should be other.txt"),
    mistake("tagged.tags", "sks dog", "caption-not-read", "should be tagged.txt"),
    mistake("Case.txt", "sks dog", "caption-not-read", "should be case.txt"),
    mistake("word.docx", b"PK", "caption-no-text", "plain text in word.txt"),
    mistake("list.json", "{}", "caption-no-text", "plain text in list.txt"),
    mistake("orphan.txt", "sks dog", "caption-unused", "no picture with this name"),
    mistake("both.txt", "sks dog", "caption-unused", "both.caption is read instead"),
    mistake("shared.txt", "sks dog", "caption-shared", "for shared.jpg and shared.png"),
]
TEXTS = [
    mistake("long.png", "sks dog " + "very " * 80, "caption-long", "82 tokens, 7 too many"),
    mistake("japanese.png", "sks dog " + "\u732b" * 60, "caption-long", "too many"),
    mistake("no-trigger.png", "a dog in the snow", "trigger-missing", 'no "sks" in: a dog in the snow'),
    mistake("in-a-word.png", "sksy dog", "trigger-missing", 'no "sks" in: sksy dog'),
    mistake("no-class.png", "sks on a chair", "class-contradicted", 'no "dog" in: sks on a chair'),
    mistake("other-class.png", "sks cat", "class-contradicted", '(it says "cat", another folder)'),
    mistake("misspelt.png", "sks dog, tree, gras", "tag-once", '"gras", perhaps "grass"?'),
    mistake("swapped.png", "sks dog, tree, garss", "tag-once", '"garss", perhaps "grass"?'),
    mistake("rare.png", "sks dog, tree, zeppelin", "tag-once", '"zeppelin"'),
]
ALL = [*PICTURES, *(Mistake(f"{DOG}/{one.path}", *list(vars(one).values())[1:]) for one in [*CAPTIONS, *TEXTS])]


@dataclass(frozen=True)
class Told:
    """What the command said of a folder."""

    code: int
    text: str
    json: dict[str, Any]

    def kinds(self) -> set[str]:
        return {finding["kind"] for finding in self.json["findings"]}

    def of(self, kind: str) -> dict[str, Any]:
        return next(finding for finding in self.json["findings"] if finding["kind"] == kind)

    def details(self, kind: str) -> dict[str, str]:
        return {place["path"]: place["detail"] for place in self.of(kind)["places"]} if kind in self.kinds() else {}


Check = Callable[..., Told]


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """A function that runs the command twice, for people and for programs, on a folder that it must leave as it is."""

    def run(folder: Path, *options: str) -> Told:
        before = digests(folder)
        words = ["check", str(folder), "--resolution", "64", *options]
        code = cli.main(words)
        text = capsys.readouterr().out
        assert cli.main([*words, "--json", "-"]) == code
        assert digests(folder) == before
        return Told(code, text, json.loads(capsys.readouterr().out))

    return run


def write_good(folder: Path, numbers: Iterable[int], caption: str | None) -> None:
    for i in numbers:
        put(folder / f"good-{i:02d}.png", encoded(drawing(100 + i), "PNG"), caption)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent of DreamBooth folders with all mistakes at once, and sound pictures between them."""
    parent = tmp_path_factory.mktemp("corpus") / "photos"
    write_good(parent / DOG, range(12), "sks dog, tree, grass")
    write_good(parent / CAT, range(20, 22), None)
    write_good(parent / YEAR, range(30, 32), None)
    for one in PICTURES:
        put(parent / one.path, one.content, one.caption)
    for i, one in enumerate(CAPTIONS):
        stem = one.path.lower().partition(".")[0]
        put(parent / DOG / one.path, one.content)
        if stem != "orphan":
            put(parent / DOG / f"{stem}.png", encoded(drawing(200 + i), "PNG"))
    put(parent / DOG / "shared.jpg", encoded(drawing(250), "JPEG", quality=95))
    put(parent / DOG / "both.caption", "sks dog")
    for i, one in enumerate(TEXTS):
        assert isinstance(one.content, str)
        put(parent / DOG / one.path, encoded(drawing(300 + i), "PNG"), one.content)
    return parent


@pytest.fixture(scope="module")
def told(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    file = tmp_path_factory.mktemp("told") / "found.json"
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        code = cli.main(["check", str(corpus), "--resolution", "64", "--all", "--json", str(file)])
    return Told(code, "\n".join(lines), json.loads(file.read_text(encoding="utf-8")))


def test_there_are_many_mistakes() -> None:
    assert len(ALL) >= 40
    assert len({one.path for one in ALL}) == len(ALL)


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.path)
def test_every_mistake_is_told_with_its_message_and_a_fix(told: Told, one: Mistake) -> None:
    details = told.details(one.kind)
    assert one.path in details
    assert one.said in details[one.path]
    finding = told.of(one.kind)
    for line in (finding["message"], finding["fix"], f"      {one.path}"):
        assert line in told.text


def test_nothing_is_said_of_sound_pictures_and_captions(told: Told) -> None:
    for kind in told.kinds() - {"imbalance", "many-repeats"}:
        # of one picture in two folders, the captioned one is kept; the copies of the good ones are named
        assert not [path for path in told.details(kind) if "good-" in path], kind


def test_each_bad_file_is_told_of_for_its_own_fault_alone(told: Told) -> None:
    by_path: dict[str, set[str]] = {}
    for finding in told.json["findings"]:
        for place in finding["places"]:
            by_path.setdefault(place["path"], set()).add(finding["kind"])
    for one in ALL:
        assert by_path[one.path] == {one.kind}, one.path


def test_folders_out_of_balance_and_years_taken_for_repeats(told: Told) -> None:
    assert f"{YEAR}" in told.details("many-repeats")
    details = told.details("imbalance")
    assert details[YEAR] == "2 pictures x 2021 = 4042 an epoch"
    assert "_mia cat` would be as many as the largest" in details[CAT]


def test_the_json_says_what_the_documents_promise(told: Told, corpus: Path) -> None:
    assert list(told.json) == ["folder", "pictures", "folders", "counts", "exit_code", "findings"]
    assert told.json["folder"] == str(corpus)
    assert told.json["exit_code"] == told.code == 2
    assert told.json["pictures"] == sum(folder["pictures"] for folder in told.json["folders"])
    assert {folder["name"]: folder["repeats"] for folder in told.json["folders"]} == {DOG: 10, CAT: 1, YEAR: 2021}
    severities = [finding["severity"] for finding in told.json["findings"]]
    assert {name: severities.count(name) for name in ("error", "warning", "hint")} == told.json["counts"]
    assert severities == sorted(severities, key=["error", "warning", "hint"].index)
    for finding in told.json["findings"]:
        assert list(finding) == ["severity", "kind", "message", "fix", "places"]
    documented = (Path(__file__).parents[2] / "docs" / "check.md").read_text(encoding="utf-8")
    assert [kind for kind in told.kinds() if f"`{kind}`" not in documented] == []


# ---- exit codes, and folders of other kinds ------------------------------------------------------------------------


def test_a_good_folder(check: Check, tmp_path: Path) -> None:
    write_good(tmp_path / "photos", range(4), "a photo of sks dog")
    told = check(tmp_path / "photos", "--trigger", "sks")
    assert told.code == 0
    assert told.json["findings"] == []
    assert told.text.splitlines()[-1] == "nothing found that should be changed"


def test_hints_alone_leave_the_exit_code_at_0(check: Check, tmp_path: Path) -> None:
    write_good(tmp_path / "photos", range(4), "sks dog\nmore")
    told = check(tmp_path / "photos")
    assert (told.code, told.kinds()) == (0, {"caption-several-lines"})


def test_warnings_make_it_1(check: Check, tmp_path: Path) -> None:
    write_good(tmp_path / "photos", range(4), "a dog")
    told = check(tmp_path / "photos", "--trigger", "sks")
    assert (told.code, told.kinds()) == (1, {"trigger-missing"})
    assert told.text.count("good-") == 3
    assert "and 1 more (--all shows every one)" in told.text


def test_a_plain_folder_needs_captions_or_one_for_all(check: Check, tmp_path: Path) -> None:
    write_good(tmp_path / "photos", range(3), None)
    told = check(tmp_path / "photos")
    assert told.code == 2
    assert set(told.details("caption-missing")) == {f"good-{i:02d}.png" for i in range(3)}
    assert check(tmp_path / "photos", "--caption", "a photo of sks dog").json["findings"] == []
    told = check(tmp_path / "photos", "--caption", "a photo of a dog", "--trigger", "sks")
    assert told.kinds() == {"trigger-missing-default"}


def test_the_trigger_may_stand_in_the_folders_name(check: Check, tmp_path: Path) -> None:
    write_good(tmp_path / DOG, range(3), None)
    assert check(tmp_path / DOG, "--trigger", "sks").json["findings"] == []
    assert set(check(tmp_path, "--trigger", "ohwx").details("trigger-missing-folder")) == {DOG}


def test_another_caption_extension(check: Check, tmp_path: Path) -> None:
    write_good(tmp_path / DOG, range(2), "sks dog")
    assert check(tmp_path / DOG, "--caption-extension", ".cap").details("caption-not-read") == {
        f"good-{i:02d}.txt": f"should be good-{i:02d}.cap, for good-{i:02d}.png" for i in range(2)
    }


def test_longer_captions_when_they_are_trained(check: Check, tmp_path: Path) -> None:
    write_good(tmp_path / DOG, range(2), "sks dog " + "very " * 80)
    assert check(tmp_path / DOG).kinds() == {"caption-long"}
    assert check(tmp_path / DOG, "--max-token-length", "150").json["findings"] == []


def test_pictures_that_cannot_be_read_all_of_them(check: Check, tmp_path: Path) -> None:
    put(tmp_path / "photos" / "a.jpg", b"")
    put(tmp_path / "photos" / "b.heic", HEIC)
    told = check(tmp_path / "photos", "--caption", "a dog")
    assert told.kinds() == {"no-pictures", "unreadable", "kind-not-read"}


def test_the_folder_with_the_mistakes_people_make(check: Check, tmp_path: Path) -> None:
    parent = tmp_path / "photos"
    write_good(parent / DOG, range(3), None)
    put(parent / "in the parent.jpg", encoded(drawing(1), "JPEG", quality=95))
    put(parent / DOG / "good-00.TXT", "sks dog")
    put(parent / DOG / "phone.HEIC", HEIC)
    put(parent / DOG / "broken.jpg", half(SOUND))
    shutil.copy(parent / DOG / "good-01.png", parent / DOG / "good-01 (1).png")
    told = check(parent)
    assert told.code == 2
    assert {kind: set(told.details(kind)) for kind in told.kinds()} == {
        "unreadable": {f"{DOG}/broken.jpg"},
        "unused-picture": {"in the parent.jpg"},
        "kind-not-read": {f"{DOG}/phone.HEIC"},
        "duplicate": {f"{DOG}/good-01.png"},
        "caption-capitals": {f"{DOG}/good-00.TXT"},
    }
    assert told.text.splitlines()[-1] == "1 error, 3 warnings, 1 hint"


def test_a_relative_path_and_the_flag_itself(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_good(tmp_path / DOG, range(2), None)
    put(tmp_path / "direct.jpg", SOUND)
    expected = check(tmp_path).json["findings"]
    monkeypatch.chdir(tmp_path)
    for words in (["."], ["--folder", "."]):
        assert cli.main(["check", *words, "--resolution", "64", "--json", "-"]) == 1
        assert json.loads(capsys.readouterr().out)["findings"] == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "missing: DIR, the folder of pictures. For example: lorasmith check photos"),
        (["photso"], "there is no folder photso; did you mean photos?"),
        (["photos/a.png"], "photos/a.png is a file, but a folder of pictures is expected; give the folder it lies in."),
        (["nothing"], "no pictures found in nothing"),
        (["photos", "--fix", "photos/fixed"], "--fix photos/fixed lies in photos itself"),
        (["photos", "--fix", "."], "--fix .: this exists already, and nothing is overwritten"),
        (["photos", "--sheet", "photos/sheet.png"], "--sheet photos/sheet.png lies in photos itself"),
        (["photos", "--sheet", "sheet.pdf"], "--sheet sheet.pdf: expected a name that ends with .png"),
        (["photos", "--sheet", "no/sheet.png"], "--sheet no/sheet.png: there is no folder no"),
        (["photos", "--json", "photos/a.png"], "--json photos/a.png lies in photos itself"),
        (["photos", "--json", "nothing"], "--json nothing: this is a folder"),
        (["photos", "--preview", "c.pdf"], "--preview c.pdf: expected a name that ends with .png"),
        (["photos", "--preview", "photos/c.png"], "--preview photos/c.png lies in photos itself"),
        (["photos", "--buckets"], "buckets change what --preview shows; add it"),
        (["photos", "--preview", "c.png", "--bucket-step", "32"], "bucket_step change the buckets, but they are off"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    put(tmp_path / "photos" / "a.png", encoded(drawing(0), "PNG"))
    (tmp_path / "nothing").mkdir()
    monkeypatch.chdir(tmp_path)
    before = digests(tmp_path)
    assert cli.main(["check", *words]) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"lorasmith: {message}")
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert digests(tmp_path) == before


# ---- the sheet and the repaired copy -------------------------------------------------------------------------------


def test_the_sheet_shows_every_picture(check: Check, tmp_path: Path) -> None:
    write_good(tmp_path / "photos", range(7), "sks dog")
    put(tmp_path / "photos" / "broken.png", half(SOUND), "sks dog")
    sheet = tmp_path / "sheet.png"
    told = check(tmp_path / "photos", "--sheet", str(sheet))
    assert told.text.splitlines()[-1] == f"contact sheet   {sheet}"
    with Image.open(sheet) as page:
        colours = {colour for _, colour in page.convert("RGB").getcolors(page.width * page.height) or []}
    for i in range(7):
        shown = drawing(100 + i).getpixel((0, 0))
        assert shown in colours


def test_a_sheet_of_very_many_pictures_becomes_several_files(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorasmith.commands.check._PER_SHEET", 3)
    write_good(tmp_path / "photos", range(7), "sks dog")
    told = check(tmp_path / "photos", "--sheet", str(tmp_path / "sheet.jpg"))
    files = [tmp_path / name for name in ("sheet.jpg", "sheet-2.jpg", "sheet-3.jpg")]
    assert told.text.splitlines()[-3:] == [f"contact sheet   {file}" for file in files]
    heights = []
    for file in files:
        with Image.open(file) as page:
            heights.append(page.size)
    assert heights[0] == heights[1] and heights[2][0] < heights[0][0]


def test_the_repaired_copy_of_all_mistakes_has_only_those_that_need_a_person(
    corpus: Path, tmp_path: Path, check: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(corpus)
    fixed = tmp_path / "fixed"
    assert cli.main(["check", str(corpus), "--resolution", "64", "--fix", str(fixed)]) == 2
    assert digests(corpus) == before
    assert f"what is left to do: lorasmith check {fixed}" in capsys.readouterr().out
    told = check(fixed)
    mended = {
        "unreadable", "kind-not-read", "unused-picture", "animated", "caption-empty", "caption-not-read",
        "caption-capitals", "caption-shared", "caption-unused", "caption-no-text",
    }  # fmt: skip
    assert not told.kinds() & mended
    encodings = set(told.details("caption-encoding"))
    assert encodings == {f"{DOG}/utf16-bare.txt", f"{DOG}/windows.txt"}  # what they mean cannot be known for sure
    # a picture in two folders with different captions: only a person knows which is right
    assert set(told.details("duplicate")) == {f"{CAT}/zz copy.png"}


def test_the_copy_again_goes_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_good(tmp_path / DOG, range(2), None)
    words = ["check", str(tmp_path / DOG), "--resolution", "64", "--fix", str(tmp_path / "fixed")]
    assert cli.main(words) == 0
    copied = digests(tmp_path / "fixed")
    assert copied == {f"{DOG}/{name}": digest for name, digest in digests(tmp_path / DOG).items()}
    assert cli.main(words) == 2
    assert "this exists already" in capsys.readouterr().err
    assert digests(tmp_path / "fixed") == copied


def test_turned_and_converted_pictures_show_the_same_in_the_copy(tmp_path: Path, check: Check) -> None:
    photos, fixed = tmp_path / "photos", tmp_path / "fixed"
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = drawing(1, (128, 96))
    put(photos / "turned.jpg", encoded(wide, "JPEG", quality=95, exif=exif), "sks dog")
    put(photos / "print.tif", encoded(drawing(2).convert("CMYK"), "TIFF"), "sks dog")
    put(photos / "plain.jpg", encoded(drawing(3), "JPEG"), "sks dog")
    check_code = cli.main(["check", str(photos), "--resolution", "64", "--fix", str(fixed)])
    assert check_code == 0
    assert sorted(path.name for path in fixed.iterdir() if path.suffix != ".txt") == [
        "plain.jpg", "print.png", "turned.png",
    ]  # fmt: skip
    assert (fixed / "plain.jpg").read_bytes() == (photos / "plain.jpg").read_bytes()
    with Image.open(fixed / "turned.png") as turned, Image.open(photos / "turned.jpg") as original:
        assert turned.size == (96, 128)
        assert turned.getexif().get(0x0112, 1) == 1
        assert np.array_equal(np.asarray(turned), np.asarray(original.transpose(Image.Transpose.ROTATE_270)))
    with Image.open(fixed / "print.png") as printed:
        assert printed.mode == "RGB"


# ---- the preview of crops ------------------------------------------------------------------------------------------


def test_the_preview_shows_every_crop_the_worst_first(check: Check, tmp_path: Path) -> None:
    for i, size in enumerate([(96, 96), (192, 96), (96, 120), (48, 48)]):
        put(tmp_path / "photos" / DOG / f"{i}.png", encoded(drawing(i, size), "PNG"))
    told = check(tmp_path / "photos", "--resolution", "96", "--preview", str(tmp_path / "crops.png"))
    lines = told.text.splitlines()
    assert f"crops           {tmp_path / 'crops.png'}" in lines
    assert "cropping cuts away 18% of the area on average, at most 50% (1.png); --buckets would cut less" in told.text
    with Image.open(tmp_path / "crops.png") as page:
        assert page.width > 4 * 200  # four side by side
        first = page.crop((8, 8, 208, 208))
    # the first is the widest picture: its middle as it is, its sides greyed and reddened
    whole = drawing(1, (192, 96)).resize((192, 96))
    assert first.getpixel((96, 40)) == whole.getpixel((96, 40))
    assert first.getpixel((10, 40)) != whole.getpixel((10, 40))


def test_the_preview_follows_the_buckets_and_faces_of_training(check: Check, tmp_path: Path) -> None:
    put(tmp_path / "photos" / DOG / "wide.png", encoded(drawing(1, (440, 320)), "PNG"))
    put(tmp_path / "photos" / DOG / "face_100_100_50_50.png", encoded(drawing(2, (400, 400)), "PNG"))
    preview = ["--preview", str(tmp_path / "crops.png"), "--resolution", "256"]
    plain = check(tmp_path / "photos", *preview)
    assert "2 pictures as 256x256" in plain.text
    in_buckets = check(tmp_path / "photos", *preview, "--buckets", "--bucket-min", "128")
    assert "1 picture as 256x192" in in_buckets.text
    rule = check(tmp_path / "photos", *preview, "--buckets", "--bucket-min", "128", "--bucket-rule", "sd-scripts")
    assert "1 picture as 320x192" in rule.text
    faces = check(tmp_path / "photos", *preview, "--face-crop-aug-range", "2,2")
    assert "cropped around a face: 1 of 2" in faces.text
    fine = check(tmp_path / "photos", *preview, "--buckets", "--bucket-min", "128", "--bucket-step", "8",
                 "--bucket-max", "512")  # fmt: skip
    assert "1 picture as 296x216" in fine.text
    small = check(tmp_path / "photos", "--preview", str(tmp_path / "crops.png"), "--resolution", "1024", "--buckets",
                  "--bucket-no-upscale")  # fmt: skip
    assert "enlarged" not in small.text.partition("crops  ")[2]


def test_folders_in_folders_are_looked_at_when_asked(check: Check, tmp_path: Path) -> None:
    write_good(tmp_path / "photos", range(2), "sks dog")
    put(tmp_path / "photos" / "deep" / "er" / "a.png", encoded(drawing(7), "PNG"), "sks dog")
    assert "would be left out" in check(tmp_path / "photos").text
    told = check(tmp_path / "photos", "--recursive")
    assert "would be left out" not in told.text and "photos: 3 pictures" in told.text


# ---- captions in one file ------------------------------------------------------------------------------------------


def test_captions_of_a_metadata_file_are_checked(check: Check, tmp_path: Path) -> None:
    for i in range(4):
        put(tmp_path / "photos" / f"{i}.png", encoded(drawing(i), "PNG"))
    put(tmp_path / "photos" / "2.txt", "this file is not read")
    entries = {"0": {"caption": "sks dog"}, "1.png": {"tags": "sks, " + "word " * 90}, "2": {}, "gone": {"tags": "a"}}
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    told = check(tmp_path / "photos", "--captions", str(tmp_path / "meta.json"), "--trigger", "sks")
    assert [place["path"] for place in told.of("caption-long")["places"]] == ["1.png"]
    assert [place["path"] for place in told.of("caption-missing")["places"]] == ["2.png"]
    assert "write it in meta.json" in told.of("caption-missing")["fix"]
    assert [place["path"] for place in told.of("unused-picture")["places"]] == ["3.png"]
    assert "no entry in meta.json" in told.of("unused-picture")["message"]
    assert not told.kinds() & {"caption-not-read", "caption-unused", "trigger-missing"}
    filled = check(tmp_path / "photos", "--captions", str(tmp_path / "meta.json"), "--caption", "sks thing")
    assert "caption-missing" not in filled.kinds()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--captions", "none.json"], "cannot be opened"),
        (["--captions", "bad.json"], "bad.json is not valid JSON"),
        (["--captions", "other.json"], "has a picture in photos"),
        (["--captions", "meta.json", "--recursive"], "recursive can do nothing for captions in a metadata file"),
        (["--captions", "meta.json", "--fix", "new"], "fix can do nothing for captions in a metadata file"),
    ],
)
def test_mistakes_about_captions_in_one_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    put(tmp_path / "photos" / "a.png", encoded(drawing(0), "PNG"))
    for name, text in {"bad": "{", "other": '{"z": {"tags": "a"}}', "meta": '{"a": {"tags": "a"}}'}.items():
        (tmp_path / f"{name}.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check", "photos", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_pictures_that_would_be_left_out_are_looked_at_too(check: Check, tmp_path: Path) -> None:
    write_good(tmp_path / "photos" / DOG, range(2), None)
    put(tmp_path / "photos" / "broken.jpg", half(encoded(drawing(5), "JPEG")))
    put(tmp_path / "photos" / "copy.png", next((tmp_path / "photos" / DOG).glob("*.png")).read_bytes())
    put(tmp_path / "photos" / "sound.png", encoded(drawing(6), "PNG"))
    places = {place["path"]: place["detail"] for place in check(tmp_path / "photos").of("unused-picture")["places"]}
    assert "cannot be read: damaged or cut off" in places["broken.jpg"]
    assert f"the same file as {DOG}/" in places["copy.png"] and places["sound.png"] == ""
