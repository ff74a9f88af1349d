"""Words of a command line survive a shell."""

import shlex

import pytest

from lorasmith.command_line import quoted


@pytest.mark.parametrize(
    "word", ["a", "", "a b", "a;b", "(x)", "a&b", "it's", "#ff8000", "*", "--rank=8", "../a/b.ckpt"]
)
def test_a_shell_reads_the_word_that_was_meant(word: str) -> None:
    assert shlex.split(quoted(word)) == [word]
    assert (quoted(word) == word) == (shlex.quote(word) == word)
