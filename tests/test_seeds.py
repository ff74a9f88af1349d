"""Seeds: pure functions of what they are asked for, distinct, and in torch's range."""

import hashlib

import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.seeds import derive

SEEDS, PURPOSES = st.integers(0, 2**63 - 1), st.sampled_from(["noise", "timestep", "caption", "picture"])
NUMBERS = st.lists(st.integers(0, 10**6), max_size=3)
QUESTIONS = st.tuples(SEEDS, PURPOSES, NUMBERS)


@given(QUESTIONS)
def test_every_seed_is_one_that_torch_takes(question: tuple[int, str, list[int]]) -> None:
    seed, purpose, numbers = question
    derived = derive(seed, purpose, *numbers)
    assert 0 <= derived < 2**63
    assert torch.Generator().manual_seed(derived).initial_seed() == derived


@given(QUESTIONS, QUESTIONS)
def test_other_questions_get_other_seeds(one: tuple[int, str, list[int]], two: tuple[int, str, list[int]]) -> None:
    assert (derive(one[0], one[1], *one[2]) == derive(two[0], two[1], *two[2])) == (one == two)


def test_numbers_do_not_run_together() -> None:
    assert len({derive(1, "noise", 23), derive(1, "noise", 2, 3), derive(12, "noise", 3), derive(1, "noise2", 3)}) == 4


def test_it_is_the_hash_that_it_says() -> None:
    digest = hashlib.blake2b(b"7/noise/3/0", digest_size=8).digest()
    assert derive(7, "noise", 3, 0) == int.from_bytes(digest, "big") // 2
