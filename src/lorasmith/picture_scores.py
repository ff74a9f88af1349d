"""What a LoRA's pictures are worth, as numbers: of unit vectors that an embedding model makes of pictures.

All distances are of vectors of length 1, so half the square of the distance between two is 1 less their cosine. Where
the measures come from, and what they cannot tell, is in docs/judge.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COPY = 0.5  # of the training pictures' spacing: nearer than this is a copy
_SAME = 1e-3  # vectors this near are those of one picture


@dataclass(frozen=True)
class Scores:
    """Means over pictures; None: not measured, for want of what it takes.

    likeness: cosine with the training pictures, in [-1, 1]. adherence: how well the prompt is shown, as the judge has
    it. diversity: 1 less the cosine of pictures of one prompt, in [0, 2]. copying: share of the pictures, in [0, 1].
    damage: 1 less the cosine with what the base model draws instead, in [0, 2].
    """

    likeness: float
    adherence: float | None = None
    diversity: float | None = None
    copying: float | None = None
    damage: float | None = None


@dataclass(frozen=True)
class Reference:
    """What scores are compared with.

    base: the scores of the base model alone. variety: 1 less the cosine of two training pictures, the mean of all
    pairs. unrelated: the same of the base model's pictures of different unrelated prompts; None: none were drawn.
    """

    base: Scores
    variety: float
    unrelated: float | None = None


def likeness(drawn: Tensor, training: Tensor) -> Tensor:
    """Return the mean cosine of each picture with all training pictures, (N,) in [-1, 1]: (N, D) and (M, D).

    Its mean is what arXiv:2208.12242, section 4, calls CLIP-I, or DINO with that model.
    """
    return (drawn @ training.T).mean(1)


def diversity(drawn: Sequence[Tensor]) -> float | None:
    """Return 1 less the mean cosine of two pictures of the same prompt, in [0, 2]; None: there are no two.

    Args:
        drawn: pictures of one prompt each, from different seeds, (n, D).
    """
    pairs = torch.cat([torch.zeros(0), *(_pairs(own) for own in drawn)])
    return pairs.mean().item() if len(pairs) else None


def between(groups: Sequence[Tensor]) -> float | None:
    """Return 1 less the mean cosine of two pictures of different groups, (n, D) each, in [0, 2]; None: of one group."""
    distances = [_half_squares(one, other).flatten() for i, one in enumerate(groups) for other in groups[i + 1 :]]
    return torch.cat(distances).mean().item() if distances else None


def damage(drawn: Tensor, base: Tensor) -> Tensor:
    """Return 1 less the cosine of each picture with the base model's of the same prompt and seed, (N,) in [0, 2]."""
    return (drawn - base).square().sum(1) / 2


def nearest(drawn: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """Return each picture's distance to the nearest training picture, (N,) in [0, 2], and which that is, (N,)."""
    found = _distances(drawn, training).min(1)
    return found.values, found.indices


def spacing(training: Tensor) -> float | None:
    """Return the median distance of a training picture, (M, D), to the nearest other one, in (0, 2].

    Several copies of a picture count once. None: no two are different.
    """
    distances = _distances(training, training)
    is_first = (distances < _SAME).int().argmax(1) == torch.arange(len(training))
    own = distances[is_first][:, is_first]
    if len(own) < 2:
        return None
    own.fill_diagonal_(torch.inf)
    return own.min(1).values.median().item()


def is_copy(distances: Tensor, spacing: float) -> Tensor:
    """Return which pictures are nearer to a training picture than half of what lies between training pictures, (N,).

    After the authenticity of arXiv:2102.08921, which asks for nearer than the training picture's nearest neighbour;
    half of that, since pictures of one thing are that near without being copies.
    """
    return distances < COPY * spacing


def variety(training: Tensor) -> float:
    """Return 1 less the mean cosine of two training pictures, in [0, 2]; 0 of a single one."""
    pairs = _pairs(training)
    return pairs.mean().item() if len(pairs) else 0.0


def shares(scores: Scores, reference: Reference) -> dict[str, float]:
    """Return what each score that was measured is worth, 0 to 1: 1 is all that can be asked.

    likeness: the share of the way from the base model's to 1. adherence and diversity: what is kept of the base
    model's, where for the latter that of the training pictures is enough. copying: the share that is no copy. damage:
    what is kept, where nothing is when all is as far off as the base model's picture of another unrelated prompt.
    """
    base, found = reference.base, {}
    found["likeness"] = max(0.0, scores.likeness - base.likeness) / max(1 - base.likeness, 1e-6)
    if scores.adherence is not None and base.adherence is not None:
        found["adherence"] = _kept(scores.adherence, base.adherence)
    if scores.diversity is not None and base.diversity is not None:
        found["diversity"] = _kept(scores.diversity, min(base.diversity, reference.variety))
    if scores.copying is not None:
        found["copying"] = 1 - scores.copying
    if scores.damage is not None and reference.unrelated is not None:
        found["damage"] = _kept(reference.unrelated - scores.damage, reference.unrelated)
    return {name: min(1.0, share) for name, share in found.items()}


def overall(scores: Scores, reference: Reference) -> float:
    """Return the product of all shares, 0 to 1: what is bad in one thing is not made good by another."""
    product = 1.0
    for share in shares(scores, reference).values():
        product *= share
    return product


def _kept(value: float, wanted: float) -> float:
    """Return the share of `wanted` that is there, 0 to 1."""
    return 1.0 if value >= wanted else max(0.0, value) / wanted if wanted > 0 else 0.0


def _pairs(features: Tensor) -> Tensor:
    """Return 1 less the cosine of all pairs of vectors, (n * (n - 1) / 2,)."""
    first, second = torch.triu_indices(len(features), len(features), offset=1)
    return _half_squares(features, features)[first, second]


def _half_squares(one: Tensor, other: Tensor) -> Tensor:
    return _distances(one, other).square() / 2


def _distances(one: Tensor, other: Tensor) -> Tensor:
    """Return (N, M) distances, exactly 0 of equal vectors."""
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")
