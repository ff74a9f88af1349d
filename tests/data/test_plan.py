"""The plan: what must hold for any records, shapes and batch sizes."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.data.plan import MicroBatch, Plan, Sample, balanced_repeats, build_plan
from lorasmith.data.records import ImageRecord
from lorasmith.errors import UserError

SHAPES = [(512, 512), (448, 576), (576, 448)]


def make_records(repeats: Sequence[int], prior_repeats: Sequence[int] = ()) -> list[ImageRecord]:
    train = [ImageRecord(Path(f"{i}.png"), "", (64, 64), n) for i, n in enumerate(repeats)]
    return train + [ImageRecord(Path(f"r{i}.png"), "", (64, 64), n, is_prior=True) for i, n in enumerate(prior_repeats)]


@st.composite
def plans(draw: st.DrawFn, num_processes: int | None = None, *, has_shards: bool | None = None) -> Plan:
    """Plans of one or two data sets, some of whose pictures may lie in shards."""
    num_processes = num_processes or draw(st.integers(1, 3))
    datasets = [
        make_records(
            draw(st.lists(st.integers(1, 4), min_size=1, max_size=8)), draw(st.lists(st.integers(1, 4), max_size=5))
        )
        for _ in range(draw(st.integers(1, 2)))
    ]
    records = [replace(record, dataset=number) for number, dataset in enumerate(datasets) for record in dataset]
    if draw(st.booleans()) if has_shards is None else has_shards:
        shards = st.none() | st.integers(0, 4)
        records = [replace(record, shard=draw(shards)) for record in records]
        records.append(ImageRecord(Path("for-all.png"), "", (64, 64), 1))  # so that no process is without any
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=len(records), max_size=len(records)))
    return build_plan(
        records,
        shapes,
        batch_sizes=[draw(st.integers(1, 4)) for _ in datasets],
        num_processes=num_processes,
        gradient_accumulation=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**40)),
    )


def of_all_processes(plan: Plan, step: int) -> list[list[MicroBatch]]:
    return [plan.step(step, process) for process in range(plan.num_processes)]


def real_samples(micro_batches: Sequence[MicroBatch]) -> list[Sample]:
    return [s for m in micro_batches for s, is_padding in zip(m.samples, m.is_padding, strict=True) if not is_padding]


def all_real(plan: Plan, step: int) -> list[Sample]:
    return [sample for batches in of_all_processes(plan, step) for sample in real_samples(batches)]


@given(plans(), st.integers(0, 3))
def test_an_epoch_holds_every_record_as_often_as_it_repeats(plan: Plan, epoch: int) -> None:
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    samples = [sample for step in steps for sample in all_real(plan, step)]
    counts = Counter(sample.record for sample in samples)
    assert [counts[record] for record in range(len(plan.repeats))] == list(plan.repeats)
    assert len(samples) == plan.num_samples_per_epoch == sum(plan.samples_per_shape().values())
    assert all(sample.epoch == epoch == plan.epoch_of(step) for step in steps for sample in all_real(plan, step))


@given(plans(), st.integers(0, 40))
def test_a_unit_has_one_shape_and_every_process_the_same_number_of_units(plan: Plan, step: int) -> None:
    processes = of_all_processes(plan, step)
    assert len({len(batches) for batches in processes}) == 1
    assert 1 <= len(processes[0]) <= plan.gradient_accumulation
    for unit in zip(*processes, strict=True):
        real = [sample.record for sample in real_samples(unit)]
        assert len({(plan.shapes[record], plan.datasets[record]) for record in real}) == 1
        for micro_batch in unit:
            assert 1 <= len(micro_batch.samples) <= plan.batch_sizes[plan.datasets[real[0]]]
            assert {plan.shapes[sample.record] for sample in micro_batch.samples} == {micro_batch.shape}
            assert micro_batch.is_padding in ((False,) * len(micro_batch.samples), (True,))


@given(plans(), st.integers(0, 40))
def test_indexes_in_a_step_are_distinct_and_its_samples_are_counted(plan: Plan, step: int) -> None:
    indexes = [sample.index for sample in all_real(plan, step)]
    assert len(set(indexes)) == len(indexes) == plan.num_samples(step)
    assert all(0 <= index < max(plan.unit_sizes) * plan.gradient_accumulation for index in indexes)


@given(plans(has_shards=True), st.integers(0, 40))
def test_a_shard_is_read_by_one_process(plan: Plan, step: int) -> None:
    for process, batches in enumerate(of_all_processes(plan, step)):
        for sample in (sample for micro_batch in batches for sample in micro_batch.samples):
            shard = plan.shards[sample.record]
            assert shard is None or shard % plan.num_processes == process
            assert plan.reads(sample.record, process)


def test_a_process_without_a_shard_is_an_error() -> None:
    records = [ImageRecord(Path(f"{i}.png"), "", (64, 64), shard=i % 2) for i in range(4)]
    with pytest.raises(UserError, match="3 processes share 2 shards, so process 2 has none to read; start fewer"):
        build_plan(records, [SHAPES[0]] * 4, batch_sizes=[1], num_processes=3, gradient_accumulation=1, seed=0)


def test_regularization_alone_in_its_data_set_is_an_error() -> None:
    records = make_records([1], [1])
    records[1] = replace(records[1], dataset=1)
    with pytest.raises(UserError, match="data set 2 holds 1 regularization pictures and none to train on"):
        balanced_repeats(records)


@given(plans(num_processes=1, has_shards=False), st.integers(2, 3), st.integers(0, 40))
def test_n_processes_of_batch_1_are_one_of_batch_n(plan: Plan, n: int, step: int) -> None:
    common = {"gradient_accumulation": plan.gradient_accumulation, "seed": plan.seed}
    used = [i for i, repeats in enumerate(plan.repeats) if repeats]
    records = [ImageRecord(Path(f"{i}.png"), "", (64, 64), plan.repeats[i], dataset=plan.datasets[i]) for i in used]
    shapes = [plan.shapes[i] for i in used]
    one = build_plan(records, shapes, batch_sizes=[n, 2 * n], num_processes=1, **common)
    many = build_plan(records, shapes, batch_sizes=[1, 2], num_processes=n, **common)
    assert (one.steps_per_epoch, one.units_per_epoch) == (many.steps_per_epoch, many.units_per_epoch)
    # the same samples, with the same indexes, in the same units
    for number, whole in enumerate(one.step(step, 0)):
        parts = [batches[number] for batches in of_all_processes(many, step)]
        assert real_samples([whole]) == real_samples(parts)
        assert {part.shape for part in parts} == {whole.shape}


@given(plans(), st.permutations(range(12)))
def test_a_step_depends_on_nothing_but_its_number(plan: Plan, order: list[int]) -> None:
    in_order = {step: of_all_processes(plan, step) for step in range(12)}
    twin = replace(plan)
    assert {step: of_all_processes(twin, step) for step in order} == in_order


@settings(max_examples=20)
@given(st.integers(0, 2**60), st.integers(0, 2**60))
def test_the_seed_and_the_epoch_change_the_order(seed: int, other: int) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        plan = build_plan(
            make_records([1] * 40),
            [SHAPES[0]] * 40,
            batch_sizes=[1],
            num_processes=1,
            gradient_accumulation=1,
            seed=seed,
        )
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        return [all_real(plan, step)[0].record for step in steps]

    assert order(seed, 0) == order(seed, 0)
    assert order(seed, 0) != order(seed, 1)
    assert (order(seed, 0) == order(other, 0)) == (seed == other)


def test_shapes_are_mixed_and_neighbours_change_from_epoch_to_epoch() -> None:
    plan = build_plan(
        make_records([1] * 40),
        [SHAPES[0]] * 20 + [SHAPES[1]] * 20,
        batch_sizes=[2],
        num_processes=1,
        gradient_accumulation=1,
        seed=0,
    )
    shapes = [plan.step(step, 0)[0].shape for step in range(20)]
    assert sum(a != b for a, b in itertools.pairwise(shapes)) > 3
    pairs = [
        {frozenset(sample.record for sample in all_real(plan, step)) for step in range(first, first + 20)}
        for first in (0, 20)
    ]
    assert len(pairs[0] & pairs[1]) < 8


def sd_scripts_balance(num_train: int, reg_repeats: list[int]) -> list[int]:
    """The loop of sd-scripts' DreamBoothDataset, on bare numbers."""
    repeats, n, is_first = [0] * len(reg_repeats), 0, True
    while n < num_train:
        for i, given_repeats in enumerate(reg_repeats):
            repeats[i] += given_repeats if is_first else 1
            n += given_repeats if is_first else 1
            if n >= num_train:
                break
        is_first = False
    return repeats


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_regularization_adds_up_to_the_training_pictures(repeats: list[int], prior_repeats: list[int]) -> None:
    balanced = balanced_repeats(make_records(repeats, prior_repeats))
    theirs = sd_scripts_balance(sum(repeats), prior_repeats)
    assert balanced[: len(repeats)] == repeats
    ours = balanced[len(repeats) :]
    assert sum(ours) == sum(repeats)
    surplus = sum(theirs) - sum(ours)  # theirs may run over with the last picture taken
    last = max(i for i, n in enumerate(theirs) if n)
    assert ours == [n - surplus if i == last and surplus else n for i, n in enumerate(theirs)]


@pytest.mark.parametrize(
    "repeats, prior_repeats, expected",
    [
        ([2], [1, 1, 1, 1], "4 pictures make 2 samples an epoch, as many as the training pictures; 2 of them are too"),
        ([9], [1, 1], "2 pictures make 9 samples an epoch, as many as the training pictures; their repeats were"),
        ([2], [1, 1], "2 pictures make 2 samples an epoch, as many as the training pictures"),
    ],
)
def test_the_balance_is_said_in_the_plan(repeats: list[int], prior_repeats: list[int], expected: str) -> None:
    records = make_records(repeats, prior_repeats)
    plan = build_plan(
        records, [SHAPES[0]] * len(records), batch_sizes=[1], num_processes=1, gradient_accumulation=1, seed=0
    )
    assert len(plan.notes) == 1 and expected in plan.notes[0]


def test_the_figures_of_an_epoch() -> None:
    # 5 + 2 samples in units of 2: 3 + 1 units, in steps of 3 units: 2 steps, the last of 1 unit
    records = make_records([5, 2])
    plan = build_plan(records, SHAPES[:2], batch_sizes=[1], num_processes=2, gradient_accumulation=3, seed=0)
    assert (plan.num_samples_per_epoch, plan.units_per_epoch, plan.steps_per_epoch) == (7, 4, 2)
    assert [len(plan.step(step, 0)) for step in range(4)] == [3, 1, 3, 1]
    assert [plan.epoch_of(step) for step in range(4)] == [0, 0, 1, 1]


@pytest.mark.parametrize("records", [[], make_records([], [1, 2])])
def test_nothing_to_train_on_is_an_error(records: list[ImageRecord]) -> None:
    with pytest.raises(UserError, match="no pictures to train on"):
        build_plan(
            records, [SHAPES[0]] * len(records), batch_sizes=[1], num_processes=1, gradient_accumulation=1, seed=0
        )
