"""Kinds of values that several commands' options have."""

import os.path
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

_COLORS = ("white", "black", "gray", "red", "green", "blue", "yellow")


class Section(BaseModel):
    """A group of options; an unknown name in it is an error."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


def _parse_size(value: Any) -> Any:
    """Accept 512, "512", "448,640", "448x640" and [448, 640] as (width, height) in pixels."""
    if isinstance(value, str):
        value = [part.strip() for part in value.lower().replace("x", ",").split(",")]
    if isinstance(value, int) or (isinstance(value, (list, tuple)) and len(value) == 1):
        side = value if isinstance(value, int) else value[0]
        value = [side, side]
    return value


def _check_size(size: tuple[int, int]) -> tuple[int, int]:
    for side in size:
        if side < 8 or side % 8:
            down, up = max(8, side // 8 * 8), (side // 8 + 1) * 8
            raise ValueError(f"{side} is not a multiple of 8, which the model's latents need; use {down} or {up}")
    return size


Size = Annotated[
    tuple[int, int],
    BeforeValidator(_parse_size),
    AfterValidator(_check_size),
    Field(json_schema_extra={"format": "width,height"}),
]


def _parse_range(value: Any) -> Any:
    """Accept "2,4" and [2, 4]."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _check_range(ends: tuple[float, float]) -> tuple[float, float]:
    if not 0 < ends[0] <= ends[1]:
        raise ValueError("expected two numbers above 0, the smaller first, such as 2,4")
    return ends


Range = Annotated[
    tuple[float, float],
    BeforeValidator(_parse_range),
    AfterValidator(_check_range),
    Field(json_schema_extra={"format": "low,high"}),
]


def _check_color(color: str) -> str:
    if color.lower() not in _COLORS and not re.fullmatch(r"#[0-9a-fA-F]{6}", color):
        raise ValueError(f"{color!r} is no colour that is known; give one like #ff8000, or one of {', '.join(_COLORS)}")
    return color.lower()


def _check_name(name: str) -> str:
    if not name.strip() or name.startswith(".") or set(name) & set('/\\:*?"<>|'):
        raise ValueError(
            f'{name!r} is no plain file name; the folder goes into --output, and a name has no / \\ : * ? " < > | '
            "and does not begin with a dot"
        )
    return name


def _check_separator(separator: str) -> str:
    if not separator:
        raise ValueError("an empty text separates nothing; give the separator that the captions have, such as a comma")
    return separator


def _check_token_length(length: int) -> int:
    if length not in (75, 150, 225):
        raise ValueError(f"{length} tokens of a caption cannot be used; give 75, 150 or 225")
    return length


# A shell expands ~ at the start of a word only: not in --base=~/model, nor in a TOML file.
Place = Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(path)))]
PlaceOrHubId = Annotated[str, AfterValidator(os.path.expanduser)]
CacheDir = Annotated[Path, AfterValidator(lambda path: Path(os.path.abspath(os.path.expanduser(path))))]
FileName = Annotated[str, AfterValidator(_check_name)]
Color = Annotated[str, AfterValidator(_check_color), Field(json_schema_extra={"format": "color"})]
TokenLength = Annotated[int, AfterValidator(_check_token_length)]
Separator = Annotated[str, AfterValidator(_check_separator)]
NUMBERS = Field(json_schema_extra={"format": "numbers"})
Numbers = Annotated[list[float], NUMBERS]
Share = Annotated[float, Field(ge=0, le=1)]


def is_changed(section: Section, name: str) -> bool:
    return getattr(section, name) != type(section).model_fields[name].default


BUCKET_OPTIONS = ("bucket_min", "bucket_max", "bucket_step", "bucket_rule", "bucket_no_upscale")


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
