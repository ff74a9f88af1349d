"""kohya-ss/sd-scripts' command lines, run by lorasmith's commands. Nothing outside of this package knows an old name.

How a script is added:

1. Write a module here with a `SCRIPT = Script("train_network.py", "train", flags=(...))`. Each option that the script
   has, or ever had, is one `Flag` (`table.py` says what it can be told): the option of lorasmith that takes its value,
   or a note why nothing needs doing, or the reason why it is refused. What several scripts share is a tuple of flags,
   and `flags=(*MODEL, *DATA, Flag(...))` puts them together.
2. What one flag alone does not decide (`--beam_search` decides whether `--top_p` counts) goes into the script's
   `complete`, a function from the old options that are given to values of options by place.
3. Name the module in `scripts.py`, and put a script of that name at the root of the repository, like the others.
4. `make docs` writes the script's table into docs/sd-scripts.md. Tests: the script's lines as its documents have them,
   through `entry.main`, and what `entry.translate` makes of them against a golden TOML.

A flag whose value sd-scripts takes for granted, and lorasmith does not, has it as its `default`: it is then written
into the TOML. A script that has sd-scripts' `--config_file` says so with `has_config_file=True` and needs nothing else.
"""
