"""What a saved LoRA says of a dataset file: the values of `ss_datasets` and its fellows, in sd-scripts' form."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from lorasmith.data import captions
from lorasmith.data.plan import Plan
from lorasmith.data.records import ImageRecord
from lorasmith.data.subsets import DatasetRules, Subset


def describe(
    datasets: Sequence[DatasetRules], records: Sequence[ImageRecord], plan: Plan, *, shares_captions: bool
) -> dict[str, Any]:
    """Return `datasets`, `dataset_dirs` and `tag_frequency`.

    Args:
        plan: of these records.
        shares_captions: whether names of folders and words of captions may be said.
    """
    described, folders, frequencies, first = [], dict[str, dict[str, int]](), dict[str, dict[str, int]](), 0
    for number, dataset in enumerate(datasets):
        own = [list[ImageRecord]() for _ in dataset.subsets]
        for record in records:
            if record.dataset == number:
                own[record.subset - first].append(record)
        first += len(dataset.subsets)
        pairs = list(zip(dataset.subsets, own, strict=True))
        frequency: dict[str, dict[str, int]] = {}
        for subset, of_subset in pairs if shares_captions else []:
            if not subset.is_prior:
                counted = Counter(tag for one in of_subset for tag in captions.tags(one.caption, subset.captions))
                known = Counter(frequency.get(_label(subset), {}))
                frequency[_label(subset)] = dict(known + counted)
                facts = {"n_repeats": subset.repeats, "img_count": len(of_subset)}
                folders[_unused(_label(subset), folders)] = facts
        frequencies = frequency | frequencies  # a folder in several data sets is counted once
        described.append(
            {
                **_dataset(number, dataset, records, plan),
                "tag_frequency": frequency,
                "subsets": [_subset(*pair, shares_captions=shares_captions) for pair in pairs],
            }
        )
    return {"datasets": described, "dataset_dirs": folders, "tag_frequency": frequencies}


def _dataset(number: int, dataset: DatasetRules, records: Sequence[ImageRecord], plan: Plan) -> dict[str, Any]:
    own = [i for i, record in enumerate(records) if record.dataset == number]
    buckets, shapes = dataset.buckets, Counter[tuple[int, int]]()
    for i in own:
        shapes[plan.shapes[i]] += plan.repeats[i]
    info = {str(i): {"resolution": shape, "count": count} for i, (shape, count) in enumerate(sorted(shapes.items()))}
    return {
        "is_dreambooth": all(subset.metadata is None for subset in dataset.subsets),
        "batch_size_per_device": dataset.batch_size,
        "num_train_images": sum(plan.repeats[i] for i in own if not records[i].is_prior),
        "num_reg_images": sum(plan.repeats[i] for i in own if records[i].is_prior),
        "resolution": dataset.resolution,
        "enable_bucket": buckets is not None,
        "min_bucket_reso": buckets and buckets.min_side,
        "max_bucket_reso": buckets and buckets.max_side,
        "bucket_info": buckets and {"buckets": info},
        "resize_interpolation": None,
    }


def _subset(subset: Subset, records: Sequence[ImageRecord], *, shares_captions: bool) -> dict[str, Any]:
    rules, augmentation = subset.captions, subset.augmentation
    described = {
        "img_count": len(records),
        "num_repeats": subset.repeats,
        "color_aug": augmentation.colour,
        "flip_aug": augmentation.flip,
        "random_crop": augmentation.random_crop,
        "shuffle_caption": rules.shuffle,
        "keep_tokens": rules.keep_tokens,
        "keep_tokens_separator": rules.keep_separator or None,
        "secondary_separator": rules.secondary_separator or None,
        "enable_wildcard": rules.wildcards,
        "resize_interpolation": None,
    }
    if subset.metadata is None:
        described["is_reg"] = subset.is_prior
    if shares_captions:
        described |= {"caption_prefix": rules.prefix or None, "caption_suffix": rules.suffix or None}
        described["image_dir"] = _name(subset.place)
        described |= (
            {"class_tokens": subset.caption}
            if subset.metadata is None
            else {"metadata_file": _name(str(subset.metadata))}
        )
    return described


def _label(subset: Subset) -> str:
    return _name(subset.place if subset.metadata is None else str(subset.metadata))


def _name(place: str) -> str:
    return os.path.basename(os.path.abspath(place))


def _unused(name: str, taken: Iterable[str]) -> str:
    """Return the name, with a number where it is taken, as sd-scripts counts them."""
    numbered = [name, *(f"{name} ({number})" for number in range(2, len(list(taken)) + 3))]
    return next(one for one in numbered if one not in taken)
