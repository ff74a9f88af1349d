"""What every optimizer step consists of, as a pure function of (records, shapes, batch sizes, seed).

Words: a *unit* is batch_size * num_processes samples of one shape, what all processes work on at once; an optimizer
step is gradient_accumulation units. An epoch holds every record `repeats` times; its units are cut shape by shape (the
last one of a shape may be smaller) and put in an order drawn from the seed and the epoch's number. So the same samples
meet in the same step whether there is one process with batch 2 or two processes with batch 1.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from lorasmith.data.buckets import Size
from lorasmith.data.records import ImageRecord
from lorasmith.errors import UserError
from lorasmith.seeds import derive

Unit = tuple[int, ...]  # record indexes


@dataclass(frozen=True)
class Sample:
    """One use of a record; `index` is its place in the global batch of its step: units, then samples in a unit."""

    record: int
    epoch: int
    index: int


@dataclass(frozen=True)
class MicroBatch:
    """What one process works on at once; `shape` is (width, height) in pixels; padding counts nothing in the loss."""

    samples: tuple[Sample, ...]
    shape: Size
    is_padding: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """The samples of every step; made by `build_plan`.

    repeats: how often each record counts in an epoch, regularization balanced; 0 for one that is not used.
    notes: plain sentences about the balance, for the printed plan.
    """

    shapes: tuple[Size, ...]
    repeats: tuple[int, ...]
    batch_size: int
    num_processes: int
    gradient_accumulation: int
    seed: int
    notes: tuple[str, ...]

    @property
    def unit_size(self) -> int:
        """Samples that all processes work on at once."""
        return self.batch_size * self.num_processes

    @cached_property
    def num_samples_per_epoch(self) -> int:
        """Samples in one pass over the data."""
        return sum(self.repeats)

    @cached_property
    def units_per_epoch(self) -> int:
        """Units in one pass over the data: for each shape, its samples / unit_size, rounded up."""
        return sum(-(-count // self.unit_size) for count in self.samples_per_shape().values())

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return -(-self.units_per_epoch // self.gradient_accumulation)

    def samples_per_shape(self) -> dict[Size, int]:
        """Return how many samples of an epoch have each shape, shapes sorted."""
        counts = dict.fromkeys(sorted(set(self.shapes)), 0)
        for shape, repeats in zip(self.shapes, self.repeats, strict=True):
            counts[shape] += repeats
        return {shape: count for shape, count in counts.items() if count}

    def epoch_of(self, step: int) -> int:
        """Return the epoch, counted from 0, that a step (counted from 0) belongs to."""
        return step // self.steps_per_epoch

    def num_samples(self, step: int) -> int:
        """Return how many samples, over all processes and units and without padding, a step has."""
        return sum(map(len, self._units_of(step)))

    def step(self, step: int, process_index: int) -> list[MicroBatch]:
        """Return one process's part of a step, counted from 0 and running over the epochs without end."""
        epoch = self.epoch_of(step)
        return [
            self._micro_batch(unit, epoch, number * self.unit_size, process_index)
            for number, unit in enumerate(self._units_of(step))
        ]

    def _units_of(self, step: int) -> Sequence[Unit]:
        first = step % self.steps_per_epoch * self.gradient_accumulation
        return _epoch_units(self, self.epoch_of(step))[first : first + self.gradient_accumulation]

    def _micro_batch(self, unit: Unit, epoch: int, first_index: int, process_index: int) -> MicroBatch:
        start = process_index * self.batch_size
        mine = unit[start : start + self.batch_size]
        is_padding = not mine  # a process without a sample works on any one of the unit: all must keep step
        samples = [Sample(record, epoch, first_index + start + i) for i, record in enumerate(mine or unit[:1])]
        return MicroBatch(tuple(samples), self.shapes[unit[0]], (is_padding,) * len(samples))


def build_plan(
    records: Sequence[ImageRecord],
    shapes_per_record: Sequence[Size],
    *,
    batch_size: int,
    num_processes: int,
    gradient_accumulation: int,
    seed: int,
) -> Plan:
    """Return the plan for these records; `shapes_per_record` is the (width, height) each is trained in.

    Raises:
        UserError: there is nothing to train on but regularization pictures, or nothing at all.
    """
    repeats = balanced_repeats(records)
    return Plan(
        shapes=tuple(shapes_per_record),
        repeats=tuple(repeats),
        batch_size=batch_size,
        num_processes=num_processes,
        gradient_accumulation=gradient_accumulation,
        seed=seed,
        notes=tuple(_balance_notes(records, repeats)),
    )


def balanced_repeats(records: Sequence[ImageRecord]) -> list[int]:
    """Return each record's repeats, those of regularization pictures changed to add up to the training pictures'.

    sd-scripts' method: they are taken in order until there are enough; the rest is not used; if there are too few, the
    repeats are raised one by one, round and round. (sd-scripts may end a few samples above; here the last one is cut.)

    Raises:
        UserError: no training pictures.
    """
    repeats = [0 if record.is_prior else record.repeats for record in records]
    missing = sum(repeats)
    if not missing:
        raise UserError(
            f"there are no pictures to train on ({len(records)} regularization pictures do not count); "
            "give a folder with training pictures."
        )
    priors = [i for i, record in enumerate(records) if record.is_prior]
    for i in priors:
        repeats[i] = min(records[i].repeats, missing)
        missing -= repeats[i]
    for number, i in enumerate(priors):
        repeats[i] += missing // len(priors) + (number < missing % len(priors))
    return repeats


def _balance_notes(records: Sequence[ImageRecord], repeats: Sequence[int]) -> list[str]:
    priors = [i for i, record in enumerate(records) if record.is_prior]
    if not priors:
        return []
    given, used = sum(records[i].repeats for i in priors), sum(repeats[i] for i in priors)
    note = f"regularization: {len(priors)} pictures make {used} samples an epoch, as many as the training pictures"
    num_unused = sum(repeats[i] == 0 for i in priors)
    if num_unused:
        return [f"{note}; {num_unused} of them are too many and are not used"]
    if used > given:
        return [f"{note}; their repeats were raised, since they alone make {given}"]
    return [note]


@lru_cache(maxsize=4)  # a memory only, no state: an epoch's order depends on nothing but the plan and its number
def _epoch_units(plan: Plan, epoch: int) -> tuple[Unit, ...]:
    rng = random.Random(derive(plan.seed, "order", epoch))
    samples: dict[Size, list[int]] = {shape: [] for shape in plan.samples_per_shape()}
    for record, (shape, repeats) in enumerate(zip(plan.shapes, plan.repeats, strict=True)):
        if repeats:
            samples[shape] += [record] * repeats
    units: list[Unit] = []
    for of_shape in samples.values():
        rng.shuffle(of_shape)
        units += [tuple(of_shape[i : i + plan.unit_size]) for i in range(0, len(of_shape), plan.unit_size)]
    rng.shuffle(units)
    return tuple(units)
