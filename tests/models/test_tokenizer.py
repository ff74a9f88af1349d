"""The tokenizer gives CLIP's ids."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.models import tokenizer


@pytest.mark.parametrize(
    "text, ids",
    [  # as OpenAI's CLIP has them
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("A  Photo\tof a CAT", [320, 1125, 539, 320, 2368]),
        ("sks", [48136]),
        ("hello world!", [3306, 1002, 256]),
        ("!", [256]),
        ("", []),
    ],
)
def test_ids_are_clips(text: str, ids: list[int]) -> None:
    assert tokenizer.build()(text, add_special_tokens=False)["input_ids"] == ids


def test_start_and_end_are_the_last_two_of_49408() -> None:
    built = tokenizer.build()
    assert len(built) == 49408
    assert built.convert_ids_to_tokens([tokenizer.START, tokenizer.END]) == ["<|startoftext|>", "<|endoftext|>"]


@pytest.mark.parametrize("text", ["crème brûlée", "日本語", "🦊 fox", "naïve ¡olé! ½", "\u0000\u007f\u00a0\u00ad."])
def test_every_byte_has_a_token(text: str) -> None:
    ids = tokenizer.build()(text, add_special_tokens=False)["input_ids"]
    assert ids and tokenizer.END not in ids  # 49407 is CLIP's unknown token as well


WORDS = st.lists(
    st.sampled_from(["cat", "antidisestablishmentarianism", "Käthe", "x" * 400, ",", "1girl"]), max_size=99
)


@settings(deadline=None, max_examples=40)
@given(WORDS, st.integers(1, 3))
def test_chunks_hold_the_words_in_order_and_cut_none_that_fits(texts: list[str], count: int) -> None:
    words = tokenizer.words([(text + " ", float(number)) for number, text in enumerate(texts)])
    ids = tokenizer.build()(" ".join(texts), add_special_tokens=False)["input_ids"]
    tokens = [token for word in words for token in word]
    assert [number for number, _ in tokens] == ids
    filled, is_whole = tokenizer.chunks(words, count)
    together = [token for chunk in filled for token in chunk]
    assert len(filled) == count and all(len(chunk) <= 75 for chunk in filled)
    assert together == tokens[: len(together)] and is_whole == (len(together) == len(tokens))
    ends, used = set(itertools.accumulate(map(len, words))), 0
    for chunk in filled:
        used += len(chunk)
        assert used in ends | {0} or len(next(w for w, end in zip(words, sorted(ends), strict=True) if end > used)) > 75


@settings(deadline=None, max_examples=200)
@given(st.lists(st.text(st.sampled_from("aé1 ,'’s\u00a0\u0301\t\n\x1c|<>日🦊"), max_size=30) | st.text(), max_size=5))
def test_counted_are_the_tokens_that_the_model_is_given(texts: list[str]) -> None:
    assert tokenizer.count(texts) == [sum(map(len, tokenizer.words([(text, 1.0)]))) for text in texts]
