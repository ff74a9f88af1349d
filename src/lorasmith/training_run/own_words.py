"""The textual-inversion embeddings of a run: which captions and prompts they stand in."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorasmith.data.records import ImageRecord
from lorasmith.data.subsets import Subset
from lorasmith.models.embeddings import Embedding, Embeddings

_NUM_SHOWN = 8


@dataclass(frozen=True)
class OwnWords:
    """The embeddings that were given, in how many pictures' captions each stands, by name, and what to say of them."""

    embeddings: Embeddings
    num_captions: Counter[str]
    may_be_composed: bool  # captions have variants, of which names may be put together
    notes: list[str]

    def facts(self) -> list[str]:
        """Return what the training's result depends on: embeddings that no caption names may come and go."""
        return sorted(one.identity for one in self.embeddings if self.may_be_composed or self.num_captions[one.name])


def own_words(
    embeddings: Embeddings, notes: list[str], records: Sequence[ImageRecord], subsets: Sequence[Subset]
) -> OwnWords:
    """Look for the embeddings' names in all captions, as they are written."""
    num_captions: Counter[str] = Counter()
    for record in records if embeddings else []:
        options = subsets[record.subset].captions
        num_captions.update(embeddings.used_in(" ".join((options.prefix, record.caption, options.suffix))))
    return OwnWords(embeddings, num_captions, any(subset.captions.wildcards for subset in subsets), notes)


def own_word_lines(words: OwnWords, num_captions: int, prompts: Iterable[str]) -> list[str]:
    """Say of each embedding how many vectors it has and where it stands, those first that are used; then the notes."""
    num_prompts = Counter(name for prompt in prompts for name in words.embeddings.used_in(prompt))
    used, unused = [], []
    for one in sorted(words.embeddings, key=lambda one: one.name):
        in_captions, in_prompts = words.num_captions[one.name], num_prompts[one.name]
        if in_captions or in_prompts:
            prompts_too = f" and {in_prompts} prompt{'s' * (in_prompts > 1)}" if in_prompts else ""
            used.append(f"{_with_vectors(one)}, in {in_captions} of {num_captions} captions{prompts_too}")
        else:
            unused.append(_with_vectors(one))
    more = f" and {len(unused) - _NUM_SHOWN} more" if len(unused) > _NUM_SHOWN else ""
    return [
        *used,
        *([f"in no caption or prompt: {', '.join(unused[:_NUM_SHOWN])}{more}"] if unused else []),
        *words.notes,
    ]


def _with_vectors(one: Embedding) -> str:
    return f"{one.name} ({len(one.vectors)} vector{'s' * (len(one.vectors) > 1)})"
