"""Command lines for a person to copy."""


def quoted(word: object) -> str:
    """Return a word of a command line as it can be pasted into a shell, on Windows too."""
    text = str(word)
    return f'"{text}"' if " " in text or not text else text
