"""What prompts hold beside words, against the rules written out by hand and properties of what is drawn."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.errors import UserError
from lorasmith.prompt_syntax import LoraTag, chosen, composed, take_loras, variants


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a cat", ["a cat"]),
        ("", [""]),
        ("a {b|c} d", ["a b d", "a c d"]),
        ("{a|b} {c|d}", ["a c", "a d", "b c", "b d"]),
        ("a {b|c {d|e}}", ["a b", "a c d", "a c e"]),
        ("{a|}x", ["ax", "x"]),
        ("{2$$a|b|c}", ["a, b", "a, c", "b, c"]),
        ("{1-2$$ and $$a|b}", ["a", "b", "a and b"]),
        ("{0-1$$a|b}", ["", "a", "b"]),
        ("{$$a|b}", ["a", "b"]),
        (r"{a\|b|\{c\}}", ["a|b", "{c}"]),
        ("{a|b", ["{a|b"]),
        ("}a|b{", ["}a|b{"]),
        ("{x {a|b}", ["{x a", "{x b"]),
        ("{" * 5000 + "a", ["{" * 5000 + "a"]),
        (r"\(a\)", [r"\(a\)"]),
    ],
)
def test_all_variants(text: str, expected: list[str]) -> None:
    assert variants(text) == expected
    assert {one for seed in range(50) for one in chosen(text, random.Random(seed))} >= set(expected[:1])


@given(st.text("ab{}|$12- \\", max_size=30), st.integers(0, 5))
def test_what_is_drawn_is_one_of_the_variants_but_for_the_order_in_a_choice_of_several(text: str, seed: int) -> None:
    try:
        every = variants(text)
    except UserError:
        return
    [one] = chosen(text, random.Random(seed))
    assert sorted(one) in [sorted(one) for one in every]
    assert chosen(text, random.Random(seed)) == chosen(text, random.Random(seed))


@pytest.mark.parametrize("text", ["a {b|c {d|e}} f", "{a|b} {c|d}", "{2$$a|b|c}", "{1-2$$ and $$a|b}"])
def test_of_a_marked_choice_all_variants_are_drawn(text: str) -> None:
    marked = text.replace("{", "{e$$")
    assert chosen(marked, random.Random(0)) == variants(marked) == variants(text)
    drawn = [chosen(f"{{x|y|z}} {marked}", random.Random(seed)) for seed in range(20)]
    assert all([one[2:] for one in some] == variants(text) and len({one[0] for one in some}) == 1 for some in drawn)
    assert {some[0][0] for some in drawn} == {"x", "y", "z"}


def test_too_many_variants_are_refused_before_they_fill_the_memory() -> None:
    for text in ("{e$$a|b}" * 40, "{" + "{e$$a|b}" * 40 + "|" + "{e$$a|b}" * 40 + "}"):
        with pytest.raises(UserError, match="more than 10,000 variants"):
            chosen(text, random.Random(0))


@pytest.mark.parametrize("text", ["{3$$a|b}", "{2-1$$a|b}"])
def test_choices_that_cannot_be(text: str) -> None:
    with pytest.raises(UserError, match="of 2 variants, which cannot be"):
        variants(text)


def test_too_many_variants_are_refused_at_once() -> None:
    with pytest.raises(UserError, match="more than 10,000 variants; leave out --all-variants"):
        variants("{a|b}" * 200)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a cat", [("a cat", 1.0)]),
        ("at 16:9", [("at 16:9", 1.0)]),
        ("a cat AND a dog", [("a cat", 1.0), ("a dog", 1.0)]),
        ("a cat :1.5 AND a (dog:1.2) AND\nsea:-.5", [("a cat", 1.5), ("a (dog:1.2)", 1.0), ("sea", -0.5)]),
        ("a BAND and SAND", [("a BAND and SAND", 1.0)]),
    ],
)
def test_prompts_joined_by_AND(text: str, expected: list[tuple[str, float]]) -> None:
    assert composed(text) == expected


def test_loras_in_a_prompt() -> None:
    text, tags = take_loras("a <lora:one>cat <lora:two b:0.5> <lora:three:0.2:-1>")
    assert text == "a cat"
    assert tags == [LoraTag("one", 1, 1), LoraTag("two b", 0.5, 0.5), LoraTag("three", unet=-1, text_encoder=0.2)]


@pytest.mark.parametrize("tag", ["<lora:>", "<lora:a:b>", "<lora:a:1:2:3>", "<lora:a:nan>", "<lora:a:>"])
def test_loras_written_otherwise_are_refused(tag: str) -> None:
    with pytest.raises(UserError, match=f"{tag}: expected <lora:name>"):
        take_loras(f"a cat {tag}")
