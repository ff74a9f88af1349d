"""CLIP's tokenizer, built from the byte-pair table that comes with the package: nothing is downloaded."""

import gzip
import hashlib
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

_VOCAB = Path(__file__).parent / "vocab" / "bpe_simple_vocab_16e6.txt.gz"
_NUM_MERGES = 48894  # CLIP uses this many of the table's lines, after the heading (OpenAI's simple_tokenizer.py)
NUM_TOKENS = 49408
START, END = 49406, 49407
NUM_POSITIONS = 77
CHUNK = NUM_POSITIONS - 2  # tokens between start and end
Token = tuple[int, float]  # id, weight


@lru_cache(maxsize=1)
def build() -> CLIPTokenizer:
    """Return the tokenizer of Stable Diffusion 1 and 2: 49408 tokens, ids as in CLIP."""
    with gzip.open(_VOCAB, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 1 + _NUM_MERGES]
    merges = [(first, second) for first, second in (line.split() for line in lines)]  # transformers 5 wants tuples
    symbols = _byte_symbols()
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    make: Any = CLIPTokenizer  # its annotations are behind its code
    tokenizer = make(vocab={token: number for number, token in enumerate(tokens)}, merges=merges)
    assert len(tokenizer) == NUM_TOKENS, f"{len(tokenizer)} tokens"  # it falls back to 2 without an error
    return tokenizer


@lru_cache(maxsize=1)
def vocabulary_hash() -> str:
    """Return the SHA-256 of the byte-pair table."""
    return hashlib.sha256(_VOCAB.read_bytes()).hexdigest()


def count(texts: Collection[str]) -> list[int]:
    """Return how many tokens each text has, without start and end.

    No token reaches over a space, and captions share most of their words: each is looked at once.
    """
    backend: Any = build().backend_tokenizer
    pieces = list({piece for text in texts for piece in text.split(" ")})
    found = backend.encode_batch_fast(pieces, add_special_tokens=False)
    lengths = {piece: len(one.ids) for piece, one in zip(pieces, found, strict=True)}
    return [sum(lengths[piece] for piece in text.split(" ")) for text in texts]


def words(pieces: Sequence[tuple[str, float]]) -> list[list[Token]]:
    """Return the tokens of a text that is given in pieces with their weights, word by word."""
    found: list[list[Token]] = [[]]
    for text, weight in pieces:
        for number in build()(text, add_special_tokens=False)["input_ids"]:
            found[-1].append((number, weight))
            if number in _word_ends():
                found.append([])
    return [word for word in found if word]


def chunks(text: Sequence[Sequence[Token]], count: int | None) -> tuple[list[list[Token]], bool]:
    """Return `count` chunks of at most 75 tokens, filled with whole words, and whether all words found their place.

    A word that is longer than a chunk is cut; the last chunks may be empty. None: as many chunks as are needed.
    """
    filled: list[list[Token]] = [[]]
    for word in text:
        pieces = [list(word[start : start + CHUNK]) for start in range(0, len(word), CHUNK)]
        for piece in pieces:
            if len(filled[-1]) + len(piece) > CHUNK:
                filled.append([])
            filled[-1] += piece
    count = len(filled) if count is None else count
    return [*filled[:count], *([] for _ in range(count - len(filled)))], len(filled) <= count


@lru_cache(maxsize=1)
def _word_ends() -> frozenset[int]:
    vocabulary: dict[str, int] = build().get_vocab()
    ends = {number for token, number in vocabulary.items() if token.endswith("</w>")}
    return frozenset(ends | {START, END})


def _byte_symbols() -> list[str]:
    """Return a printable character for each of the 256 bytes, in CLIP's order: first those that are printable."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    num_others = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + n) for n in range(num_others)]
