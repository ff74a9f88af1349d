"""What is said of data sets adds up to the plan, and says no words where none are to be shared."""

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from lorasmith.data import dataset_metadata
from lorasmith.data.plan import build_plan
from lorasmith.data.records import ImageRecord
from lorasmith.data.subsets import DatasetRules, Subset

subsets = st.builds(
    Subset,
    place=st.sampled_from(["photos/cat", "old/cat", "dog"]),
    metadata=st.sampled_from([None, Path("words/meta.json")]),
    repeats=st.integers(1, 3),
    caption=st.just("secret"),
    is_prior=st.just(False),
)
counts = st.integers(1, 3)


@given(
    datasets=st.lists(
        st.lists(st.tuples(subsets, counts, st.booleans()), min_size=1, max_size=3), min_size=1, max_size=3
    )
)
def test_counts_are_those_of_the_plan(datasets: list[list[tuple[Subset, int, bool]]]) -> None:
    rules, records = [], []
    for number, dataset in enumerate(datasets):
        own = [Subset(place=f"reg{i}", is_prior=True) if i and is_prior else subset
               for i, (subset, _, is_prior) in enumerate(dataset)]  # fmt: skip
        first = sum(len(one.subsets) for one in rules)
        rules.append(DatasetRules(tuple(own), (512, 512), None, number + 1))
        for i, (subset, (_, count, _)) in enumerate(zip(own, dataset, strict=True)):
            records += [
                ImageRecord(Path(f"{n}.png"), f"secret, tag {n}", (9, 9), subset.repeats, subset.is_prior,
                            dataset=number, subset=first + i)
                for n in range(count)
            ]  # fmt: skip
    plan = build_plan(
        records,
        [(512, 512)] * len(records),
        batch_sizes=[one.batch_size for one in rules],
        num_processes=1,
        gradient_accumulation=1,
        seed=0,
    )
    said = dataset_metadata.describe(rules, records, plan, shares_captions=True)
    samples = sum(one["num_train_images"] + one["num_reg_images"] for one in said["datasets"])
    assert samples == plan.num_samples_per_epoch
    assert [len(one["subsets"]) for one in said["datasets"]] == [len(one.subsets) for one in rules]
    assert sum(subset["img_count"] for one in said["datasets"] for subset in one["subsets"]) == len(records)
    trained = [record for record in records if not record.is_prior]
    assert sum(one["img_count"] for one in said["dataset_dirs"].values()) == len(trained)
    assert len(said["dataset_dirs"]) == sum(not subset.is_prior for one in rules for subset in one.subsets)
    for one in said["datasets"]:
        assert all(said["tag_frequency"].keys() >= one["tag_frequency"].keys() for one in said["datasets"])
        assert sum(tags["secret"] for tags in one["tag_frequency"].values()) == sum(
            subset["img_count"] for subset in one["subsets"] if not subset.get("is_reg")
        )
    hidden = json.dumps(dataset_metadata.describe(rules, records, plan, shares_captions=False))
    assert not any(word in hidden for word in ("secret", "cat", "dog", "meta.json", "reg0", "reg1", "tag "))
