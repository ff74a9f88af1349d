"""What a script of sd-scripts takes, as data: one `Flag` an option, one `Script` a script."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from lorasmith.config import COMMANDS, Option, options

Kind = Literal["text", "path", "integer", "number", "switch"]
Values = Mapping[str, Any]  # of old options, by name without dashes; or of lorasmith's, by place: "network.rank"


@dataclass(frozen=True)
class Flag:
    """An option of an old script: it has a place, or a note, or a refusal, or `Script.complete` sees to it.

    name: as it is typed, "--network_dim"; without dashes it is a word that stands for itself, "train_data_dir".
    place: the option of the command that takes the value: "network.rank", or "lora" of a command without sections.
    kind: what is typed; a path may be written with backslashes. many: any number of them.
    value: what a switch puts there. convert: makes of what was typed what the option takes, None as if it were left
        out; a ValueError of it is told.
    default: what the option gets if it is left out, where lorasmith would take something else.
    note: one sentence for who gives it: why nothing needs doing, or what is different. refusal: why it cannot be given.
    becomes: words for the page: what `Script.complete` makes of it, or where it comes from.
    is_optional: for a word, that it may be left out.
    needs: keys of options without any of which it does nothing, so that it is left out with a note.
    """

    name: str
    place: str = ""
    kind: Kind = "text"
    many: bool = False
    choices: tuple[str, ...] = ()
    value: Any = True
    convert: Callable[[Any], Any] | None = None
    default: Any = None
    note: str = ""
    refusal: str = ""
    becomes: str = ""
    is_optional: bool = False
    needs: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return self.name.lstrip("-")

    def is_idle(self, given: Values) -> bool:
        """Return whether it does nothing, for lack of the options that it needs."""
        return bool(self.needs) and not any(given.get(name) for name in self.needs)


@dataclass(frozen=True)
class Script:
    """An old script.

    name: its path in the repository. command: the command of lorasmith that does its work.
    complete: what takes more than one old option to say, as values by place; None is no value. It is given the old
        options, like all below, and raises a UserError for what cannot be meant together.
    idle: which of the given do nothing beside the others, so that they are left out, and why, to follow "does nothing".
    notes: what is worth a line besides the notes of single flags.
    check: raises a UserError if what is given is not what the files are.
    instead: what to run in place of the command, for what only the script does; None: the command.
    differences: what is otherwise than in sd-scripts, for the page.
    """

    name: str
    command: str
    flags: tuple[Flag, ...]
    complete: Callable[[Values], Values] = lambda given: {}
    notes: Callable[[Values], Sequence[str]] = lambda given: ()
    check: Callable[[Values], None] = lambda given: None
    instead: Callable[[Values], Callable[[], int] | None] = lambda given: None
    idle: Callable[[Values], Mapping[str, str]] = lambda given: {}
    has_config_file: bool = False
    differences: tuple[str, ...] = ()

    def options(self) -> dict[str, Option]:
        """Return the options of the command by place."""
        return _options_by_place(self.command)


@cache
def _options_by_place(command: str) -> dict[str, Option]:
    return {".".join(option.place): option for option in options(COMMANDS[command])}


def as_path(text: str) -> str:
    """Return a path that may be typed as on Windows as this system has it: ..\\model\\a.ckpt as ../model/a.ckpt."""
    if os.sep == "/" and "\\" in text and not Path(text).exists():
        return text.replace("\\", "/")
    return text
