from collections.abc import Iterable, Sequence

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lorasmith.judging import Bench, Candidate, recommend
from lorasmith.picture_scores import Reference, Scores


class Averages:
    """A judge that sees a picture's nine pixels, and adherence as how red it is."""

    def embed(self, pictures: Iterable[Image.Image]) -> Tensor:
        seen = [torch.tensor(list(picture.tobytes()), dtype=torch.float32) for picture in pictures]
        return F.normalize(torch.stack(seen), dim=1)

    def adherence(self, pictures: Sequence[Image.Image], features: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([picture.getpixel((0, 0))[0] / 255 for picture in pictures])  # pyright: ignore


def pictures(count: int, seed: int) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(seed)
    return [Image.fromarray(one) for one in (torch.rand(count, 3, 3, 3, generator=generator) * 255).byte().numpy()]


def test_copies_of_the_training_pictures_are_found_and_named() -> None:
    training = pictures(5, seed=0)
    bench = Bench(Averages(), training)

    seen = bench.look([training[3], *pictures(1, seed=1), training[0], training[3]], ["a", "b", "a", "b"])

    assert seen.nearest[[0, 2, 3]].tolist() == [3, 0, 3]
    assert bench.scores(seen).copying == 0.75
    assert bench.scores(bench.look(training, ["a"] * 5)).copying == 1


def test_the_base_model_itself_is_no_damage_and_as_diverse_as_itself() -> None:
    bench = Bench(Averages(), pictures(3, seed=0))
    base, unrelated = (bench.look(pictures(4, seed=seed), ["a", "a", "b", "b"]) for seed in (1, 2))

    reference = bench.reference(base, unrelated)

    assert reference.base.damage == 0
    assert reference.unrelated is not None and reference.unrelated > 0
    assert bench.scores(base).diversity == pytest.approx(reference.base.diversity)
    assert bench.scores(base).damage is None


def test_a_single_training_picture_leaves_copying_out() -> None:
    bench = Bench(Averages(), pictures(1, seed=0) * 2)

    assert bench.scores(bench.look(pictures(1, seed=1), ["a"])).copying is None


REFERENCE = Reference(Scores(0.5, 0.3, 0.2, 0.0, 0.0), variety=0.1, unrelated=0.4)


def test_the_best_is_recommended_with_what_sets_it_apart() -> None:
    early = Candidate("early at 1", Scores(0.6, 0.3, 0.15, 0.0, 0.05))
    good = Candidate("good at 1", Scores(0.8, 0.28, 0.12, 0.0, 0.1))
    burnt = Candidate("burnt at 1", Scores(0.95, 0.2, 0.01, 0.9, 0.35))

    best, told = recommend([early, good, burnt], REFERENCE)

    assert best is good
    assert told.startswith("Recommended: good at 1, overall 0.42: likeness to the training pictures 0.80")
    assert "no copies" in told
    assert "The next is early at 1" in told
    assert "better likeness 0.800 to 0.600; worse adherence 0.280 to 0.300, damage 0.100 to 0.050" in told


def test_of_equal_ones_the_earlier_is_recommended() -> None:
    scores = Scores(0.6, 0.3, 0.15, 0.0, 0.05)
    first, second = Candidate("a", scores), Candidate("b", scores)

    best, told = recommend([first, second], REFERENCE)

    assert best is first
    assert "about the same" in told


def test_nothing_is_recommended_where_nothing_is_worth_anything() -> None:
    worthless = {
        "no more like the training pictures": Scores(0.4, 0.3, 0.2, 0.0, 0.0),
        "all its pictures are copies": Scores(0.9, 0.3, 0.2, 1.0, 0.0),
        "unrelated prompts give pictures of something else": Scores(0.9, 0.3, 0.2, 0.0, 0.5),
    }

    best, told = recommend([Candidate(f"at {n}", one) for n, one in enumerate(worthless.values())], REFERENCE)

    assert best is None
    assert told.startswith("None is recommended.")
    assert all(reason in told for reason in worthless)
