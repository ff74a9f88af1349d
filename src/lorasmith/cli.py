"""The command line: `lorasmith COMMAND [options]`.

Parsers are made from the models in `config/`, so an option is written once. A command's module, and with it torch, is
imported only when the command runs.
"""

import argparse
import difflib
import errno
import importlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lorasmith
from lorasmith import config
from lorasmith.command_line import harmless
from lorasmith.config import COMMANDS, Option, Section
from lorasmith.errors import FullDisk, UserError

_SCHEMA = "schema"
_SCHEMA_HELP = "Print the JSON Schema of a command's options."
# What fails outside of the program, and what to do; any other OSError is taken for a bug of ours.
_NO_SPACE = "the disk is full; make room and start again, or save elsewhere"
_OUTSIDE = {
    errno.ENOSPC: _NO_SPACE,
    errno.EDQUOT: _NO_SPACE,
    errno.EFBIG: "the file grows larger than is allowed here; save elsewhere, or raise the limit (ulimit -f)",
    errno.EACCES: "no right to open or write it; change its rights, or choose another place",
    errno.EPERM: "no right to open or write it; change its rights, or choose another place",
    errno.EROFS: "the place cannot be written to; choose another",
    errno.EIO: "the disk or the network drive failed; check it, or use another",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}
_METAVARS = {
    "integer": "N", "number": "X", "text": "TEXT", "path": "PATH", "list": "TEXT", "size": "W,H", "range": "A,B",
    "color": "COLOR", "numbers": "X",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (sys.argv's, unless given) and return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(partial(_dispatch, arguments), next(iter(arguments), ""))


def guarded(work: Callable[[], int], command: str) -> int:
    """Do the work of a command and return the exit code; whatever ends it is told to a person."""
    try:
        code = work()
        sys.stdout.flush()
    except FullDisk as error:
        return _fail(f"{error}{_going_on(command)}", 2)
    except UserError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("stopped by Ctrl+C", 130)
    except BrokenPipeError:  # `lorasmith train --help | head`: nobody reads on, which is no mistake
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in _OUTSIDE:
            return _bug()
        where = f"{error.filename}: " if error.filename else ""
        hint = _going_on(command) if _OUTSIDE[error.errno] == _NO_SPACE else ""
        return _fail(f"{where}{_OUTSIDE[error.errno]} ({error.strerror}).{hint}", 2)
    except Exception:
        return _bug()
    return code


def _going_on(command: str) -> str:
    """Return a sentence for a command that need not begin anew."""
    model = COMMANDS.get(command)
    can_resume = model is not None and any(option.flag == "--resume" for option in config.options(model))
    return " What was begun goes on with --resume." if can_resume else ""


def _bug() -> int:
    traceback.print_exc()
    return _fail("this is a bug in lorasmith, not a mistake of yours; please report it with the lines above.", 1)


def _fail(message: str, code: int) -> int:
    """Tell why the program ends; of a mistake that all processes of a run meet, the first one tells."""
    if code == 2 and is_later_process():
        return code
    for line in message.splitlines():
        print(f"lorasmith: {harmless(line)}", file=sys.stderr)
    return code


def is_later_process() -> bool:
    """Whether a launcher (torchrun, accelerate) started this process as another than its first."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0"


def _dispatch(arguments: list[str]) -> int:
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help"):
        print(_overview())
    elif command == "--version":
        print(f"lorasmith {lorasmith.__version__}")
    elif command == _SCHEMA:
        print(_schema(rest))
    elif command in COMMANDS:
        return run(command, rest)
    else:
        near = difflib.get_close_matches(command, [*COMMANDS, _SCHEMA], n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join([*COMMANDS, _SCHEMA])}."
        raise UserError(f"there is no command {command}; {hint}")
    return 0


def _overview() -> str:
    commands = {name: config.sections(model)[""] for name, model in COMMANDS.items()} | {_SCHEMA: _SCHEMA_HELP}
    return "\n".join(
        [
            "usage: lorasmith COMMAND [options]",
            "",
            *(f"  {name:<10}{title}" for name, title in commands.items()),
            "",
            "lorasmith COMMAND --help lists a command's options, lorasmith --version tells the version.",
        ]
    )


def _schema(arguments: list[str]) -> str:
    if len(arguments) != 1 or arguments[0] not in COMMANDS:
        raise UserError(f"schema: expected one command: {', '.join(COMMANDS)}. For example: lorasmith schema train")
    return json.dumps(COMMANDS[arguments[0]].model_json_schema(), indent=2, ensure_ascii=False)


def run(name: str, arguments: Sequence[str]) -> int:
    """Run a command with the options that are given to it.

    Raises:
        UserError: they cannot be meant, or the command ends with one.
    """
    command = COMMANDS[name]
    parser = parser_of(name, command)
    given = vars(_parse(parser, command, arguments))
    if given.pop("help"):
        print(parser.format_help(), end="")
        return 0
    file = given.pop("config")
    file = file and file.expanduser()
    cfg = config.build(command, _nested(given), file)
    return importlib.import_module(f"lorasmith.commands.{name}").run(cfg)


def parser_of(name: str, command: type[Section]) -> argparse.ArgumentParser:
    """Return a command's parser; it only gathers what was given, as text, and leaves all checks to the model."""
    options = config.options(command)
    words = [_shown(option) for option in options if option.positional]
    parser = argparse.ArgumentParser(
        prog=f"lorasmith {name}",
        usage=" ".join(["%(prog)s", *words, "[options]"]),
        description=f"{config.sections(command)['']} Every option can also be written with its section, "
        "as in --section.option, and stand in a TOML file.",
        argument_default=argparse.SUPPRESS,
        formatter_class=_Formatter,
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    general = parser.add_argument_group("general")
    general.add_argument("-h", "--help", action="store_true", default=False, help="Show this help.")
    general.add_argument(
        "--config",
        type=Path,
        default=None,
        metavar="PATH",
        help="Read options from this TOML file; the command line wins.",
    )
    titles = config.sections(command)
    groups = {section: parser.add_argument_group(section, titles[section]) for section in titles if section}
    for option in options:
        _add(groups.get(option.section, general), option)
    return parser


def _add(group: Any, option: Option) -> None:
    """Add an option under all its spellings: short or with the section, dashes or underscores."""
    text, dest = _help(option), ".".join(option.place)
    if option.kind == "boolean":
        group.add_argument(*_spellings(option), dest=dest, action="store_true", help=text)
        group.add_argument(*_spellings(option, "no_"), dest=dest, action="store_false", help=argparse.SUPPRESS)
        return
    metavar = f"{{{','.join(option.choices)}}}" if option.choices else option.positional or _METAVARS[option.kind]
    nargs = "*" if option.kind in ("list", "numbers") else None
    group.add_argument(*_spellings(option), dest=dest, metavar=metavar, nargs=nargs, help=text)


def _spellings(option: Option, prefix: str = "") -> list[str]:
    name = prefix + option.name
    dotted = [f"{option.section}.{name}", f"{prefix}{option.section}.{option.name}"] if option.section else []
    spellings = [f"--{form}" for spelling in [name, *dotted] for form in (spelling.replace("_", "-"), spelling)]
    return list(dict.fromkeys(spellings))


def _help(option: Option) -> str:
    default = option.default
    if isinstance(default, bool):
        default = "on" if default else "off"
    is_told = default not in (None, "", [])
    bare = f" [{option.flag} itself may be left out]" if option.positional else ""
    return (option.help + (f" [default: {default}]" if is_told else "") + bare).replace("%", "%%")


class _Formatter(argparse.HelpFormatter):
    """Shows the shortest spelling of each option only."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flag = action.option_strings[0]
        if action.nargs == 0 and flag.startswith("--"):
            return f"{flag}, --no-{flag[2:]}"
        if flag == "-h":
            return "-h, --help"
        return f"{flag} {self._format_args(action, action.dest)}"


_BELOW_ZERO = re.compile(r"-[.\d][-+.\deE,]*", re.ASCII)


def _parse(parser: argparse.ArgumentParser, command: type[Section], arguments: Sequence[str]) -> argparse.Namespace:
    # argparse would take -1,0.5 and -1e-3 for options, but nothing that has a space in it; numbers may have one.
    words = [f" {word}" if _BELOW_ZERO.fullmatch(word) else word for word in arguments]
    try:
        given, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        name = (error.argument_name or "").partition("/")[0]
        raise UserError(f"{name}: {error.message}; `{parser.prog} --help` says what it takes.") from error
    if unknown and not given.help:
        _take_words(parser, command, given, unknown)
    return given


def _take_words(
    parser: argparse.ArgumentParser, command: type[Section], given: argparse.Namespace, words: list[str]
) -> None:
    """Put words without an option where the command expects them: argparse's own positionals must stand together."""
    wrong = next((word for word in words if word.startswith("-")), None)
    left = list(words)
    for option in config.options(command):
        dest = ".".join(option.place)
        if option.positional and left and wrong is None:
            if dest in given:
                raise UserError(f"{left[0]!r} and {option.flag} both say what {option.positional} is; leave out one.")
            setattr(given, dest, left if option.kind == "list" else left.pop(0))
            left = [] if option.kind == "list" else left
    if left:
        raise UserError(_unknown(parser, command, wrong or left[0]))


def _shown(option: Option) -> str:
    return f"{option.positional}..." if option.kind == "list" else option.positional


def _unknown(parser: argparse.ArgumentParser, command: type[Section], word: str) -> str:
    if not word.startswith("-"):
        return f"{word!r} belongs to no option; a value with spaces needs quotes, and an option begins with --."
    flag = word.partition("=")[0]
    near = config.nearest(command, flag.lstrip("-").removeprefix("no-"))
    hint = f"did you mean {near.flag}?" if near else f"`{parser.prog} --help` lists them all."
    return f"there is no option {flag}; {hint}"


def _nested(given: dict[str, Any]) -> dict[str, Any]:
    """Turn {"network.rank": 8} into {"network": {"rank": 8}}."""
    nested: dict[str, Any] = {}
    for place, value in given.items():
        section, _, name = place.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested
