"""Data sets of the Hugging Face library `datasets`: an imagefolder, parquet files, a saved set, or a hub id.

Rows are read one at a time from memory-mapped Arrow files, so pictures stay on the disk. Which files and splits a
folder holds, and where that library keeps its own copy of them, is its matter (HF_DATASETS_CACHE).
"""

import difflib
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from lorasmith.data.caption_files import chosen_lines
from lorasmith.data.images import probe_all, require_folder
from lorasmith.data.metadata_files import Entry
from lorasmith.data.places import is_hub_id
from lorasmith.data.records import ImageRecord, Scan
from lorasmith.data.subsets import Subset
from lorasmith.errors import UserError

_CAPTION_NAMES = ("text", "caption", "prompt")
_TAGS = "tags"
_BINARY = ("binary", "large_binary")
_TEXT = ("string", "large_string")
_NUM_LISTED = 20
_LOADERS = {".parquet": "parquet", ".arrow": "arrow"}


@dataclass(frozen=True)
class Row:
    """The picture in one row of a data set: its bytes, or a file that it names."""

    rows: Any  # a datasets.Dataset whose column of pictures is not decoded
    column: str
    index: int

    def read(self) -> bytes:
        """Return the bytes of the picture. OSError: there are none."""
        value = self.rows[self.index][self.column]
        if value is None or (value["bytes"] is None and not value["path"]):
            raise OSError("the row holds no picture")
        if value["bytes"] is not None:
            return value["bytes"]
        if "://" in value["path"]:
            raise OSError(f"the row names {value['path']}, and nothing is downloaded; store the picture itself")
        return Path(value["path"]).read_bytes()


def scan_subset(subset: Subset) -> Scan:
    """Return the pictures of a data set in the order of its rows, each decoded once.

    Raises:
        UserError: the library `datasets` is not installed; it cannot load what was given; the columns of pictures or
            captions are unclear; captions are missing; unreadable pictures.
    """
    datasets = _library()
    rows = _load(datasets, subset)
    if not len(rows):
        raise UserError(f"the data set {subset.place} has no rows; give one with pictures.")
    image = _image_column(datasets, rows.features, subset)
    columns = _caption_columns(datasets, rows.features, subset, image)
    texts, num_cut = _texts(datasets, rows, columns, all_lines=subset.captions.wildcards)
    _refuse_missing(rows, texts, columns, subset)
    pictures = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    places = _places(Path(subset.place), pictures, image)
    probed, probe_notes = probe_all(
        places,
        skip_unreadable=subset.skip_unreadable,
        data={place: Row(pictures, image, index) for index, place in enumerate(places)},
    )
    group = Path(subset.place).resolve().name
    records = [
        ImageRecord(
            place,
            text or subset.caption or "",
            probed[place][0],
            subset.repeats,
            subset.is_prior,
            group,
            probed[place][1],
            data=Row(pictures, image, index),
        )
        for index, (place, text) in enumerate(zip(places, texts, strict=True))
        if place in probed
    ]
    return Scan(records, [*_notes(rows.features, image, columns, texts, num_cut, subset), *probe_notes])


# ---- loading -------------------------------------------------------------------------------------------------------


def _library() -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise UserError(
            "Hugging Face data sets need the Python package `datasets`, which is not installed: "
            "pip install 'lorasmith[datasets]'"
        ) from error
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it says as it fails is told by our own message
    importlib.import_module("huggingface_hub").logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def _load(datasets: Any, subset: Subset) -> Any:
    """Return the rows of a split."""
    place, path, split = subset.place, Path(subset.place), subset.dataset_split
    is_local = path.exists()
    if not is_local and not is_hub_id(place):
        require_folder(path)
    try:
        if not is_local:
            return datasets.load_dataset(path.as_posix(), split=split)
        if path.is_file():
            return datasets.load_dataset(_LOADERS.get(path.suffix.lower(), ""), data_files=str(path), split=split)
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _saved(datasets.load_from_disk(str(path)), subset)
        return datasets.load_dataset(str(path.resolve()), split=split)
    except UserError:
        raise
    except Exception as error:  # whatever its readers of many formats raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if "Unknown split" in reason:
            raise UserError(f"--dataset-split {split}: {place} has no such split. {reason}") from error
        if is_local:
            raise UserError(
                f"{place} cannot be read as a Hugging Face data set ({reason}); expected is a folder with parquet "
                "files, one that save_to_disk wrote, or pictures with a metadata.jsonl or metadata.csv "
                "(file_name, text)."
            ) from error
        raise UserError(
            f"there is no folder {place}, and the Hugging Face hub does not give a data set of that name ({reason}); "
            "check the name and the connection, log in if it is not public (hf auth login), or give the folder of a "
            "copy of it."
        ) from error


def _saved(loaded: Any, subset: Subset) -> Any:
    """Return the split of what save_to_disk wrote; a set without splits is its only one."""
    if not isinstance(loaded, dict):
        return loaded
    if subset.dataset_split not in loaded:
        raise UserError(
            f"--dataset-split {subset.dataset_split}: {subset.place} has no such split; it has {', '.join(loaded)}."
        )
    return loaded[subset.dataset_split]


# ---- columns -------------------------------------------------------------------------------------------------------


def _image_column(datasets: Any, features: Any, subset: Subset) -> str:
    given = subset.image_column
    if given is not None:
        _require_column("--image-column", given, features)
        if not _may_be_pictures(datasets, features[given]):
            raise UserError(
                f"--image-column {given} is of type {_type(features[given])}, but pictures are of type Image, or "
                f"binary, or texts that name files.{_columns(features)}"
            )
        return given
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(found) != 1:
        what = f"{len(found)} columns hold pictures, {', '.join(found)}" if found else "no column is of type Image"
        raise UserError(f"{subset.place}: {what}; name the one to train on with --image-column.{_columns(features)}")
    return found[0]


def _may_be_pictures(datasets: Any, feature: Any) -> bool:
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    is_plain = isinstance(feature, datasets.Value) and feature.dtype in (*_BINARY, *_TEXT)
    return is_plain or isinstance(feature, datasets.Image)


def _caption_columns(datasets: Any, features: Any, subset: Subset, image: str) -> list[str]:
    """Return the column of captions, with that of tags beside a column `caption`; none if there is no such."""
    given = subset.caption_column
    if given is not None:
        _require_column("--caption-column", given, features)
        found = [given]
    else:
        named = [name for name in features if name.lower() in _CAPTION_NAMES and name != image]
        if len(named) > 1:
            raise UserError(
                f"{subset.place}: {' and '.join(named)} may both be the captions; name the one to train on with "
                f"--caption-column.{_columns(features)}"
            )
        tags = [name for name in features if name.lower() == _TAGS and name != image]
        found = [*named, *(tags if not named or named[0].lower() == "caption" else [])]
    for name in found:
        if not (_is_text(datasets, features[name]) or isinstance(features[name], datasets.ClassLabel)):
            raise UserError(
                f"the column {name} is of type {_type(features[name])}, but captions are texts, lists of texts or "
                f"the names of classes; name another with --caption-column.{_columns(features)}"
            )
    if not found and subset.caption is None:
        raise UserError(
            f"{subset.place}: no column is named {', '.join(_CAPTION_NAMES)} or {_TAGS}; name that of the captions "
            f'with --caption-column, or give --caption "your words" for all pictures.{_columns(features)}'
        )
    return found


def _is_text(datasets: Any, feature: Any) -> bool:
    inner = feature.feature if isinstance(feature, (datasets.List, datasets.LargeList)) else feature
    return isinstance(inner, datasets.Value) and inner.dtype in _TEXT


def _require_column(option: str, name: str, features: Any) -> None:
    if name not in features:
        near = difflib.get_close_matches(name, features, n=1)
        hint = f"did you mean {near[0]}?" if near else "take one of these."
        raise UserError(f"{option} {name}: there is no such column; {hint}{_columns(features)}")


def _columns(features: Any) -> str:
    return "".join(f"\n  {name}: {_type(feature)}" for name, feature in features.items())


def _type(feature: Any) -> str:
    if isinstance(feature, dict):
        return f"struct of {', '.join(feature)}"
    if type(feature).__name__ in ("List", "LargeList"):
        return f"list of {_type(feature.feature)}"
    return getattr(feature, "dtype", "") if type(feature).__name__ == "Value" else type(feature).__name__


# ---- captions ------------------------------------------------------------------------------------------------------


def _texts(datasets: Any, rows: Any, columns: Sequence[str], *, all_lines: bool) -> tuple[list[str], int]:
    """Return each row's caption, "" where there is none, and how many have lines that are not used."""
    if not columns:
        return [""] * len(rows), 0
    num_cut, texts = 0, []
    classes = {name: rows.features[name] for name in columns if isinstance(rows.features[name], datasets.ClassLabel)}
    for row in rows.select_columns(list(columns)):
        caption, tags = "", ""
        for column in columns:
            value = row[column]
            if column in classes and value is not None:
                value = classes[column].int2str(value)
            parts = [part for part in (value if isinstance(value, list) else [value]) if part]
            if column.lower() == _TAGS:
                tags = ", ".join(parts)
            else:
                caption, is_cut = chosen_lines("\n".join(parts), all_lines=all_lines)
                num_cut += is_cut
        texts.append(Entry(caption, tags).text)
    return texts, num_cut


def _refuse_missing(rows: Any, texts: Sequence[str], columns: Sequence[str], subset: Subset) -> None:
    missing = [index for index, text in enumerate(texts) if not text]
    if missing and subset.caption is None:
        listed = ", ".join(map(str, missing[:_NUM_LISTED])) + (" and more" if len(missing) > _NUM_LISTED else "")
        raise UserError(
            f"{len(missing)} of {len(rows)} rows have no text in {' or '.join(columns)} (rows {listed}, counted from "
            '0); write it there, or give --caption "your words" for them.'
        )


# ---- rows ----------------------------------------------------------------------------------------------------------


def _places(place: Path, pictures: Any, column: str) -> list[Path]:
    """Return where each picture lies, as it is told of: its row, and the name that the row has for it."""
    names = pictures.flatten().select_columns([f"{column}.path"])
    return [
        place / f"row {index}" / (PureWindowsPath(path).name if (path := row[f"{column}.path"]) else "")
        for index, row in enumerate(names)
    ]


def _notes(
    features: Any, image: str, columns: Sequence[str], texts: Sequence[str], num_cut: int, subset: Subset
) -> list[str]:
    times = "once" if subset.repeats == 1 else f"{subset.repeats} times"
    num_default = sum(not text for text in texts)
    used = [f"{len(texts) - num_default} from {' and '.join(columns)}"] if num_default < len(texts) else []
    used += [f'{num_default} the default, "{subset.caption}"'] if num_default else []
    notes = [
        f"{subset.place} ({subset.dataset_split}): {len(texts)} pictures from the column {image}, each {times} an "
        f"epoch; captions: {', '.join(used)}"
    ]
    if num_cut:
        notes.append(f"only the first line is used of {num_cut} captions")
    left = [name for name in features if name not in (image, *columns)]
    if left:
        notes.append(f"columns that are not used: {', '.join(left)}")
    if subset.caption is not None and not num_default:
        notes.append(f'caption = "{subset.caption}" is not used: every picture has one of its own')
    return notes
