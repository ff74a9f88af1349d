"""Draws that belong to a picture: distributed as nucleus sampling, and whatever the neighbours are."""

import torch
from PIL import Image

from lorasmith.taggers._generation import NucleusDraws, picture_seed


def drawn(top_p: float, seeds: list[int], scores: torch.Tensor) -> torch.Tensor:
    out = NucleusDraws(top_p, seeds)(torch.zeros(len(seeds), 1, dtype=torch.long), scores)
    assert (out.isfinite().sum(dim=-1) == 1).all()
    return out.argmax(dim=-1)


def test_words_are_drawn_as_often_as_they_are_likely() -> None:
    shares = torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1])
    number = 4000
    for top_p, kept in [(0.8, [1, 2, 3]), (0.35, [1]), (1.0, [0, 1, 2, 3, 4])]:
        nucleus = torch.zeros(5)
        nucleus[kept] = shares[kept] / shares[kept].sum()
        found = drawn(top_p, list(range(number)), shares.log().expand(number, -1)).bincount(minlength=5) / number
        # five standard deviations of a share, at most sqrt(0.25 / 4000)
        assert (found - nucleus).abs().max() < 5 * (0.25 / number) ** 0.5
        assert not found[nucleus == 0].any()


def test_a_row_draws_the_same_among_any_others() -> None:
    scores = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    together = drawn(0.9, [1, 2, 3, 4, 5, 6], scores)
    alone = torch.cat([drawn(0.9, [seed], scores[seed - 1 : seed]) for seed in range(1, 7)])
    assert together.equal(alone)


def test_each_token_is_drawn_anew() -> None:
    draws, scores = NucleusDraws(1.0, [7]), torch.zeros(1, 1000)
    ids = torch.zeros(1, 1, dtype=torch.long)
    assert len({int(draws(ids, scores).argmax()) for _ in range(20)}) > 15


def test_seeds_follow_from_pixels_shape_and_seed() -> None:
    wide, high = Image.new("RGB", (4, 2), "red"), Image.new("RGB", (2, 4), "red")
    other = wide.copy()
    other.putpixel((0, 0), (254, 0, 0))
    seeds = [picture_seed(1, wide), picture_seed(1, high), picture_seed(1, other), picture_seed(2, wide)]
    assert len(set(seeds)) == 4 and picture_seed(1, wide.copy()) == seeds[0]
