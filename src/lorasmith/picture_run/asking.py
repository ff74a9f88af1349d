"""Prompts that are typed while the model stays loaded, one after the other."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lorasmith.command_line import harmless
from lorasmith.errors import UserError


def asked_prompts() -> Iterator[str]:
    """Yield each line that is typed or piped in, until an empty one or the end (Ctrl+D; on Windows Ctrl+Z, Enter).

    On a terminal lines can be edited, and earlier ones come back with the arrow keys, where Python has readline.
    """
    with suppress(ImportError):
        import readline  # noqa: F401  (input() then edits lines with it, and keeps those of this session)
    while True:
        try:
            line = input("prompt: ").strip()
        except EOFError:
            print()
            return
        if not line:
            return
        yield line


@contextmanager
def telling_of_mistakes() -> Iterator[None]:
    """Print what cannot be meant, instead of ending with it."""
    try:
        yield
    except UserError as error:
        print(f"lorasmith: {harmless(str(error))}", file=sys.stderr, flush=True)
