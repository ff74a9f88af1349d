"""Dataset files: every key does what it says, what counts where several say it, and what is told of each mistake."""

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorasmith.data import dataset_config
from lorasmith.data.buckets import Buckets
from lorasmith.data.dataset_config import DATASET, GENERAL, KEYS, SUBSET
from lorasmith.data.subsets import DatasetRules, Subset
from lorasmith.errors import UserError

DEFAULTS = DatasetRules((Subset(),), (512, 512), None, 1)
BUCKETS_OFF = Buckets((512, 512))
HERE = Path()
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """A function that writes a dataset file in a working folder with folders `a`, `b`, `masks` and a metadata file."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "meta.json").write_text("{}")
    numbers = itertools.count()

    def make(content: str | dict[str, Any], suffix: str = ".toml") -> Path:
        path = tmp_path / f"sets{next(numbers)}{suffix}"
        text = content if isinstance(content, str) else {".toml": tomli_w.dumps, ".json": json.dumps}[suffix](content)
        path.write_text(text, encoding="utf-8")
        return path

    return make


def read(
    path: Path, defaults: DatasetRules = DEFAULTS, buckets: Buckets = BUCKETS_OFF, root: Path = HERE
) -> dataset_config.DatasetFile:
    return dataset_config.read(path, defaults, buckets=buckets, root=root)


def one_subset(level: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return a file with one subset and these values at one level."""
    subset, dataset, general = {"image_dir": "a"}, {}, {}
    {GENERAL: general, DATASET: dataset, SUBSET: subset}[level].update(values)
    return {"general": general, "datasets": [{**dataset, "subsets": [subset]}]}


# ---- each key ------------------------------------------------------------------------------------------------------

OF_SUBSET: dict[str, tuple[Any, Callable[[Subset], Any], Any]] = {  # value, what it must change, to what
    "image_dir": ("b", lambda subset: subset.place, "b"),
    "is_reg": (True, lambda subset: subset.is_prior, True),
    "metadata_file": (
        "meta.json",
        lambda subset: (subset.metadata, subset.source),
        (Path("meta.json"), "metadata_json"),
    ),
    "conditioning_data_dir": ("masks", lambda subset: subset.masks, Path("masks")),
    "alpha_mask": (True, lambda subset: subset.alpha_mask, True),
    "num_repeats": (7, lambda subset: subset.repeats, 7),
    "class_tokens": ("sks dog", lambda subset: subset.caption, "sks dog"),
    "caption_extension": (".tags", lambda subset: subset.caption_extension, ".tags"),
    "shuffle_caption": (True, lambda subset: subset.captions.shuffle, True),
    "caption_separator": (";", lambda subset: subset.captions.separator, ";"),
    "keep_tokens": (2, lambda subset: subset.captions.keep_tokens, 2),
    "keep_tokens_separator": ("|||", lambda subset: subset.captions.keep_separator, "|||"),
    "secondary_separator": (";;;", lambda subset: subset.captions.secondary_separator, ";;;"),
    "enable_wildcard": (True, lambda subset: subset.captions.wildcards, True),
    "token_warmup_min": (3, lambda subset: subset.captions.token_warmup_min, 3),
    "token_warmup_step": (0.5, lambda subset: subset.captions.token_warmup_steps, 0.5),
    "caption_prefix": ("a photo of", lambda subset: subset.captions.prefix, "a photo of"),
    "caption_suffix": ("by me", lambda subset: subset.captions.suffix, "by me"),
    "caption_dropout_rate": (0.1, lambda subset: subset.captions.dropout, 0.1),
    "caption_dropout_every_n_epochs": (3, lambda subset: subset.captions.dropout_every_epochs, 3),
    "caption_tag_dropout_rate": (1, lambda subset: subset.captions.tag_dropout, 1.0),
    "color_aug": (True, lambda subset: subset.augmentation.colour, True),
    "flip_aug": (True, lambda subset: subset.augmentation.flip, True),
    "random_crop": (True, lambda subset: subset.augmentation.random_crop, True),
    "face_crop_aug_range": ([2, 4.5], lambda subset: subset.augmentation.face_portions, (2.0, 4.5)),
    "recursive": (True, lambda subset: subset.recursive, True),
    "alpha_color": ("#FF8000", lambda subset: subset.alpha_color, "#ff8000"),
    "source": ("folder", lambda subset: subset.source, "folder"),
    "custom_attributes": ({"diff_output_preservation": True}, lambda subset: subset.keeps_output, True),
    "image_column": ("photo", lambda subset: subset.image_column, "photo"),
    "caption_column": ("words", lambda subset: subset.caption_column, "words"),
    "dataset_split": ("test", lambda subset: subset.dataset_split, "test"),
}
BUCKETS = {"enable_bucket": True}
OF_DATASET: dict[str, tuple[dict[str, Any], Any, Callable[[DatasetRules], Any], Any]] = {
    "batch_size": ({}, 4, lambda rules: rules.batch_size, 4),
    "resolution": ({}, [448, 640], lambda rules: rules.resolution, (448, 640)),
    "enable_bucket": ({}, True, lambda rules: rules.buckets, Buckets((512, 512))),
    "min_bucket_reso": (BUCKETS, 320, lambda rules: rules.buckets, Buckets((512, 512), min_side=320)),
    "max_bucket_reso": (BUCKETS, 768, lambda rules: rules.buckets, Buckets((512, 512), max_side=768)),
    "bucket_reso_steps": (BUCKETS, 32, lambda rules: rules.buckets, Buckets((512, 512), step=32)),
    "bucket_no_upscale": (BUCKETS, True, lambda rules: rules.buckets, Buckets((512, 512), no_upscale=True)),
    "validation_split": ({}, 0.25, lambda rules: rules.validation_split, 0.25),
    "validation_seed": ({}, 11, lambda rules: rules.validation_seed, 11),
}
WITHOUT_EFFECT = {  # the values that are accepted, one that is not
    "cache_info": ([True, False], 1),
    "network_multiplier": ([1.0, 1], 0.5),
    "resize_interpolation": (["lanczos"], "area"),
}


def test_every_key_is_in_one_of_these_tables() -> None:
    assert sorted([*OF_SUBSET, *OF_DATASET, *WITHOUT_EFFECT]) == sorted(KEYS)


@pytest.mark.parametrize(("name", "level"), [(name, level) for name in OF_SUBSET for level in KEYS[name].levels])
def test_a_key_changes_the_rules_of_the_subset_and_nothing_else(write: Write, name: str, level: str) -> None:
    value, look, expected = OF_SUBSET[name]
    without = read(write(one_subset(level, {}))).datasets[0].subsets[0]
    subset = read(write(one_subset(level, {name: value}))).datasets[0].subsets[0]
    assert look(subset) == expected
    assert look(without) != expected
    target = KEYS[name].target.partition(".")[0]
    also = {"source": subset.source} if name == "metadata_file" else {}
    assert replace(without, **{target: getattr(subset, target)}, **also) == subset


@pytest.mark.parametrize(("name", "level"), [(name, level) for name in OF_DATASET for level in KEYS[name].levels])
def test_a_key_changes_the_rules_of_the_data_set_and_nothing_else(write: Write, name: str, level: str) -> None:
    others, value, look, expected = OF_DATASET[name]
    without = read(write(one_subset(level, others))).datasets[0]
    rules = read(write(one_subset(level, {**others, name: value}))).datasets[0]
    assert look(rules) == expected
    assert look(without) != expected
    target = KEYS[name].target.partition(".")[0] or "buckets"
    assert replace(without, **{target: getattr(rules, target)}) == rules


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_a_key_without_its_feature_is_accepted_where_it_changes_nothing(write: Write, name: str) -> None:
    accepted, refused = WITHOUT_EFFECT[name]
    level = KEYS[name].levels[-1]
    for value in accepted:
        file = read(write(one_subset(level, {name: value})))
        assert file.datasets == read(write(one_subset(level, {}))).datasets
        assert any(note.startswith(f"{name} changes nothing: ") for note in file.notes)
    with pytest.raises(UserError, match=f"line .*{name} = "):
        read(write(one_subset(level, {name: refused})))


@pytest.mark.parametrize("attributes", [{"diff_output_preservation": 1}, {"other": True}])
def test_other_attributes_are_refused(write: Write, attributes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"line .*the only one is diff_output_preservation = true or false"):
        read(write(one_subset(SUBSET, {"custom_attributes": attributes})))


def test_outputs_kept_by_the_command_line_are_those_of_regularization_pictures(write: Write) -> None:
    no = {"custom_attributes": {"diff_output_preservation": False}}
    subsets = [{"image_dir": "a"}, {"image_dir": "b", "is_reg": True}, {"image_dir": "c", "is_reg": True, **no}]
    for name in "abc":
        Path(name).mkdir(exist_ok=True)
    rules = read(write({"datasets": [{"subsets": subsets}]}), DatasetRules((Subset(keeps_output=True),))).datasets[0]
    assert [subset.keeps_output for subset in rules.subsets] == [False, True, False]


def test_a_resolution_is_written_in_four_ways(write: Write) -> None:
    for value in (512, "512", "512,512", [512, 512]):
        assert read(write(one_subset(DATASET, {"resolution": value}))).datasets[0].resolution == (512, 512)


def test_buckets_have_the_area_of_their_own_resolution_and_the_rule_of_the_command_line(write: Write) -> None:
    path = write(one_subset(DATASET, {"resolution": 768, "enable_bucket": True}))
    rules = read(path, buckets=Buckets((512, 512), step=32, is_sd_scripts=True)).datasets[0]
    assert rules.buckets == Buckets((768, 768), step=32, is_sd_scripts=True)


def test_a_metadata_file_alone_has_its_pictures_beside_it(write: Write) -> None:
    (Path("b") / "meta.jsonl").write_text("")
    subset = read(write({"datasets": [{"subsets": [{"metadata_file": "b/meta.jsonl"}]}]})).datasets[0].subsets[0]
    assert (subset.place, subset.metadata) == ("b", Path("b/meta.jsonl"))


def test_masks_of_the_command_line_are_not_for_regularization_pictures(write: Write) -> None:
    path = write({"datasets": [{"subsets": [{"image_dir": "a"}, {"image_dir": "b", "is_reg": True}]}]})
    for masked in (Subset(masks=Path("masks")), Subset(alpha_mask=True)):
        own, prior = read(path, replace(DEFAULTS, subsets=(masked,))).datasets[0].subsets
        assert (own.masks, own.alpha_mask) == (masked.masks, masked.alpha_mask)
        assert (prior.masks, prior.alpha_mask) == (None, False)


# ---- what counts ---------------------------------------------------------------------------------------------------

SUBSET_VALUES = {
    "num_repeats": st.integers(1, 9),
    "keep_tokens": st.integers(0, 3),
    "caption_prefix": st.sampled_from(["", "x", "a photo of"]),
    "flip_aug": st.booleans(),
    "token_warmup_step": st.sampled_from([0, 0.25, 100]),
}
DATASET_VALUES = {
    "batch_size": st.integers(1, 9),
    "resolution": st.sampled_from([256, 512]),
    "enable_bucket": st.booleans(),
    "bucket_reso_steps": st.sampled_from([8, 64]),
}
subset_tables = st.fixed_dictionaries({}, optional=SUBSET_VALUES)
other_tables = st.fixed_dictionaries({}, optional=SUBSET_VALUES | DATASET_VALUES)
files = st.fixed_dictionaries(
    {
        "general": other_tables,
        "datasets": st.lists(
            st.tuples(other_tables, st.lists(subset_tables, min_size=1, max_size=3)), min_size=1, max_size=3
        ),
    }
)


def first(name: str, *tables: dict[str, Any]) -> Any:
    """sd-scripts' look-up: the first table that holds the key."""
    return next(table[name] for table in tables if name in table)


@given(file=files, given_values=other_tables)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_innermost_table_counts_then_the_command_line_and_toml_is_json(
    write: Write, file: dict[str, Any], given_values: dict[str, Any]
) -> None:
    folders = (f"{number}" for number in itertools.count())
    tables = {
        "general": file["general"],
        "datasets": [
            {**dataset, "subsets": [{**subset, "image_dir": next(folders)} for subset in subsets]}
            for dataset, subsets in file["datasets"]
        ],
    }
    for dataset in tables["datasets"]:
        for subset in dataset["subsets"]:
            Path(subset["image_dir"]).mkdir(exist_ok=True)
    defaults = {
        "num_repeats": 1, "keep_tokens": 0, "caption_prefix": "", "flip_aug": False, "token_warmup_step": 0,
        "batch_size": 1, "resolution": 512, "enable_bucket": False, "bucket_reso_steps": 64,
    }  # fmt: skip
    outer = {**defaults, **given_values}
    default = Subset(
        repeats=outer["num_repeats"],
        captions=replace(
            Subset().captions,
            keep_tokens=outer["keep_tokens"],
            prefix=outer["caption_prefix"],
            token_warmup_steps=outer["token_warmup_step"],
        ),
        augmentation=replace(Subset().augmentation, flip=outer["flip_aug"]),
    )
    size = (outer["resolution"],) * 2
    buckets = Buckets(size, step=outer["bucket_reso_steps"])
    rules = DatasetRules((default,), size, buckets if outer["enable_bucket"] else None, outer["batch_size"])
    found = read(write(tables), rules, buckets).datasets
    assert found == read(write(tables, ".json"), rules, buckets).datasets
    for dataset, built in zip(tables["datasets"], found, strict=True):
        shapes = [dataset, file["general"], outer]
        assert built.batch_size == first("batch_size", *shapes)
        assert built.resolution == (first("resolution", *shapes),) * 2
        assert (built.buckets is not None) == first("enable_bucket", *shapes)
        assert built.buckets is None or built.buckets.step == first("bucket_reso_steps", *shapes)
        for table, subset in zip(dataset["subsets"], built.subsets, strict=True):
            all_tables = [table, *shapes]
            assert subset.repeats == first("num_repeats", *all_tables)
            assert subset.captions.keep_tokens == first("keep_tokens", *all_tables)
            assert subset.captions.prefix == first("caption_prefix", *all_tables)
            assert subset.captions.token_warmup_steps == first("token_warmup_step", *all_tables)
            assert subset.augmentation.flip == first("flip_aug", *all_tables)


# ---- where folders are ---------------------------------------------------------------------------------------------


def test_paths_start_from_the_root_then_from_beside_the_file(write: Write, tmp_path: Path) -> None:
    path = write(one_subset(SUBSET, {}))
    assert read(path).datasets[0].subsets[0].place == "a" and not read(path).notes
    (tmp_path / "elsewhere" / "a").mkdir(parents=True)
    elsewhere = read(path, root=tmp_path / "elsewhere")
    assert elsewhere.datasets[0].subsets[0].place == str(tmp_path / "elsewhere" / "a") and not elsewhere.notes
    beside = read(path, root=tmp_path / "b")
    assert beside.datasets[0].subsets[0].place == str(tmp_path / "a")
    assert f'image_dir = "a": not in {tmp_path / "b"}, so taken from beside the dataset file' in beside.notes


def test_a_tilde_is_the_home_folder(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert read(write(one_subset(SUBSET, {"image_dir": "~/b"}))).datasets[0].subsets[0].place == str(tmp_path / "b")


def test_what_is_no_folder_is_left_to_its_source(write: Write, tmp_path: Path) -> None:
    def place(**values: Any) -> str:
        return read(write(one_subset(SUBSET, values)), root=tmp_path).datasets[0].subsets[0].place

    assert place(image_dir="org/name", source="huggingface") == "org/name"
    assert place(image_dir="tars/set-{0..3}.tar") == str(tmp_path / "tars" / "set-{0..3}.tar")


# ---- what is told --------------------------------------------------------------------------------------------------


def test_a_number_in_the_folders_name_is_spoken_of_unless_num_repeats_is_given(write: Write) -> None:
    Path("10_sks dog").mkdir()
    file = read(write(one_subset(SUBSET, {"image_dir": "10_sks dog"})))
    assert file.datasets[0].subsets[0].repeats == 1
    assert any("10_sks dog: the 10 in this name says nothing in a dataset file" in note for note in file.notes)
    for level in (GENERAL, DATASET, SUBSET):
        given = one_subset(level, {"num_repeats": 1})
        given["datasets"][0]["subsets"][0]["image_dir"] = "10_sks dog"
        assert not read(write(given)).notes


@pytest.mark.parametrize(
    ("values", "note"),
    [
        (
            {"min_bucket_reso": 256, "bucket_reso_steps": 64},
            "data set 1: min_bucket_reso and bucket_reso_steps not used",
        ),
        ({"enable_bucket": True, "bucket_no_upscale": True, "max_bucket_reso": 768}, "data set 1: max_bucket_reso not"),
        ({"token_warmup_min": 2}, "token_warmup_min not used where token_warmup_step"),
    ],
)
def test_a_key_that_does_nothing_is_spoken_of(write: Write, values: dict[str, Any], note: str) -> None:
    assert [told for told in read(write(one_subset(GENERAL, values))).notes if told.startswith(note)]
    assert not read(write(one_subset(GENERAL, {}))).notes


def test_the_same_folder_may_come_twice_with_other_rules_or_in_another_data_set(write: Write) -> None:
    twice = [{"image_dir": "a"}, {"image_dir": "./a", "caption_prefix": "x"}]
    file = read(write({"datasets": [{"subsets": twice}, {"subsets": [{"image_dir": "a"}]}]}))
    assert [len(dataset.subsets) for dataset in file.datasets] == [2, 1]
    assert any("is given twice in a data set; each time counts, with its own rules" in note for note in file.notes)


S = "[[datasets]]\n[[datasets.subsets]]\n"  # two lines
LAST = "[[datasets.subsets]]\nimage_dir = 'a'"
BAD = {
    "an unknown key": (S + 'image_dir = "a"\nflip_augg = true', 4, ["flip_augg = true", "did you mean flip_aug?"]),
    "a key of the second of two subsets": (
        '[general]\n\n[[datasets]]\n# one\n[[datasets.subsets]]\nimage_dir = "a"\n\n[[datasets.subsets]]\n'
        'image_dir = "b"\nnum_repeat = 3\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"',
        10,
        ["num_repeat = 3", "did you mean num_repeats?"],
    ),
    "a key of the second data set": (
        f'{S}image_dir = "a"\n[[datasets]]\nbatch = 3\n[[datasets.subsets]]\nimage_dir = "b"',
        5,
        ["batch = 3", "batch_size"],
    ),
    "a name of the command line": (
        f"[general]\ntrain_batch_size = 3\n{S}image_dir = 'a'",
        2,
        ["train_batch_size = 3", "did you mean batch_size?"],
    ),
    "a name of our command line": (
        f"[general]\nbuckets = true\n{S}image_dir = 'a'",
        2,
        ["did you mean enable_bucket?"],
    ),
    "what only the command line says": (
        f"[general]\nprior_loss_weight = 0.5\n{S}image_dir = 'a'",
        2,
        ["said on the command line: --prior-loss-weight"],
    ),
    "nonsense": (f"[general]\nxyzzy = 1\n{S}image_dir = 'a'", 2, ["no such key", "docs/dataset-config.md"]),
    "the batch size of a subset": (
        S + 'image_dir = "a"\nbatch_size = 2',
        4,
        ["belongs under [general] or [[datasets]]"],
    ),
    "a folder of a data set": (
        '[[datasets]]\nimage_dir = "a"\n[[datasets.subsets]]\nimage_dir = "a"',
        2,
        ["belongs under [[datasets.subsets]]"],
    ),
    "a folder for all": (f"[general]\nimage_dir = 'a'\n{S}image_dir = 'a'", 2, ["belongs under [[datasets.subsets]]"]),
    "a key above all tables": (f"batch_size = 2\n{S}image_dir = 'a'", 1, ["belongs under [general] or [[datasets]]"]),
    "a misspelt table": (f"[genral]\nflip_aug = true\n{S}image_dir = 'a'", 1, ["no table genral", "[general]?"]),
    "subsets of nothing": (
        "[[subsets]]\nimage_dir = 'a'\n[[datasets]]\n[[datasets.subsets]]\nimage_dir='a'",
        1,
        ["[[datasets.subsets]] below a [[datasets]]"],
    ),
    "one bracket": ("[general]\n\n[datasets]\nbatch_size = 1", 3, ["[[datasets]] with two brackets"]),
    "one bracket below": ("[[datasets]]\n[datasets.subsets]\nimage_dir = 'a'", 2, ["[[datasets.subsets]] with two"]),
    "two brackets": (f"[[general]]\nflip_aug = true\n{S}image_dir = 'a'", 1, ["expected a table", "[general]"]),
    "a text for a number": (
        S + 'image_dir = "a"\nnum_repeats = "10"',
        4,
        ['num_repeats = "10"', "a whole number above 0"],
    ),
    "a number for a switch": (S + 'image_dir = "a"\nflip_aug = 1', 4, ["expected true or false"]),
    "a switch for a number": (S + 'image_dir = "a"\nkeep_tokens = true', 4, ["expected a whole number at least 0"]),
    "no repeats": (S + 'image_dir = "a"\nnum_repeats = 0', 4, ["a whole number above 0"]),
    "too large a share": (S + 'image_dir = "a"\ncaption_dropout_rate = 1.5', 4, ["at least 0 and at most 1"]),
    "an odd resolution": ("[[datasets]]\nresolution = 500\n" + LAST, 2, ["multiple of 8", "504"]),
    "three sides": ("[[datasets]]\nresolution = [8, 8, 8]\n" + LAST, 2, ["one side or width,height"]),
    "half a range": (S + 'image_dir = "a"\nface_crop_aug_range = [2]', 4, ["two numbers above 0"]),
    "an unknown source": (S + 'image_dir = "a"\nsource = "folders"', 4, ["did you mean folder?"]),
    "no folder": (f"# mine\n{S}num_repeats = 2", 3, ['image_dir is missing; write image_dir = "folder of pictures"']),
    "a folder that is not there": (S + "image_dir = 'masjs'", 3, ["there is no such folder", "did you mean masks?"]),
    "a file for a folder": (S + "image_dir = 'meta.json'", 3, ["expected a folder, but meta.json is none"]),
    "no such metadata": (S + "metadata_file = 'meta.jsn'", 3, ["there is no such file", "did you mean meta.json?"]),
    "no such masks": (
        S + "image_dir = 'a'\nconditioning_data_dir = 'c'",
        4,
        ["conditioning_data_dir", "no such folder"],
    ),
    "no subsets": ("[general]\n[[datasets]]\nbatch_size = 2", 2, ["no subsets; write [[datasets.subsets]]"]),
    "no data sets": ("[general]\nflip_aug = true", 1, ["no data sets; write [[datasets]]"]),
    "nothing": ("", 1, ["no data sets; write [[datasets]]"]),
    "the same twice": (
        f"{S}image_dir = 'b'\n{LAST}\n[[datasets.subsets]]\nimage_dir = './a'\nnum_repeats = 3",
        6,
        ["a is given twice in this data set with the same rules", "num_repeats"],
    ),
    "trained and not": (
        f"{S}image_dir = 'a'\n[[datasets.subsets]]\nimage_dir = 'a'\nis_reg = true",
        4,
        ["both trained on and is_reg"],
    ),
    "two ways to keep": (
        f"[general]\nkeep_tokens = 1\n{S}image_dir = 'a'\nkeep_tokens_separator = '|||'",
        4,
        ["both say which parts stay"],
    ),
    "buckets the wrong way": (
        "[[datasets]]\nenable_bucket = true\nmin_bucket_reso = 1024\nmax_bucket_reso = 256\n" + LAST,
        1,
        ["min_bucket_reso = 1024 is larger than max_bucket_reso = 256"],
    ),
    "steps of 10": (
        "[[datasets]]\nenable_bucket = true\nbucket_reso_steps = 10\n" + LAST,
        1,
        ["bucket_reso_steps = 10 is not a multiple of 8"],
    ),
    "captions from two places": (
        f"{S}metadata_file = 'meta.json'\ncaption_extension = '.txt'",
        4,
        ["caption_extension is given beside metadata_file"],
    ),
    "regularization by metadata": (f"{S}metadata_file = 'meta.json'\nis_reg = true", 4, ["is_reg is given beside"]),
    "a source without its file": (f"{S}image_dir = 'a'\nsource = 'metadata_json'", 4, ["needs metadata_file"]),
    "two masks": (
        f"{S}image_dir = 'a'\nalpha_mask = true\nconditioning_data_dir = 'masks'",
        5,
        ["a picture has one mask"],
    ),
    "a Windows path": (
        S + 'image_dir = "C:\\hoge"',
        3,
        ["not TOML", "write Windows paths with / or in 'single quotes'"],
    ),
    "a Windows path that is TOML": (S + 'image_dir = "C:\\temp"', 3, ["a backslash begins a special character"]),
    "an empty path": (S + 'image_dir = ""', 3, ["expected a path"]),
    "no quotes": (S + "image_dir = a", 3, ["a text stands in quotes"]),
    "a key twice": (S + "image_dir = 'a'\nimage_dir = 'b'", 4, ["not TOML"]),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_is_told_with_its_line(write: Write, mistake: str) -> None:
    text, line, parts = BAD[mistake]
    path = write(text)
    with pytest.raises(UserError) as error:
        read(path)
    told = str(error.value).splitlines()
    assert told[0].startswith(f"{path}, line {line}: "), told
    assert all(part in told[0] for part in parts), told
    assert len(told) == 1


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ('{"general": {\n "flip_augg": true},\n "datasets": []}', 2, "did you mean flip_aug?"),
        (
            '{"datasets": [\n {"subsets": [\n  {"image_dir": "a"},\n  {"image_dir": "b",\n   "batch_size": 2}]}]}',
            5,
            "belongs",
        ),
        ('{"datasets": [\n {"subsets": [\n  {"image_dir": "a"},\n  {"num_repeats": 2}]}]}', 4, "image_dir is missing"),
        ('{"datasets": [\n {"resolution": [512,\n 512],\n  "subsets": []}]}', 2, "no subsets"),
        ('{"datasets":\n {}}', 1, "expected a list of tables"),
        ('{"datasets": [],\n "datasets": []}', 2, "datasets stands here and in line 1"),
        ('{"datasets": [{"subsets": [{"image_dir": "a"}]}],\n}', 2, "this is not JSON"),
        ('{"general": {"flip_aug": null}, "datasets": [{"subsets": [{"image_dir": "a"}]}]}', 1, "flip_aug = null"),
        ("[]", 1, "expected an object"),
    ],
)
def test_a_mistake_in_json_is_told_with_its_line(write: Write, text: str, line: int, part: str) -> None:
    path = write(text, ".json")
    with pytest.raises(UserError) as error:
        read(path)
    assert any(told.startswith(f"{path}, line {line}: ") and part in told for told in str(error.value).splitlines())


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(write: Write) -> None:
    path = write(f"[general]\nxyzzy = 1\n{S}image_dir = 'a'\nbatch_size = 2\nflip_aug = 3")
    with pytest.raises(UserError) as error:
        read(path)
    assert [line.partition(": ")[0] for line in str(error.value).splitlines()] == [
        f"{path}, line {number}" for number in (2, 6, 7)
    ]


def test_another_kind_of_file_is_refused(write: Write) -> None:
    with pytest.raises(UserError, match=r"ends with \.toml or \.json"):
        read(write("", ".yaml"))
    with pytest.raises(UserError, match="there is no such file"):
        read(Path("nowhere.toml"))


def test_the_example_of_the_document_is_read_as_it_says(write: Write) -> None:
    text = (Path(__file__).parents[2] / "docs" / "dataset-config.md").read_text(encoding="utf-8")
    for name in ("photos/sks dog", "photos/old ones", "dogs"):
        Path(name).mkdir(parents=True)
    Path("captions.jsonl").write_text("")
    file = read(write(text.partition("```toml\n")[2].partition("```")[0]))
    first, second = file.datasets
    assert (first.resolution, first.batch_size, first.buckets) == ((512, 512), 4, Buckets((512, 512)))
    assert (second.resolution, second.batch_size, second.buckets) == ((768, 768), 1, None)
    assert [subset.repeats for subset in first.subsets] == [10, 1, 1]
    assert [subset.captions.shuffle for subset in (*first.subsets, *second.subsets)] == [True, True, False, True]
    assert first.subsets[2].is_prior and second.subsets[0].captions.dropout == 0.1 and not file.notes
    (of_json,) = re.findall(r"in JSON: `(.*)`", text)
    Path("photos.json").write_text(of_json)
    assert read(Path("photos.json")).datasets[0].subsets[0].captions.keep_tokens == 1


def test_depth_without_end_is_refused(write: Write) -> None:
    with pytest.raises(UserError, match=r"cannot be read|not JSON"):
        read(write("[" * 100_000, ".json"))
