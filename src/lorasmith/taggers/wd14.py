"""The WD14 family of taggers (SmilingWolf): `model.onnx` with `selected_tags.csv`, computed by onnxruntime.

The graph takes (N, H, W, 3) floats, blue first, from 0 to 255, of a picture padded to a square on white, and gives a
score from 0 to 1 for each line of the table.
"""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lorasmith.data.tags import CHARACTER, RATING, ScoredTag
from lorasmith.errors import UserError
from lorasmith.hub import model_folder
from lorasmith.taggers.base import TAGS, TaggerOptions

MAKES = TAGS
DEFAULT_MODEL = "SmilingWolf/wd-swinv2-tagger-v3"
_GRAPH, _TABLE = "model.onnx", "selected_tags.csv"
_DEFAULT_SIDE = 448  # where the graph takes any
_CATEGORIES = {0: "general", 1: "artist", 3: "copyright", 4: CHARACTER, 5: "meta", 9: RATING}  # Danbooru's, and 9
_SLACK = 1e-3  # of half-precision graphs, above 1 and below 0
# What `auto` tries, in this order; TensorRT and OpenVINO build engines for minutes, so they have to be asked for.
_QUICK_PROVIDERS = ("CUDA", "ROCM", "MIGraphX", "Dml", "CPU")


def load(options: TaggerOptions) -> "Wd14":
    """Return the tagger of a folder or hub id.

    Raises:
        UserError: it is nowhere, incomplete, of another form, or onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            "taggers need the package onnxruntime: pip install 'lorasmith[tag]' (for NVIDIA GPUs: pip install "
            "onnxruntime-gpu)"
        ) from error
    providers = _providers(options.providers, onnxruntime.get_available_providers())
    folder = model_folder("--model", options.model or DEFAULT_MODEL, (f"{_GRAPH}*", _TABLE), ((_GRAPH,), (_TABLE,)))
    tags = _read_table(folder / _TABLE)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors only
    try:
        session = onnxruntime.InferenceSession(str(folder / _GRAPH), settings, providers=providers)
    except MemoryError:
        raise
    except Exception as error:  # onnxruntime's own kinds, all of them directly below Exception
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder / _GRAPH} cannot be loaded ({reason}); get the model again.") from error
    return Wd14(session, tags, folder, options.lowest_score)


class Wd14:
    """Scores pictures; see `load`."""

    def __init__(self, session: Any, tags: Sequence[tuple[str, str]], folder: Path, lowest_score: float) -> None:
        graph = folder / _GRAPH
        (taken, *others), (given, *_) = session.get_inputs(), session.get_outputs()
        self._batch, height, width, channels = _shape(graph, taken, others)
        if channels not in (3, None) or height != width:
            raise UserError(
                f"{graph} takes {taken.shape}; expected (N, H, H, 3), as the WD14 family has it. Taggers of other "
                "families need a module of their own (--tagger my.module)."
            )
        if len(given.shape) == 2 and isinstance(given.shape[1], int):
            _check_length(folder, given.shape[1], len(tags))
        self._session, self._name, self._side = session, taken.name, height or _DEFAULT_SIDE
        self._folder, self._tags, self._lowest = folder, tags, lowest_score
        self._is_rating = np.array([category == RATING for _, category in tags])

    def __call__(self, images: Sequence[Image.Image]) -> list[list[ScoredTag]]:
        pixels = np.stack([prepare(image, self._side) for image in images])
        return [self._scored(row) for row in self._scores(pixels)]

    def _scores(self, pixels: np.ndarray) -> np.ndarray:  # (N, H, W, 3) -> (N, tags)
        size = self._batch or len(pixels)
        found = []
        for begin in range(0, len(pixels), size):
            part = pixels[begin : begin + size]
            filled = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)])
            found.append(self._session.run(None, {self._name: filled})[0][: len(part)])
        scores = np.concatenate(found)
        if scores.ndim != 2:
            raise UserError(f"{self._folder / _GRAPH} gives {scores.shape}; expected (N, number of tags).")
        _check_length(self._folder, scores.shape[1], len(self._tags))
        if not (scores.min() >= -_SLACK and scores.max() <= 1 + _SLACK):
            raise UserError(
                f"{self._folder / _GRAPH} gives scores from {scores.min():.3g} to {scores.max():.3g}, expected from 0 "
                "to 1; give a model of the WD14 family, which ends with a sigmoid."
            )
        return scores

    def _scored(self, row: np.ndarray) -> list[ScoredTag]:
        places: list[int] = np.flatnonzero((row >= self._lowest) | self._is_rating).tolist()
        return [ScoredTag(*self._tags[place], float(row[place])) for place in places]


def prepare(image: Image.Image, side: int) -> np.ndarray:
    """Return a picture as the family was trained: (side, side, 3) float32, blue first, 0 to 255, padded with white."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), "white")
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    if longest != side:
        square = square.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(square, dtype=np.float32)[:, :, ::-1]


def _shape(graph: Path, taken: Any, others: Sequence[Any]) -> tuple[int | None, ...]:
    """Return the numbers of (N, H, W, C) that a graph's input fixes; None where it takes any."""
    if others or taken.type != "tensor(float)" or len(taken.shape) != 4:
        raise UserError(
            f"{graph} takes {[one.name for one in [taken, *others]]} of {taken.type}, {taken.shape}; expected one "
            "tensor of floats, (N, H, H, 3), as the WD14 family has it."
        )
    return tuple(size if isinstance(size, int) and size > 0 else None for size in taken.shape)


def _check_length(folder: Path, num_scores: int, num_tags: int) -> None:
    if num_scores != num_tags:
        raise UserError(
            f"{folder / _TABLE} lists {num_tags} tags, but {_GRAPH} beside it gives {num_scores} scores; they are not "
            "of one model: get both again from the same place."
        )


def _read_table(path: Path) -> list[tuple[str, str]]:
    """Return (tag, category) of each line, in the order of the scores."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file)
            if not {"name", "category"} <= set(lines.fieldnames or ()):
                raise UserError(
                    f"{path}: expected a table with the columns tag_id, name, category, count; its first line is "
                    f"{', '.join(lines.fieldnames or ())[:80] or 'empty'}."
                )
            return [_tag(path, lines.line_num, line) for line in lines]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no table in UTF-8 ({error}); get the model again.") from error


def _tag(path: Path, number: int, line: dict[str, str | None]) -> tuple[str, str]:
    name, category = line["name"], line["category"]
    if not name or not category or not category.strip().isdigit():
        raise UserError(f"{path}, line {number}: expected a name and a category such as 0 or 4, found {line}.")
    return name, _CATEGORIES.get(int(category), category)


def _providers(asked: str, here: Sequence[str]) -> list[Any]:
    """Return onnxruntime's execution providers for `auto` or a list with commas such as `cuda,cpu`."""
    known = {name.removesuffix("ExecutionProvider").lower(): name for name in here}
    if asked.strip().lower() == "auto":
        names = [name.lower() for name in _QUICK_PROVIDERS if name.lower() in known]
    else:
        names = [name.strip().removesuffix("ExecutionProvider").lower() for name in asked.split(",") if name.strip()]
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise UserError(
                f"--providers {asked}: expected auto or some of {', '.join(known)}, which the installed onnxruntime "
                "has. CUDA comes with onnxruntime-gpu."
            )
    gpu = {"device_id": os.environ.get("LOCAL_RANK", "0")}  # of several processes each has its own
    return [(known[name], gpu) if name in ("cuda", "rocm") else known[name] for name in names]
