"""What a caption becomes each time its picture is trained: pure text work, with the random generator handed in."""

import random


def process(
    caption: str,
    *,
    rng: random.Random,
    shuffle: bool = False,
    keep_tokens: int = 0,
    separator: str = ",",
    dropout: float = 0.0,
) -> str:
    """Return the caption to train on: empty with probability `dropout`, else with its parts shuffled when asked.

    The order of operations and the joining with ", " are sd-scripts'; without shuffling the text is used untouched.

    Args:
        keep_tokens: how many leading parts stay where they are.
        separator: what divides the caption into parts.
    """
    is_dropped = rng.random() < dropout  # drawn always, so that the rate does not change how parts are shuffled
    if is_dropped:
        return ""
    if not shuffle:
        return caption
    parts = [part.strip() for part in caption.split(separator)]
    parts = [part for part in parts if part]
    fixed, flexible = parts[:keep_tokens], parts[keep_tokens:]
    rng.shuffle(flexible)
    return ", ".join(fixed + flexible)
