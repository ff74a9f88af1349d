"""What is written into prompts beside words: `<lora:name:0.8>`, `AND` between prompts, `{a|b}` for variants.

`{e$$a|b}` stands for all of its variants even where of others one is drawn.

Weights such as `(a:1.2)` and the word BREAK are the text encoder's business (`data.captions.weights`, `models.sd`).
"""

import math
import random
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice, product

from lorasmith.errors import UserError

MOST_VARIANTS = 10_000
_LORA = re.compile(r"<lora:([^<>]*)>")
_AND = re.compile(r"\bAND\b")
_WEIGHT = re.compile(r"(?P<text>.*?)\s*:\s*(?P<weight>[-+]?(?:\d+\.?\d*|\.\d+))\s*", re.DOTALL)
_BRACE = re.compile(r"\\?[{|}]")
_EVERY = re.compile(r"[eE]\$\$")
_COUNT = re.compile(r"(?:(?P<least>\d+)(?:-(?P<most>\d+))?)?\$\$")


@dataclass(frozen=True)
class LoraTag:
    """A LoRA that a prompt asks for, by the name of its file without the ending, and how strongly."""

    name: str
    unet: float
    text_encoder: float


def take_loras(text: str) -> tuple[str, list[LoraTag]]:
    """Return a prompt without its `<lora:name>`, `<lora:name:strength>` or `<lora:name:text encoder:unet>`, and these.

    The order of the two strengths is WebUI's.

    Raises:
        UserError: one of them is written otherwise.
    """
    tags = [_tag(match[0], match[1]) for match in _LORA.finditer(text)]
    return _LORA.sub("", text).strip(), tags


def _tag(whole: str, inside: str) -> LoraTag:
    name, *numbers = inside.split(":")
    try:
        strengths = [float(number) for number in numbers] or [1.0]
    except ValueError:
        strengths = []
    if not name.strip() or len(strengths) not in (1, 2) or not all(map(math.isfinite, strengths)):
        raise UserError(
            f"{whole}: expected <lora:name>, <lora:name:strength> or <lora:name:strength in the text encoder:strength "
            "in the U-Net>, such as <lora:robot:0.8>."
        )
    return LoraTag(name.strip(), unet=strengths[-1], text_encoder=strengths[0])


def composed(text: str) -> list[tuple[str, float]]:
    """Return the prompts that `AND` joins with their weights, as in `a cat AND a dog :0.5`; one alone weighs 1."""
    parts = _AND.split(text)
    if len(parts) == 1:
        return [(text, 1.0)]
    found = []
    for part in parts:
        match = _WEIGHT.fullmatch(part.strip())
        found.append((match["text"], float(match["weight"])) if match else (part.strip(), 1.0))
    return found


# --- variants ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    """`{2-3$$ and $$a|b|c}`: that many of the options, joined by the separator; each option is a text with choices.

    is_every: it is `{e$$a|b}`, which stands for all of them in any case.
    """

    options: "Sequence[_Text]"
    least: int
    most: int
    separator: str
    is_every: bool


_Text = list["str | _Choice"]


def chosen(text: str, draws: random.Random) -> list[str]:
    """Return a text with what is drawn for each `{a|b}` in it, inner ones too; one text for each option of `{e$$a|b}`.

    Raises:
        UserError: these are more than `MOST_VARIANTS`.
    """
    return _counted(text, _drawn(_parsed(text), draws))


def variants(text: str) -> list[str]:
    """Return all texts that a text with `{a|b}` in it stands for, in the order in which the options are written.

    Raises:
        UserError: there are more than `MOST_VARIANTS`.
    """
    return _counted(text, _all(_parsed(text)))


def _counted(text: str, variants: Iterator[str]) -> list[str]:
    found = _some(variants)
    if len(found) > MOST_VARIANTS:
        raise UserError(
            f"prompt {text!r} has more than {MOST_VARIANTS:,} variants; leave out --all-variants and {{e$$...}}, and "
            "give --images, to draw some of them."
        )
    return found


def _some(variants: Iterator[str]) -> list[str]:
    """Return all of them, or so many that it is clear that they are too many."""
    return list(islice(variants, MOST_VARIANTS + 1))


def _drawn(text: _Text, draws: random.Random) -> Iterator[str]:
    parts = [_some(_drawn_of(part, draws)) if isinstance(part, _Choice) else [part] for part in text]
    return map("".join, product(*parts))


def _drawn_of(choice: _Choice, draws: random.Random) -> Iterator[str]:
    if choice.is_every:
        texts = [_some(_drawn(option, draws)) for option in choice.options]
        some = (one for count in range(choice.least, choice.most + 1) for one in combinations(texts, count))
    else:
        numbers = draws.sample(range(len(choice.options)), draws.randint(choice.least, choice.most))
        some = [[_some(_drawn(choice.options[number], draws)) for number in numbers]]
    for picked in some:
        yield from map(choice.separator.join, product(*picked))


def _all(text: _Text) -> Iterator[str]:
    if not text:
        yield ""
        return
    for begin in _all_of(text[0]) if isinstance(text[0], _Choice) else [text[0]]:
        for end in _all(text[1:]):
            yield begin + end


def _all_of(choice: _Choice) -> Iterator[str]:
    for count in range(choice.least, choice.most + 1):
        for options in combinations(choice.options, count):
            for texts in product(*(_all(option) for option in options)):
                yield choice.separator.join(texts)


def _parsed(text: str) -> _Text:
    return _read(text, 0, "", _closed(text))[0]


def _closed(text: str) -> set[int]:
    """Return where the braces are opened that are closed again."""
    opened: list[int] = []
    found: set[int] = set()
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            found.add(opened.pop())
    return found


def _read(text: str, start: int, stops: str, closed: Collection[int]) -> tuple[_Text, int]:
    """Return what stands in a text from `start` to one of the stops, and where that is.

    A backslash makes `{`, `|` and `}` letters; a brace that is never closed is one.
    """
    found: _Text = [""]
    i = start
    while i < len(text) and text[i] not in stops:
        if i in closed:
            choice, i = _read_choice(text, i + 1, closed)
            found += [choice, ""]
            continue
        match = _BRACE.match(text, i)
        letters = match[0] if match else text[i]
        found[-1] = str(found[-1]) + letters[-1]
        i += len(letters)
    return [part for part in found if part != ""], i


def _read_choice(text: str, start: int, closed: Collection[int]) -> tuple[_Choice, int]:
    """Return the choice whose brace was opened before `start`, and where it ends."""
    every = _EVERY.match(text, start)
    i = every.end() if every else start
    count = _COUNT.match(text, i)
    least, most, separator = 1, 1, ", "
    if count:
        least, i = int(count["least"] or 1), count.end()
        most = int(count["most"] or least)
        before, dollars, _ = text[i:].partition("$$")
        if dollars and not set(before) & set("{|}"):
            separator, i = before, i + len(before) + 2
    options = []
    while True:
        option, i = _read(text, i, "|}", closed)
        options.append(option)
        i += 1
        if text[i - 1] == "}":
            break
    if not least <= most <= len(options):
        raise UserError(
            f"prompt {text!r}: {text[start - 1 : i]} asks for {least}{'' if most == least else f' to {most}'} of "
            f"{len(options)} variants, which cannot be."
        )
    return _Choice(options, least, most, separator, is_every=every is not None), i
