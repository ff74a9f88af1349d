"""Writes docs/options.md, docs/schema/*.json, and the tables of docs/dataset-config.md and docs/sd-scripts.md from the
code: `make docs`.
"""

import json
from pathlib import Path
from typing import Any

from lorasmith import config
from lorasmith.compat import entry
from lorasmith.compat.scripts import SCRIPTS
from lorasmith.compat.table import Flag, Script
from lorasmith.config import COMMANDS, Option, Section
from lorasmith.data.dataset_config import KEYS, Key

ROOT = Path(__file__).resolve().parent.parent
_INTRODUCTION = """\
# Options

Made from `src/lorasmith/config/` by `make docs`; change the options there.

Options are given on the command line (`--rank 8`, or with the section, `--network.rank 8`; dashes and underscores are
the same) or in a TOML file (`--config run.toml`), where the command line wins:

```toml
[network]
rank = 8

[data]
images = "photos"
resolution = [448, 640]
```

What may be on or off is `--flip` or `--no-flip`, and `flip = true` or `flip = false` in a file.
`lorasmith schema train` prints the same as JSON Schema, which also lies in `docs/schema/`.
"""


def pages() -> dict[Path, str]:
    """Return the text of each generated file by its path."""
    schemas = {
        ROOT / "docs" / "schema" / f"{name}.json": json.dumps(model.model_json_schema(), indent=2) + "\n"
        for name, model in COMMANDS.items()
    }
    options = "\n".join([_INTRODUCTION, *(_command(name, model) for name, model in COMMANDS.items())])
    dataset_config, sd_scripts = ROOT / "docs" / "dataset-config.md", ROOT / "docs" / "sd-scripts.md"
    return {
        ROOT / "docs" / "options.md": options,
        dataset_config: _with_keys(dataset_config.read_text(encoding="utf-8")),
        sd_scripts: _with_scripts(sd_scripts.read_text(encoding="utf-8")),
        **schemas,
    }


def _with_keys(text: str) -> str:
    """Return the page about dataset files with its table made anew."""
    before, head, after = text.partition("| key | under | value | else | what it does |\n|---|---|---|---|---|\n")
    return before + head + "".join(f"{_key_row(key)}\n" for key in KEYS.values()) + after[after.index("\n## ") :]


def _key_row(key: Key) -> str:
    under = "any" if len(key.levels) == 3 else " or ".join(f"`{level}`" for level in key.levels)
    values = " or ".join(f"`{json.dumps(value)}`" for value in key.only) if key.only else key.expected
    option = f"`--{key.option.replace('_', '-')}`" if key.option else ""
    return f"| `{key.name}` | {under} | {values} | {option} | {key.help.replace('|', chr(92) + '|')} |"


def _with_scripts(text: str) -> str:
    """Return the page about sd-scripts' command lines with its tables made anew."""
    before, head, _ = text.partition("## The scripts\n")
    by_flags: dict[tuple[Flag, ...], list[Script]] = {}
    for script in SCRIPTS.values():
        by_flags.setdefault(script.flags, []).append(script)
    return before + head + "".join(map(_script, by_flags.values()))


def _script(alike: list[Script]) -> str:
    script, names = alike[0], ", ".join(one.name for one in alike)
    rows = [f"| `{flag.name}` | {entry.told(script, flag).replace('|', chr(92) + '|')} |" for flag in script.flags]
    lines = [f"### {names}", "", f"`lorasmith {script.command}`", "", "| option | here |", "|---|---|", *rows]
    differences = [f"- {difference}" for difference in script.differences]
    return "\n".join(["", *lines, *([""] if differences else []), *differences, ""])


def _command(name: str, model: type[Section]) -> str:
    lines = [f"## lorasmith {name}", "", config.sections(model)[""], ""]
    for section, title in config.sections(model).items():
        rows = [_row(option) for option in config.options(model) if option.section == section]
        if section:
            lines += [f"### {name}: [{section}]", "", title, ""]
        if rows:
            lines += ["| option | value | default | |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _row(option: Option) -> str:
    expected = "on or off" if option.kind == "boolean" else option.expected
    name = f"`{option.flag}`" + (f" or `{option.positional}`" if option.positional else "")
    cells = [name, expected, _default(option.default), option.help]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(value: Any) -> str:
    if value in (None, "", []):
        return ""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else f"`{value}`"


def main() -> None:
    for path, text in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
