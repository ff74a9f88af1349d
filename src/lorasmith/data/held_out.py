"""Validation pictures: a share of each data set that is held out, so that no picture is both trained and validated."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from lorasmith.data.records import ImageRecord
from lorasmith.data.subsets import DatasetRules
from lorasmith.errors import UserError


def hold_out(records: Sequence[ImageRecord], datasets: Sequence[DatasetRules]) -> tuple[list[ImageRecord], list[str]]:
    """Return the records with those of validation pictures marked, and a note on each data set that has some.

    The choice follows from each picture's content and the data set's seed alone: neither names, order, folders nor
    other pictures change it, and all copies of a picture, in any data set and among the regularization pictures, are on
    the same side. Of n different training pictures `validation_split * n` are held out, rounded, and at least one.

    Raises:
        UserError: none would be left to train on.
    """
    held_out: set[str] = set()
    for number, dataset in enumerate(datasets):
        if not dataset.validation_split:
            continue
        own = {record.content_hash for record in records if record.dataset == number and not record.is_prior}
        count = max(1, round(dataset.validation_split * len(own)))
        if count >= len(own):
            raise UserError(
                f"validation_split = {dataset.validation_split:g} of {len(own)} different pictures in data set "
                f"{number + 1} leaves none to train on; lower it, or give more pictures."
            )
        held_out.update(sorted(own, key=lambda content: _score(dataset.validation_seed, content))[:count])
    marked = [replace(record, is_validation=record.content_hash in held_out) for record in records]
    return marked, _notes(marked)


def _score(seed: int, content_hash: str) -> bytes:
    return hashlib.sha256(f"{seed} {content_hash}".encode()).digest()


def _notes(records: Sequence[ImageRecord]) -> list[str]:
    validated = [record for record in records if record.is_validation and not record.is_prior]
    if not validated:
        return []
    total = sum(not record.is_prior for record in records)
    priors = sum(record.is_validation and record.is_prior for record in records)
    copies = f"; {priors} regularization pictures are copies of these and are not used" if priors else ""
    names = ", ".join(record.path.name for record in validated[:3]) + (
        f" and {len(validated) - 3} more" if len(validated) > 3 else ""
    )
    return [f"held out for validation, never trained on: {len(validated)} of {total} ({names}){copies}"]
