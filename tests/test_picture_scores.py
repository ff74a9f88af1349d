import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith import picture_scores
from lorasmith.picture_scores import Reference, Scores


def vectors(count: int, seed: int = 0, width: int = 6) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def angle(*degrees: float) -> Tensor:
    """Unit vectors in a plane, so that distances are those of a circle."""
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def test_likeness_is_the_mean_cosine_of_all_pairs() -> None:
    drawn, training = vectors(4), vectors(5, seed=1)

    found = picture_scores.likeness(drawn, training)

    oracle = F.cosine_similarity(drawn[:, None], training[None], dim=-1).mean(1)
    torch.testing.assert_close(found, oracle)
    assert picture_scores.likeness(training[:1], training[:1]).item() == pytest.approx(1)


def test_diversity_is_of_pictures_of_the_same_prompt_alone() -> None:
    one, other = angle(0, 60, 120), angle(180, 180)

    # pairs of the first: 60, 60 and 120 degrees apart; of the second: 0
    assert picture_scores.diversity([one, other]) == pytest.approx((0.5 + 0.5 + 1.5 + 0) / 4)


def test_identical_pictures_have_no_diversity_and_single_ones_none_to_measure() -> None:
    same = vectors(1).expand(4, -1)

    assert picture_scores.diversity([same]) == 0
    assert picture_scores.diversity([vectors(1), vectors(1)]) is None
    assert picture_scores.variety(same[:1]) == 0
    assert picture_scores.variety(angle(0, 90)) == pytest.approx(1)


def test_between_is_of_pictures_of_different_prompts_alone() -> None:
    assert picture_scores.between([angle(0, 0), angle(90), angle(180)]) == pytest.approx((1 + 1 + 2 + 2 + 1) / 5)
    assert picture_scores.between([vectors(3)]) is None


def test_what_the_base_draws_itself_is_no_damage() -> None:
    base = vectors(5)

    assert picture_scores.damage(base, base).tolist() == [0] * 5
    torch.testing.assert_close(
        picture_scores.damage(vectors(5, seed=1), base), 1 - F.cosine_similarity(vectors(5, seed=1), base)
    )


def test_duplicates_of_training_pictures_are_copies_and_others_like_them_are_not() -> None:
    training = angle(0, 10, 20, 30)
    spacing = picture_scores.spacing(training)
    assert spacing is not None

    distances, which = picture_scores.nearest(torch.cat([training, angle(12, 15, 25, -40)]), training)

    assert spacing == pytest.approx(2 * math.sin(math.radians(5)))
    assert picture_scores.is_copy(distances, spacing).tolist() == [True] * 4 + [True, False, False, False]
    assert which.tolist()[:5] == [0, 1, 2, 3, 1]


def test_copies_among_the_training_pictures_count_once() -> None:
    training = angle(0, 10, 20, 30)

    assert picture_scores.spacing(training.repeat(3, 1)) == picture_scores.spacing(training)
    assert picture_scores.spacing(training[:1].repeat(3, 1)) is None


def reference(**changes: float | None) -> Reference:
    found = {"likeness": 0.5, "adherence": 0.3, "diversity": 0.2, "copying": 0.0, "damage": 0.0}
    return Reference(Scores(**{**found, **changes}), variety=0.1, unrelated=0.4)  # pyright: ignore


def test_the_base_model_is_worth_nothing_as_a_lora() -> None:
    assert picture_scores.overall(reference().base, reference()) == 0


def test_shares_are_of_what_can_be_reached() -> None:
    scores = Scores(likeness=0.8, adherence=0.15, diversity=0.05, copying=0.25, damage=0.1)

    found = picture_scores.shares(scores, reference())

    wanted = {"likeness": 0.6, "adherence": 0.5, "diversity": 0.5, "copying": 0.75, "damage": 0.75}
    assert found == pytest.approx(wanted)
    assert picture_scores.overall(scores, reference()) == pytest.approx(math.prod(wanted.values()))


def test_more_than_is_wanted_is_worth_no_more_and_less_than_nothing_no_less() -> None:
    much = picture_scores.shares(Scores(1.5, 0.9, 0.9, 0.0, 0.0), reference())
    little = picture_scores.shares(Scores(-0.5, -0.2, 0.0, 1.0, 1.9), reference())

    assert set(much.values()) == {1}
    assert set(little.values()) == {0}


def test_what_was_not_measured_has_no_part() -> None:
    scores = Scores(likeness=0.75)

    assert picture_scores.shares(scores, reference()) == pytest.approx({"likeness": 0.5})


@pytest.mark.parametrize("name", ["likeness", "adherence", "diversity", "copying", "damage"])
def test_each_score_alone_can_make_a_lora_worth_less(name: str) -> None:
    good = {"likeness": 0.8, "adherence": 0.3, "diversity": 0.1, "copying": 0.0, "damage": 0.0}
    worse = {"likeness": 0.7, "adherence": 0.2, "diversity": 0.05, "copying": 0.5, "damage": 0.2}

    whole = picture_scores.overall(Scores(**good), reference())

    assert picture_scores.overall(Scores(**{**good, name: worse[name]}), reference()) < whole
