"""Textual inversion (arXiv:2208.01618): names in captions that stand for vectors in the text encoder's table of tokens.

A name takes as many token places as it has vectors. They have ids after those of the tokenizer, which never gives
these, and lie beside the encoder's table, which stays as it is.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from lorasmith.models import tokenizer
from lorasmith.models.tokenizer import Token

_LETTER = r"[^\W\d_]"


@dataclass(frozen=True)
class Embedding:
    """A name and its vectors, (n, width) fp32 with n from 1 to 75."""

    name: str
    vectors: Tensor

    @cached_property
    def identity(self) -> str:
        """The SHA-256, in hex, of the name and the vectors."""
        digest = hashlib.sha256(f"{key(self.name)} {tuple(self.vectors.shape)}\n".encode())
        digest.update(self.vectors.numpy().tobytes())
        return digest.hexdigest()


def key(name: str) -> str:
    """Return what two names have in common that cannot be told apart in a caption."""
    return " ".join(unicodedata.normalize("NFC", name).lower().split())


class Embeddings:
    """The embeddings that captions may use.

    A name is found as WebUI finds it: in any case of its letters, where it is no part of a longer word, and the longest
    name first (modules/textual_inversion/textual_inversion.py, find_embedding_at_position). Unlike there, signs that
    adjoin signs, as the comma in `<name>,`, do not hide it.
    """

    def __init__(self, embeddings: Sequence[Embedding] = ()) -> None:
        self._embeddings = sorted(embeddings, key=lambda one: -len(one.name))
        self._names = re.compile("|".join(f"({_pattern(one.name)})" for one in self._embeddings), re.IGNORECASE)
        self._ids, first = list[range](), tokenizer.NUM_TOKENS
        for one in self._embeddings:
            self._ids.append(range(first, first + len(one.vectors)))
            first += len(one.vectors)

    def __iter__(self) -> Iterator[Embedding]:
        return iter(self._embeddings)

    def __len__(self) -> int:
        return len(self._embeddings)

    def used_in(self, text: str) -> set[str]:
        """Return the names that stand in a text."""
        return {self._embeddings[number].name for _, number in self._split(text) if number is not None}

    def words(self, pieces: Sequence[tuple[str, float]]) -> list[list[Token]]:
        """Return the tokens of a text that is given in pieces with their weights, word by word; a name is one word."""
        found: list[list[Token]] = []
        for text, weight in pieces:
            for part, number in self._split(text):
                if number is None:
                    found += tokenizer.words([(part, weight)])
                else:
                    found.append([(id, weight) for id in self._ids[number]])
        return found

    def extend(self, table: nn.Embedding) -> nn.Embedding:
        """Return a text encoder's table that also answers to the ids of these vectors, with the same weights."""
        return (
            _ExtendedTable(table, torch.cat([one.vectors for one in self._embeddings])) if self._embeddings else table
        )

    def _split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Return the text in parts, each with the number of the embedding that it names; None: ordinary text."""
        if not self._embeddings:
            yield text, None
            return
        text, end = unicodedata.normalize("NFC", text), 0  # as the tokenizer does first
        for match in self._names.finditer(text):
            assert match.lastindex is not None, "each name is a group"
            yield text[end : match.start()], None
            yield match[0], match.lastindex - 1
            end = match.end()
        yield text[end:], None


NO_EMBEDDINGS = Embeddings()


def _pattern(name: str) -> str:
    """Return the regular expression of a name; letters before or after its own would make another word of it."""
    words = unicodedata.normalize("NFC", name).split()
    before = f"(?<!{_LETTER})" if words[0][0].isalpha() else ""
    after = f"(?!{_LETTER})" if words[-1][-1].isalpha() else ""
    return before + r"\s+".join(map(re.escape, words)) + after


class _ExtendedTable(nn.Embedding):
    """A text encoder's table with vectors after the tokenizer's tokens; saved, hashed and adapted as without them."""

    vectors: Tensor

    def __init__(self, table: nn.Embedding, vectors: Tensor) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, device="meta")
        self.weight = table.weight
        self.register_buffer("vectors", vectors.to(table.weight.device, table.weight.dtype), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., width) of ids (...)."""
        numbers = input - tokenizer.NUM_TOKENS
        own = super().forward(input.clamp(max=tokenizer.NUM_TOKENS - 1))
        return torch.where((numbers >= 0)[..., None], self.vectors[numbers.clamp(min=0)], own)
