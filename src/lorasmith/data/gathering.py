"""From rules to records: every source is asked, every picture gets its shape and crop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lorasmith import plugins
from lorasmith.data.buckets import CropPlan, bucket_crops, cover_and_crop
from lorasmith.data.faces import FaceDraws, crop_around, face_of
from lorasmith.data.held_out import hold_out
from lorasmith.data.masks import attach
from lorasmith.data.records import ImageRecord, Scan
from lorasmith.data.subsets import DatasetRules, Subset
from lorasmith.errors import UserError


@dataclass(frozen=True)
class Gathered:
    """All that is trained on: each record with its crop; the subsets that records follow; sentences for the plan."""

    records: list[ImageRecord]
    crops: list[CropPlan]
    subsets: list[Subset]
    notes: list[str]


def gather(datasets: Sequence[DatasetRules]) -> Gathered:
    """Return the pictures of all data sets; each picture is decoded once, but none is loaded to stay.

    Raises:
        UserError: a source finds nothing or broken pictures or captions; a shape is impossible; crops around faces are
            asked for, but no picture of the subset tells where one is; masks are wrong; all would be held out.
    """
    everything = Gathered([], [], [], [])
    for number, dataset in enumerate(datasets):
        records: list[ImageRecord] = []
        for subset in dataset.subsets:
            scan_subset: Callable[[Subset], Scan] = plugins.find("data.sources", subset.source).scan_subset
            scan = scan_subset(subset)
            index = len(everything.subsets)
            records += [replace(record, dataset=number, subset=index) for record in scan.records]
            everything.subsets.append(subset)
            everything.notes.extend(scan.notes)
        crops, notes = _around_faces(everything.subsets, records, _crops(dataset, records))
        everything.notes.extend(notes)
        records, notes = _with_masks(everything.subsets, records, crops)
        everything.records.extend(records)
        everything.crops.extend(crops)
        everything.notes.extend(notes)
    everything.records[:], notes = hold_out(everything.records, datasets)
    everything.notes.extend(notes)
    return everything


def _crops(dataset: DatasetRules, records: Sequence[ImageRecord]) -> list[CropPlan]:
    if dataset.buckets is None:
        return [cover_and_crop(record.size, dataset.resolution) for record in records]
    return bucket_crops(records, dataset.buckets)


def _with_masks(
    subsets: Sequence[Subset], records: Sequence[ImageRecord], crops: Sequence[CropPlan]
) -> tuple[list[ImageRecord], list[str]]:
    """Return the records with the masks that their subsets tell of, and notes on these."""
    masked, notes = list(records), []
    for index in dict.fromkeys(record.subset for record in records):
        own = [number for number, record in enumerate(records) if record.subset == index]
        found, own_notes = attach(subsets[index], [records[i] for i in own], [crops[i] for i in own])
        for number, record in zip(own, found, strict=True):
            masked[number] = record
        notes += own_notes
    return masked, notes


def _around_faces(
    subsets: Sequence[Subset], records: Sequence[ImageRecord], crops: Sequence[CropPlan]
) -> tuple[list[CropPlan], list[str]]:
    """Return the crops, those of pictures with a face around it if nothing about that is random, and notes on it."""
    around, notes = list(crops), []
    still = FaceDraws(0.0, (0.0, 0.0), (0.0, 0.0))
    for index in dict.fromkeys(record.subset for record in records):
        portions = subsets[index].augmentation.face_portions
        if portions is None:
            continue
        own = [number for number, record in enumerate(records) if record.subset == index]
        faces = {number: face for number in own if (face := face_of(records[number].path)) is not None}
        if not faces:
            raise UserError(
                "face_crop_aug_range crops around faces, but no picture's name ends with the middle and size of one in "
                f"pixels, as in name_300_200_64_80.png (the first is {records[own[0]].path.name}); rename them, or "
                "leave it out."
            )
        is_still = subsets[index].augmentation.has_still_faces
        if is_still:
            for number, face in faces.items():
                around[number] = crop_around(face, records[number].size, crops[number].shape, portions, still)
        how = "" if is_still else ", differently each time"
        notes.append(f"cropped around a face{how}: {len(faces)} of {len(own)}")
    return around, notes
