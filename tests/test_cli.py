"""The command line as a user meets it: spellings, help, exit codes, and no torch before a command runs."""

import errno
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import Field

import lorasmith
from lorasmith import cli, config
from lorasmith.config import COMMANDS, Section, TrainConfig
from lorasmith.errors import UserError


class Spy(ModuleType):
    """Stands in for `lorasmith.commands.train`, keeps what it is given and does what it is told."""

    def __init__(self) -> None:
        super().__init__("lorasmith.commands.train")
        self.cfg: TrainConfig | None = None
        self.outcome: int | BaseException = 0

    def run(self, cfg: TrainConfig) -> int:
        self.cfg = cfg
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spy]:
    spy = Spy()
    monkeypatch.setitem(sys.modules, "lorasmith.commands.train", spy)
    yield spy


def given(spy: Spy, *arguments: str) -> dict[str, Any]:
    """Return what counts as given after `lorasmith train ARGUMENTS`."""
    assert cli.main(["train", *arguments]) == 0
    assert spy.cfg is not None
    return spy.cfg.model_dump(exclude_unset=True, mode="json")


def test_without_options_nothing_is_given(train: Spy) -> None:
    assert given(train) == {}


@pytest.mark.parametrize(
    "flag", ["--learning-rate", "--learning_rate", "--optimizer.learning-rate", "--optimizer.learning_rate"]
)
@pytest.mark.parametrize("joint", [" ", "="])
def test_an_option_has_a_short_and_a_long_name_with_dashes_or_underscores(train: Spy, flag: str, joint: str) -> None:
    assert given(train, *f"{flag}{joint}0.5".split()) == {"optimizer": {"learning_rate": 0.5}}


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--random-crop", True), ("--no-random-crop", False), ("--no_random_crop", False),
     ("--data.no-random-crop", False), ("--no-data.random-crop", False)],
)  # fmt: skip
def test_what_is_on_or_off_is_said_with_or_without_no(train: Spy, flag: str, value: bool) -> None:
    assert given(train, flag) == {"data": {"random_crop": value}}


class Positionals(Section):
    """A command with words that need no option."""

    folder: Path | None = Field(default=None, description="Folder.", json_schema_extra={"positional": "DIR"})
    files: list[str] = Field(default_factory=list, description="Files.", json_schema_extra={"positional": "FILE"})
    rank: int = Field(default=1, description="Rank.")
    is_on: bool = Field(default=False, description="On.")


@pytest.fixture
def words(train: Spy, monkeypatch: pytest.MonkeyPatch) -> Spy:
    monkeypatch.setitem(COMMANDS, "train", Positionals)
    return train


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("photos", {"folder": "photos"}),
        ("--folder photos", {"folder": "photos"}),
        ("--is-on photos", {"folder": "photos", "is_on": True}),
        ("--rank 3 photos --is-on", {"folder": "photos", "rank": 3, "is_on": True}),
        ("photos a b", {"folder": "photos", "files": ["a", "b"]}),
        ("photos a --rank 3 b", {"folder": "photos", "files": ["a", "b"], "rank": 3}),
        ("--files a b --folder photos", {"folder": "photos", "files": ["a", "b"]}),
    ],
)
def test_words_without_an_option_go_where_the_command_expects_them(
    words: Spy, arguments: str, expected: dict[str, Any]
) -> None:
    assert given(words, *arguments.split()) == expected


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("a --folder b", "'a' and --folder both say what DIR is; leave out one."),
        ("photos --rnak 8", "there is no option --rnak; did you mean --rank?"),
    ],
)
def test_a_word_too_many_is_told(words: Spy, capsys: pytest.CaptureFixture[str], arguments: str, line: str) -> None:
    assert cli.main(["train", *arguments.split()]) == 2
    assert capsys.readouterr().err == f"lorasmith: {line}\n"


def test_help_shows_the_words_that_need_no_option(words: Spy, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("usage: lorasmith train DIR FILE... [options]\n")
    assert "--folder DIR" in told


_VALUES = {
    "integer": "8", "number": "0.5", "text": "x", "path": "a/b", "list": "x", "size": "448,640", "range": "2,4",
    "color": "#ff8000", "numbers": "1 " * 25, "max_token_length": "150", "lr_table": "1:5,0.1", "trackers": "wandb",
}  # fmt: skip


@pytest.mark.parametrize("option", config.options(TrainConfig), ids=lambda option: option.name)
def test_every_option_can_be_given_in_both_spellings_and_reaches_its_place(
    train: Spy, monkeypatch: pytest.MonkeyPatch, option: config.Option
) -> None:
    monkeypatch.setattr("lorasmith.config.training.contradictions", lambda cfg: [])
    value = option.choices[-1] if option.choices else _VALUES.get(option.name, _VALUES.get(option.kind, ""))
    words = [] if option.kind == "boolean" else value.split()
    short = given(train, option.flag, *words)
    assert given(train, f"--{'.'.join(option.place)}", *words) == short
    for part in option.place:
        assert list(short) == [part]
        short = short[part]
    assert short is not None


def test_an_option_takes_several_prompts_up_to_the_next_option(train: Spy) -> None:
    assert given(train, "--prompts", "a cat", "a dog", "--rank", "8") == {
        "samples": {"prompts": ["a cat", "a dog"]},
        "network": {"rank": 8},
    }


def test_the_command_line_wins_over_the_file(train: Spy, tmp_path: Any) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[network]\nrank = 8\nalpha = 4\n", encoding="utf-8")
    assert given(train, "--config", str(file), "--rank", "2") == {"network": {"rank": 2, "alpha": 4.0}}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "there is no command trian; did you mean train?"),
        (["zzz"], f"there is no command zzz; there are: {', '.join(COMMANDS)}, schema."),
        (["train", "--rnak", "8"], "there is no option --rnak; did you mean --rank?"),
        (["train", "--netwrk.rank=8"], "there is no option --netwrk.rank; did you mean --rank?"),
        (["train", "--no-filp"], "there is no option --no-filp; did you mean --flip?"),
        (["train", "--qqqqqq"], "there is no option --qqqqqq; `lorasmith train --help` lists them all."),
        (["train", "--ran", "8"], "there is no option --ran; did you mean --rank?"),
        (["train", "--rank"], "--rank: expected one argument; `lorasmith train --help` says what it takes."),
        (
            ["train", "my", "--images", "photos"],
            "'my' belongs to no option; a value with spaces needs quotes, and an option begins with --.",
        ),
        (["train", "--rank", "abc"], "--rank abc: expected a whole number above 0"),
        (["train", "--steps", "-3"], "--steps -3: expected a whole number above 0"),
        (["train", "--config", "absent.toml"], "absent.toml: there is no such file; check the path."),
        (["schema"], f"schema: expected one command: {', '.join(COMMANDS)}. For example: lorasmith schema train"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    train: Spy, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    assert cli.main(arguments) == 2
    assert train.cfg is None
    assert capsys.readouterr() == ("", f"lorasmith: {line}\n")


@pytest.mark.parametrize("code", [0, 130, 143])
def test_a_commands_exit_code_is_the_programs(train: Spy, code: int) -> None:
    train.outcome = code
    assert cli.main(["train"]) == code


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (UserError("no pictures\ngive some"), 2, "lorasmith: no pictures\nlorasmith: give some\n"),
        (KeyboardInterrupt(), 130, "lorasmith: stopped by Ctrl+C\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "out/loss.jsonl"),
            2,
            "lorasmith: out/loss.jsonl: no right to open or write it; change its rights, or choose another place "
            "(Permission denied).\n",
        ),
    ],
)
def test_what_a_user_did_is_told_without_a_traceback(
    train: Spy, capsys: pytest.CaptureFixture[str], outcome: BaseException, code: int, message: str
) -> None:
    train.outcome = outcome
    assert cli.main(["train"]) == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(("rank", "processes", "is_told"), [("0", "2", True), ("1", "2", False), ("1", "1", True)])
def test_of_several_processes_the_first_tells_a_mistake(
    train: Spy,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: str,
    processes: str,
    is_told: bool,
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", processes)
    assert cli.main(["train", "--rnak", "8"]) == 2
    assert ("there is no option --rnak" in capsys.readouterr().err) == is_told
    train.outcome = ZeroDivisionError("division by zero")  # of this process alone
    assert cli.main(["train"]) == 1
    assert "this is a bug in lorasmith" in capsys.readouterr().err


@pytest.mark.parametrize("bug", [ZeroDivisionError("division by zero"), FileNotFoundError(errno.ENOENT, "gone", "x")])
def test_a_bug_keeps_its_traceback_and_is_called_one(
    train: Spy, capsys: pytest.CaptureFixture[str], bug: Exception
) -> None:
    train.outcome = bug
    assert cli.main(["train"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2] == f"{type(bug).__name__}: {bug}"
    assert lines[-1].startswith("lorasmith: this is a bug in lorasmith")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lorasmith {lorasmith.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli.main(arguments) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == [*COMMANDS, "schema"]


def test_help_of_a_command_shows_sections_defaults_and_choices(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["train", "--rank", "abc", "--help"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert [line[:-1] for line in lines if line.endswith(":")] == [
        "general",
        *filter(None, config.sections(TrainConfig)),
    ]
    assert "--rank N Rank of the LoRA: more can express more and costs memory. [default: 4]" in lines
    assert "--train {both,unet,text_encoder}" in lines
    assert any(line.startswith("--flip, --no-flip Mirror half") and line.endswith("[default: off]") for line in lines)
    flags = [line.split(",")[0].split(" ")[0] for line in lines if line.startswith("--")]
    assert flags == ["--config", *(option.flag for option in config.options(TrainConfig))]


def test_schema_prints_the_models_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema", "train"]) == 0
    assert json.loads(capsys.readouterr().out) == TrainConfig.model_json_schema()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["schema", "train"], ["train", "--rnak"]])
def test_torch_is_not_imported_to_answer(arguments: list[str]) -> None:
    program = f"import sys; from lorasmith.cli import main; main({arguments!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_the_module_runs_as_a_program_and_a_closed_pipe_is_no_bug() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "lorasmith", "schema", "train"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as program:
        assert program.stdout is not None and program.stderr is not None
        program.stdout.close()
        assert (program.stderr.read(), program.wait()) == (b"", 141)
