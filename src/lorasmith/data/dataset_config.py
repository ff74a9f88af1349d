"""Dataset files: sd-scripts' TOML or JSON of data sets and subsets, read strictly into rules.

    [general]                 for all data sets
    [[datasets]]              pictures that share shapes and batch size
    [[datasets.subsets]]      a folder of pictures, and what becomes of them and of their captions

What a subset does not say is taken from its data set, then from [general], then from the command line. A key for which
there is an option there takes the same values. docs/dataset-config.md tells users; its table is made from `KEYS`.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from lorasmith import config, plugins
from lorasmith.config import Option, TrainConfig
from lorasmith.data.buckets import Buckets
from lorasmith.data.subsets import DatasetRules, Subset
from lorasmith.errors import UserError

GENERAL, DATASET, SUBSET = "[general]", "[[datasets]]", "[[datasets.subsets]]"
_SHAPES, _RULES, _PICTURES = (GENERAL, DATASET), (GENERAL, DATASET, SUBSET), (SUBSET,)
_Place = tuple[str | int, ...]  # in nested values: ("datasets", 1, "subsets", 0, "image_dir")
_Rules = TypeVar("_Rules", DatasetRules, Subset)


@dataclass(frozen=True)
class Key:
    """One key of a dataset file.

    levels: the tables it may stand in. target: the field of `DatasetRules` or `Subset` that it fills. option: what says
    the same on the command line; a key that has none says `own_kind` and `own_help`. only: of a key whose feature is
    not there, the values that change nothing; the help says why.
    """

    name: str
    levels: tuple[str, ...]
    target: str = ""
    option: str = ""
    own_kind: str = ""
    own_help: str = ""
    only: tuple[Any, ...] | None = None

    @property
    def kind(self) -> str:
        """Of what type it is, as `config.Option` calls it; or a table."""
        return self.own_kind or _options()[self.option].kind

    @property
    def expected(self) -> str:
        """What may stand there, in words."""
        return _EXPECTED[self.own_kind] if self.own_kind else _options()[self.option].expected

    @property
    def help(self) -> str:
        """What it does, in a sentence."""
        return self.own_help or _options()[self.option].help


@lru_cache(maxsize=1)
def _options() -> dict[str, Option]:
    return {option.name: option for option in config.options(TrainConfig)}


_EXPECTED = {**config.EXPECTED, "table": "a table"}
KEYS = {
    key.name: key
    for key in [
        Key(
            "image_dir", _PICTURES, "place", own_kind="path",
            own_help="The folder of pictures itself. Needed, but not beside `metadata_file`, whose folder it is then.",
        ),
        Key(
            "metadata_file", _PICTURES, "metadata", own_kind="path",
            own_help="Metadata JSON or JSONL with the captions.",
        ),
        Key("is_reg", _PICTURES, "is_prior", own_kind="boolean", own_help="These are regularization pictures."),
        Key("conditioning_data_dir", _PICTURES, "masks", "masks"),
        Key("alpha_mask", _RULES, "alpha_mask", "alpha_mask"),
        Key("num_repeats", _RULES, "repeats", "repeats"),
        Key("class_tokens", _RULES, "caption", "caption"),
        Key("caption_extension", _RULES, "caption_extension", "caption_extension"),
        Key("shuffle_caption", _RULES, "captions.shuffle", "shuffle_caption"),
        Key("caption_separator", _RULES, "captions.separator", "caption_separator"),
        Key("keep_tokens", _RULES, "captions.keep_tokens", "keep_tokens"),
        Key("keep_tokens_separator", _RULES, "captions.keep_separator", "keep_tokens_separator"),
        Key("secondary_separator", _RULES, "captions.secondary_separator", "secondary_separator"),
        Key("enable_wildcard", _RULES, "captions.wildcards", "wildcards"),
        Key("token_warmup_min", _RULES, "captions.token_warmup_min", "token_warmup_min"),
        Key("token_warmup_step", _RULES, "captions.token_warmup_steps", "token_warmup_steps"),
        Key("caption_prefix", _RULES, "captions.prefix", "caption_prefix"),
        Key("caption_suffix", _RULES, "captions.suffix", "caption_suffix"),
        Key("caption_dropout_rate", _RULES, "captions.dropout", "caption_dropout"),
        Key(
            "caption_dropout_every_n_epochs", _RULES, "captions.dropout_every_epochs", "caption_dropout_every_epochs"
        ),
        Key("caption_tag_dropout_rate", _RULES, "captions.tag_dropout", "tag_dropout"),
        Key("color_aug", _RULES, "augmentation.colour", "color"),
        Key("flip_aug", _RULES, "augmentation.flip", "flip"),
        Key("random_crop", _RULES, "augmentation.random_crop", "random_crop"),
        Key("face_crop_aug_range", _RULES, "augmentation.face_portions", "face_crop_aug_range"),
        Key("recursive", _RULES, "recursive", "recursive"),
        Key("alpha_color", _RULES, "alpha_color", "alpha_color"),
        Key("source", _RULES, "source", "source"),
        Key("image_column", _RULES, "image_column", "image_column"),
        Key("caption_column", _RULES, "caption_column", "caption_column"),
        Key("dataset_split", _RULES, "dataset_split", "dataset_split"),
        Key("batch_size", _SHAPES, "batch_size", "batch_size"),
        Key("resolution", _SHAPES, "resolution", "resolution"),
        Key("enable_bucket", _SHAPES, "", "buckets"),
        Key("min_bucket_reso", _SHAPES, "buckets.min_side", "bucket_min"),
        Key("max_bucket_reso", _SHAPES, "buckets.max_side", "bucket_max"),
        Key("bucket_reso_steps", _SHAPES, "buckets.step", "bucket_step"),
        Key("bucket_no_upscale", _SHAPES, "buckets.no_upscale", "bucket_no_upscale"),
        Key(
            "cache_info", _RULES, own_kind="boolean", only=(True, False),
            own_help="Nothing is written beside the pictures here.",
        ),
        Key(
            "network_multiplier", _SHAPES, own_kind="number", only=(1,),
            own_help="The network is trained at its full strength in every data set.",
        ),
        Key(
            "resize_interpolation", _RULES, own_kind="text", only=("lanczos",),
            own_help="All pictures are resized by Lanczos' filter.",
        ),
        Key(
            "custom_attributes", _RULES, "keeps_output", own_kind="table",
            own_help="With `{diff_output_preservation = true}`, what the base model makes of the pictures is kept "
            "(docs/losses.md).",
        ),
        Key("validation_split", _SHAPES, "validation_split", "validation_split"),
        Key("validation_seed", _SHAPES, "validation_seed", "validation_seed"),
    ]
}  # fmt: skip
_TYPES: dict[str, tuple[type, ...]] = {
    "boolean": (bool,), "integer": (int,), "number": (int, float), "text": (str,), "path": (str,), "color": (str,),
    "size": (int, str, list), "range": (str, list), "table": (dict,),
}  # fmt: skip
_MEANT = {  # names of sd-scripts' command line, where a key is called otherwise
    "train_batch_size": "batch_size", "dataset_repeats": "num_repeats", "train_data_dir": "image_dir",
    "reg_data_dir": "image_dir", "in_json": "metadata_file",
}  # fmt: skip
_KEEPS_OUTPUT = "diff_output_preservation"  # among custom_attributes
_NEEDED = "in that image_dir, a folder of pictures"
_BUCKET_KEYS = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale")
_REPEATS_IN_NAME = re.compile(r"(\d+)_.+")
_NO_FOLDER = re.compile(r"[{}*?\[\]]|\.(tar(\.\w+)?|tgz|tbz2?|txz|tzst|parquet|arrow)$", re.IGNORECASE)
_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class DatasetFile:
    """What a dataset file says, and plain sentences about it for the printed plan."""

    datasets: list[DatasetRules]
    notes: list[str]


def read(path: Path, defaults: DatasetRules, *, buckets: Buckets, root: Path) -> DatasetFile:
    """Return the data sets of a file.

    Args:
        defaults: what the command line says, with one subset; it counts where the file says nothing.
        buckets: those of a data set that turns buckets on and says nothing else of them.
        root: where relative paths start; those that lead nowhere start beside the file.

    Raises:
        UserError: a line for each mistake, with the line of the file.
    """
    return _Reader(_open(path), defaults, buckets, root).read()


class _Reader:
    """Collects all mistakes of one file before telling them."""

    def __init__(self, file: "_File", defaults: DatasetRules, buckets: Buckets, root: Path) -> None:
        self._file, self._defaults, self._buckets, self._root = file, defaults, buckets, root
        self._mistakes: list[tuple[int, str]] = []
        self._notes: dict[str, None] = {}

    def read(self) -> DatasetFile:
        general, tables = self._checked()
        self._tell()
        datasets = [
            self._dataset(number, {**general, **dataset}, subsets) for number, (dataset, subsets) in enumerate(tables)
        ]
        self._tell()
        return DatasetFile(datasets, list(self._notes))

    def _tell(self) -> None:
        if self._mistakes:
            lines = [f"{self._file.path}, line {line}: {message}" for line, message in sorted(self._mistakes)]
            raise UserError("\n".join(lines))

    def _refuse(self, place: _Place, message: str) -> None:
        self._mistakes.append((self._file.line_of(place), message))

    # ---- each value by itself --------------------------------------------------------------------------------------

    def _checked(self) -> tuple[dict[str, Any], list[tuple[dict[str, Any], list[dict[str, Any]]]]]:
        """Return the values of the file, converted: the general ones, and those of each data set with its subsets."""
        given, datasets = self._file.values, []
        for name, value in given.items():
            if name not in ("general", "datasets"):
                self._refuse((name,), _misplaced_at_the_top(name, value))
        general = self._table(("general",), given.get("general", {}), GENERAL)
        for number, dataset in enumerate(self._tables(("datasets",), given.get("datasets", []), DATASET)):
            place = ("datasets", number)
            subsets = dataset.get("subsets", []) if isinstance(dataset, dict) else []
            tables = self._tables((*place, "subsets"), subsets, SUBSET)
            if not subsets:
                self._refuse(place, f"this data set has no subsets; write {SUBSET} below it, and {_NEEDED}")
            datasets.append(
                (
                    self._table(place, dataset, DATASET),
                    [self._table((*place, "subsets", i), subset, SUBSET) for i, subset in enumerate(tables)],
                )
            )
        if not given.get("datasets"):
            self._refuse((), f"there are no data sets; write {DATASET}, below it {SUBSET}, and {_NEEDED}")
        return general, datasets

    def _tables(self, place: _Place, values: Any, level: str) -> Sequence[Any]:
        if isinstance(values, list):
            return values
        self._refuse(place, f"expected a list of tables; write {level} with two brackets on each side")
        return []

    def _table(self, place: _Place, values: Any, level: str) -> dict[str, Any]:
        """Return the values of a table that may stand there, converted."""
        if not isinstance(values, dict):
            self._refuse(place, f"expected a table; write {level}, and its keys in the lines below")
            return {}
        return {
            name: converted
            for name, value in values.items()
            if not (level == DATASET and name == "subsets")
            and (converted := self._value((*place, name), name, value, level)) is not None
        }

    def _value(self, place: _Place, name: str, value: Any, level: str) -> Any:
        key = KEYS.get(name)
        try:
            if key is None:
                raise UserError(_unknown(name))
            if level not in key.levels:
                raise UserError(f"this belongs under {' or '.join(key.levels)}")
            converted = _converted(key, value)
        except UserError as error:
            self._refuse(place, f"{name} = {_shown(value)}: {error}")
            return None
        if key.only is not None:
            self._notes[f"{name} changes nothing: {key.help[0].lower()}{key.help[1:].rstrip('.')}"] = None
        return converted

    # ---- values together -------------------------------------------------------------------------------------------

    def _dataset(self, number: int, values: Mapping[str, Any], subsets: Sequence[Mapping[str, Any]]) -> DatasetRules:
        place, defaults = ("datasets", number), self._defaults
        rules = replace(defaults, subsets=(), buckets=self._buckets)
        rules = _filled(rules, {name: value for name, value in values.items() if _is_shape(name)})
        assert rules.buckets is not None
        buckets = replace(rules.buckets, resolution=rules.resolution)
        if values.get("enable_bucket", defaults.buckets is not None):
            for message in _bucket_mistakes(buckets):
                self._refuse(place, message)
            unused = [name for name in _BUCKET_KEYS[:2] if name in values and buckets.no_upscale]
            self._note_unused(number, unused, "bucket_no_upscale takes shapes from the pictures' own sizes")
        else:
            self._note_unused(number, [name for name in _BUCKET_KEYS if name in values], "enable_bucket is off")
            buckets = None
        built: list[Subset] = []
        for i, own in enumerate(subsets):
            subset = self._subset((*place, "subsets", i), {**values, **own}, own)
            self._compare((*place, "subsets", i), subset, built)
            built.append(subset)
        return replace(rules, buckets=buckets, subsets=tuple(built))

    def _note_unused(self, number: int, names: Sequence[str], reason: str) -> None:
        if names:
            self._notes[f"data set {number + 1}: {' and '.join(names)} not used, since {reason}"] = None

    def _subset(self, place: _Place, values: Mapping[str, Any], own: Mapping[str, Any]) -> Subset:
        rules = {name: value for name, value in values.items() if not _is_shape(name)}
        paths = {name: self._located(place, name, values) for name in own if KEYS[name].kind == "path"}
        defaults = replace(self._defaults.subsets[0], in_dataset_file=True)
        if values.get("is_reg"):  # on the command line, too, masks are for training pictures
            defaults = replace(defaults, masks=None, alpha_mask=False)
        else:
            defaults = replace(defaults, keeps_output=False)
        subset = _filled(defaults, {**rules, **paths})
        if subset.metadata is not None and "source" not in values:
            subset = replace(subset, source="metadata_json")
        if subset.metadata is not None and "image_dir" not in own:
            subset = replace(subset, place=str(subset.metadata.parent))
        for name, message in _subset_mistakes(subset, own).items():
            self._refuse((*place, name) if name in own else place, message)
        self._notes_on(subset, values)
        return subset

    def _located(self, place: _Place, name: str, values: Mapping[str, Any]) -> Any:
        """Return where a path leads, as text for the place of pictures and as path for others."""
        value: str = values[name]
        written, is_file = Path(os.path.expanduser(value)), name == "metadata_file"
        candidates = [self._root / written, self._file.path.parent / written]
        found = next((path for path in candidates if path.exists()), None)
        if name == "image_dir" and not self._is_folder(values):
            return str(found or candidates[0]) if found or _NO_FOLDER.search(value) else value
        what = "file" if is_file else "folder"
        if found is None:
            near = _nearest_path(candidates)
            self._refuse(
                (*place, name), f"{name} = {_shown(value)}: there is no such {what}{_where(candidates)}; {near}"
            )
        elif found.is_file() != is_file:
            self._refuse((*place, name), f"{name} = {_shown(value)}: expected a {what}, but {found} is none")
        elif found is not candidates[0]:
            note = f"{name} = {_shown(value)}: not in {_full(self._root)}, so taken from beside the dataset file"
            self._notes[note] = None
        located = found or written
        return str(located) if name == "image_dir" else located

    def _is_folder(self, values: Mapping[str, Any]) -> bool:
        """Whether image_dir means a folder of pictures, not shards, tables or the name of a data set on the hub."""
        source = values.get("source", self._defaults.subsets[0].source)
        is_plain = source == "auto" and not _NO_FOLDER.search(values.get("image_dir", ""))
        return is_plain or source in ("folder", "metadata_json")

    def _compare(self, place: _Place, subset: Subset, earlier: Iterable[Subset]) -> None:
        """Refuse pictures that are given twice by mistake; with other rules they may be."""
        for other in earlier:
            if os.path.realpath(other.place) != os.path.realpath(subset.place):
                continue
            if other.is_prior != subset.is_prior:
                self._refuse(
                    place,
                    f"{subset.place} is both trained on and is_reg; give regularization pictures of the class, not of "
                    "the thing itself, in a folder of their own",
                )
            elif replace(other, repeats=1) == replace(subset, repeats=1):
                self._refuse(
                    place,
                    f"{subset.place} is given twice in this data set with the same rules; leave out one of them, and "
                    "raise num_repeats of the other if its pictures should count more often",
                )
            else:
                self._notes[f"{subset.place} is given twice in a data set; each time counts, with its own rules"] = None

    def _notes_on(self, subset: Subset, values: Mapping[str, Any]) -> None:
        repeats = _REPEATS_IN_NAME.fullmatch(Path(subset.place).name)
        if repeats and "num_repeats" not in values and self._is_folder(values) and subset.metadata is None:
            note = (
                f"{Path(subset.place).name}: the {repeats[1]} in this name says nothing in a dataset file; num_repeats "
                f"does, and each picture counts {subset.repeats} times an epoch"
            )
            self._notes[note] = None
        if subset.captions.token_warmup_min != 1 and not subset.captions.token_warmup_steps:
            self._notes["token_warmup_min not used where token_warmup_step, how long the growth takes, is 0"] = None


def _converted(key: Key, value: Any) -> Any:
    """Return a value as the rules need it; paths are looked for later.

    Raises:
        UserError: says what was expected instead, and nothing else.
    """
    if type(value) not in _TYPES[key.kind]:  # a boolean is an int
        raise UserError(f"expected {key.expected}")
    if key.kind == "path" and (not value.strip() or min(value) < " "):
        raise UserError(
            "expected a path; in double quotes a backslash begins a special character: write the path with / or in "
            "'single quotes'"
        )
    if key.only is not None and value not in key.only:
        raise UserError(
            f"this is not possible here. {key.help} Leave it out, or write {' or '.join(map(_shown, key.only))}"
        )
    if key.name == "source":
        plugins.find("data.sources", value)
    if key.name == "custom_attributes":
        return _keeps_output(value)
    return config.checked(TrainConfig, _options()[key.option], value) if key.option else value


def _keeps_output(attributes: Mapping[str, Any]) -> bool:
    keeps = attributes.get(_KEEPS_OUTPUT, False)
    if not attributes.keys() <= {_KEEPS_OUTPUT} or not isinstance(keeps, bool):
        raise UserError(f"nothing is made of these attributes here; the only one is {_KEEPS_OUTPUT} = true or false")
    return keeps


def _filled(rules: _Rules, values: Mapping[str, Any]) -> _Rules:
    """Return the rules with the fields that keys fill."""
    for name, value in values.items():
        if target := KEYS[name].target:
            rules = _with(rules, target, value)
    return rules


def _with(rules: Any, target: str, value: Any) -> Any:
    field, _, rest = target.partition(".")
    return replace(rules, **{field: _with(getattr(rules, field), rest, value) if rest else value})


def _bucket_mistakes(buckets: Buckets) -> list[str]:
    found = []
    if buckets.min_side > buckets.max_side and not buckets.no_upscale:
        found.append(
            f"min_bucket_reso = {buckets.min_side} is larger than max_bucket_reso = {buckets.max_side}; swap them"
        )
    if buckets.step % 8:
        found.append(f"bucket_reso_steps = {buckets.step} is not a multiple of 8; use 64, or 8 for the finest buckets")
    return found


def _subset_mistakes(subset: Subset, own: Mapping[str, Any]) -> dict[str, str]:
    """Return what cannot be meant together, by the key that is too much, or that is missing."""
    found, captions = {}, subset.captions
    if subset.metadata is None and not subset.place:
        found["image_dir"] = 'image_dir is missing; write image_dir = "folder of pictures"'
    if subset.source == "metadata_json" and subset.metadata is None:
        found["source"] = 'source = "metadata_json" needs metadata_file, the file with the captions'
    if subset.metadata is not None:
        reasons = {
            "is_reg": subset.is_prior and "regularization pictures have captions in files, or class_tokens",
            "source": subset.source not in ("auto", "metadata_json") and "its pictures lie in a folder",
            "caption_extension": "its captions are in that file",
            "recursive": "it names its pictures itself, those of folders in folders too",
        }
        for name, reason in reasons.items():
            if name in own and reason:
                found[name] = f"{name} is given beside metadata_file, but {reason}; leave out one of them"
    if subset.masks is not None and subset.alpha_mask:
        found["conditioning_data_dir"] = (
            "conditioning_data_dir and alpha_mask are both on, but a picture has one mask; leave out the first, or "
            "write alpha_mask = false here"
        )
    of_separators = config.separator_contradictions(
        captions.keep_tokens, captions.keep_separator, captions.separator, captions.secondary_separator
    )
    if of_separators:
        found["captions"] = "; ".join(of_separators)
    return found


def _is_shape(name: str) -> bool:
    return KEYS[name].levels == _SHAPES


# ---- messages ------------------------------------------------------------------------------------------------------


def _misplaced_at_the_top(name: str, value: Any) -> str:
    if name == "subsets":
        return f"subsets belong to a data set; write {SUBSET} below a {DATASET}"
    if name in KEYS:
        return f"{name} = {_shown(value)}: this belongs under {' or '.join(KEYS[name].levels)}"
    near = difflib.get_close_matches(name.lower(), ("general", "datasets"), n=1)
    if near:
        return f"there is no table {name}; did you mean {GENERAL if near[0] == 'general' else DATASET}?"
    return f"{name} = {_shown(value)}: {_unknown(name)}"


def _unknown(name: str) -> str:
    wanted = name.replace("-", "_").lower()
    by_option = {key.option: key.name for key in KEYS.values() if key.option}
    meant = _MEANT.get(wanted) or by_option.get(wanted)
    if meant is None and wanted in _options():
        return f"this is said on the command line: {_options()[wanted].flag}"
    meant = meant or next(iter(difflib.get_close_matches(wanted, KEYS, n=1)), None)
    if meant is None:
        return "there is no such key; docs/dataset-config.md lists them all"
    return f"there is no such key; did you mean {meant}?"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _where(candidates: Sequence[Path]) -> str:
    if len(set(map(_full, candidates))) == 1:
        return f": {_full(candidates[0])}"
    return f", neither {_full(candidates[0])} nor, beside the dataset file, {_full(candidates[1])}"


def _nearest_path(candidates: Sequence[Path]) -> str:
    for path in candidates:
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        if near := difflib.get_close_matches(path.name, beside, n=1):
            return f"did you mean {path.parent / near[0]}?"
    return "check the path"


def _full(path: Path) -> str:
    return os.path.abspath(path)


# ---- the file ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """A file with its values, and the line in which the value at a place begins."""

    path: Path
    values: dict[str, Any]
    line_of: Callable[[_Place], int]


def _open(path: Path) -> _File:
    kind, text = path.suffix.lower(), config.read_text(path)
    if kind == ".toml":
        return _File(path, config.parse_toml(path, text), lambda place: config.line_in_toml(text, place))
    if kind != ".json":
        raise UserError(f"{path}: a dataset file is TOML or JSON, and its name ends with .toml or .json; rename it.")
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: this is not JSON: {error.msg} (column {error.colno})."
        ) from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: this holds values that cannot be read ({error}).") from error
    if not isinstance(values, dict):
        raise UserError(f'{path}, line 1: expected an object, {{"datasets": [{{"subsets": [...]}}]}}.')
    lines = _lines_of_json(path, text)
    return _File(path, values, lambda place: lines.get(place, 1))


def _lines_of_json(path: Path, text: str) -> dict[_Place, int]:
    """Return the line in which each key and item of a sound JSON text begins: the json module tells none.

    Raises:
        UserError: a key stands twice in an object, which the json module overlooks.
    """
    lines: dict[_Place, int] = {}
    decoder = json.JSONDecoder()

    def skip(position: int) -> int:
        match = _SPACE.match(text, position)
        assert match is not None
        return match.end()

    def walk(begin: int, place: _Place) -> int:
        """Note the lines of all that is in the value that begins there; return its end."""
        if text[begin] not in "{[" or len(place) == len(("datasets", 0, "subsets", 0, "image_dir")):
            return decoder.raw_decode(text, begin)[1]
        position, number = skip(begin + 1), 0
        while text[position] not in "}]":
            line, name = text.count("\n", 0, position) + 1, number
            if text[begin] == "{":
                name, end = decoder.raw_decode(text, position)
                position = skip(skip(end) + 1)
            inner = (*place, name)
            if inner in lines:
                raise UserError(
                    f"{path}, line {line}: {name} stands here and in line {lines[inner]}; keep one of them."
                )
            lines[inner] = line
            position = skip(walk(position, inner))
            if text[position] == ",":
                position = skip(position + 1)
            number += 1
        return position + 1

    walk(skip(0), ())
    return lines
