"""Regularization pictures that the base model draws itself: what it knows of a class before it is trained.

Each has its number, and its noise follows from the run's seed and that number, so a stopped start goes on where it was
and comes to the same pictures.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lorasmith.checkpoint import atomic_file
from lorasmith.data.images import pictures_in
from lorasmith.data.sources.folder import find_parts
from lorasmith.seeds import derive

_NO_FILE_NAME = re.compile(r'[/\\:*?"<>|\x00-\x1f]+')
_LONGEST_NAME = 80


@dataclass(frozen=True)
class Missing:
    """Pictures to draw: the folder that they go into, with the prompt as their caption, and their numbers."""

    folder: Path
    prompt: str
    numbers: Sequence[int]


def missing(folder: Path, prompt: str, wanted: int) -> Missing:
    """Return what is missing in a folder of regularization pictures up to the wanted number.

    Every picture that training would use there counts. New ones go beside pictures that lie directly in the folder,
    else into a folder `1_prompt` in it.
    """
    found = 0
    if folder.is_dir():
        found = sum(len(part.pictures) for part in find_parts(folder, prompt, 1)[0])
    words = " ".join(_NO_FILE_NAME.sub(" ", prompt).split()).strip(" .")[:_LONGEST_NAME].strip() or "drawn"
    is_direct = folder.is_dir() and bool(pictures_in(folder))
    target = folder if is_direct else folder / f"1_{words}"
    free = (number for number in range(1, wanted + found + 1) if not path_of(target, number).exists())
    return Missing(target, prompt, [number for number, _ in zip(free, range(wanted - found), strict=False)])


def path_of(folder: Path, number: int) -> Path:
    """Return the file of the drawn picture of that number."""
    return folder / f"drawn-{number:05d}.png"


def draw(to_draw: Missing, numbers: Iterable[int], generate: Callable[[str, int], Image.Image], *, seed: int) -> None:
    """Draw and keep the pictures of some numbers, one by one, each with its caption; it is whole or not there.

    Args:
        generate: prompt and seed to a picture.
    """
    for number in numbers:
        picture = generate(to_draw.prompt, derive(seed, "prior picture", number) % 2**32)
        path = path_of(to_draw.folder, number)
        with atomic_file(path.with_suffix(".txt")) as temporary:
            temporary.write_text(to_draw.prompt + "\n", encoding="utf-8")
        with atomic_file(path) as temporary:
            picture.save(temporary, "PNG")


def class_words(folder: Path) -> list[str]:
    """Return the classes that `N_identifier class` folders name: the words after the identifier, each once."""
    names = [part.fallback for part in find_parts(folder, None, 1)[0] if part.is_dreambooth and part.fallback]
    return list(dict.fromkeys(words for name in names if (words := name.partition(" ")[2].strip())))
