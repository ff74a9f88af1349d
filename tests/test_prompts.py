"""Prompts with options: what is written comes back, in every notation, and what is not known is never passed over."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.errors import UserError
from lorasmith.prompts import Prompt, check_plain, is_file, parse, read_file

WORDS = st.text("abcXYZ ,.:()-ü", max_size=20).map(lambda text: " ".join(text.replace("--", "-").split()))
TEXTS = WORDS.filter(lambda text: text and not text.startswith("#"))
PROMPTS = st.builds(
    Prompt,
    TEXTS,
    negative=st.none() | WORDS,
    width=st.none() | st.integers(1, 200).map(lambda n: 8 * n),
    height=st.none() | st.integers(1, 200).map(lambda n: 8 * n),
    seeds=st.none() | st.lists(st.integers(0, 2**32), min_size=1, max_size=3).map(tuple),
    steps=st.none() | st.integers(1, 1000),
    guidance=st.none() | st.floats(0, 30),
    sampler=st.none() | st.sampled_from(["ddim", "k_euler_a"]),
    negative_guidance=st.none() | st.floats(0, 30),
    denoise=st.none() | st.floats(0.01, 1),
    strengths=st.none() | st.lists(st.floats(-2, 2), min_size=1, max_size=3).map(tuple),
    file=st.none() | st.sampled_from(["cat", "a {seed}.webp"]),
)
OPTIONS = {
    "negative": "n", "width": "w", "height": "h", "seeds": "d", "steps": "s", "guidance": "l", "sampler": "ss",
    "negative_guidance": "nl", "denoise": "t", "strengths": "am", "file": "f",
}  # fmt: skip
KEYS = {
    "text": "prompt", "negative": "negative_prompt", "width": "width", "height": "height", "seeds": "seed",
    "steps": "sample_steps", "guidance": "scale", "sampler": "sample_sampler", "negative_guidance": "negative_scale",
    "denoise": "denoise", "strengths": "lora_strengths", "file": "file_name",
}  # fmt: skip


def line(prompt: Prompt) -> str:
    given = {name: value for name, value in asdict(prompt).items() if name != "text" and value is not None}
    return " ".join([prompt.text, *(f"--{OPTIONS[name]} {typed(value)}" for name, value in given.items())])


def typed(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def entry(prompt: Prompt) -> dict[str, object]:
    values = {KEYS[name]: value for name, value in asdict(prompt).items() if value is not None}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


@given(PROMPTS)
def test_a_line_holds_a_prompt_with_its_options(prompt: Prompt) -> None:
    assert parse(line(prompt)) == prompt


@given(prompts=st.lists(PROMPTS, min_size=1, max_size=4))
def test_every_kind_of_file_says_the_same(tmp_path_factory: pytest.TempPathFactory, prompts: list[Prompt]) -> None:
    folder = tmp_path_factory.mktemp("files")
    files = {
        "a.txt": "# a comment\n\n" + "\n".join(map(line, prompts)),
        "a.json": json.dumps([entry(prompts[0]), *map(line, prompts[1:])]),
        "a.toml": tomli_w.dumps({"prompt": {"subset": list(map(entry, prompts))}}),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
        assert is_file([str(folder / name)]) and read_file(folder / name) == prompts


def test_what_stands_under_prompt_holds_for_all(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(
        '[prompt]\nwidth = 64\nscale = 5\n[[prompt.subset]]\nprompt = "a"\n[[prompt.subset]]\nprompt = "b"\nwidth = 72'
    )
    assert read_file(tmp_path / "a.toml") == [Prompt("a", width=64, guidance=5), Prompt("b", width=72, guidance=5)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a --width 64", "did you mean --w?"),
        ("a --w 65", "--w 65: expected a multiple of 8"),
        ("a --d x", "expected a whole number"),
        ("a --s 0", "from 1 to 1000"),
        ("a --l -1", "at least 0"),
        ("a --fs 3", "for models that cannot be trained here"),
        ("a --d 1,x", "expected a whole number, or several with commas"),
        ("a --am 0.8,much", "--am 0.8,much: expected a number for each LoRA"),
        ("a --t 0", "--t 0: expected a number above 0 and at most 1"),
        ("a --f ../b", "--f ../b: expected a name without folders"),
        ("a --zzz", "no option --zzz; there are --n (negative)"),
        ("a --cn x.png", "one picture for all prompts (generate --control-picture)"),
    ],
)
def test_a_wrong_option_is_told(text: str, expected: str) -> None:
    with pytest.raises(UserError) as told:
        parse(text)
    assert expected in str(told.value)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "# nothing\n", "no prompt in it"),
        ("a.txt", "a --q 3", "a.txt: prompt 'a --q 3': there is no option --q"),
        ("a.json", "[", "not JSON"),
        ("a.json", '{"prompt": "a"}', "expected a list"),
        ("a.json", '[{"prompt": "a", "widht": 64}]', "did you mean width?"),
        ("a.json", '[{"width": 64}]', "expected a text, or a prompt"),
        ("a.json", '[{"prompt": "a", "seed": true}]', "expected a whole number"),
        ("a.toml", "[prompt]\nwidth = 64", "expected [prompt] with what all have in common"),
        ("a.toml", "[prompt\nwidth", "--prompts"),
        ("a.toml", 'prompt = "a"', "expected [prompt] with what all have in common"),
    ],
)
def test_a_file_that_cannot_be_meant_is_told(tmp_path: Path, name: str, text: str, expected: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as told:
        read_file(tmp_path / name)
    assert expected in str(told.value) and name in str(told.value)


@pytest.mark.parametrize("seed", [0, 2**53 + 1, 2**63 - 1])
def test_every_seed_is_taken_to_the_digit(seed: int) -> None:
    """2**53 + 1 is the first whole number that a float does not hold."""
    assert parse(f"a cat --d {seed}").seeds == (seed,)


@pytest.mark.parametrize("option", ["--d 1,2", "--nl 2", "--t 0.5", "--am 0.5", "--f cat"])
def test_what_only_generate_can_do_is_refused_elsewhere(option: str) -> None:
    check_plain(parse("a cat --d 1 --w 64 --n bad --l 3 --ss ddim"))
    with pytest.raises(UserError, match=r"prompt 'a cat': .* for lorasmith generate"):
        check_plain(parse(f"a cat {option}"))


@pytest.mark.parametrize("line", ["caf\udce9", "a cat --n caf\udce9"])
def test_letters_that_are_none_are_told(line: str, tmp_path: Path) -> None:
    """From a terminal of another encoding, or half of a pair in JSON: no tokenizer takes them."""
    with pytest.raises(UserError, match="no text in UTF-8"):
        parse(line)
    file = tmp_path / "prompts.json"
    file.write_text('[{"prompt": "half of an emoji: \\ud83d"}]')
    with pytest.raises(UserError, match="no text in UTF-8"):
        read_file(file)
