"""Which options a resumed run may change: those listed, and no others."""

import copy
from collections import Counter
from typing import Any

import pytest

from lorasmith import config
from lorasmith.config import Option, TrainConfig
from lorasmith.errors import UserError
from lorasmith.resume import CHANGEABLE, merge_options

OPTIONS = [option for option in config.options(TrainConfig) if option.section]
FIXED = [option for option in OPTIONS if option.name not in CHANGEABLE]
FREE = [option for option in OPTIONS if option.name in CHANGEABLE]


def ids(option: Option) -> str:
    return option.name


def test_every_changeable_option_exists_and_is_one_option_only() -> None:
    counts = Counter(option.name for option in config.options(TrainConfig))
    assert {name: counts[name] for name in CHANGEABLE} == dict.fromkeys(CHANGEABLE, 1)


@pytest.mark.parametrize("option", FREE, ids=ids)
def test_a_changeable_option_is_taken(option: Option) -> None:
    merged = merge_options({option.section: {option.name: "old"}}, {option.section: {option.name: "new"}})
    assert merged[option.section][option.name] == "new"


@pytest.mark.parametrize("option", FIXED, ids=ids)
def test_an_option_that_would_make_another_run_is_refused_with_both_values(option: Option) -> None:
    with pytest.raises(UserError) as error:
        merge_options({option.section: {option.name: "old"}}, {option.section: {option.name: "new"}})
    assert f"{option.section}.{option.name} was old, now new" in str(error.value)
    assert "--weights" in str(error.value)


@pytest.mark.parametrize("option", FIXED, ids=ids)
def test_an_option_may_be_repeated_as_it_was(option: Option) -> None:
    stored = {option.section: {option.name: "same"}}
    assert merge_options(stored, copy.deepcopy(stored)) == stored


@pytest.mark.parametrize("option", [option for option in FIXED if option.default is not None], ids=ids)
def test_a_default_may_be_spelled_out_though_it_was_not_stored(option: Option) -> None:
    given = {option.section: {option.name: option.default}}
    assert merge_options({}, given) == given
    with pytest.raises(UserError, match=f"{option.name} was "):
        merge_options({}, {option.section: {option.name: "something else"}})


def test_all_refusals_come_at_once() -> None:
    with pytest.raises(UserError) as error:
        merge_options({"network": {"rank": 4}}, {"network": {"rank": 8}, "training": {"seed": 3}})
    assert "network.rank was 4, now 8" in str(error.value) and "training.seed was 42, now 3" in str(error.value)


@pytest.mark.parametrize(("given", "dropped"), [("steps", "epochs"), ("epochs", "steps")])
def test_a_new_length_replaces_the_old_one_in_either_unit(given: str, dropped: str) -> None:
    merged = merge_options({"training": {dropped: 5, "seed": 1}}, {"training": {given: 7}})
    assert merged == {"training": {given: 7, "seed": 1}}
    config.build(TrainConfig, merged)


def test_what_is_not_given_stays_and_the_arguments_are_not_touched() -> None:
    stored: dict[str, Any] = {"network": {"rank": 4}, "save": {"output": "a"}, "training": {"epochs": 2}}
    given: dict[str, Any] = {"dry_run": True, "save": {"output": "b"}, "training": {"steps": 9}}
    before = copy.deepcopy((stored, given))
    assert merge_options(stored, given) == {
        "dry_run": True, "network": {"rank": 4}, "save": {"output": "b"}, "training": {"steps": 9},
    }  # fmt: skip
    assert (stored, given) == before


def test_nothing_given_is_the_stopped_run() -> None:
    stored = {"network": {"rank": 4}, "training": {"steps": 5}}
    assert merge_options(stored, {"resume": "out"}) == {**stored, "resume": "out"}
