"""Names of pictures' files: what every system can hold, and nothing is replaced."""

from pathlib import Path

import pytest
from PIL import Image

from lorasmith.picture_files import PictureFolder

PICTURE = Image.new("RGB", (8, 8))


def name_of(folder: PictureFolder, prompt: str) -> str:
    return folder.add(PICTURE, "a cat", {"prompt": prompt}).name


@pytest.mark.parametrize(
    "prompt, name",
    [
        ("con", "_con.png"),
        ("NUL.txt", "_NUL.txt.png"),
        ("lpt9 ", "_lpt9.png"),
        ("COM1.a b", "_COM1.a b.png"),
        ("a con", "a con.png"),
        ("console", "console.png"),
        ('a<b>:"/\\|?*c', "a b c.png"),
        ("two\nlines", "two lines.png"),
        ("...", "00001.png"),
    ],
)
def test_names_that_windows_keeps_for_itself_are_not_given(prompt: str, name: str, tmp_path: Path) -> None:
    """A file of that name would be a device there: the picture would be gone without an error."""
    assert name_of(PictureFolder(tmp_path, "{prompt}", "png"), prompt) == name


@pytest.mark.parametrize("prompt", ["a" * 300, "👩‍👩‍👧" * 60, "e\u0301" * 150, "猫" * 200])
def test_long_names_are_cut_to_what_systems_allow(prompt: str, tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path, "{prompt}", "png")
    names = [name_of(folder, prompt) for _ in range(3)]
    assert len(set(names)) == 3 and all(prompt.startswith(names[0].removesuffix(".png")) for _ in names)
    assert all(len(name.encode()) <= 255 - len(".safetensors") and (tmp_path / name).exists() for name in names)
