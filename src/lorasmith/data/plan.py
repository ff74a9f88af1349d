"""What every optimizer step consists of, as a pure function of (records, shapes, batch sizes, seed).

Words: a *unit* is batch_size * num_processes samples of one data set and one shape, what all processes work on at once;
an optimizer step is gradient_accumulation units. An epoch holds every record `repeats` times; its units are cut shape
by shape (the last one of a shape may be smaller) and put in an order drawn from the seed and the epoch's number. So the
same samples meet in the same step whether there is one process with batch 2 or two processes with batch 1.

Records that lie in shards are the exception: process p alone reads shards p, p + num_processes and so on, for they need
not be on other machines. Its places in each unit are filled from them, and stay empty when they run out.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from lorasmith.data.buckets import Size
from lorasmith.data.records import ImageRecord
from lorasmith.errors import UserError
from lorasmith.seeds import derive

_EMPTY = -1  # a place in a unit without a sample


@dataclass(frozen=True)
class _Unit:
    """records: record indexes in the order of their places, `_EMPTY` where there is none."""

    dataset: int
    records: tuple[int, ...]


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
    datasets, shards: of each record. batch_sizes: of each data set, on each process.
    notes: plain sentences about the balance, for the printed plan.
    """

    shapes: tuple[Size, ...]
    repeats: tuple[int, ...]
    datasets: tuple[int, ...]
    shards: tuple[int | None, ...]
    batch_sizes: tuple[int, ...]
    num_processes: int
    gradient_accumulation: int
    seed: int
    notes: tuple[str, ...]

    @property
    def unit_sizes(self) -> tuple[int, ...]:
        """Samples of each data set that all processes work on at once."""
        return tuple(size * self.num_processes for size in self.batch_sizes)

    @cached_property
    def num_samples_per_epoch(self) -> int:
        """Samples in one pass over the data."""
        return sum(self.repeats)

    @cached_property
    def units_per_epoch(self) -> int:
        """Units in one pass over the data: for each data set and shape, its samples / unit size, rounded up."""
        return len(_epoch_units(self, 0))

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
        return sum(len(unit.records) - unit.records.count(_EMPTY) for unit in self._units_of(step))

    def reads(self, record: int, process_index: int) -> bool:
        """Whether a process may read a record: any but one in a shard of another process."""
        shard = self.shards[record]
        return shard is None or shard % self.num_processes == process_index

    def step(self, step: int, process_index: int) -> list[MicroBatch]:
        """Return one process's part of a step, counted from 0 and running over the epochs without end."""
        epoch, first_index, micro_batches = self.epoch_of(step), 0, []
        for unit in self._units_of(step):
            micro_batches.append(self._micro_batch(unit, epoch, first_index, process_index))
            first_index += self.unit_sizes[unit.dataset]
        return micro_batches

    def _units_of(self, step: int) -> Sequence[_Unit]:
        first = step % self.steps_per_epoch * self.gradient_accumulation
        return _epoch_units(self, self.epoch_of(step))[first : first + self.gradient_accumulation]

    def _micro_batch(self, unit: _Unit, epoch: int, first_index: int, process_index: int) -> MicroBatch:
        start = process_index * self.batch_sizes[unit.dataset]
        places = enumerate(unit.records[start : start + self.batch_sizes[unit.dataset]], first_index + start)
        samples = [Sample(record, epoch, index) for index, record in places if record != _EMPTY]
        is_padding = not samples  # a process without a sample works on any that it may read: all must keep step
        if is_padding:
            samples = [Sample(self._any_readable(unit, process_index), epoch, first_index + start)]
        return MicroBatch(tuple(samples), self.shapes[samples[0].record], (is_padding,) * len(samples))

    def _any_readable(self, unit: _Unit, process_index: int) -> int:
        candidates = (*unit.records, *range(len(self.repeats)))
        return next(record for record in candidates if record != _EMPTY and self.reads(record, process_index))


def build_plan(
    records: Sequence[ImageRecord],
    shapes_per_record: Sequence[Size],
    *,
    batch_sizes: Sequence[int],
    num_processes: int,
    gradient_accumulation: int,
    seed: int,
) -> Plan:
    """Return the plan for these records.

    Args:
        shapes_per_record: the (width, height) that each is trained in.
        batch_sizes: of each data set, on each process.

    Raises:
        UserError: there is nothing to train on but regularization pictures, or nothing at all; a process has none that
            it may read.
    """
    repeats = balanced_repeats(records)
    plan = Plan(
        shapes=tuple(shapes_per_record),
        repeats=tuple(repeats),
        datasets=tuple(record.dataset for record in records),
        shards=tuple(record.shard for record in records),
        batch_sizes=tuple(batch_sizes),
        num_processes=num_processes,
        gradient_accumulation=gradient_accumulation,
        seed=seed,
        notes=tuple(_balance_notes(records, repeats)),
    )
    for process in range(num_processes):
        if not any(plan.reads(record, process) for record in range(len(records))):
            num_shards = len({record.shard for record in records})
            raise UserError(
                f"{num_processes} processes share {num_shards} shards, so process {process} has none to read; start "
                "fewer processes, or divide the pictures among more shards."
            )
    return plan


def validation_plan(plan: Plan, records: Sequence[ImageRecord], *, seed: int) -> Plan | None:
    """Return the plan of one look at each held-out picture, an epoch long; None if there are none.

    Its records and shapes are the training plan's, so the two can never hold the same picture.
    """
    repeats = tuple(int(record.is_validation and not record.is_prior) for record in records)
    return replace(plan, repeats=repeats, gradient_accumulation=1, seed=seed) if any(repeats) else None


def balanced_repeats(records: Sequence[ImageRecord]) -> list[int]:
    """Return each record's repeats, those of regularization pictures changed to add up to the training pictures'.

    That holds for each data set by itself. sd-scripts' method: they are taken in order until there are enough; the rest
    is not used; if there are too few, the repeats are raised one by one, round and round. (sd-scripts may end a few
    samples above; here the last one is cut.)

    Raises:
        UserError: no training pictures, in all or beside the regularization pictures of a data set.
    """
    repeats = [0 if record.is_prior or record.is_validation else record.repeats for record in records]
    if not any(repeats):
        raise UserError(
            f"there are no pictures to train on (of {len(records)}, regularization pictures and those held out for "
            "validation do not count); give a folder with training pictures, or hold out fewer."
        )
    for dataset in dict.fromkeys(record.dataset for record in records):
        own = [i for i, record in enumerate(records) if record.dataset == dataset]
        missing = sum(repeats[i] for i in own)
        priors = [i for i in own if records[i].is_prior and not records[i].is_validation]
        if priors and not missing:
            raise UserError(
                f"data set {dataset + 1} holds {len(priors)} regularization pictures and none to train on, but they "
                "are balanced against those of their own data set; put them beside what they belong to."
            )
        for i in priors:
            repeats[i] = min(records[i].repeats, missing)
            missing -= repeats[i]
        for number, i in enumerate(priors):
            repeats[i] += missing // len(priors) + (number < missing % len(priors))
    return repeats


def _balance_notes(records: Sequence[ImageRecord], repeats: Sequence[int]) -> list[str]:
    priors = [i for i, record in enumerate(records) if record.is_prior and not record.is_validation]
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
def _epoch_units(plan: Plan, epoch: int) -> tuple[_Unit, ...]:
    rng = random.Random(derive(plan.seed, "order", epoch))
    alike: dict[tuple[int, Size], list[int]] = {}
    for record, repeats in enumerate(plan.repeats):
        if repeats:
            alike.setdefault((plan.datasets[record], plan.shapes[record]), []).extend([record] * repeats)
    units: list[_Unit] = []
    for dataset, shape in sorted(alike):
        samples = alike[dataset, shape]
        rng.shuffle(samples)
        places = _by_shards(plan, dataset, samples) if any(plan.shards[i] is not None for i in samples) else samples
        size = plan.unit_sizes[dataset]
        units += [_Unit(dataset, tuple(places[i : i + size])) for i in range(0, len(places), size)]
    rng.shuffle(units)
    return tuple(units)


def _by_shards(plan: Plan, dataset: int, samples: Sequence[int]) -> list[int]:
    """Return the samples in places of those processes that may read them, empty places where one has fewer."""
    own: list[list[int]] = [[] for _ in range(plan.num_processes)]
    num_dealt = 0
    for record in samples:
        shard = plan.shards[record]
        if shard is None:  # of a file that all can read
            shard, num_dealt = num_dealt, num_dealt + 1
        own[shard % plan.num_processes].append(record)
    size = plan.batch_sizes[dataset]
    num_units = max(-(-len(records) // size) for records in own)
    for records in own:
        records += [_EMPTY] * (num_units * size - len(records))
    return [record for i in range(0, num_units * size, size) for records in own for record in records[i : i + size]]
