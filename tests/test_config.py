"""The options: what is given is kept and checked, and every mistake is told in one line."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from lorasmith import config
from lorasmith.config import COMMANDS, Section, TrainConfig, build, dump_toml, load_toml
from lorasmith.errors import UserError


def mistakes(given: dict[str, Any], file: Path | None = None) -> list[str]:
    with pytest.raises(UserError) as caught:
        build(TrainConfig, given, file)
    return str(caught.value).splitlines()


def mistakes_in_file(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return [line.replace(str(path), "run.toml") for line in mistakes({}, path)]


# ---- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_option_names_are_unique_so_that_the_short_spelling_means_one_thing(command: type[Section]) -> None:
    names = [option.name for option in config.options(command)]
    assert len(names) == len(set(names))
    assert not {"help", "config"} & set(names)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_options_are_exactly_the_fields_and_each_has_a_sentence(command: type[Section]) -> None:
    def places(model: type[Section], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        found = []
        for name, field in model.model_fields.items():
            is_section = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
            place = (*above, field.alias or name)
            found += places(field.annotation, place) if is_section else [place]  # type: ignore[arg-type]
        return found

    options = config.options(command)
    assert sorted(option.place for option in options) == sorted(places(command))
    assert all(option.help.endswith(".") for option in options)
    assert all(config.sections(command).values())


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_defaults_told_are_the_models_own(command: type[Section]) -> None:
    defaults = command().model_dump(mode="json", by_alias=True)
    for option in config.options(command):
        values = defaults[option.section] if option.section else defaults
        assert (option.default or None) == (values[option.name] or None), option


class Every(Section):
    """One option of each kind."""

    whole: int = Field(default=1, ge=1, le=9, description="Whole.")
    share: float | None = Field(default=None, gt=0, description="Share.")
    pick: Literal["a", "b"] | None = Field(default=None, description="Pick.")
    place: Path | None = Field(default=None, description="Place.")
    size: config.Size | None = Field(default=None, description="Size.")
    words: list[str] = Field(default_factory=list, description="Words.")
    is_on: bool | None = Field(default=None, description="On.")
    text: str = Field(default="", description="Text.")

    @model_validator(mode="after")
    def _refuse(self) -> "Every":
        if self.whole == 7:
            raise ValueError("whole = 7 is refused; take 6")
        return self


def test_options_tell_their_kind_and_what_they_expect() -> None:
    told = {option.name: (option.kind, option.expected) for option in config.options(Every)}
    assert told["whole"] == ("integer", "a whole number at least 1 and at most 9")
    assert told["share"] == ("number", "a number above 0")
    assert told["pick"] == ("choice", "one of a, b")
    assert {name: kind for name, (kind, _) in told.items()} == {
        "whole": "integer", "share": "number", "pick": "choice", "place": "path", "size": "size", "words": "list",
        "is_on": "boolean", "text": "text",
    }  # fmt: skip


# ---- build ---------------------------------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_file_and_only_what_was_given_counts_as_set(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        "dry_run = true\n[network]\nrank = 8\nalpha = 2\n[data]\nresolution = [448, 640]\n", encoding="utf-8"
    )
    cfg = build(TrainConfig, {"network": {"rank": "16"}, "training": {"batch_size": "2"}}, path)
    assert (cfg.network.rank, cfg.network.alpha, cfg.data.resolution) == (16, 2.0, (448, 640))
    assert cfg.model_dump(exclude_unset=True) == {
        "dry_run": True,
        "network": {"rank": 16, "alpha": 2.0},
        "data": {"resolution": (448, 640)},
        "training": {"batch_size": 2},
    }


def test_nothing_given_sets_nothing() -> None:
    assert build(TrainConfig, {}).model_dump(exclude_unset=True) == {}


@pytest.mark.parametrize(
    ("value", "expected"), [("512", (512, 512)), (512, (512, 512)), ("448,640", (448, 640)), ("448x640", (448, 640))]
)
def test_sizes_are_one_side_or_two(value: Any, expected: tuple[int, int]) -> None:
    assert build(TrainConfig, {"data": {"resolution": value}}).data.resolution == expected


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"network": {"rank": "abc"}}, "--rank abc: expected a whole number above 0"),
        ({"network": {"rank": "0"}}, "--rank 0: expected a whole number above 0"),
        ({"network": {"train": "all"}}, "--train all: expected one of both, unet, text_encoder"),
        ({"optimizer": {"learning_rate": "inf"}}, "--learning-rate inf: expected a number above 0"),
        ({"optimizer": {"learning_rate": "nan"}}, "--learning-rate nan: expected a number above 0"),
        ({"data": {"caption_dropout": "2"}}, "--caption-dropout 2: expected a number at least 0 and at most 1"),
        (
            {"data": {"resolution": "450"}},
            "--resolution 450: 450 is not a multiple of 8, which the model's latents need; use 448 or 456",
        ),
        ({"data": {"images": ""}}, "--images: expected a path"),
        ({"training": {"steps": "3", "epochs": "3"}}, "steps and epochs are both given; give one of them"),
        ({"network": {"rnak": 3}}, "--rnak 3: there is no such option; did you mean rank?"),
    ],
)
def test_one_line_names_the_option_the_value_and_what_was_expected(given: dict[str, Any], line: str) -> None:
    assert mistakes(given) == [line]


@pytest.mark.parametrize("name", ["", " ", "../last", "a/b", "a\\b", ".hidden", "what?", "C:x"])
def test_a_name_of_files_is_a_plain_one(name: str) -> None:
    [line] = mistakes({"save": {"name": name}})
    assert "is no plain file name" in line and "--output" in line


def test_a_tilde_is_the_home_folder_on_the_command_line_and_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    path = tmp_path / "run.toml"
    path.write_text('[data]\nimages = "~/photos"\n[model]\nbase = "~/m.ckpt"\nvae = "org/~vae"\n', encoding="utf-8")
    cfg = build(TrainConfig, {"save": {"output": "~/out"}}, path)
    assert (cfg.data.images, cfg.save.output) == (tmp_path / "photos", tmp_path / "out")
    assert (cfg.model.base, cfg.model.vae) == (str(tmp_path / "m.ckpt"), "org/~vae")


def test_every_mistake_is_told_at_once() -> None:
    assert len(mistakes({"network": {"rank": "a", "alpha": "b"}, "training": {"steps": "-1"}})) == 3


def test_a_mistake_of_the_command_line_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[network]\nrank = 8\n", encoding="utf-8")
    assert mistakes({"network": {"rank": "x"}}, path) == ["--rank x: expected a whole number above 0"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('\n[network]\n# so\nrank = "x"\n', 'run.toml, line 4: rank = "x": expected a whole number above 0'),
        ("[network]\nrank = true\n", "run.toml, line 2: rank = true: expected a whole number above 0"),
        ("[network]\nrnak = 8\n", "run.toml, line 2: rnak = 8: there is no such option; did you mean rank?"),
        ("rank = 8\n", "run.toml, line 1: rank = 8: there is no such option; did you mean [network] rank?"),
        ("[netwrk]\nrank = 8\n", "run.toml, line 1: [netwrk]: there is no such section; did you mean [network]?"),
        ("[zzz]\n", "run.toml, line 1: [zzz]: there is no such option; `lorasmith COMMAND --help` lists them all"),
        ('data.images = ""\n', 'run.toml, line 1: images = "": expected a path'),
        (
            'optimizer = "adamw"\n',
            'run.toml, line 1: optimizer = "adamw": this is a section; '
            "write [optimizer], and its options in the lines below",
        ),
        (
            '[samples]\nprompts = [\n  "a",\n  3,\n]\nguidance = 1\n',
            'run.toml, line 2: prompts = [ "a", 3, ]: expected a list of texts',
        ),
        (
            "[data]\nflip = true\ncolor\n",
            "run.toml, line 3: this is not TOML: Expected '=' after a key in a key/value pair.",
        ),
        ("[data]\nimages = photos\n", "run.toml, line 2: this is not TOML: Invalid value; a text stands in quotes."),
        ('[data]\nimages = "a', "run.toml, line 2: this is not TOML: Unterminated string."),
        (
            '[data]\nimages = "C:\\photos"\n',
            "run.toml, line 2: this is not TOML: Unescaped '\\' in a string; "
            "write Windows paths with / or in 'single quotes'.",
        ),
        ("a = 1\na = 2\n", "run.toml, line 2: this is not TOML: Cannot overwrite a value."),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_line(tmp_path: Path, text: str, line: str) -> None:
    assert mistakes_in_file(tmp_path, text) == [line]


def test_validators_speak_for_themselves() -> None:
    with pytest.raises(UserError, match=r"\Awhole = 7 is refused; take 6\Z"):
        build(Every, {"whole": "7"})


# ---- TOML ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no such file"), ("folder", "can be read"), (b"a = '\xff'", "expected text in UTF-8")],
)
def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "run.toml"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"run.toml: .*{message}") as caught:
        load_toml(path)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbfa = 1\r\n")
    assert load_toml(path) == {"a": 1}


_scalars = st.text() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.booleans()
_tables = st.dictionaries(st.text(min_size=1), _scalars | st.lists(_scalars, max_size=3), max_size=4)


@given(values=st.dictionaries(st.text(min_size=1), _scalars | _tables, max_size=5))
def test_what_is_dumped_is_loaded_again(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "dumped.toml"
    path.write_text(dump_toml(values), encoding="utf-8", newline="")
    assert load_toml(path) == values


def test_none_is_left_out_of_a_dump() -> None:
    assert dump_toml({"a": None, "b": {"c": None, "d": 1}}) == "[b]\nd = 1\n"


def test_a_whole_configuration_survives_a_file(tmp_path: Path) -> None:
    cfg = build(TrainConfig, {"data": {"images": "a b", "resolution": "448,640"}, "samples": {"prompts": ["a", "b"]}})
    path = tmp_path / "run.toml"
    path.write_text(dump_toml(cfg.model_dump(mode="json")), encoding="utf-8")
    assert build(TrainConfig, {}, path) == cfg


def test_the_schema_is_json_and_closed() -> None:
    for command in COMMANDS.values():
        schema = json.loads(json.dumps(command.model_json_schema()))
        assert schema["additionalProperties"] is False
        assert all(part["additionalProperties"] is False for part in schema.get("$defs", {}).values())
