"""Prompts with options of their own, as sd-scripts writes them: `a cat --w 512 --h 768 --d 7 --n blurred`.

They stand on the command line, or in a file: .txt with one a line, .toml with [prompt] and [[prompt.subset]], .json
with a list.
"""

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.config import parse_toml, read_text
from lorasmith.errors import UserError

_OPTION = re.compile(r"(?:^|\s)--(?=[A-Za-z])")


@dataclass(frozen=True)
class Prompt:
    """What to draw; None: as it is drawn otherwise.

    width, height: pixels. seeds: of its pictures, at least one. steps: of the sampler. guidance: scale of
    classifier-free guidance.

    The rest is for `lorasmith generate` alone. negative_guidance: scale for the negative prompt. denoise: share of the
    steps that are drawn on from a picture. strengths: of the LoRAs that are given, in their order. file: pattern of
    its pictures' names.
    """

    text: str
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    seeds: tuple[int, ...] | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    negative_guidance: float | None = None
    denoise: float | None = None
    strengths: tuple[float, ...] | None = None
    file: str | None = None


def _side(value: Any) -> int:
    side = _whole(value)
    if side < 8 or side % 8:
        raise ValueError("a multiple of 8")
    return side


def _whole(value: Any) -> int:
    try:
        number = float(value)
        if isinstance(value, bool) or not number.is_integer() or number < 0:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError("a whole number") from None
    return int(value) if isinstance(value, int) or str(value).isdecimal() else int(number)  # no float holds every seed


def _seeds(value: Any) -> tuple[int, ...]:
    try:
        return tuple(_whole(one) for one in _several(value))
    except ValueError:
        raise ValueError("a whole number, or several with commas between them") from None


def _numbers(value: Any) -> tuple[float, ...]:
    try:
        numbers = tuple(math.nan if isinstance(one, bool) else float(one) for one in _several(value))
    except (TypeError, ValueError):
        numbers = ()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError("a number for each LoRA, with commas between them")
    return numbers


def _several(value: Any) -> Sequence[Any]:
    """Return what a list of a file holds, or a text between its commas; anything else is one."""
    if isinstance(value, str):
        return [one.strip() for one in value.split(",")]
    return value if isinstance(value, list) and value else [value]


def _share(value: Any) -> float:
    if not 0 < (number := _scale(value)) <= 1:
        raise ValueError("a number above 0 and at most 1")
    return number


def _file(value: Any) -> str:
    if not _text(value) or set(value) & set("/\\"):
        raise ValueError("a name without folders")
    return value


def _count(value: Any) -> int:
    if not 1 <= (number := _whole(value)) <= 1000:
        raise ValueError("a whole number from 1 to 1000")
    return number


def _scale(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ValueError("a number at least 0")
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("letters; this is no text in UTF-8, write it anew or take a file of prompts") from None
    return value


# option in a line, key in a file, field, what reads its value
_TABLE: tuple[tuple[str, str, str, Callable[[Any], Any]], ...] = (
    ("n", "negative_prompt", "negative", _text),
    ("w", "width", "width", _side),
    ("h", "height", "height", _side),
    ("d", "seed", "seeds", _seeds),
    ("s", "sample_steps", "steps", _count),
    ("l", "scale", "guidance", _scale),
    ("ss", "sample_sampler", "sampler", _text),
    ("nl", "negative_scale", "negative_guidance", _scale),
    ("t", "denoise", "denoise", _share),
    ("am", "lora_strengths", "strengths", _numbers),
    ("f", "file_name", "file", _file),
)
_FOR_GENERATE = ("nl", "t", "am", "f")
_BY_OPTION = {option: (field, read) for option, _, field, read in _TABLE}
_BY_KEY = {"prompt": ("text", _text), **{key: (field, read) for _, key, field, read in _TABLE}}
_WRITTEN_OUT = {name: option for option, key, field, _ in _TABLE for name in (key, field)}
_FOR_OTHERS = {"g", "rcfg", "fs", "of"}  # sd-scripts' options for other models


def parse(line: str) -> Prompt:
    """Return the prompt in a line with its options.

    Raises:
        UserError: an option that there is not, one with a wrong value, or no text in UTF-8.
    """
    text, *options = _OPTION.split(line)
    fields: dict[str, Any] = {}
    for option in options:
        name, _, value = option.strip().partition(" ")
        if name not in _BY_OPTION:
            raise UserError(f"prompt {line!r}: {_unknown_option(name)}")
        field, read = _BY_OPTION[name]
        fields[field] = _read(f"prompt {line!r}: --{name} {value.strip()}", read, value.strip())
    return Prompt(_read(f"prompt {line!r}", _text, text.strip()), **fields)


def check_plain(prompt: Prompt) -> None:
    """Check that a prompt has no option that `lorasmith generate` alone draws with.

    Raises:
        UserError: it has one.
    """
    if len(prompt.seeds or ()) > 1:
        raise UserError(f"prompt {prompt.text!r}: several seeds are for lorasmith generate; give one.")
    for option in _FOR_GENERATE:
        if getattr(prompt, _BY_OPTION[option][0]) is not None:
            raise UserError(f"prompt {prompt.text!r}: --{option} is for lorasmith generate; leave it out here.")


def is_file(prompts: Sequence[str]) -> bool:
    """Whether what is given as prompts is a file of them."""
    return len(prompts) == 1 and Path(prompts[0]).suffix.lower() in (".txt", ".toml", ".json")


def read_file(path: Path, flag: str = "--prompts") -> list[Prompt]:
    """Return a file's prompts.

    Args:
        flag: the option that names it, for messages.

    Raises:
        UserError: it cannot be read, is no such file, or holds no prompt.
    """
    try:
        text = read_text(path)
        table = parse_toml(path, text) if path.suffix.lower() == ".toml" else {}
    except UserError as error:
        raise UserError(f"{flag} {error}") from error
    place = f"{flag} {path}"
    if path.suffix.lower() == ".txt":
        return read_lines(place, text)
    return _some(place, [_named(place, _entry, one) for one in _entries(place, path, text, table)])


def read_lines(place: str, text: str) -> list[Prompt]:
    """Return the prompts in a text, one a line.

    Args:
        place: where the text comes from, for messages.

    Raises:
        UserError: it holds no prompt, or one with a wrong option.
    """
    lines = [line.strip() for line in text.splitlines()]
    return _some(place, [_named(place, parse, line) for line in lines if line and not line.startswith("#")])


def _some(place: str, prompts: list[Prompt]) -> list[Prompt]:
    if not prompts:
        raise UserError(f"{place}: no prompt in it; write one a line (.txt), or as docs/training-log.md says.")
    return prompts


def _entries(place: str, path: Path, text: str, table: dict[str, Any]) -> list[Any]:
    if path.suffix.lower() == ".json":
        try:
            entries = json.loads(text)
        except ValueError as error:
            raise UserError(f"{place}: this is not JSON ({error}).") from error
        if isinstance(entries, list):
            return entries
        raise UserError(f'{place}: expected a list, such as [{{"prompt": "a cat", "width": 512}}].')
    common: Any = table.get("prompt")
    subsets = common.pop("subset", None) if isinstance(common, dict) else None
    if set(table) != {"prompt"} or not isinstance(subsets, list) or not all(isinstance(one, dict) for one in subsets):
        raise UserError(
            f"{place}: expected [prompt] with what all have in common, and [[prompt.subset]] for each prompt."
        )
    return [{**common, **subset} for subset in subsets]


def _entry(entry: Any) -> Prompt:
    if isinstance(entry, str):
        return parse(entry)
    if not isinstance(entry, Mapping) or "prompt" not in entry:
        raise UserError(f"{entry!r}: expected a text, or a prompt with its options by name.")
    fields = {}
    for key, value in entry.items():
        if key not in _BY_KEY:
            near = difflib.get_close_matches(str(key), _BY_KEY, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_BY_KEY)}."
            raise UserError(f"{key}: there is no such option of a prompt; {hint}")
        field, read = _BY_KEY[key]
        fields[field] = _read(f"{key} = {value!r}", read, value)
    return Prompt(**fields)


def _unknown_option(name: str) -> str:
    if name in ("cn", "ctr"):
        return f"--{name} is refused: a ControlNet is shown one picture for all prompts (generate --control-picture)."
    if name in _FOR_OTHERS:
        return f"--{name} is for models that cannot be trained here; leave it out."
    near = difflib.get_close_matches(name.lower().replace("-", "_"), [*_WRITTEN_OUT, *_BY_OPTION], n=1)
    hint = f"did you mean --{_WRITTEN_OUT.get(near[0], near[0])}? There" if near else "there"
    names = ", ".join(f"--{option} ({field})" for option, _, field, _ in _TABLE)
    return f"there is no option --{name}; {hint} are {names}."


def _read(where: str, read: Callable[[Any], Any], value: Any) -> Any:
    try:
        return read(value)
    except ValueError as error:
        raise UserError(f"{where}: expected {error}.") from None


def _named(place: str, read: Callable[[Any], Prompt], what: Any) -> Prompt:
    try:
        return read(what)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
