"""What a caption becomes each time its picture is trained: pure text work, every draw from a generator handed in.

The rules, their order and an example of each are in docs/captions.md. They are sd-scripts' where a name is the same;
each rule draws from a generator of its own, so that none changes what another one draws.
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

Draws = Callable[[str], random.Random]  # what is drawn -> a generator made new for it
_WEIGHT_MARKS = re.compile(
    r"\\[()\[\]\\]|[()\[\]]|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[^\\()\[\]:]+|[:\\]"
)  # an escaped bracket, a bracket, the end of `(a:1.2)`, text, a colon or backslash alone
_BRACKET_FACTORS = {"(": 1.1, "[": 1 / 1.1}
Choose = Callable[[Sequence[str]], str]


@dataclass(frozen=True)
class CaptionOptions:
    """How captions vary.

    shuffle: shuffle the parts. keep_tokens: how many leading parts stay in place. separator: what divides a caption
    into parts. keep_separator: the parts before the first, and after the second one, stay in place.
    secondary_separator: becomes a separator at the very end. prefix, suffix: stay first and last. dropout: share of
    captions that are empty. dropout_every_epochs: in each n-th epoch all captions are empty; 0: never. tag_dropout:
    share of parts left out. token_warmup_steps: steps until all parts are used, from `token_warmup_min` on; 0: all at
    once. wildcards: take one variant of those in braces, and one line of several.
    """

    shuffle: bool = False
    keep_tokens: int = 0
    separator: str = ","
    keep_separator: str = ""
    secondary_separator: str = ""
    prefix: str = ""
    suffix: str = ""
    dropout: float = 0.0
    dropout_every_epochs: int = 0
    tag_dropout: float = 0.0
    token_warmup_steps: float = 0
    token_warmup_min: int = 1
    wildcards: bool = False

    @property
    def moves_parts(self) -> bool:
        """Whether captions are taken apart, whatever is written in them."""
        return self.shuffle or self.tag_dropout > 0 or self.token_warmup_steps > 0


def process(caption: str, options: CaptionOptions, *, draws: Draws, step: int = 0, epoch: int = 0) -> str:
    """Return the caption to train on; with no option on, the caption itself.

    Args:
        draws: gives a new generator for each thing drawn.
        step, epoch: of the sample, counted from 0.
    """
    if _is_dropped(options, draws, epoch):
        return ""
    pieces = _chosen(caption, options, draws("line").choice, draws("wildcard").choice)
    return _arranged(pieces, options, draws, step)


def plain(caption: str, options: CaptionOptions) -> str:
    """Return the caption whole and in its order, as a prompt to draw: with nothing left out and nothing drawn.

    Of several lines or variants it has the first.
    """
    return _arranged(_chosen(caption, options, _first, _first), settled(options), random.Random, step=0)


def longest(caption: str, options: CaptionOptions) -> list[str]:
    """Return the longest text that each line of a caption can become."""
    lines = lines_of(caption) if options.wildcards else [caption]
    whole = settled(options)

    def by_length(texts: Sequence[str]) -> str:
        return max(texts, key=len)

    return [_arranged(_chosen(line, options, _first, by_length), whole, random.Random, step=0) for line in lines]


def weights(text: str) -> list[tuple[str, float]]:
    """Return the text in pieces with their weights: 1.1 times in `(a)`, a 1.1th in `[a]`, 1.2 times in `(a:1.2)`.

    The rules are WebUI's, as in sd-scripts: inner brackets multiply, a backslash makes a bracket a letter, one that is
    never closed counts to the end.
    """
    pieces: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []  # bracket, number of pieces before it

    def weigh(first: int, factor: float) -> None:
        pieces[first:] = [(piece, weight * factor) for piece, weight in pieces[first:]]

    for match in _WEIGHT_MARKS.finditer(text):
        mark, opener = match[0], {")": "(", "]": "["}.get(match[0][-1:])
        if mark in _BRACKET_FACTORS:
            opened.append((mark, len(pieces)))
        elif (mark in (")", "]") or match["weight"]) and any(bracket == opener for bracket, _ in opened):
            number = max(i for i, (bracket, _) in enumerate(opened) if bracket == opener)
            bracket, first = opened.pop(number)
            weigh(first, float(match["weight"]) if match["weight"] else _BRACKET_FACTORS[bracket])
        else:
            pieces.append((mark[1:] if len(mark) == 2 and mark[0] == "\\" else mark, 1.0))
    for bracket, first in opened:
        weigh(first, _BRACKET_FACTORS[bracket])
    return [
        ("".join(piece for piece, _ in same), weight) for weight, same in groupby(pieces, key=lambda piece: piece[1])
    ]


def tags(caption: str, options: CaptionOptions) -> list[str]:
    """Return all parts written in a caption, in their order, whichever separator divides them, from all its lines."""
    separators = (options.keep_separator, options.secondary_separator, options.separator)
    for separator in filter(None, separators):
        caption = caption.replace(separator, "\n")
    return _parts(caption, "\n")


def expand_wildcards(text: str, choose: Choose) -> str:
    """Return the text with one of the variants in each pair of braces, `{a|b}`; inner braces are chosen first.

    `{{` and `}}` stand for braces as letters, as in sd-scripts, but two braces of two open pairs close both. A brace
    that is never closed, and an empty pair, stay as they are.
    """
    pairs = [[""]]  # the text outside of all braces, then the variants of each pair that is open
    i = 0
    while i < len(text):
        letter, is_open = text[i], len(pairs) > 1
        if text[i : i + 2] == "{{" or (text[i : i + 2] == "}}" and len(pairs) < 3):
            pairs[-1][-1] += letter
            i += 1
        elif letter == "{":
            pairs.append([""])
        elif letter == "|" and is_open:
            pairs[-1].append("")
        elif letter == "}" and is_open:
            variants = pairs.pop()
            pairs[-1][-1] += "{}" if variants == [""] else choose(variants)
        else:
            pairs[-1][-1] += letter
        i += 1
    while len(pairs) > 1:
        variants = pairs.pop()
        pairs[-1][-1] += "{" + "|".join(variants)
    return pairs[0][0]


def lines_of(caption: str) -> list[str]:
    """Return the lines of a caption that hold something."""
    return _parts(caption, "\n") or [""]


def _first(texts: Sequence[str]) -> str:
    return texts[0]


def _chosen(caption: str, options: CaptionOptions, choose_line: Choose, choose_variant: Choose) -> tuple[str, str, str]:
    """Return prefix, caption and suffix, with wildcards one line of the caption and one variant in each of them."""
    if not options.wildcards:
        return options.prefix, caption, options.suffix
    line = choose_line(lines_of(caption))
    prefix, body, suffix = (expand_wildcards(text, choose_variant) for text in (options.prefix, line, options.suffix))
    return prefix, body, suffix


def _is_dropped(options: CaptionOptions, draws: Draws, epoch: int) -> bool:
    """Whether this sample is trained without its caption; epochs are counted from 1 here, as in sd-scripts."""
    if options.dropout_every_epochs and (epoch + 1) % options.dropout_every_epochs == 0:
        return True
    return options.dropout > 0 and draws("dropout").random() < options.dropout


@lru_cache(maxsize=64)  # a memory only: the captions of a subset share their options
def settled(options: CaptionOptions) -> CaptionOptions:
    """Return the options without those that move parts or leave something out; variants are still chosen."""
    return replace(options, shuffle=False, dropout=0.0, dropout_every_epochs=0, tag_dropout=0.0, token_warmup_steps=0)


def _arranged(pieces: tuple[str, str, str], options: CaptionOptions, draws: Draws, step: int) -> str:
    """Join prefix, caption and suffix, and take the parts through warm-up, shuffling and dropout if any is on."""
    prefix, _, suffix = pieces
    text = " ".join(filter(None, pieces))
    if options.moves_parts or (options.keep_separator and options.keep_separator in text):
        head, flexible, tail = _divided(text, options, _num_parts(prefix, options), _num_parts(suffix, options))
        flexible = _warmed_up(flexible, options, step)
        if options.shuffle:
            draws("shuffle").shuffle(flexible)
        if options.tag_dropout > 0:
            rng = draws("tag dropout")
            flexible = [part for part in flexible if rng.random() >= options.tag_dropout]
        text = ", ".join([*head, *flexible, *tail])
    if options.secondary_separator:
        text = text.replace(options.secondary_separator, options.separator)
    return text


def _divided(
    text: str, options: CaptionOptions, num_prefix_parts: int, num_suffix_parts: int
) -> tuple[list[str], list[str], list[str]]:
    """Return the parts that stay first, those that may move or fall out, and those that stay last.

    sd-scripts lets a prefix be shuffled along unless keep_tokens covers it; here whatever has words of it stays.
    """
    before, between, after = "", text, ""
    if options.keep_separator and options.keep_separator in text:
        before, _, rest = text.partition(options.keep_separator)
        between, _, after = rest.partition(options.keep_separator)
        after = after.replace(options.keep_separator, options.separator)  # a third one has no meaning of its own
    head, flexible, tail = (_parts(part, options.separator) for part in (before, between, after))
    parts = [*head, *flexible, *tail]
    num_first = min(max(len(head), options.keep_tokens, num_prefix_parts), len(parts))
    num_last = min(max(len(tail), num_suffix_parts), len(parts) - num_first)
    end = len(parts) - num_last
    return parts[:num_first], parts[num_first:end], parts[end:]


def _num_parts(text: str, options: CaptionOptions) -> int:
    if options.keep_separator:
        text = text.replace(options.keep_separator, options.separator)
    return len(_parts(text, options.separator))


def _parts(text: str, separator: str) -> list[str]:
    return [part for piece in text.split(separator) if (part := piece.strip())]


def _warmed_up(parts: list[str], options: CaptionOptions, step: int) -> list[str]:
    """Return the leading parts that are used at this step: their number grows in proportion to the steps done."""
    if step >= options.token_warmup_steps:
        return parts
    more = math.floor(step * ((len(parts) - options.token_warmup_min) / options.token_warmup_steps))
    return parts[: options.token_warmup_min + more]
