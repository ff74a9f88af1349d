"""Metadata files: the captions and tags of many pictures in one file, read strictly and written.

JSON has an entry for each picture under its key, a file whose name ends with .jsonl has one in each line:

    {"0001": {"caption": "a cat on a sofa", "tags": "cat, sofa"}, "sub/0002.png": {"tags": "dog"}}

    {"image_path": "0001.png", "caption": "a cat on a sofa", "tags": "cat, sofa"}
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasmith.errors import UserError

JSON, JSONL = ".json", ".jsonl"
_KEYS = ("image_path", "image_key", "file_name")  # what may name the picture in a line of JSONL
_TEXTS = ("caption", "tags")
_OTHERS = ("train_resolution", "image_size")  # sd-scripts writes them for itself; here pictures are measured anew
_MEANT = {
    "text": "caption", "prompt": "caption", "description": "caption", "label": "tags", "keywords": "tags",
    "image": "image_path", "path": "image_path", "file": "file_name", "filename": "file_name",
}  # fmt: skip
_EXAMPLES = {
    JSON: '{"caption": "a cat", "tags": "cat, sofa"}',
    JSONL: '{"image_path": "0001.png", "caption": "a cat", "tags": "cat, sofa"}',
}
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
_Member = tuple[str, Any, int, int]  # name, value, where the name and where the value begins


@dataclass(frozen=True)
class Entry:
    """What a metadata file says of one picture.

    tags: as text, divided by commas. others: what sd-scripts keeps there for itself. line: where the entry begins.
    """

    caption: str = ""
    tags: str = ""
    others: Mapping[str, Any] = field(default_factory=dict)
    line: int = 0

    @property
    def text(self) -> str:
        """What is trained: caption and tags."""
        return ", ".join(part.strip() for part in (self.caption, self.tags) if part.strip())


def is_lines(path: Path) -> bool:
    """Whether a file is JSONL, by its name."""
    return path.suffix.lower() == JSONL


def read(path: Path) -> dict[str, Entry]:
    """Return the entries of a metadata file by their keys, in their order.

    Raises:
        UserError: it is missing, not UTF-8, broken or of another form, or has a key twice; line and column are named.
    """
    text = _text_of(path)
    try:
        entries = _entries_in_lines(path, text) if is_lines(path) else _entries_in_object(path, text)
    except UserError:
        raise
    except (RecursionError, ValueError) as error:  # a list in a list in a list ..., a number of thousands of digits
        raise UserError(f"{path} is no metadata file: it holds values that cannot be read ({error}).") from error
    if not entries:
        example = _EXAMPLES[JSONL] if is_lines(path) else '{"0001": {"caption": "a cat"}}'
        raise UserError(f"{path} must hold an object with an entry for each picture, like {example}; it holds nothing.")
    return entries


def lines_to_write(path: Path, entries: Mapping[str, Entry]) -> Iterator[str]:
    """Return the text of a metadata file in pieces, JSON or JSONL by its name; what is empty is left out."""
    if is_lines(path):
        for key, entry in entries.items():
            yield json.dumps({_KEYS[0]: key, **_fields(entry)}, ensure_ascii=False) + "\n"
        return
    for number, (key, entry) in enumerate(entries.items()):
        value = json.dumps(_fields(entry), ensure_ascii=False, indent=2).replace("\n", "\n  ")
        yield f"{',' if number else '{'}\n  {json.dumps(key, ensure_ascii=False)}: {value}"
    yield "\n}\n"


def _fields(entry: Entry) -> dict[str, Any]:
    texts = {"caption": entry.caption, "tags": entry.tags}
    return {name: text for name, text in texts.items() if text} | dict(entry.others)


def _text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"the metadata file {path} cannot be opened ({error.strerror}); check the path.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it again as UTF-8.") from error


# ---- the two forms -------------------------------------------------------------------------------------------------


class _Mistake(Exception):
    """What is wrong, and where in the text."""

    def __init__(self, position: int, message: str) -> None:
        super().__init__(message)
        self.position = position


def _entries_in_object(path: Path, text: str) -> dict[str, Entry]:
    try:
        pairs = _pairs(path, text)
    except json.JSONDecodeError as error:
        hint = "mend it there"
        if error.msg == "Extra data":
            hint = f"if each line is an entry of its own, the file's name must end with {JSONL}"
        raise UserError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; {hint}."
        ) from error
    entries: dict[str, Entry] = {}
    places = _Places(text)
    for key, value, position, begin in pairs:
        line, _ = places.of(position)
        try:
            _check_text(key, position)
            if key in entries:
                message = f"the same key more than once: {key} (first in line {entries[key].line})"
                raise _Mistake(position, f"{message}; keep one entry of each.")
            if not key.strip():
                raise _Mistake(position, "an empty key names no picture; write the picture's path there.")
            if not isinstance(value, _Object):
                raise _Mistake(begin, f"expected an object such as {_EXAMPLES[JSON]}, found {_shown(value)}.")
            entries[key] = _entry(value.members, line, JSON)
        except _Mistake as mistake:
            number, column = places.of(mistake.position)
            raise UserError(f'{path}, line {number}, column {column}, key "{key}": {mistake}') from None
    return entries


def _entries_in_lines(path: Path, text: str) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            members = _whole_object(line)
            key, position = _key(members)
            if key in entries:
                first = entries[key].line
                message = f'"{key}" stands in line {first} already; keep one line for each picture.'
                raise _Mistake(position, message)
            entries[key] = _entry([member for member in members if member[0] not in _KEYS], number, JSONL)
        except json.JSONDecodeError as error:
            is_object = number == 1 and line.strip() == "{"
            hint = f"the file's name must end with {JSON} if it is one object" if is_object else "mend it there"
            raise UserError(
                f"{path} is not valid JSONL: {error.msg} at line {number}, column {error.colno}; each line is an "
                f"object such as {_EXAMPLES[JSONL]}; {hint}."
            ) from error
        except _Mistake as mistake:
            raise UserError(f"{path}, line {number}, column {mistake.position + 1}: {mistake}") from None
    return entries


def _pairs(path: Path, text: str) -> list[_Member]:
    """Return keys and entries of a JSON file, the entries as `_Object`."""
    begin = _skip(text, 0)
    if text[begin : begin + 1] != "{":
        value, end = _DECODER.raw_decode(text, begin)
        _refuse_more(text, end)
        kind = f"a {type(value).__name__}" if value else "nothing"
        hint = f"; a list of entries is written as {JSONL}, one in each line" if value and type(value) is list else ""
        raise UserError(
            f"{path} must hold an object with an entry for each picture, like "
            f'{{"0001": {{"caption": "a cat"}}}}; it holds {kind}{hint}.'
        )
    members, end = _members(text, begin, depth=1)
    _refuse_more(text, end)
    return members


def _whole_object(line: str) -> list[_Member]:
    begin = _skip(line, 0)
    if line[begin : begin + 1] != "{":
        value, end = _DECODER.raw_decode(line, begin)
        _refuse_more(line, end)
        raise _Mistake(begin, f"expected an object such as {_EXAMPLES[JSONL]}, found {_shown(value)}.")
    members, end = _members(line, begin, depth=0)
    _refuse_more(line, end)
    return members


def _key(members: Iterable[_Member]) -> tuple[str, int]:
    named = [member for member in members if member[0] in _KEYS]
    names = ", ".join(_KEYS[:-1]) + f" or {_KEYS[-1]}"
    if not named:
        near = [f'"{member[0]}"' for member in members if _nearest(member[0], _KEYS)]
        found = f"; {near[0]} is none of them" if near else ""
        raise _Mistake(0, f"no picture is named; write its path as {names}{found}.")
    if len(named) > 1:
        told = " and ".join(f'"{member[0]}"' for member in named)
        raise _Mistake(named[1][2], f"{told} both name the picture; keep one of them.")
    name, key, position, begin = named[0]
    if not isinstance(key, str) or not key.strip():
        raise _Mistake(begin, f"{name} must be a picture's path as text, found {_shown(key)}.")
    _check_text(key, begin)
    return key, position


def _entry(members: Iterable[_Member], line: int, form: str) -> Entry:
    found: dict[str, Any] = {}
    allowed = (*(_KEYS if form == JSONL else ()), *_TEXTS, *_OTHERS)
    for name, value, position, begin in members:
        if name in found:
            raise _Mistake(position, f'"{name}" is given twice; keep one of them.')
        if name not in _TEXTS and name not in _OTHERS:
            near = _nearest(name, allowed)
            hint = f"did you mean {near}?" if near else f"known are {', '.join(allowed)}."
            raise _Mistake(position, f'there is no field "{name}"; {hint}')
        found[name] = _value(name, value, begin, form)
    others = {name: found[name] for name in _OTHERS if name in found}
    return Entry(found.get("caption", ""), found.get("tags", ""), others, line)


def _value(name: str, value: Any, begin: int, form: str) -> Any:
    if name in _OTHERS:
        _check_text(json.dumps(value, ensure_ascii=False), begin)
        return value
    if name == "tags" and isinstance(value, list) and all(isinstance(tag, str) for tag in value):
        value = ", ".join(value)
    if value is not None and not isinstance(value, str):
        what = "a text or a list of texts" if name == "tags" else "a text"
        found = f"found {name} = {_shown(value)}"
        raise _Mistake(begin, f"expected an object such as {_EXAMPLES[form]}, {found}; {name} is {what}.")
    _check_text(value or "", begin)
    return value or ""


def _check_text(text: str, position: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        broken = f"\\u{ord(text[error.start]):04x}"
        raise _Mistake(position, f"{broken} is half of a character and no text; write the character itself.") from None


def _nearest(name: str, allowed: Iterable[str]) -> str | None:
    known = list(allowed)
    if _MEANT.get(name.lower()) in known:
        return _MEANT[name.lower()]
    return next(iter(difflib.get_close_matches(name.lower(), known, n=1)), None)


def _shown(value: Any) -> str:
    text = "an object" if isinstance(value, (_Object, dict)) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---- JSON with places: the json module tells none ------------------------------------------------------------------


@dataclass(frozen=True)
class _Object:
    members: list[_Member]


class _Places:
    """Lines and columns of positions in a text, quick for rising ones."""

    def __init__(self, text: str) -> None:
        self._text, self._position, self._line = text, 0, 1

    def of(self, position: int) -> tuple[int, int]:
        """Return the line and the column, both from 1."""
        if position < self._position:
            self._position, self._line = 0, 1
        self._line += self._text.count("\n", self._position, position)
        self._position = position
        return self._line, position - self._text.rfind("\n", 0, position)


def _members(text: str, begin: int, *, depth: int) -> tuple[list[_Member], int]:
    """Return the members of the object that begins there, and where it ends; so many levels below are `_Object`."""
    found: list[_Member] = []
    position = _skip(text, begin + 1)
    if text[position : position + 1] == "}":
        return found, position + 1
    while True:
        if text[position : position + 1] != '"':
            raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, position)
        name, end = _DECODER.raw_decode(text, position)
        colon = _skip(text, end)
        if text[colon : colon + 1] != ":":
            raise json.JSONDecodeError("Expecting ':' delimiter", text, colon)
        value_begin = _skip(text, colon + 1)
        if depth and text[value_begin : value_begin + 1] == "{":
            members, end = _members(text, value_begin, depth=depth - 1)
            found.append((name, _Object(members), position, value_begin))
        else:
            value, end = _DECODER.raw_decode(text, value_begin)
            found.append((name, value, position, value_begin))
        position = _skip(text, end)
        delimiter = text[position : position + 1]
        if delimiter == "}":
            return found, position + 1
        if delimiter != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        position = _skip(text, position + 1)


def _refuse_more(text: str, end: int) -> None:
    position = _skip(text, end)
    if position < len(text):
        raise json.JSONDecodeError("Extra data", text, position)


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()
