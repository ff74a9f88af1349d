"""Captions and tags made uniform by tables of rules: pure text work, in order, and nothing left to do the second time.

The rules are data: `tables/caption_rules.toml`, and files of the same form from users. docs/captions-metadata.md
says what each does. Tags are matched whole and captions by whole words, so that no word is changed inside another.
"""

import difflib
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorasmith.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHIPPED = Path(__file__).parent / "tables" / "caption_rules.toml"
_TABLES: dict[str, Any] = {
    "extend": bool,
    "tags": {"underscores_to_spaces": bool, "keep": list, "remove": list, "rename": dict, "general": dict},
    "captions": {"replace": dict},
}
_EXPECTED = {
    bool: "true or false",
    list: 'a list of texts, such as ["a", "b"]',
    dict: "a table of its own",
    str: 'a text in quotes, such as "long hair"',
}
_BRACKETS = re.compile(r"\\.|[()\[\]{}]")
_CLOSING = {")": "(", "]": "[", "}": "{"}
_LINE_ENDS = re.compile(r"\r\n|\r|\n")
_ROOM_TO_GROW = 10_000  # letters: a caption that replacements make longer than this grows without end


@dataclass(frozen=True)
class Change:
    """One thing that a rule did; `after` is empty where something was left out."""

    rule: str
    before: str
    after: str


@dataclass(frozen=True)
class Rules:
    """What to change. Tags in the tables are as users write them.

    tidy: white space, commas and duplicates. keep: tags that no rule changes. general: tag -> more specific ones that
    make it superfluous; a star at one end of them stands for further words. replace: words of captions.
    """

    tidy: bool = False
    underscores_to_spaces: bool = False
    keep: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    general: Mapping[str, Sequence[str]] = field(default_factory=dict)
    replace: Mapping[str, str] = field(default_factory=dict)


class Cleaner:
    """Applies rules. What becomes of a tag is worked out once.

    Raises:
        UserError: rules that undo each other, so that cleaning would never end.
    """

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._keep = frozenset(map(fold, rules.keep))
        self._remove = frozenset(map(self._key, rules.remove))
        self._rename = {self._key(tag): new for tag, new in rules.rename.items() if tag != new}
        self._general = {self._key(tag): self._pattern(wider) for tag, wider in rules.general.items() if wider}
        self._replace = {fold(words): new for words, new in rules.replace.items() if words != new}
        self._words = _words_pattern(self._replace)
        self._settled: dict[str, tuple[str, tuple[Change, ...]]] = {}
        for tag in rules.rename:
            self._settle(tag)
        for words in rules.replace:
            self.caption(words)

    def tags(self, text: str) -> tuple[list[str], list[Change]]:
        """Return the cleaned tags of a text, and what was changed in them."""
        changes: list[Change] = []
        while True:
            units = split_tags(text, self._keep)
            spaced = ", ".join(units)
            if self._rules.tidy and spaced != text:
                changes.append(Change("spaces and commas", text, spaced))
            kept = self._without_general(self._without_duplicates(units, changes), changes)
            cleaned = ", ".join(kept)
            if cleaned == spaced:
                return kept, changes
            text = cleaned

    def caption(self, text: str) -> tuple[str, list[Change]]:
        """Return a cleaned caption, its lines each by itself, and what was changed in it."""
        changes: list[Change] = []
        if not self._rules.tidy and self._words is None:
            return text, changes
        lines = [self._line(line, changes) for line in _LINE_ENDS.split(text)]
        return "\n".join(filter(None, lines) if self._rules.tidy else lines), changes

    def _without_duplicates(self, units: Sequence[str], changes: list[Change]) -> list[str]:
        seen: set[str] = set()
        kept = []
        for unit in units:
            tag, own = self._settle(unit)
            changes += own
            folded = fold(tag)
            if folded in seen and self._rules.tidy:
                changes.append(Change("duplicates", tag, ""))
            elif tag:
                kept.append(tag)
                seen.add(folded)
        return kept

    def _settle(self, tag: str) -> tuple[str, tuple[Change, ...]]:
        """Return what becomes of one tag, "" if it is left out."""
        if tag not in self._settled:
            self._settled[tag] = self._followed(tag)
        return self._settled[tag]

    def _followed(self, tag: str) -> tuple[str, tuple[Change, ...]]:
        changes: list[Change] = []
        forms = [tag]
        while tag and fold(tag) not in self._keep and "," not in tag:  # a comma: words in brackets, kept together
            rule, tag = self._next(tag)
            if not rule:
                break
            changes.append(Change(rule, forms[-1], tag))
            if tag in forms:
                circle = " -> ".join([*forms[forms.index(tag) :], tag])
                raise UserError(f"the rules rename tags in a circle: {circle}; leave out one of these rules.")
            forms.append(tag)
        return tag, tuple(changes)

    def _next(self, tag: str) -> tuple[str, str]:
        """Return the first rule that changes a tag, and what it makes of it."""
        rules, key = self._rules, self._key(tag)
        spaced = " ".join(tag.split())
        if rules.tidy and spaced != tag:
            return "spaces and commas", spaced
        if rules.underscores_to_spaces and "_" in tag:
            return "underscores", " ".join(tag.replace("_", " ").split())
        if key in self._remove:
            return "removed tags", ""
        if key in self._rename and self._rename[key] != tag:
            return "renamed tags", self._rename[key]
        return "", tag

    def _without_general(self, tags: Sequence[str], changes: list[Change]) -> list[str]:
        keys = [self._key(tag) for tag in tags]
        left = set(range(len(tags)))
        for number, (tag, key) in enumerate(zip(tags, keys, strict=True)):
            if key not in self._general or fold(tag) in self._keep:
                continue
            pattern = self._general[key]
            wider = next((i for i in sorted(left) if keys[i] != key and pattern.fullmatch(keys[i])), None)
            if wider is not None:
                left.remove(number)
                changes.append(Change("said by a more specific tag", f"{tag} ({tags[wider]})", ""))
        return [tags[number] for number in sorted(left)]

    def _line(self, text: str, changes: list[Change]) -> str:
        def put(match: re.Match[str]) -> str:
            found = match[0]
            new = self._replace.get(fold(found), found)
            new = new[:1].upper() + new[1:] if found[:1].isupper() else new
            if new != found:
                changes.append(Change("words of captions", found, new))
            return new

        limit, forms = len(text) + _ROOM_TO_GROW, {text}
        while True:
            before = text
            text = self._words.sub(put, text) if self._words is not None else text
            if self._rules.tidy or text != before:
                tidied = _tidied(text)
                if text == before and tidied != text:
                    changes.append(Change("spaces and commas", text, tidied))
                text = tidied
            if text == before:
                return text
            if text in forms or len(text) > limit:
                words = ", ".join(f"{old} -> {new}" for old, new in self._rules.replace.items() if fold(old) in before)
                raise UserError(
                    f"the rules for words of captions never come to an end: {_shortened(words)}; what a rule puts must "
                    "not be replaced again by it, nor by another one that leads back to it."
                )
            forms.add(text)

    def _key(self, tag: str) -> str:
        """Return a tag as the tables are asked for it: upper and lower case alike, and underscores where they go."""
        folded = fold(tag)
        if self._rules.underscores_to_spaces and "_" in folded and folded not in self._keep:
            folded = " ".join(folded.replace("_", " ").split())
        return folded

    def _pattern(self, wider: Iterable[str]) -> re.Pattern[str]:
        texts = [re.escape(self._key(tag.strip("* "))) for tag in wider]
        return re.compile(
            "|".join(
                (r".+\s" if tag.startswith("*") else "") + text + (r"\s.+" if tag.endswith("*") else "")
                for tag, text in zip(wider, texts, strict=True)
            )
        )


@lru_cache(maxsize=200_000)
def fold(tag: str) -> str:
    """Return a tag as it is compared: case and the width of spaces do not count."""
    return " ".join(tag.casefold().split())


def split_tags(text: str, emoticons: Collection[str] = ()) -> list[str]:
    """Return the tags between commas and line ends; what stands in brackets with a comma inside is kept together.

    Args:
        emoticons: folded tags whose brackets are no brackets.
    """
    pieces = text.replace("\r", ",").replace("\n", ",").split(",")
    if not _BRACKETS.search(text):
        return [unit for piece in pieces if (unit := piece.strip())]
    opened: list[tuple[str, int]] = []  # bracket, number of its piece
    end_of: dict[int, int] = {}
    for number, piece in enumerate(pieces):
        if fold(piece) in emoticons:
            continue
        for mark in _BRACKETS.findall(piece):
            if mark in _CLOSING.values():
                opened.append((mark, number))
            elif mark in _CLOSING and opened and opened[-1][0] == _CLOSING[mark]:
                first = opened.pop()[1]
                end_of[first] = max(end_of.get(first, first), number)
    units, number = [], 0
    while number < len(pieces):
        first = last = number
        while number <= last:
            last = max(last, end_of.get(number, number))
            number += 1
        units.append(",".join(pieces[first:number]).strip())
    return [unit for unit in units if unit]


def add_first(tags: Sequence[str], added: Sequence[str]) -> tuple[list[str], list[Change]]:
    """Return the tags with others before them, which are not there a second time."""
    folded = {fold(tag) for tag in added}
    result = [*added, *(tag for tag in tags if fold(tag) not in folded)]
    if list(tags[: len(added)]) == list(added):
        return result, []
    there = {fold(tag) for tag in tags}
    return result, [Change("added first", tag if fold(tag) in there else "", tag) for tag in added]


def limit(
    lists: Sequence[list[str]], *, kept: Collection[str] = (), min_count: int = 1, max_tags: int | None = None
) -> tuple[list[list[str]], list[list[Change]]]:
    """Return the tags of all pictures without the rare ones, and no more than so many each; and what was left out.

    In the result no tag is in fewer than `min_count` pictures, but for those of `kept`.
    """
    always = {fold(tag) for tag in kept}
    changes: list[list[Change]] = [[] for _ in lists]
    result = _without_rare(lists, always, min_count, changes)
    if max_tags is not None:
        for tags, own in zip(result, changes, strict=True):
            own += [Change("more than --max-tags", tag, "") for tag in tags[max_tags:]]
        result = _without_rare([tags[:max_tags] for tags in result], always, min_count, changes)
    return result, changes


def frequencies(lists: Iterable[Iterable[str]]) -> Counter[str]:
    """Return in how many pictures each tag is, under the spelling that comes first."""
    counts: Counter[str] = Counter()
    spelling: dict[str, str] = {}
    for tags in lists:
        for folded, tag in {fold(tag): tag for tag in tags}.items():
            counts[spelling.setdefault(folded, tag)] += 1
    return counts


def _without_rare(
    lists: Sequence[list[str]], always: Collection[str], min_count: int, changes: Sequence[list[Change]]
) -> list[list[str]]:
    if min_count < 2:
        return list(lists)
    counts = Counter(folded for tags in lists for folded in {fold(tag) for tag in tags})
    result = []
    for tags, own in zip(lists, changes, strict=True):
        rare = [tag for tag in tags if counts[fold(tag)] < min_count and fold(tag) not in always]
        own += [Change("fewer than --min-count", tag, "") for tag in rare]
        dropped = set(rare)
        result.append([tag for tag in tags if tag not in dropped])
    return result


def _words_pattern(words: Iterable[str]) -> re.Pattern[str] | None:
    """Return what finds any of the words or phrases, the longest first, but not inside of a word like `woman's`."""
    texts = [r"\s+".join(map(re.escape, phrase.split())) for phrase in sorted(words, key=len, reverse=True)]
    return re.compile(rf"(?<![\w'’-])(?:{'|'.join(texts)})(?![\w'’-])", re.IGNORECASE) if texts else None


def _tidied(text: str) -> str:
    text = re.sub(r"\s*,(?:\s*,)+", ",", " ".join(text.split()))
    return re.sub(r" ,(?= |$)", ",", text).strip(" ,")


def _shortened(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:297]}..."


# ---- tables --------------------------------------------------------------------------------------------------------


def load_rules(path: Path | None = None) -> Rules:
    """Return the shipped rules, or those of a user's file, which extend them unless it says `extend = false`.

    Raises:
        UserError: the file cannot be read or is no such table; each mistake with its line.
    """
    shipped = _rules(_load(SHIPPED))
    if path is None:
        return shipped
    values = _load(path)
    own = _rules(values)
    if not values.get("extend", True):
        return own
    says_underscores = "underscores_to_spaces" in values.get("tags", {})
    return replace(
        own,
        underscores_to_spaces=own.underscores_to_spaces if says_underscores else shipped.underscores_to_spaces,
        keep=(*shipped.keep, *own.keep),
        remove=(*shipped.remove, *own.remove),
        rename={**shipped.rename, **own.rename},
        general={**shipped.general, **own.general},
        replace={**shipped.replace, **own.replace},
    )


def _rules(values: Mapping[str, Any]) -> Rules:
    tags, captions = values.get("tags", {}), values.get("captions", {})
    return Rules(
        tidy=True,
        underscores_to_spaces=tags.get("underscores_to_spaces", False),
        keep=tuple(tags.get("keep", ())),
        remove=tuple(tags.get("remove", ())),
        rename=tags.get("rename", {}),
        general=tags.get("general", {}),
        replace=captions.get("replace", {}),
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        values = tomllib.loads(text)
    except OSError as error:
        raise UserError(f"the rules {path} cannot be opened ({error.strerror}); check the path.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it again as UTF-8.") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}; a text stands in quotes; mend it there.") from error
    mistakes = list(_mistakes(values, _TABLES, ()))
    if mistakes:
        lines = [f"{path}, line {_line_of(text, place)}: {message}" for place, message in mistakes]
        raise UserError("\n".join(lines))
    return values


def _mistakes(
    values: Mapping[str, Any], expected: Mapping[str, Any], above: tuple[str, ...]
) -> Iterable[tuple[tuple[str, ...], str]]:
    """Return where the tables are not of the expected form, and what is wrong there."""
    for name, value in values.items():
        place = (*above, name)
        if name not in expected:
            near = difflib.get_close_matches(name, expected, n=1)
            known = ", ".join(expected)
            where = f" in [{'.'.join(above)}]" if above else ""
            hint = f"did you mean {near[0]}?" if near else f"known are {known}."
            yield place, f'there is no "{name}"{where}; {hint}'
        elif isinstance(expected[name], Mapping):
            if isinstance(value, Mapping):
                yield from _mistakes(value, expected[name], place)
            else:
                yield place, f"{name}: expected {_EXPECTED[dict]}; write [{name}], and its rules in the lines below."
        elif not isinstance(value, expected[name]):
            yield place, f"{name}: expected {_EXPECTED[expected[name]]}, found {value!r}."
        elif expected[name] is list:
            yield from ((place, message) for message in _wrong_tags(name, value))
        elif expected[name] is dict:
            for key, item in value.items():
                yield from (((*place, key), message) for message in _wrong_rule(name, key, item))


def _wrong_rule(table: str, key: str, value: Any) -> Iterable[str]:
    if not key.strip():
        yield f"{table}: an empty text on the left names nothing."
    if table == "general":
        if not isinstance(value, list):
            yield f'{key}: expected {_EXPECTED[list]}, found {value!r}; it holds more specific tags than "{key}".'
            return
        yield from _wrong_tags(key, value)
        for tag in value:
            if isinstance(tag, str) and tag.strip() and not re.fullmatch(r"(\* )?[^*]+( \*)?", tag):
                yield f'{key}: "{tag}": a star stands for words at the beginning or the end, such as "* hair".'
    elif not isinstance(value, str):
        yield f"{key}: expected {_EXPECTED[str]}, found {value!r}."
    elif table == "rename":
        if not value.strip():
            yield f'{key}: an empty text is no tag; to leave the tag out, put it into remove = ["{key}"].'
        yield from _wrong_tags(key, [tag for tag in (key, value) if tag.strip()])


def _wrong_tags(name: str, tags: Sequence[Any]) -> Iterable[str]:
    for tag in tags:
        if not isinstance(tag, str):
            yield f"{name}: expected {_EXPECTED[str]}, found {tag!r}."
        elif not tag.strip():
            yield f"{name}: an empty text is no tag; leave it out."
        elif "," in tag:
            yield f'{name}: "{tag}" has a comma, which divides tags; write them one by one.'


def _line_of(text: str, place: tuple[str, ...]) -> int:
    """Return the line of a rule: the last one of the shortest beginning of the file that is TOML and holds it."""
    lines = text.splitlines()
    begin = 0
    for end in range(1, len(lines) + 1):
        try:
            values: Any = tomllib.loads("\n".join(lines[:end]))
        except tomllib.TOMLDecodeError:
            continue
        for name in place:
            values = values.get(name) if isinstance(values, Mapping) else None
        if values is not None:
            break
        begin = end
    return begin + 1
