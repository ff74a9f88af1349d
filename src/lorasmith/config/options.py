"""Options by their names: from the command line and TOML to a configuration, with the words for what is wrong."""

import difflib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tomli_w
from pydantic import ValidationError

from lorasmith.config.drawing import GenerateConfig, GridConfig, JudgeConfig
from lorasmith.config.files import ConvertConfig, ExtractConfig, InspectConfig, MergeConfig, ResizeConfig
from lorasmith.config.pictures import CacheConfig, CaptionConfig, CaptionsConfig, CheckConfig, PrepareConfig, TagConfig
from lorasmith.config.training import DemoConfig, TrainConfig
from lorasmith.config.values import Section
from lorasmith.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


COMMANDS: dict[str, type[Section]] = {
    "train": TrainConfig,
    "demo": DemoConfig,
    "check": CheckConfig,
    "captions": CaptionsConfig,
    "caption": CaptionConfig,
    "tag": TagConfig,
    "cache": CacheConfig,
    "prepare": PrepareConfig,
    "generate": GenerateConfig,
    "grid": GridConfig,
    "judge": JudgeConfig,
    "merge": MergeConfig,
    "extract": ExtractConfig,
    "resize": ResizeConfig,
    "convert": ConvertConfig,
    "inspect": InspectConfig,
}


# ---- derived from the models above: nothing below knows an option by name ------------------------------------------

_Config = TypeVar("_Config", bound=Section)
_LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
_FORMATS = {"width,height": "size", "low,high": "range"}
_KINDS = {**_FORMATS, "string": "text", "array": "list"}  # others are called as the schema calls them
EXPECTED = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "text": "a text",
    "path": "a path",
    "list": "a list of texts",
    "numbers": "one or more numbers, such as 0.8 -0.5",
    "size": "one side or width,height in pixels, such as 512 or 448,640",
    "range": "two numbers above 0, the smaller first, such as 2,4",
    "color": "white, black, gray, red, green, blue, yellow or one like #ff8000",
}


@dataclass(frozen=True)
class Option:
    """One option of a command, as the command line and the documents need to know it."""

    section: str  # "" for an option of the command itself
    name: str
    kind: str  # boolean, integer, number, numbers, text, path, size, list, choice
    expected: str  # in words: "a whole number above 0"
    choices: tuple[str, ...]
    default: Any
    help: str
    positional: str  # what stands for it in the usage line, where its flag may be left out: "DIR"; else ""

    @property
    def place(self) -> tuple[str, ...]:
        """Where the option stands in nested values: ("network", "rank")."""
        return (self.section, self.name) if self.section else (self.name,)

    @property
    def flag(self) -> str:
        """The short spelling on the command line: `--learning-rate`."""
        return f"--{self.name.replace('_', '-')}"


@cache
def options(command: type[Section]) -> tuple[Option, ...]:
    """Return a command's options in their order, read from its JSON Schema."""
    schema = command.model_json_schema()
    found = []
    for name, facts in schema["properties"].items():
        if "$ref" not in facts:
            found.append(_option("", name, facts))
            continue
        section = schema["$defs"][facts["$ref"].rpartition("/")[2]]
        found += [_option(name, option, facts) for option, facts in section["properties"].items()]
    return tuple(found)


def sections(command: type[Section]) -> dict[str, str]:
    """Return the title line of each section of a command, by name; "" is the command itself."""
    found = {"": _title(command)}
    for name, field in command.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found[name] = _title(field.annotation)
    return found


def nearest(command: type[Section], name: str) -> Option | None:
    """Return the option that was probably meant by a misspelt name, with or without its section."""
    by_name = {option.name: option for option in options(command)}
    wanted = name.rpartition(".")[2].replace("-", "_").lower()
    near = difflib.get_close_matches(wanted, by_name, n=1)
    return by_name[near[0]] if near else None


def build(command: type[_Config], given: Mapping[str, Any], file: Path | None = None) -> _Config:
    """Return a command's checked configuration: what is given, over what the TOML file says.

    Only what stands in one of the two counts as set (`model_fields_set`).

    Raises:
        UserError: a line for each mistake, which names the option, or the line of the file, and what was expected.
    """
    text = "" if file is None else read_text(file)
    merged = _laid_over({} if file is None else parse_toml(file, text), given)
    mistakes = {option.place: _expectation(option) for option in options(command) if _is_misread(option, merged)}
    config = None
    try:
        config = command.model_validate(merged)
    except ValidationError as error:
        for found in error.errors(include_url=False):
            place = _place(command, found["loc"])
            mistakes.setdefault(place, _reason(command, place, found))
    if config is not None and not mistakes:
        return config
    lines = []
    for place, reason in mistakes.items():
        is_in_file = file is not None and not _holds(given, place) and _holds(merged, place)
        name = _name_in_file(file, text, place, merged) if is_in_file else _name_of_flag(place, merged)
        lines.append(f"{name}: {reason}" if name else reason)
    raise UserError("\n".join(lines))


def checked(command: type[Section], option: Option, value: Any) -> Any:
    """Return the value of one option, converted.

    Raises:
        UserError: says what was expected instead, and nothing else.
    """
    section = command.model_fields[option.section].annotation
    assert isinstance(section, type) and issubclass(section, Section)
    if _is_misread(option, {option.section: {option.name: value}}):
        raise UserError(_expectation(option))
    try:
        return getattr(section.model_validate({option.name: value}), option.name)
    except ValidationError as error:
        raise UserError(_reason(command, option.place, error.errors(include_url=False)[0])) from None


def load_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        UserError: it cannot be read, or is not TOML; the line is named.
    """
    return parse_toml(path, read_text(path))


def dump_toml(values: Mapping[str, Any]) -> str:
    """Write nested values as TOML; what is None is left out, as TOML has no such value."""
    return tomli_w.dumps(_without_none(values))


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_none(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if value is not None
    }


def _title(section: type[Section]) -> str:
    return (section.__doc__ or "").strip().partition("\n")[0]


def _option(section: str, name: str, facts: Mapping[str, Any]) -> Option:
    """Read an option from its part of the JSON Schema."""
    shape = next((one for one in facts.get("anyOf", ()) if one.get("type") != "null"), facts)
    kind = _kind(shape)
    choices = tuple(str(choice) for choice in shape.get("enum", ()))
    each = shape.get("items", shape)
    limits = " and ".join(f"{word} {each[key]}" for key, word in _LIMITS.items() if key in each)
    if choices:
        expected = f"one of {', '.join(choices)}"
    elif kind == "numbers" and limits:
        expected = f"one or more numbers, each {limits}"
    else:
        expected = f"{EXPECTED[kind]} {limits}".strip()
    positional = facts.get("positional", "")
    return Option(section, name, kind, expected, choices, facts.get("default"), facts["description"], positional)


def _kind(shape: Mapping[str, Any]) -> str:
    if "enum" in shape:
        return "choice"
    name = str(shape.get("format", shape["type"]))
    return _KINDS.get(name, name)


def read_text(path: Path) -> str:
    """Read a file of text.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows editors put a byte order mark first
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; check the path.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected text in UTF-8 ({error.reason}); save it anew as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{path}: expected a file that can be read, but: {error.strerror}.") from error


def parse_toml(path: Path, text: str) -> dict[str, Any]:
    """Return what a TOML text says.

    Raises:
        UserError: it is not TOML; the line is named.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message, line = str(error), text.count("\n") + 1
        if found := re.search(r" \(at line (\d+), column \d+\)| \(at end of document\)", message):
            message, line = message[: found.start()], int(found[1] or line)
        hint = "; write Windows paths with / or in 'single quotes'" if "\\" in text.splitlines()[line - 1] else ""
        if message == "Invalid value":
            hint = f"; a text stands in quotes{hint}"
        raise UserError(f"{path}, line {line}: this is not TOML: {message}{hint}.") from error


def line_in_toml(text: str, place: tuple[str | int, ...]) -> int:
    """Return the line where an option or table of a TOML text begins; tables in a list are counted from 0.

    tomllib tells no places: the first lines that parse and hold the option end with it, and it began after the lines
    that parsed before.
    """
    lines, begin = text.splitlines(), 0
    for end in range(1, len(lines) + 1):
        try:
            values = tomllib.loads("\n".join(lines[:end]))
        except tomllib.TOMLDecodeError:
            continue
        if _holds(values, place):
            break
        begin = end
    return begin + 1


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        under = below.get(name)
        if isinstance(value, Mapping) and isinstance(under, Mapping):
            value = _laid_over(under, value)
        merged[name] = value
    return merged


def _holds(values: Any, place: tuple[str | int, ...]) -> bool:
    for name in place:
        if name not in _names_in(values):
            return False
        values = values[name]
    return True


def _names_in(values: Any) -> Any:
    if isinstance(values, list):
        return range(len(values))
    return values if isinstance(values, Mapping) else ()


def _value(values: Any, place: tuple[str, ...]) -> Any:
    for name in place:
        values = values[name]
    return values


def _is_misread(option: Option, values: Mapping[str, Any]) -> bool:
    """Whether pydantic would take the value for something else: "" for the working folder, true for the number 1."""
    if not _holds(values, option.place):
        return False
    value = _value(values, option.place)
    return (option.kind == "path" and value == "") or (isinstance(value, bool) and option.kind != "boolean")


def _expectation(option: Option) -> str:
    return f"expected {option.expected}"


def _place(command: type[Section], loc: tuple[int | str, ...]) -> tuple[str, ...]:
    """Return where an error belongs, without the index in a list: section and option, or one of them, or neither."""
    depth = 2 if loc and loc[0] in sections(command) else 1
    return tuple(str(part) for part in loc[:depth])


def _reason(command: type[Section], place: tuple[str, ...], found: "ErrorDetails") -> str:
    """Say what was expected instead, in our words rather than pydantic's."""
    if found["type"] == "value_error":
        return str(found["ctx"]["error"]) if "ctx" in found else found["msg"]
    if found["type"] == "extra_forbidden":
        return _unknown(command, place)
    for option in options(command):
        if option.place == place:
            return _expectation(option)
    return f"this is a section; write [{place[0]}], and its options in the lines below"


def _unknown(command: type[Section], place: tuple[str, ...]) -> str:
    names = [name for name in sections(command) if name]
    if len(place) == 1 and (near := difflib.get_close_matches(place[0].lower(), names, n=1)):
        return f"there is no such section; did you mean [{near[0]}]?"
    option = nearest(command, place[-1])
    if option is None:
        return "there is no such option; `lorasmith COMMAND --help` lists them all"
    where = f"[{option.section}] " if option.section and option.place[:-1] != place[:-1] else ""
    return f"there is no such option; did you mean {where}{option.name}?"


def _name_in_file(file: Path | None, text: str, place: tuple[str, ...], values: Mapping[str, Any]) -> str:
    value = _value(values, place)
    shown = f"[{'.'.join(place)}]" if isinstance(value, Mapping) else _shortened(tomli_w.dumps({place[-1]: value}))
    return f"{file}, line {line_in_toml(text, place)}: {shown}"


def _name_of_flag(place: tuple[str, ...], values: Mapping[str, Any]) -> str:
    if not place:
        return ""
    flag = f"--{place[-1].replace('_', '-')}"
    value = _value(values, place) if _holds(values, place) else ""
    return _shortened(f"{flag} {' '.join(map(str, value)) if isinstance(value, list) else value}")


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else f"{line[:77]}..."
