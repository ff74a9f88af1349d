"""The tokenizer gives CLIP's ids."""

import pytest

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
