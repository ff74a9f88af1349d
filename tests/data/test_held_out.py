"""Validation pictures: which are held out, and that none of them is ever trained."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.data.held_out import hold_out
from lorasmith.data.plan import build_plan, validation_plan
from lorasmith.data.records import ImageRecord
from lorasmith.data.subsets import DatasetRules, Subset
from lorasmith.errors import UserError

SHAPE = (64, 64)


def rules(split: float, seed: int = 0) -> DatasetRules:
    return DatasetRules((Subset(),), validation_split=split, validation_seed=seed)


def records_of(contents: list[str], dataset: int = 0, is_prior: bool = False) -> list[ImageRecord]:
    return [
        ImageRecord(Path(f"{i}.png"), "", SHAPE, is_prior=is_prior, content_hash=content, dataset=dataset)
        for i, content in enumerate(contents)
    ]


def held_out(records: list[ImageRecord]) -> set[str]:
    return {record.content_hash for record in records if record.is_validation}


contents = st.lists(st.sampled_from([f"picture {i}" for i in range(12)]), min_size=2, max_size=30)


@given(contents, contents, st.lists(st.sampled_from(["picture 0", "of the class"]), max_size=4), st.integers(0, 99))
def test_no_content_is_both_trained_and_validated(
    first: list[str], second: list[str], prior: list[str], seed: int
) -> None:
    records = [*records_of(first), *records_of(prior, is_prior=True), *records_of(second, dataset=1)]
    datasets = [rules(0.3, seed), rules(0.2, seed + 1)]
    try:
        marked, _ = hold_out(records, datasets)
        plan = build_plan(
            marked, [SHAPE] * len(marked), batch_sizes=[2, 1], num_processes=1, gradient_accumulation=2, seed=seed
        )
    except UserError as error:  # too few different pictures
        assert "none to train on" in str(error) or "no pictures to train on" in str(error)
        return
    validation = validation_plan(plan, marked, seed=7)
    assert validation is not None
    trained = {marked[i].content_hash for i, repeats in enumerate(plan.repeats) if repeats}
    validated = {marked[i].content_hash for i, repeats in enumerate(validation.repeats) if repeats}
    assert not trained & validated and validated == held_out(marked)
    assert not any(marked[i].is_prior for i, repeats in enumerate(validation.repeats) if repeats)
    drawn = [
        sample.record
        for step in range(validation.steps_per_epoch)
        for micro_batch in validation.step(step, 0)
        for sample in micro_batch.samples
    ]
    assert sorted(drawn) == [i for i, record in enumerate(marked) if record.is_validation and not record.is_prior]


@given(st.permutations([f"picture {i}" for i in range(20)]), st.integers(0, 5))
def test_the_choice_depends_on_contents_and_seed_alone(order: list[str], seed: int) -> None:
    usual, _ = hold_out(records_of(sorted(order)), [rules(0.25, seed)])
    again, _ = hold_out([replace(r, path=Path("other") / r.path) for r in records_of(order)], [rules(0.25, seed)])
    assert held_out(usual) == held_out(again) and len(held_out(again)) == 5


def test_another_seed_holds_out_other_pictures() -> None:
    records = records_of([f"picture {i}" for i in range(20)])
    assert len({frozenset(held_out(hold_out(records, [rules(0.25, seed)])[0])) for seed in range(6)}) > 3


def test_one_at_least_is_held_out_and_the_note_says_which() -> None:
    marked, notes = hold_out(records_of(["a", "b", "c"]), [rules(0.01)])
    (chosen,) = [record for record in marked if record.is_validation]
    assert notes == [f"held out for validation, never trained on: 1 of 3 ({chosen.path.name})"]
    assert hold_out(records_of(["a", "b"]), [rules(0)])[1] == []


def test_copies_among_regularization_pictures_are_not_used() -> None:
    records = [*records_of(["a", "b"]), *records_of(["a", "b"], is_prior=True)]
    marked, (note,) = hold_out(records, [rules(0.5)])
    assert "1 of 2" in note and "1 regularization pictures are copies of these" in note
    plan = build_plan(marked, [SHAPE] * 4, batch_sizes=[1], num_processes=1, gradient_accumulation=1, seed=0)
    assert sum(plan.repeats) == 2 and not any(
        repeats for repeats, record in zip(plan.repeats, marked, strict=True) if record.is_validation
    )


def test_holding_out_everything_is_an_error() -> None:
    with pytest.raises(UserError, match=r"validation_split = 0.9 of 2 different pictures in data set 1 leaves none"):
        hold_out(records_of(["a", "b", "a"]), [rules(0.9)])
