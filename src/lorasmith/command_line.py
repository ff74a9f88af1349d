"""What is shown in a terminal: command lines for a person to copy, and text that does nothing to the terminal."""

_SPECIAL = frozenset(" ;&|<>()*?#'`\t")  # what a shell takes for something else


def quoted(word: object) -> str:
    """Return a word of a command line as it can be pasted into a shell, on Windows too."""
    text = str(word)
    return f'"{text}"' if _SPECIAL.intersection(text) or not text else text


def harmless(text: str) -> str:
    """Return a line of which nothing moves the cursor, changes colours or turns the direction of writing around.

    What would is spelled out: `\\x1b`, `\\u202e`.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
