"""What a judge sees in a LoRA's pictures beside the training pictures and the base model's, and what it recommends."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image
from torch import Tensor

from lorasmith import picture_scores
from lorasmith.picture_judges import Judge
from lorasmith.picture_scores import Reference, Scores

Thing = TypeVar("Thing")
_MOST_PICTURES = 500  # training pictures that are looked at
NAMES = ("likeness", "adherence", "diversity", "copying", "damage")
_MEANS = {  # of a share of 0
    "likeness": "its pictures are no more like the training pictures than the base model's",
    "adherence": "its pictures show nothing of the prompts",
    "diversity": "its pictures of a prompt are all the same",
    "copying": "all its pictures are copies of training pictures",
    "damage": "unrelated prompts give pictures of something else",
}


@dataclass(frozen=True)
class Seen:
    """What a judge saw in pictures, in their order: (N,) each, and vectors of length 1, (N, D).

    nearest: numbers of the nearest training pictures, at `distances`.
    """

    prompts: list[str]
    features: Tensor
    likeness: Tensor
    adherence: Tensor | None
    distances: Tensor
    nearest: Tensor

    def by_prompt(self) -> list[Tensor]:
        """Return the vectors of each prompt's pictures."""
        prompts = list(dict.fromkeys(self.prompts))
        return [self.features[[one == prompt for one in self.prompts]] for prompt in prompts]


def at_most(training: Sequence[Thing]) -> Sequence[Thing]:
    """Return the training pictures to look at: all, or 500 at most, evenly spread."""
    return training[:: -(-len(training) // _MOST_PICTURES)]


class Bench:
    """A judge that knows the training pictures, and so can score others.

    Args:
        training: at least one picture.
    """

    def __init__(self, judge: Judge, training: Iterable[Image.Image]) -> None:
        self._judge, self._training = judge, judge.embed(training)
        self.spacing, self.variety = picture_scores.spacing(self._training), picture_scores.variety(self._training)

    def look(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Seen:
        """Look at pictures of these prompts, at least one."""
        features = self._judge.embed(pictures)
        return Seen(
            list(prompts),
            features,
            picture_scores.likeness(features, self._training),
            self._judge.adherence(pictures, features, prompts),
            *picture_scores.nearest(features, self._training),
        )

    def scores(self, seen: Seen, unrelated: tuple[Seen, Seen] | None = None) -> Scores:
        """Return the scores of a LoRA's pictures.

        Args:
            unrelated: its pictures of unrelated prompts, and those that the base model draws with the same seeds.
        """
        return Scores(
            likeness=seen.likeness.mean().item(),
            adherence=None if seen.adherence is None else seen.adherence.mean().item(),
            diversity=picture_scores.diversity(seen.by_prompt()),
            copying=None
            if self.spacing is None
            else picture_scores.is_copy(seen.distances, self.spacing).float().mean().item(),
            damage=unrelated and picture_scores.damage(*(one.features for one in unrelated)).mean().item(),
        )

    def reference(self, base: Seen, unrelated: Seen | None = None) -> Reference:
        """Return what a LoRA's scores are compared with: the base model's pictures, and those of unrelated prompts."""
        return Reference(
            self.scores(base, unrelated and (unrelated, unrelated)),
            self.variety,
            unrelated and picture_scores.between(unrelated.by_prompt()),
        )


@dataclass(frozen=True)
class Candidate:
    """A LoRA at a strength, as it is called."""

    name: str
    scores: Scores


def recommend(candidates: Sequence[Candidate], reference: Reference) -> tuple[Candidate | None, str]:
    """Return the candidate that is worth most, the earlier of equal ones, and why, in a sentence; None: none is."""
    ranked = sorted(candidates, key=lambda one: -picture_scores.overall(one.scores, reference))
    best = ranked[0]
    if not picture_scores.overall(best.scores, reference):
        reasons = {one.name: picture_scores.shares(one.scores, reference) for one in candidates}
        told = "; ".join(
            f"{name}: {_MEANS[next(score for score, share in shares.items() if not share)]}"
            for name, shares in reasons.items()
        )
        return None, f"None is recommended. {told}."
    base = reference.base
    facts = [f"likeness to the training pictures {best.scores.likeness:.2f} (the base model's: {base.likeness:.2f})"]
    if best.scores.adherence is not None and base.adherence is not None:
        facts.append(f"adherence to the prompts {best.scores.adherence:.2f} ({base.adherence:.2f})")
    if best.scores.copying is not None:
        facts.append(f"{best.scores.copying:.0%} copies" if best.scores.copying else "no copies")
    if best.scores.damage is not None:
        facts.append(f"damage to unrelated prompts {best.scores.damage:.2f}")
    told = (
        f"Recommended: {best.name}, overall {picture_scores.overall(best.scores, reference):.2f}: {', '.join(facts)}."
    )
    if len(ranked) > 1:
        told += f" {_against(best, ranked[1], reference)}"
    return best, told


def _against(best: Candidate, next_best: Candidate, reference: Reference) -> str:
    """Say what sets it apart from the next best one."""
    own, others = (picture_scores.shares(one.scores, reference) for one in (best, next_best))
    better, worse = [], []
    for name, share in own.items():
        pair = [f"{getattr(one.scores, name):.3f}" for one in (best, next_best)]
        if share != others[name] and pair[0] != pair[1]:
            (better if share > others[name] else worse).append(f"{name} {' to '.join(pair)}")
    parts = [f"{title} {', '.join(names)}" for title, names in (("better", better), ("worse", worse)) if names]
    overall = picture_scores.overall(next_best.scores, reference)
    return f"The next is {next_best.name}, overall {overall:.2f}; against it: {'; '.join(parts) or 'about the same'}."
