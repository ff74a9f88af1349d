"""Runs an old command line: tells what it is in lorasmith, as a command and as TOML, and then does that.

python networks/merge_lora.py --sd_model model.ckpt --save_to merged.safetensors --models last.safetensors --ratios 0.8
python -m lorasmith.compat networks/merge_lora.py ...        # the same without a clone of the repository
"""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from lorasmith import cli
from lorasmith.command_line import quoted
from lorasmith.compat.scripts import SCRIPTS
from lorasmith.compat.table import Flag, Kind, Script, Values, as_path
from lorasmith.config import dump_toml, load_toml
from lorasmith.errors import UserError

_CONFIG_FILE = Flag("--config_file", kind="path")


def main(name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a script's command line (sys.argv's, unless given) and return the exit code."""
    script = SCRIPTS[name]
    words = list(sys.argv[1:] if arguments is None else arguments)
    return cli.guarded(partial(_run, script, words), script.command)


def _run(script: Script, arguments: list[str]) -> int:
    if {"-h", "--help"}.intersection(arguments):
        print(_parser(script).format_help(), end="")
        return 0
    given = read(script, arguments)
    values = translate(script, given)
    script.check(given)
    work = script.instead(given)
    if not cli.is_later_process():
        print(page(script, given, values, is_run=work is None), flush=True)
    try:
        return cli.run(script.command, words_of(script, values)) if work is None else work()
    except UserError as error:
        raise type(error)(_in_old_words(script, str(error))) from error


# ---- what is typed -------------------------------------------------------------------------------------------------


def read(script: Script, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the old options that are given, on the command line or in its --config_file, by name without dashes.

    Raises:
        UserError: an option is unknown, refused or cannot take the value; or the file cannot be read.
    """
    parser = _parser(script)
    given = _parse(parser, script, arguments)
    if file := given.pop(_CONFIG_FILE.key, None):
        path = Path(file if file.endswith(".toml") else f"{file}.toml")
        given = _parse(parser, script, [*_words_in(script, path), *arguments])
        given.pop(_CONFIG_FILE.key)
    flags = {flag.key: flag for flag in script.flags}
    for key, value in given.items():
        if (refusal := flags[key].refusal) and value not in ("", []):  # which a user interface may write down
            raise UserError(f"{flags[key].name} is refused: {refusal}")
    return given


def _parse(parser: argparse.ArgumentParser, script: Script, arguments: Sequence[str]) -> dict[str, Any]:
    flags = {
        flag.name: flag for flag in (*script.flags, *[_CONFIG_FILE] * script.has_config_file) if flag.name[0] == "-"
    }
    found, unknown = parser.parse_known_args([_in_full(flags, word) for word in arguments])
    if unknown:
        raise UserError(_unknown(script, unknown[0], list(flags)))
    return vars(found)


def _in_full(flags: Mapping[str, Flag], word: str) -> str:
    """Return a word with an abbreviated name in full: what only one option begins with, or several of one place.

    argparse would take `--caption_ext` for ambiguous, since sd-scripts also knows its old misspelling of that option.
    """
    name, equals, value = word.partition("=")
    meant = [flag for flag in flags.values() if flag.name.startswith(name)]
    if not name.startswith("--") or name in ("--", *flags) or not meant:
        return word
    if len({flag.place or flag.name for flag in meant}) > 1:
        names = ", ".join(flag.name for flag in meant)
        raise UserError(f"{name} is short for several options: {names}; write more of it.")
    return f"{meant[0].name}{equals}{value}"


def _unknown(script: Script, word: str, names: Sequence[str]) -> str:
    if not word.startswith("-"):
        return f"{word!r} belongs to no option of {script.name}; a value with spaces needs quotes."
    name = word.partition("=")[0]
    near = difflib.get_close_matches(name.replace("-", "_").replace("__", "--", 1), names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"`python {script.name} --help` lists them all."
    return f"{script.name} has no option {name}; {hint}"


class _Parser(argparse.ArgumentParser):
    """Tells mistakes as all others are told here."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace("the following arguments are required", "missing")
        raise UserError(f"{message}; `python {self.prog} --help` says what it takes.")


def _parser(script: Script) -> argparse.ArgumentParser:
    """Return a parser as the script had it, which takes --name value and --name=value."""
    parser = _Parser(
        prog=script.name,
        description=f"This is `lorasmith {script.command}` under the options that sd-scripts has for it.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
        epilog="docs/sd-scripts.md says more.",
    )
    for flag in script.flags:
        _add(parser, flag, told(script, flag))
    if script.has_config_file:
        _add(parser, _CONFIG_FILE, "Options in a TOML file; the command line wins.")
    return parser


def _add(parser: argparse.ArgumentParser, flag: Flag, text: str) -> None:
    text = text.replace("`", "").replace("%", "%%")
    if flag.kind == "switch":
        parser.add_argument(flag.name, action="store_true", help=text)
        return
    many: dict[str, Any] = {"nargs": "*"} if flag.many else {"nargs": "?"} if flag.is_optional else {}
    metavar: dict[str, Any] = {} if flag.choices or flag.name[0] != "-" else {"metavar": flag.kind.upper()}
    parser.add_argument(
        flag.name, type=partial(_read, flag.kind), choices=flag.choices or None, help=text, **many, **metavar
    )


_READERS: dict[Kind, Callable[[str], Any]] = {"text": str, "path": as_path, "integer": int, "number": float}
_EXPECTED: dict[Kind, str] = {
    "text": "a text", "path": "a path", "integer": "a whole number", "number": "a number", "switch": "true or false",
}  # fmt: skip


def _read(kind: Kind, text: str) -> Any:
    try:
        return _READERS[kind](text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {_EXPECTED[kind]}, not {text!r}") from None


def _words_in(script: Script, path: Path) -> list[str]:
    """Return the options of a TOML file as words of a command line; its sections are of no meaning, as ever.

    Raises:
        UserError: the file cannot be read, or a name in it is unknown (which sd-scripts passes over).
    """
    flags = {flag.key: flag for flag in script.flags if flag.name[0] == "-"}
    flat: dict[str, Any] = {}
    for name, value in load_toml(path).items():
        flat |= value if isinstance(value, dict) else {name: value}
    words: list[str] = []
    for name, value in flat.items():
        if name not in flags:
            near = difflib.get_close_matches(name, flags, n=1)
            hint = f"did you mean {near[0]}?" if near else "check the spelling."
            raise UserError(f"{path}: {script.name} has no option {name}; {hint}")
        words += _words_for(flags[name], value, path)
    return words


def _words_for(flag: Flag, value: Any, path: Path) -> list[str]:
    if isinstance(value, dict) or (flag.kind == "switch") != isinstance(value, bool):
        raise UserError(f"{path}: {flag.key} = {value!r}: expected {_EXPECTED[flag.kind]}.")
    if flag.kind == "switch":
        return [flag.name] if value else []
    if flag.many:
        return [flag.name, *map(str, value if isinstance(value, list) else [value])]
    return [f"{flag.name}={','.join(map(str, value)) if isinstance(value, list) else value}"]


# ---- what it is in lorasmith ---------------------------------------------------------------------------------------


def translate(script: Script, given: Values) -> dict[str, Any]:
    """Return the values of the command's options by place, in the order in which the command has them.

    Raises:
        UserError: two old options say different things of one, or a value cannot be converted.
    """
    idle = script.idle(given)
    given = {name: value for name, value in given.items() if name not in idle}
    values: dict[str, Any] = dict(script.complete(given))
    source: dict[str, Flag] = {}
    for flag in script.flags:
        if not flag.place or given.get(flag.key) is None or flag.is_idle(given):
            continue
        value = _converted(flag, given[flag.key])
        if value is None:
            continue
        if values.setdefault(flag.place, value) != value:
            other = source[flag.place].name if flag.place in source else "another option"
            raise UserError(f"{flag.name} and {other} contradict each other; leave out one of them.")
        source[flag.place] = flag
    for flag in script.flags:
        if flag.default is not None:
            values.setdefault(flag.place, flag.default)
    return {place: values[place] for place in script.options() if values.get(place) is not None}


def _converted(flag: Flag, typed: Any) -> Any:
    value = flag.value if flag.kind == "switch" else typed
    try:
        return flag.convert(value) if flag.convert else value
    except ValueError as error:
        raise UserError(f"{flag.name} {typed}: {error}") from error


def page(script: Script, given: Values, values: Values, *, is_run: bool = True) -> str:
    """Return what is told before the work begins: notes on what was given, and the command line and TOML for it."""
    notes = [f"{flag.name}: {flag.note}" for flag in script.flags if flag.note and flag.key in given]
    notes += [
        f"{flag.name} does nothing without {' or '.join(f'--{name}' for name in flag.needs)}, and is left out"
        for flag in script.flags
        if flag.key in given and flag.is_idle(given)
    ]
    notes += [f"--{name} does nothing {reason}, and is left out" for name, reason in script.idle(given).items()]
    line = " ".join(["lorasmith", script.command, *map(quoted, words_of(script, values))])
    what = "the same in lorasmith's own words" if is_run else "what lorasmith has for this, with another result"
    name = f"{script.command}.toml"
    return "\n".join(
        [
            *(f"note: {note}" for note in [*script.notes(given), *notes]),
            f"{script.name}: {what}, as a command line (docs/sd-scripts.md):",
            line,
            f"# or lorasmith {script.command} --config {name}, with this in {name}:",
            dump_toml(nested(values)).rstrip(),
            f"# the end of {name}",
        ]
    )


def words_of(script: Script, values: Values) -> list[str]:
    """Return the words of the command line of the command that takes these values."""
    options, words, first = script.options(), list[str](), list[str]()
    for place, value in values.items():
        option = options[place]
        if isinstance(value, bool):
            words.append(option.flag if value else f"--no-{option.flag.removeprefix('--')}")
        elif isinstance(value, list):
            words += [option.flag, *map(str, value)]
        elif option.positional and not str(value).startswith("-"):
            first.append(str(value))
        else:
            words += [f"{option.flag}={value}"] if str(value).startswith("-") else [option.flag, str(value)]
    return [*first, *words]


def nested(values: Values) -> dict[str, Any]:
    """Return values by place as a file of options has them, {"network": {"rank": 8}}."""
    found: dict[str, Any] = {}
    for place, value in values.items():
        section, _, name = place.rpartition(".")
        (found.setdefault(section, {}) if section else found)[name] = value
    return found


def told(script: Script, flag: Flag) -> str:
    """Return what becomes of an old option, for a person."""
    if flag.refusal:
        return f"refused: {flag.refusal}"
    option = script.options()[flag.place] if flag.place else None
    target = f"`{option.positional or option.flag}`{_shown_value(flag)}" if option else ""
    default = "" if flag.default is None else f"left out: `{flag.default}`"
    return "; ".join(filter(None, [target, flag.becomes, default, flag.note]))


def _shown_value(flag: Flag) -> str:
    if flag.kind != "switch" or flag.value is True:
        return ""
    return " off" if flag.value is False else f" `{flag.value}`"


def _in_old_words(script: Script, message: str) -> str:
    """Return a message of the command with the names of options that the user knows."""
    options = script.options()
    old: Mapping[str, str] = {options[f.place].flag: f.name for f in script.flags if f.place}
    return re.sub(r"(?<![\w-])--[\w-]+", lambda found: old.get(found[0], found[0]), message)
