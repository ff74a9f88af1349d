"""Pictures with what they were drawn from in them, as WebUI writes it, so that its users' tools can read it.

PNG has it as the text `parameters`, WebP and JPEG as Exif's UserComment.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lorasmith.checkpoint import atomic_file
from lorasmith.errors import UserError

SUFFIXES = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}
FIELDS = ("number", "seed", "prompt", "model", "sampler", "steps", "guidance", "width", "height")
_EXIF, _USER_COMMENT = 0x8769, 0x9286  # tags of Exif 2.3
_QUALITY = 95
_LONGEST = 200  # bytes of a file's name without its ending; systems allow 255
_FIELD = re.compile(r"\{(\w*)\}")
_DEVICE = re.compile(
    r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])(\.|$)", re.IGNORECASE
)  # whatever follows the dot, on Windows
_NO_FILE_NAME = re.compile(r'[/\\:*?"<>|\x00-\x1f]+')


def parameters(prompt: str, negative: str, facts: Mapping[str, str]) -> str:
    """Return the text that WebUI keeps with a picture: prompt, negative prompt, and a line of `name: value`."""
    lines = [prompt, *([f"Negative prompt: {negative}"] if negative else [])]
    return "\n".join([*lines, ", ".join(f"{name}: {_quoted(value)}" for name, value in facts.items())])


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(sign in value for sign in ',:\n"') else value


def check_pattern(where: str, pattern: str) -> None:
    """Check a pattern of names.

    Raises:
        UserError: it has a field that there is not.
    """
    if unknown := [name for name in _FIELD.findall(pattern) if name not in FIELDS]:
        raise UserError(
            f"{where}: there is no field {{{unknown[0]}}}; there are {', '.join(f'{{{name}}}' for name in FIELDS)}."
        )


class PictureFolder:
    """Where pictures go, by a pattern of names such as `{number}-{seed}`; no file that is there is ever replaced.

    Raises:
        UserError: the pattern has a field that there is not.
    """

    def __init__(self, path: Path, pattern: str, form: str) -> None:
        check_pattern(f"--name {pattern}", pattern)
        if path.exists() and not path.is_dir():
            raise UserError(f"--output {path} is a file; give a folder for the pictures.")
        self._path, self._pattern, self._suffix = path, pattern, SUFFIXES[form]
        self._number = self._last_number()

    def add(self, picture: Image.Image, text: str, fields: Mapping[str, str], pattern: str | None = None) -> Path:
        """Write a picture with its text and return its file; it is whole or not there.

        Args:
            fields: what the pattern's fields stand for, all but the number.
            pattern: of this picture's name, in place of the folder's; may end as one of `SUFFIXES`.
        """
        self._number += 1
        pattern, suffix = (self._pattern, self._suffix) if pattern is None else self._split(pattern)
        path = self._free(pattern, suffix, {**fields, "number": f"{self._number:05d}"})
        with atomic_file(path) as temporary:
            _write(picture, temporary, suffix, text)
        return path

    def _split(self, pattern: str) -> tuple[str, str]:
        suffix = Path(pattern).suffix
        return (pattern.removesuffix(suffix), suffix) if suffix in SUFFIXES.values() else (pattern, self._suffix)

    def _free(self, pattern: str, suffix: str, fields: Mapping[str, str]) -> Path:
        name = " ".join(_FIELD.sub(lambda match: _NO_FILE_NAME.sub(" ", fields[match[1]]), pattern).split())
        name = name.encode()[:_LONGEST].decode(errors="ignore").strip(" .") or fields["number"]
        name = f"_{name}" if _DEVICE.match(name) else name
        path, count = self._path / f"{name}{suffix}", 1
        while path.exists():
            count += 1
            path = self._path / f"{name}-{count}{suffix}"
        return path

    def _last_number(self) -> int:
        """Return the highest number of the pictures that lie there; 0 if there is none."""
        parts = re.split(r"\{(\w+)\}", self._pattern)
        pattern = "".join(
            (r"(\d+)" if part == "number" else ".*") if i % 2 else re.escape(part) for i, part in enumerate(parts)
        )
        if "number" not in parts[1::2] or not self._path.is_dir():
            return 0
        found = (re.fullmatch(pattern, path.stem) for path in self._path.iterdir())
        return max((int(match[1]) for match in found if match), default=0)


def _write(picture: Image.Image, path: Path, suffix: str, text: str) -> None:
    if suffix == ".png":
        info = PngInfo()
        info.add_text("parameters", text)
        picture.save(path, "PNG", pnginfo=info)
        return
    exif = Image.Exif()
    exif.get_ifd(_EXIF)[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    if suffix == ".webp":
        picture.save(path, "WEBP", quality=_QUALITY, exif=exif)
        return
    try:
        picture.save(path, "JPEG", quality=_QUALITY, exif=exif)
    except ValueError as error:  # Exif in a JPEG has at most 64 KB
        raise UserError("the prompt is too long to be kept in a JPEG; give --form png or --form webp.") from error
