"""Captions: properties over any text, and sd-scripts' own rules as oracle where nothing is drawn."""

import math
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lorasmith.data.captions import CaptionOptions, expand_wildcards, longest, plain, process, tags, weights
from lorasmith.seeds import derive

unhurried = settings(deadline=None)  # a busy machine is no failure
words = st.text("abc d", min_size=1, max_size=5).filter(str.strip).map(str.strip)
parts = st.lists(words, min_size=1, max_size=8)
seeds = st.integers(0, 2**32)


def draws(seed: int) -> Callable[[str], random.Random]:
    return lambda purpose: random.Random(derive(seed, purpose))


def drawn(caption: str, seed: int = 0, step: int = 0, epoch: int = 0, **options: Any) -> str:
    return process(caption, CaptionOptions(**options), draws=draws(seed), step=step, epoch=epoch)


def split(caption: str, separator: str = ",") -> list[str]:
    return [part.strip() for part in caption.split(separator) if part.strip()]


# ---- nothing, and independence -------------------------------------------------------------------------------------


@unhurried
@given(st.text(), seeds, st.integers(0, 9), st.integers(0, 9))
def test_without_options_the_text_is_untouched(caption: str, seed: int, step: int, epoch: int) -> None:
    assert drawn(caption, seed, step, epoch) == caption == plain(caption, CaptionOptions())


# What each option is beside the others: on, but without effect on this text; or with an effect that is known.
INERT = [
    {"separator": ",", "keep_separator": "|||", "secondary_separator": ";;;"},
    {"dropout": 1e-12},
    {"wildcards": True},
    {"tag_dropout": 1e-12},
    {"dropout_every_epochs": 7},
    {"token_warmup_steps": 3, "token_warmup_min": 2},  # over by the step that is asked for
]


@unhurried
@given(parts, seeds, st.sampled_from(INERT), st.booleans())
def test_one_option_does_not_change_what_another_one_draws(
    texts: list[str], seed: int, inert: dict[str, Any], is_shuffled: bool
) -> None:
    used: dict[str, Any] = {"shuffle": True} if is_shuffled else {"tag_dropout": 0.4}
    alone = drawn(", ".join(texts), seed, 5, **used)
    assert drawn(", ".join(texts), seed, 5, **(inert | used)) == alone


@unhurried
@given(parts, seeds, st.floats(0, 0.99))
def test_the_dropout_rate_does_not_change_the_shuffling(texts: list[str], seed: int, rate: float) -> None:
    caption = ", ".join(texts)
    assert drawn(caption, seed, shuffle=True, dropout=rate) in ("", drawn(caption, seed, shuffle=True))


OPTIONS = st.builds(
    CaptionOptions,
    shuffle=st.booleans(),
    keep_tokens=st.integers(0, 3),
    keep_separator=st.sampled_from(["", "|||"]),
    secondary_separator=st.sampled_from(["", ";;;"]),
    prefix=st.sampled_from(["", "sks", "anime,", "a, b"]),
    suffix=st.sampled_from(["", "z", ", z", "y, z"]),
    dropout=st.sampled_from([0.0, 0.3]),
    dropout_every_epochs=st.integers(0, 3),
    tag_dropout=st.sampled_from([0.0, 0.5, 1.0]),
    token_warmup_steps=st.sampled_from([0, 5, 7.5]),
    token_warmup_min=st.integers(1, 3),
    wildcards=st.booleans(),
)
captions = st.lists(st.sampled_from(["a", "b c", "||| ", ";;;", ",", ", ", "\n", "{d|e f}"]), max_size=12).map("".join)


@unhurried
@given(captions, OPTIONS, seeds, st.integers(0, 9), st.integers(0, 4))
def test_a_caption_is_a_pure_function_and_uses_no_words_of_its_own(
    caption: str, options: CaptionOptions, seed: int, step: int, epoch: int
) -> None:
    result = process(caption, options, draws=draws(seed), step=step, epoch=epoch)
    assert result == process(caption, options, draws=draws(seed), step=step, epoch=epoch)
    everything = f"{options.prefix} {caption} {options.suffix}"
    assert Counter(re.findall("[a-z]", result)) <= Counter(re.findall("[a-z]", everything))


# ---- parts ---------------------------------------------------------------------------------------------------------


@unhurried
@given(parts, st.integers(0, 9), seeds, st.sampled_from([",", "|", ". "]))
def test_shuffling_keeps_all_parts_and_the_first_ones_in_place(
    texts: list[str], keep: int, seed: int, separator: str
) -> None:
    shuffled = split(drawn(separator.join(texts), seed, shuffle=True, keep_tokens=keep, separator=separator))
    assert Counter(shuffled) == Counter(texts)
    assert shuffled[:keep] == texts[:keep]


def test_shuffling_reaches_every_order_equally() -> None:
    orders = Counter(drawn("a, b, c", seed, shuffle=True) for seed in range(3000))
    assert set(orders) == {"a, b, c", "a, c, b", "b, a, c", "b, c, a", "c, a, b", "c, b, a"}
    assert all(400 < count < 600 for count in orders.values())


def test_empty_parts_vanish_when_shuffled() -> None:
    assert drawn("a,, b ,", shuffle=True, keep_tokens=2) == "a, b"


@unhurried
@given(parts, parts, parts, seeds, st.booleans(), st.sampled_from(["", " "]))
def test_parts_before_the_mark_and_after_the_second_one_stay(
    head: list[str], middle: list[str], tail: list[str], seed: int, has_tail: bool, space: str
) -> None:
    marked = [", ".join(part) for part in ([head, middle, tail] if has_tail else [head, middle])]
    result = split(drawn(f"{space}|||{space}".join(marked), seed, shuffle=True, tag_dropout=0.5, keep_separator="|||"))
    assert result[: len(head)] == head
    assert not has_tail or result[-len(tail) :] == tail
    assert Counter(result[len(head) : len(result) - has_tail * len(tail)]) <= Counter(middle)


def test_a_mark_is_never_trained() -> None:
    assert drawn("a ||| b, c ||| d", keep_separator="|||") == "a, b, c, d"
    assert drawn("a ||| b ||| c ||| d", keep_separator="|||") == "a, b, c, d"
    assert drawn("a, b", keep_separator="|||") == "a, b"


@unhurried
@given(parts, seeds, st.sampled_from(["sks thing", "anime,", "one, two", "x, y,"]), st.sampled_from([", z", "by me"]))
def test_the_prefix_is_always_first_and_the_suffix_last(texts: list[str], seed: int, prefix: str, suffix: str) -> None:
    caption = ", ".join(texts)
    plainly = drawn(caption, prefix=prefix, suffix=suffix)
    assert plainly == f"{prefix} {caption} {suffix}"
    shuffled = drawn(caption, seed, prefix=prefix, suffix=suffix, shuffle=True, tag_dropout=0.5)
    assert shuffled.startswith(prefix) and shuffled.endswith(suffix.removeprefix(", "))
    whole = drawn(caption, seed, prefix=prefix, suffix=suffix, shuffle=True)
    assert Counter(split(whole)) == Counter(split(plainly))


@unhurried
@given(st.lists(words, min_size=1, max_size=4), seeds)
def test_the_second_separator_holds_parts_together(texts: list[str], seed: int) -> None:
    held = ";;;".join(texts)
    result = drawn(f"x, {held}, y", seed, shuffle=True, secondary_separator=";;;")
    assert ",".join(texts) in result and ";;;" not in result
    assert drawn(held, secondary_separator=";;;") == ",".join(texts)


# ---- variants and lines --------------------------------------------------------------------------------------------


def sd_scripts_wildcards(caption: str, choose: Callable[[list[str]], str]) -> str:
    """library/train_util.py, process_caption: braces written twice are put aside, then each pair is replaced."""
    caption = caption.replace("{{", "\1").replace("}}", "\2")
    caption = re.sub(r"\{([^}]+)\}", lambda match: choose(match[1].split("|")), caption)
    return caption.replace("\1", "{").replace("\2", "}")


@unhurried
@given(st.text("ab |{}", max_size=20), st.integers(0, 5))
def test_without_nesting_variants_are_sd_scripts_own(caption: str, number: int) -> None:
    escaped = caption.replace("{{", "\1").replace("}}", "\2")
    assume(not re.search(r"\{[^}]*\{|\{[^}]*$|\{\}", escaped))  # nested, never closed, empty

    def choose(variants: Any) -> str:
        return variants[number % len(variants)]

    assert expand_wildcards(caption, choose) == sd_scripts_wildcards(caption, choose)


TREES = st.recursive(words, lambda inner: st.lists(st.lists(inner, min_size=1, max_size=3), min_size=2, max_size=3))


def written(tree: Any) -> str:
    """A list is a pair of braces with its variants, each of which is several texts."""
    return tree if isinstance(tree, str) else "{" + "|".join(" ".join(map(written, part)) for part in tree) + "}"


def offered(tree: Any) -> set[str]:
    if isinstance(tree, str):
        return {tree}
    joined: set[str] = set()
    for part in tree:
        texts = {""}
        for piece in part:
            texts = {f"{text} {more}".strip() for text in texts for more in offered(piece)}
        joined |= texts
    return joined


@unhurried
@given(TREES, seeds)
def test_only_variants_that_are_offered_are_chosen_however_deep(tree: Any, seed: int) -> None:
    text = "x " + written(tree)
    assume("{{" not in text and len(text) < 200)
    result = drawn(text, seed, wildcards=True)
    assert result.removeprefix("x ") in offered(tree)
    assert drawn(text, seed) == text


def test_every_variant_and_line_is_chosen_equally_often() -> None:
    counts = Counter(drawn("{a|b|c} x\n\n  y\n", seed, wildcards=True) for seed in range(3000))
    assert set(counts) == {"a x", "b x", "c x", "y"}
    assert 1400 < counts["y"] < 1600 and all(400 < counts[f"{letter} x"] < 600 for letter in "abc")


@pytest.mark.parametrize(
    ("text", "variants"),
    [
        ("{{a|b}}", {"{a|b}"}), ("{a|{b|c}}", {"a", "b", "c"}), ("{a||b}", {"a", "", "b"}), ("{} {", {"{} {"}),
        ("} | {a", {"} | {a"}), ("{x {a|b}", {"{x a", "{x b"}), ("{a, b|c}, d", {"a, b, d", "c, d"}), ("", {""}),
    ],
)  # fmt: skip
def test_braces_of_all_kinds(text: str, variants: set[str]) -> None:
    assert {drawn(text, seed, wildcards=True) for seed in range(60)} == variants


def test_variants_are_chosen_before_parts_are_told_apart() -> None:
    results = {drawn("k, {a, b|c}, d", seed, wildcards=True, tag_dropout=1.0, keep_tokens=2) for seed in range(60)}
    assert results == {"k, a", "k, c"}
    prefixed = {drawn("a\nb", seed, wildcards=True, shuffle=True, prefix="{p|q, r},") for seed in range(99)}
    assert prefixed == {"p, a", "p, b", "q, r, a", "q, r, b"}


def test_as_a_prompt_a_caption_has_its_first_line_and_variants() -> None:
    assert plain("a {b|c}\nd", CaptionOptions(wildcards=True, prefix="{p|q},", shuffle=True)) == "p, a b"


# ---- leaving out ---------------------------------------------------------------------------------------------------


def test_dropout_has_the_given_rate_and_drops_the_whole_caption() -> None:
    results = Counter(drawn("a, b", seed, dropout=0.25, prefix="p") for seed in range(2000))
    assert set(results) == {"", "p a, b"}
    assert 400 < results[""] < 600
    assert drawn("a, b", dropout=1.0) == ""


@pytest.mark.parametrize(("every", "empty"), [(1, {0, 1, 2, 3, 4, 5}), (2, {1, 3, 5}), (3, {2, 5}), (0, set())])
def test_whole_epochs_are_without_captions_counted_from_1(every: int, empty: set[int]) -> None:
    texts = [drawn("a", epoch=epoch, dropout_every_epochs=every) for epoch in range(6)]
    assert {epoch for epoch, text in enumerate(texts) if not text} == empty


def test_parts_are_left_out_at_the_given_rate_and_independently() -> None:
    counts, pairs = Counter[str](), 0
    for seed in range(2000):
        left = split(drawn("k, a, b, c", seed, keep_tokens=1, tag_dropout=0.3))
        counts.update(left)
        pairs += {"a", "b"} <= set(left)
    assert counts["k"] == 2000
    assert all(1320 < counts[part] < 1480 for part in "abc")
    assert 900 < pairs < 1060  # 0.7 * 0.7 of them


@unhurried
@given(parts, st.integers(0, 6), seeds)
def test_all_parts_but_the_kept_ones_may_be_left_out(texts: list[str], keep: int, seed: int) -> None:
    assert split(drawn(", ".join(texts), seed, keep_tokens=keep, tag_dropout=1.0)) == texts[:keep]


# ---- warm-up -------------------------------------------------------------------------------------------------------


@unhurried
@given(parts, st.integers(1, 40), st.integers(1, 10), st.integers(0, 3))
def test_the_warm_up_is_sd_scripts_own(texts: list[str], steps: int, least: int, keep: int) -> None:
    flexible = texts[keep:]
    options = {"token_warmup_steps": steps, "token_warmup_min": least, "keep_tokens": keep}
    lengths = []
    for step in range(steps + 2):
        grown = math.floor(step * ((len(flexible) - least) / steps)) + least  # library/train_util.py, process_caption
        expected = texts[:keep] + (flexible[:grown] if step < steps else flexible)
        result = split(drawn(", ".join(texts), step=step, **options))
        assert result == expected
        lengths.append(len(result))
    assert lengths == sorted(lengths) and lengths[-1] == len(texts)


def test_a_warm_up_takes_the_leading_parts_before_they_are_shuffled() -> None:
    seen = {drawn("a, b, c, d", seed, step=5, shuffle=True, token_warmup_steps=10) for seed in range(50)}
    assert seen == {"a, b", "b, a"}


# ---- the caption as it stands --------------------------------------------------------------------------------------


@unhurried
@given(captions, OPTIONS)
def test_as_a_prompt_a_caption_is_whole_and_in_order(caption: str, options: CaptionOptions) -> None:
    bare = CaptionOptions(
        keep_separator=options.keep_separator,
        secondary_separator=options.secondary_separator,
        prefix=options.prefix,
        suffix=options.suffix,
        wildcards=options.wildcards,
    )
    assume("{" not in caption and "\n" not in caption)
    assert plain(caption, options) == process(caption, bare, draws=draws(1))


@unhurried
@given(captions, OPTIONS, seeds)
def test_the_tags_of_a_caption_are_all_that_can_be_trained(caption: str, options: CaptionOptions, seed: int) -> None:
    assume("{" not in caption)
    bare = replace(options, prefix="", suffix="", shuffle=True, token_warmup_steps=0)
    result = process(caption, bare, draws=draws(seed))
    assert Counter(tags(result, bare)) <= Counter(tags(caption, bare))


def test_tags_are_divided_by_every_separator() -> None:
    options = CaptionOptions(separator=".", keep_separator="|||", secondary_separator=";;;")
    assert tags("a, b ||| c. d;;;e..", options) == ["a, b", "c", "d", "e"]


def test_the_longest_text_of_each_line_is_that_of_its_longest_variants() -> None:
    options = CaptionOptions(wildcards=True, prefix="p,", shuffle=True, dropout=1.0, tag_dropout=1.0)
    assert longest("a {b|c d}\n{e|}", options) == ["p, a c d", "p, e"]
    assert longest("a\n{b|c d}", CaptionOptions()) == ["a\n{b|c d}"]


# ---- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("a (b) c", [("a ", 1), ("b", 1.1), (" c", 1)]),
        ("a [b]", [("a ", 1), ("b", 1 / 1.1)]),
        ("(a: 1.5) [b]c", [("a", 1.5), (" ", 1), ("b", 1 / 1.1), ("c", 1)]),
        ("((a:2) b:3)", [("a", 6), (" b", 3)]),
        ("(a (b", [("a ", 1.1), ("b", 1.1 * 1.1)]),
        (r"\(a\) \[b\] \\ c\d", [(r"(a) [b] \ c\d", 1)]),
        ("a) b] c:1.2 (d:-1) :3)", [("a) b] c:1.2 ", 1), ("d", -1), (" :3)", 1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a [b:2) c]", [("a ", 2), ("b", 2 / 1.1), (" c", 1 / 1.1)]),
    ],
)
def test_weights_are_webuis(text: str, expected: list[tuple[str, float]]) -> None:
    pieces = weights(text)
    assert [piece for piece, _ in pieces] == [piece for piece, _ in expected]
    assert [weight for _, weight in pieces] == pytest.approx([weight for _, weight in expected])


@unhurried
@given(st.text())
def test_weights_lose_no_words_and_without_brackets_are_1(text: str) -> None:
    without = re.sub(r"[()\[\]\\]", "", text)
    assert weights(without) == ([(without, 1.0)] if without else [])
    escaped = re.sub(r"([()\[\]\\])", r"\\\1", text)
    assert weights(escaped) == ([(text, 1.0)] if text else [])
