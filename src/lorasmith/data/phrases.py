"""Captions as text: phrases that a captioner says of every other picture cut out, and new words put to older ones."""

import re
from collections.abc import Sequence
from pathlib import Path

from lorasmith.errors import UserError

HABITS = "habits"  # the name of the table that comes along
_TABLE = Path(__file__).parent / "tables" / "captioner_habits.txt"


def read_phrases(name: str) -> list[re.Pattern[str]]:
    """Return the patterns of a table: `habits`, which comes along, or a text file with a regular expression a line.

    Raises:
        UserError: there is no such file, it is not UTF-8, or a line is no regular expression.
    """
    path = _TABLE if name == HABITS else Path(name).expanduser()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(
            f"--remove-phrases {name}: expected {HABITS}, the table that comes along, or a file with a regular "
            f"expression a line ({error.strerror}: {path})."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"--remove-phrases {name}: the file is not UTF-8; save it again as UTF-8.") from error
    patterns = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            try:
                patterns.append(re.compile(line, re.IGNORECASE))
            except re.error as error:
                raise UserError(f"{path}, line {number}: this is no regular expression ({error}): {line}") from error
    return patterns


def cut(caption: str, phrases: Sequence[re.Pattern[str]]) -> str:
    """Return a caption without the phrases, on one line; one of which nothing would be left stays as it is."""
    whole = " ".join(caption.split())
    rest = whole
    for phrase in phrases:
        rest = phrase.sub("", rest)
    rest = re.sub(r"\s+([,.;])", r"\1", " ".join(rest.split())).strip(" ,;")
    return rest if re.search(r"\w", rest) else whole


def add_to_first_line(text: str, parts: Sequence[str], separator: str) -> str:
    """Return a text with parts put to the end of its first line, which is the caption; all else stays to the letter."""
    line, newline, rest = text.partition("\n")
    ending = "\r" if line.endswith("\r") else ""
    mark = separator.strip()
    begin = line.rstrip().removesuffix(mark).rstrip() if mark else line.rstrip("\r")
    return separator.join([*([begin] if begin else []), *parts]) + ending + newline + rest
