"""`lorasmith check` on masks: every mistake gets its message, sound ones none, and sheets show what is masked out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorasmith import cli
from lorasmith.sheets import tinted
from tests.commands.test_check import drawing, encoded, put

SIDE = 96
PICTURES = [
    "sound", "soft", "missing", "empty", "cut", "turned", "other-shape", "black", "nearly-black", "zero-one", "white",
    "coloured", "smaller", "twice",
]  # fmt: skip


def half(level: int = 255, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(level, (0, 0, size[0] // 2, size[1]))
    return mask


def noisy_black() -> bytes:
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 8, (SIDE, SIDE), dtype=np.uint8)), "PNG")


MASKS: dict[str, bytes] = {
    "sound.png": encoded(half(), "PNG"),
    "soft.jpg": encoded(half(200), "JPEG"),
    "empty.png": b"",
    "cut.png": encoded(drawing(5), "PNG")[:500],
    "turned.png": encoded(half(size=(SIDE, SIDE // 2)), "PNG"),
    "other-shape.webp": encoded(half(size=(60, 64)), "WEBP", lossless=True),
    "black.png": encoded(half(0), "PNG"),
    "nearly-black.png": noisy_black(),
    "zero-one.png": encoded(half(1), "PNG"),
    "white.png": encoded(Image.new("L", (SIDE, SIDE), 255), "PNG"),
    "coloured.png": encoded(Image.merge("RGB", [half(), half(0), half(0)]), "PNG"),
    "smaller.png": encoded(half(size=(48, 48)), "PNG"),
    "twice.png": encoded(half(), "PNG"),
    "twice.jpg": encoded(half(), "JPEG"),
    "of-nothing.png": encoded(half(), "PNG"),
}
EXPECTED = [
    ("mask-missing", "missing.png", ""),
    ("mask-unreadable", "empty.png", "masks/empty.png: the file is empty (0 bytes)"),
    ("mask-unreadable", "cut.png", "damaged or cut off"),
    ("mask-shape", "turned.png", "96x96, but "),
    ("mask-shape", "other-shape.png", "masks/other-shape.webp is 60x64"),
    ("mask-black", "black.png", "brightest value 0 of 255"),
    ("mask-black", "nearly-black.png", "brightest value 7 of 255"),
    ("mask-black", "zero-one.png", "brightest value 1 of 255"),
    ("mask-white", "white.png", "masks/white.png"),
    ("mask-coloured", "coloured.png", "masks/coloured.png"),
    ("mask-size", "smaller.png", "is 48x48"),
    ("mask-doubtful", "twice.png", "twice.jpg or "),
    ("mask-unused", "masks/of-nothing.png", ""),
]


class Place:
    def __init__(self, path: Path) -> None:
        self.photos, self.masks, self.path = path / "photos", path / "masks", path
        for number, name in enumerate(PICTURES):
            put(self.photos / f"{name}.png", encoded(drawing(number), "PNG"), "a thing")
        for name, content in MASKS.items():
            put(self.masks / name, content)

    def check(self, capsys: pytest.CaptureFixture[str], *options: object) -> tuple[int, dict[str, Any]]:
        code = cli.main(["check", str(self.photos), "--resolution", str(SIDE), *map(str, options), "--json", "-"])
        return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def found_about_masks(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (finding["kind"], place["path"], place["detail"])
        for finding in report["findings"]
        for place in finding["places"]
        if finding["kind"].startswith("mask")
    ]


def test_every_mistake_is_found_once_and_nothing_else(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = place.check(capsys, "--masks", place.masks)
    found = found_about_masks(report)
    assert code == 2 and len(found) == len(EXPECTED)
    for kind, path, said in EXPECTED:
        assert [said in detail for k, p, detail in found if k == kind and (p == path or p.endswith(f"/{path}"))] == [
            True
        ], (kind, path)
    assert not any(path in ("sound.png", "soft.png") for _, path, _ in found)


def test_without_masks_nothing_is_said_of_them(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = place.check(capsys)
    assert code == 0 and found_about_masks(report) == []


def test_sound_masks_leave_nothing_to_say(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for file in [*place.masks.iterdir(), *place.photos.iterdir()]:
        if file.stem not in ("sound", "soft"):
            file.unlink()
    assert place.check(capsys, "--masks", place.masks)[0] == 0
    assert cli.main(["check", str(place.photos), "--resolution", str(SIDE), "--masks", str(place.masks)]) == 0
    assert "nothing found that should be changed" in capsys.readouterr().out


def test_none_at_all_is_an_error(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for file in place.masks.iterdir():
        file.unlink()
    code, report = place.check(capsys, "--masks", place.masks)
    assert code == 2 and {kind for kind, _, _ in found_about_masks(report)} == {"mask-none"}
    code, report = place.check(capsys, "--alpha-mask")
    assert code == 2 and {kind for kind, _, _ in found_about_masks(report)} == {"mask-none"}


def test_transparency_as_masks(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for name, alpha in {"sound": half(), "black": half(0)}.items():
        picture = drawing(len(name)).convert("RGBA")
        picture.putalpha(alpha)
        picture.save(place.photos / f"{name}.png")
    code, report = place.check(capsys, "--alpha-mask")
    found = found_about_masks(report)
    assert code == 2 and ("mask-black", "black.png", "brightest value 0 of 255") in found
    assert sum(kind == "mask-missing" for kind, _, _ in found) == len(PICTURES) - 2
    assert "transparent" not in {finding["kind"] for finding in report["findings"]}
    assert "transparent" in {finding["kind"] for finding in place.check(capsys)[1]["findings"]}


def test_the_sheet_is_red_where_pictures_are_masked_out(place: Place, tmp_path: Path) -> None:
    for file in place.photos.iterdir():
        if file.stem != "sound":
            file.unlink()
    sheets = [tmp_path / "plain.png", tmp_path / "masked.png"]
    for sheet, options in zip(sheets, ([], ["--masks", str(place.masks)]), strict=True):
        cli.main(["check", str(place.photos), "--resolution", str(SIDE), "--sheet", str(sheet), *options])
    plain, masked = (np.asarray(Image.open(sheet), dtype=np.int16) for sheet in sheets)
    changed = np.argwhere(np.abs(plain[:200] - masked[:200]).max(axis=2) > 0)
    left = np.argwhere(np.abs(plain[:200] - plain[0, 0]).max(axis=2) > 60)[:, 1].min()  # where the picture begins
    assert changed[:, 1].min() >= left + SIDE and len(changed) > 1000  # it is enlarged twice, so this is its middle
    red = masked[:200][changed[:, 0], changed[:, 1]]
    assert (red[:, 0] > red[:, 1] + 40).all() and (red[:, 0] > red[:, 2] + 40).all()


def test_tint_is_as_strong_as_the_mask_is_dark() -> None:
    grey = Image.new("RGB", (3, 1), (100, 100, 100))
    mask = Image.fromarray(np.array([[255, 128, 0]], dtype=np.uint8))
    whole, part, out = (tuple(pixel) for pixel in np.asarray(tinted(grey, mask))[0].tolist())
    assert whole == (100, 100, 100) and 100 < part[0] < out[0] and 100 > part[1] > out[1] == out[2]


def test_what_cannot_be_meant_is_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for options, said in (
        (["--masks", place.masks, "--alpha-mask"], "leave out one of them"),
        (["--masks", place.path / "mask"], f"did you mean {place.masks}?"),
        (["--masks", place.photos], "keep masks in a folder of their own"),
    ):
        assert cli.main(["check", str(place.photos), *map(str, options)]) == 2
        assert said in capsys.readouterr().err
