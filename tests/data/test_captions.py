"""Captions: properties over any text."""

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from lorasmith.data.captions import process

tags = st.lists(st.text("abc d", min_size=1, max_size=5).filter(str.strip), min_size=1, max_size=8)


def split(caption: str, separator: str = ",") -> list[str]:
    return [part.strip() for part in caption.split(separator)]


@given(st.text(), st.integers())
def test_without_options_the_text_is_untouched(caption: str, seed: int) -> None:
    assert process(caption, rng=random.Random(seed)) == caption


@given(tags, st.integers(0, 9), st.integers(), st.sampled_from([",", "|", ". "]))
def test_shuffling_keeps_all_parts_and_the_first_ones_in_place(
    parts: list[str], keep: int, seed: int, separator: str
) -> None:
    caption = separator.join(parts)
    shuffled = split(process(caption, rng=random.Random(seed), shuffle=True, keep_tokens=keep, separator=separator))
    assert Counter(shuffled) == Counter(split(caption, separator))
    assert shuffled[:keep] == split(caption, separator)[:keep]


def test_shuffling_reaches_every_order() -> None:
    orders = {process("a, b, c", rng=random.Random(seed), shuffle=True) for seed in range(200)}
    assert orders == {"a, b, c", "a, c, b", "b, a, c", "b, c, a", "c, a, b", "c, b, a"}


def test_empty_parts_vanish_when_shuffled() -> None:
    assert process("a,, b ,", rng=random.Random(0), shuffle=True, keep_tokens=2) == "a, b"


def test_dropout_has_the_given_rate_and_drops_the_whole_caption() -> None:
    results = Counter(process("a, b", rng=random.Random(seed), dropout=0.25) for seed in range(2000))
    assert set(results) == {"", "a, b"}
    assert 400 < results[""] < 600
    assert process("a, b", rng=random.Random(0), dropout=1.0) == ""


@given(st.integers(), st.floats(0, 0.99))
def test_the_dropout_rate_does_not_change_the_shuffling(seed: int, rate: float) -> None:
    caption = "a, b, c, d, e"
    dropped = process(caption, rng=random.Random(seed), shuffle=True, dropout=rate)
    assert dropped in ("", process(caption, rng=random.Random(seed), shuffle=True))
