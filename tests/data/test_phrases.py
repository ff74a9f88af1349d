"""Captioners' habits cut out, and words put to older captions."""

import pytest

from lorasmith.data.phrases import HABITS, add_to_first_line, cut, read_phrases


@pytest.mark.parametrize(
    "said, left",
    [
        ("a sign with the words stop on it", "a sign"),
        ('a poster with the word "open late" on the wall', "a poster"),
        ("a shirt and the letters 'ab' is on it, in a shop", "a shirt, in a shop"),
        ("a red sign that says stop", "a red sign"),
        ("a sign that says 'do not enter' on it, at night", "a sign, at night"),
        ("arafed dog on a sofa", "dog on a sofa"),
        ("there are two dogs", "two dogs"),
        ("a man is there is no doubt", "a man is there is no doubt"),
        ("a woman with the wordless look", "a woman with the wordless look"),
        ("a cat on a letter", "a cat on a letter"),
        ("arafed", "arafed"),
        ("", ""),
    ],
)
def test_habits(said: str, left: str) -> None:
    assert cut(said, read_phrases(HABITS)) == left


def test_without_a_table_only_line_ends_change() -> None:
    assert cut(" a cat\non  a sofa ,  red ", []) == "a cat on a sofa, red"


@pytest.mark.parametrize(
    "older, added",
    [
        ("", "b, c"),
        ("a", "a, b, c"),
        ("a, ", "a, b, c"),
        ("a\r\nmore\r\n", "a, b, c\r\nmore\r\n"),
        ("\nmore", "b, c\nmore"),
    ],
)
def test_words_are_put_to_the_first_line(older: str, added: str) -> None:
    assert add_to_first_line(older, ["b", "c"], ", ") == added
