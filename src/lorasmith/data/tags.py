"""What becomes of a tagger's scores: which tags are taken, how they are spelled, and in which order they stand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lorasmith.data.caption_cleaning import load_rules
from lorasmith.data.phrases import add_to_first_line
from lorasmith.errors import UserError

RATING = "rating"
CHARACTER = "character"
# In the order in which `category` puts them; a category that is none of these comes after them.
CATEGORIES = (CHARACTER, "copyright", "artist", "general", "meta")
Order = Literal["confidence", "alphabetical", "category"]

_EMOTICONS = frozenset(load_rules().keep)  # faces, where an underscore is a mouth: one table for all commands


@dataclass(frozen=True)
class ScoredTag:
    """A tag as the tagger spells it, its category (`general`, `character`, `rating`, ...) and its score in [0, 1]."""

    name: str
    category: str
    score: float


@dataclass(frozen=True)
class TagRules:
    """Which tags are taken and how they are written.

    blacklist, always_first: tags by their `key`. replacements: `key` of a tag -> what is written for it.
    """

    general_threshold: float = 0.35
    character_threshold: float = 0.35
    has_rating: bool = False
    keeps_underscores: bool = False
    order: Order = "confidence"
    blacklist: frozenset[str] = frozenset()
    always_first: Sequence[str] = ()
    replacements: Mapping[str, str] = field(default_factory=dict)


def key(tag: str) -> str:
    """Return what two spellings of a tag have in common: `Blue_Eyes` and `blue eyes` are one."""
    return " ".join(tag.replace("_", " ").lower().split())


def spelled(tag: str, *, keeps_underscores: bool) -> str:
    """Return a tag with spaces for underscores, unless they are to be kept or are part of an emoticon such as ^_^."""
    return tag if keeps_underscores or tag in _EMOTICONS else tag.replace("_", " ")


def choose(scored: Sequence[ScoredTag], rules: TagRules) -> list[str]:
    """Return the tags to write, in their order; each once, the rating (if wanted) last."""
    taken = [tag for tag in scored if tag.category != RATING and tag.score >= _threshold(tag, rules)]
    ratings = [tag for tag in scored if tag.category == RATING]
    taken = _ordered([tag for tag in taken if key(tag.name) not in rules.blacklist], rules)
    if rules.has_rating and ratings:
        best = max(ratings, key=lambda tag: tag.score)
        taken += [best] if key(best.name) not in rules.blacklist else []
    written: dict[str, str] = {}
    for tag in taken:
        text = rules.replacements.get(key(tag.name), spelled(tag.name, keeps_underscores=rules.keeps_underscores))
        written.setdefault(key(text), text)
    first = [wanted for wanted in rules.always_first if wanted in written]
    return [written[one] for one in dict.fromkeys([*first, *written])]


def _threshold(tag: ScoredTag, rules: TagRules) -> float:
    return rules.character_threshold if tag.category == CHARACTER else rules.general_threshold


def _ordered(tags: Sequence[ScoredTag], rules: TagRules) -> list[ScoredTag]:
    by_score = sorted(tags, key=lambda tag: (-tag.score, tag.name))
    if rules.order == "alphabetical":
        return sorted(tags, key=lambda tag: (key(tag.name), tag.name))
    if rules.order == "category":
        places = {category: number for number, category in enumerate(CATEGORIES)}
        return sorted(by_score, key=lambda tag: places.get(tag.category, len(places)))
    return by_score


def with_missing(text: str, tags: Sequence[str], separator: str) -> str:
    """Return a text whose first line has those tags added that it lacks; all that it has stays to the letter."""
    there = {key(part) for part in text.partition("\n")[0].split(separator.strip() or separator)}
    missing = [tag for tag in tags if key(tag) not in there]
    return add_to_first_line(text, missing, separator) if missing else text


# ---- lists that a user gives ---------------------------------------------------------------------------------------


def read_list(text: str | None) -> list[str]:
    """Return the entries of an option: a list with commas (`\\,` is a comma in an entry), or a file with one a line.

    Raises:
        UserError: the file is not UTF-8.
    """
    if not text:
        return []
    if _is_file(text):
        try:
            return [
                line.strip()
                for line in Path(text).expanduser().read_text(encoding="utf-8-sig").splitlines()
                if line.strip()
            ]
        except UnicodeDecodeError as error:
            raise UserError(f"{text} is not UTF-8; save it again as UTF-8, with one entry a line.") from error
    return [entry for part in _split(text, ",") if (entry := part.replace("\\,", ",").strip())]


def read_replacements(text: str | None) -> dict[str, str]:
    r"""Return `a:b` entries as {key of a: b}; `\:` is a colon in a tag, and one at the beginning is one as well.

    Raises:
        UserError: an entry has another form, or names a tag twice.
    """
    replacements: dict[str, str] = {}
    for entry in read_list(text):
        parts = [part.replace("\\:", ":").strip() for part in _split(entry, ":", start=1)]
        if len(parts) != 2 or not all(parts):
            raise UserError(
                f"--replace {entry}: expected OLD:NEW, such as 1girl:woman, with \\: for a colon in a tag; "
                "to leave a tag out, use --blacklist."
            )
        if key(parts[0]) in replacements:
            raise UserError(f"--replace {entry}: {parts[0]} is replaced twice; leave one of them out.")
        replacements[key(parts[0])] = parts[1]
    return replacements


def _is_file(text: str) -> bool:
    try:
        return Path(text).expanduser().is_file()
    except (OSError, RuntimeError):  # too long for a path, or ~ of nobody: so a list
        return False


def _split(text: str, mark: str, *, start: int = 0) -> list[str]:
    """Split at each mark from `start` on that has no backslash before it."""
    parts, begin = [], 0
    for place in range(start, len(text)):
        if text[place] == mark and text[place - 1 : place] != "\\":
            parts.append(text[begin:place])
            begin = place + 1
    return [*parts, text[begin:]]
