"""From rules to records: every source is asked, every picture gets its shape and crop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lorasmith import plugins
from lorasmith.data.buckets import CropPlan, bucket_crops, cover_and_crop
from lorasmith.data.faces import FaceDraws, crop_around, face_of
from lorasmith.data.held_out import hold_out
from lorasmith.data.masks import attach
from lorasmith.data.places import source_of
from lorasmith.data.records import ImageRecord, Scan
from lorasmith.data.subsets import DatasetRules, Subset
from lorasmith.errors import UserError
from lorasmith.processes import Processes

_FOR_TABLES = ("image_column", "caption_column", "dataset_split")
_WITHOUT_USE = {  # what says nothing to a source
    "folder": _FOR_TABLES,
    "metadata_json": _FOR_TABLES,
    "webdataset": ("metadata", "recursive", *_FOR_TABLES),
    "huggingface": ("metadata", "recursive", "caption_extension"),
}


@dataclass(frozen=True)
class Gathered:
    """All that is trained on: each record with its crop; the subsets that records follow; sentences for the plan."""

    records: list[ImageRecord]
    crops: list[CropPlan]
    subsets: list[Subset]
    notes: list[str]


def gather(datasets: Sequence[DatasetRules], processes: Processes) -> Gathered:
    """Return the pictures of all data sets; each picture is decoded once, but none is loaded to stay.

    Every process has the same; a picture in a shard is decoded by the one that reads it, and the others are told.

    Raises:
        UserError: a source finds nothing or broken pictures or captions; a shape is impossible; crops around faces are
            asked for, but no picture of the subset tells where one is; masks are wrong; all would be held out.
    """
    everything = Gathered([], [], [], [])
    for number, dataset in enumerate(datasets):
        records: list[ImageRecord] = []
        for subset in dataset.subsets:
            scan = _scan(subset, processes)
            index = len(everything.subsets)
            records += [replace(record, dataset=number, subset=index) for record in scan.records]
            everything.subsets.append(subset)
            everything.notes.extend(scan.notes)
        crops, notes = plan_crops(dataset, everything.subsets, records)
        everything.notes.extend(notes)
        records, notes = _with_masks(everything.subsets, records, crops)
        everything.records.extend(records)
        everything.crops.extend(crops)
        everything.notes.extend(notes)
    everything.records[:], notes = hold_out(everything.records, datasets)
    everything.notes.extend(notes)
    return everything


def _scan(subset: Subset, processes: Processes) -> Scan:
    """Return what the subset's source finds; a source that is read by shard finds each process's share."""
    subset = _with_source(subset)
    source = plugins.find("data.sources", subset.source)
    if "scan_share" not in vars(source):
        scan_subset: Callable[[Subset], Scan] = source.scan_subset
        return scan_subset(subset)
    if processes.count > 1 and (subset.masks is not None or subset.alpha_mask):
        raise UserError(
            f"masks are read by every process, but the pictures of {subset.place} lie in shards, each read by one; "
            "leave out masks and alpha_mask, start one process, or unpack the shards into folders."
        )
    scan_share: Callable[[Subset, int, int], Scan] = source.scan_share
    with processes.together():
        own = scan_share(subset, processes.index, processes.count)
    return _joined(subset, own, processes)


def _with_source(subset: Subset) -> Subset:
    source = subset.source
    if source == "auto":
        source = "metadata_json" if subset.metadata is not None else source_of(subset.place)
    defaults = Subset()
    given = [name for name in _WITHOUT_USE.get(source, ()) if getattr(subset, name) != getattr(defaults, name)]
    if given:
        raise UserError(
            f"{' and '.join('captions' if name == 'metadata' else name for name in given)} can do nothing for "
            f"{subset.place}, which is read as {source}; leave it out, or say with --source what the pictures lie in."
        )
    if source == "metadata_json" and subset.metadata is None:
        raise UserError(f"{subset.place} is to be read as metadata_json, but no metadata file is given (--captions).")
    return replace(subset, source=source)


def _joined(subset: Subset, own: Scan, processes: Processes) -> Scan:
    """Return the shares of all processes in the order of the shards; only one's own pictures can be read."""
    shares = processes.gather(replace(own, records=[replace(record, data=None) for record in own.records]))
    if any(share.shards != own.shards for share in shares):
        raise UserError(
            f"the processes see different shards in {subset.place}: "
            f"{', '.join(f'process {i} has {len(share.shards)}' for i, share in enumerate(shares))}. Where not every "
            "machine holds all of them, a pattern must name them all, as in shards/set-{000..099}.tar."
        )
    shares[processes.index] = own
    records = [record for share in shares for record in share.records]
    notes = [f"process {i}: {note}" for i, share in enumerate(shares) for note in share.notes]
    return Scan(
        sorted(records, key=lambda record: record.shard or 0), own.notes if len(shares) == 1 else notes, own.shards
    )


def plan_crops(
    dataset: DatasetRules, subsets: Sequence[Subset], records: Sequence[ImageRecord]
) -> tuple[list[CropPlan], list[str]]:
    """Return how each picture of a data set is brought to its shape, and notes on crops around faces.

    Raises:
        UserError: as `gather`, of shapes and faces.
    """
    if dataset.buckets is None:
        crops = [cover_and_crop(record.size, dataset.resolution) for record in records]
    else:
        crops = bucket_crops(records, dataset.buckets)
    return _around_faces(subsets, records, crops)


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
