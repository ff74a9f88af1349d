"""Measuring held-out pictures: each counts the same, however many processes divide them among themselves."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith import validation
from lorasmith.data.plan import MicroBatch, Plan, build_plan, validation_plan
from lorasmith.data.records import ImageRecord
from lorasmith.validation import Validation, short_names, validate

SHAPES = [(64, 64), (64, 96), (64, 64), (64, 64), (64, 64)]  # of the four held out one is alone in its shape
RECORDS = [ImageRecord(Path(f"{i}.png"), "", (64, 64), 1, is_validation=i > 0) for i in range(5)]


def loss_of(batch: MicroBatch) -> torch.Tensor:
    """A loss of each sample that tells its picture and its draw apart from all others."""
    return torch.tensor([100.0 * sample.record + 10 * sample.epoch + sample.index for sample in batch.samples])


@dataclass
class Reader:
    """Stands for a data set: its batches are what the plan says of them."""

    plan: Plan

    def prefetch(self, steps: range, process_index: int, workers: int) -> Any:
        return (self.plan.step(step, process_index) for step in steps)


@dataclass
class OneOf:
    """Stands for one of several processes; those before it have left what they measured in `told`."""

    index: int
    told: list[Any] = field(default_factory=list)
    together = in_step = staticmethod(nullcontext)
    most = int

    def gather(self, thing: Any) -> list[Any]:
        self.told.append(thing)
        return self.told


def measured(count: int, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> Validation:
    monkeypatch.setattr(validation, "sample_losses", lambda model, batch, *rest: loss_of(batch))
    plan = build_plan(RECORDS, SHAPES, batch_sizes=[batch_size], num_processes=count, gradient_accumulation=1, seed=3)
    held_out = validation_plan(plan, RECORDS, seed=5)
    assert held_out is not None
    told: list[Any] = []
    model: Any = None
    results = [
        validate(model, held_out, Reader(held_out), OneOf(index, told), lambda captions: model, workers=0)  # type: ignore[arg-type]
        for index in range(count)
    ]
    return results[-1]  # the one that knows of all


@pytest.mark.parametrize("count", [2, 4, 8])
def test_places_that_no_picture_fills_count_nothing(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = measured(1, count, monkeypatch)
    assert sorted(alone.pictures) == [1, 2, 3, 4]
    assert alone.loss == pytest.approx(sum(alone.pictures.values()) / 4)
    assert measured(count, 1, monkeypatch) == alone


def test_few_pictures_are_measured_with_several_draws_each(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = measured(1, 1, monkeypatch)
    assert {round(loss - 100 * record) for record, loss in alone.pictures.items()} == {35}  # of epochs 0 to 7


def test_names_have_as_much_of_their_folders_as_tells_them_apart() -> None:
    assert short_names([Path("a/x.png"), Path("a/y.png")]) == ["x.png", "y.png"]
    assert short_names([Path("a/x.png"), Path("b/x.png")]) == ["a/x.png", "b/x.png"]
