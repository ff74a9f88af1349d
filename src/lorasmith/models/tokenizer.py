"""CLIP's tokenizer, built from the byte-pair table that comes with the package: nothing is downloaded."""

import gzip
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

_VOCAB = Path(__file__).parent / "vocab" / "bpe_simple_vocab_16e6.txt.gz"
_NUM_MERGES = 48894  # CLIP uses this many of the table's lines, after the heading (OpenAI's simple_tokenizer.py)
NUM_TOKENS = 49408
START, END = 49406, 49407
NUM_POSITIONS = 77


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


def _byte_symbols() -> list[str]:
    """Return a printable character for each of the 256 bytes, in CLIP's order: first those that are printable."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    num_others = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + n) for n in range(num_others)]
