"""Pictures that are drawn to be compared: each is written when it is drawn, and the same command goes on with those."""

import hashlib
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from lorasmith.command_line import harmless
from lorasmith.config import DrawConfig, GridConfig, JudgeConfig
from lorasmith.picture_files import parameters
from lorasmith.picture_run.comparison_folder import CELLS, ComparisonFolder
from lorasmith.picture_run.drawing import Base, drawn, load, telling_of_memory
from lorasmith.picture_run.facts import facts_of, facts_of_all, shown_prompt
from lorasmith.picture_run.loras import Loras
from lorasmith.picture_run.pictures import Picture
from lorasmith.progress import counted

_NO_FILE_NAME_SIGNS = re.compile(r'[/\\:*?"<>|\x00-\x1f]+')
_LONGEST_NAME = 120  # bytes of a LoRA's name in the name of a picture
# Of what commands draw with: what changes no picture, or is asked of the base as it was opened.
_NO_CHANGE = {"progress", "batch_size", "attention", "on_out_of_memory", "device", "precision"}


class Comparison:
    """Pictures and the folder that they go into, in which some may lie already.

    Args:
        files: the pictures, in the order in which they are drawn, with the names of their files.
        is_folded: as for `drawing.drawn`.
    """

    def __init__(
        self,
        cfg: GridConfig | JudgeConfig,
        base: Base,
        loras: Loras,
        files: Mapping[Picture, str],
        *,
        is_folded: bool = False,
    ) -> None:
        self._cfg, self._base, self._loras, self._files, self._is_folded = cfg, base, loras, files, is_folded
        common = facts_of_all(cfg, base.checkpoint)
        self._texts = {
            one: parameters(shown_prompt(one), one.negative, {**facts_of(cfg, one, loras), **common}) for one in files
        }
        self.folder = ComparisonFolder(cfg.output, self._marks())

    def told(self) -> list[str]:
        """Return lines on where the pictures go, and how many there are already."""
        wanted, folder = self._cfg.output, self.folder
        lines = [f"{wanted} holds something already; this goes into {folder.path}"] if folder.path != wanted else []
        if folder.drawn:
            lines.append(f"{len(folder.drawn)} of these were drawn before, and are taken from there")
        return lines

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Make the folder, and say what lies in it when it is stopped by Ctrl+C or by too little memory.

        Raises:
            UserError: it cannot be made, or there is too little memory.
        """
        self.folder.take_over()
        cells = self.folder.path / CELLS
        written = f"The pictures that were drawn are in {cells}; the same command goes on with them."
        try:
            with telling_of_memory(self._cfg, self._base, list(self._files), written):
                yield
        except KeyboardInterrupt:
            lying = sum(1 for _ in cells.glob("*.png"))
            print("\n" + harmless(f"{lying} of {len(self._files)} pictures are drawn. {written}"), flush=True)
            raise

    def draw(self) -> None:
        """Draw all pictures that are not there yet."""
        rest = [one for one, name in self._files.items() if name not in self.folder.drawn]
        if rest:
            found = drawn(self._cfg, load(self._cfg, self._base), rest, self._loras, is_folded=self._is_folded)
            found = _told_of_time(self._cfg, found, len(rest))
            for one, picture in counted(found, len(rest), "drawing", is_shown=self._cfg.progress):
                self.folder.add(self._files[one], picture, self._texts[one])

    def file(self, one: Picture) -> Path:
        """Return where a picture lies."""
        return self.folder.file(self._files[one])

    def read(self, one: Picture) -> Image.Image:
        """Return a picture that was drawn."""
        with Image.open(self.file(one)) as picture:
            return picture.convert("RGB")

    def _marks(self) -> dict[str, str]:
        """Return a mark for each picture, by the name of its file: of all that it follows from."""
        cfg, base = self._cfg, self._base
        settings = cfg.model_dump(mode="json", include=set(DrawConfig.model_fields) - _NO_CHANGE)
        places = [base.checkpoint.path, *([Path(cfg.vae)] if cfg.vae else []), *cfg.embeddings]
        common = [settings, self._is_folded, base.device.type, base.precision, [_stamp(path) for path in places]]
        return {
            name: hashlib.sha256(json.dumps([repr(one), self._texts[one], common]).encode()).hexdigest()
            for one, name in self._files.items()
        }


def file_name(prompt: int, seed: int, lora: int = 0, name: str = "base", strength: float | None = None) -> str:
    """Return the name of a picture's file; prompts and LoRAs count from 1, and without one it is the base model's."""
    short = _NO_FILE_NAME_SIGNS.sub("_", name).encode()[:_LONGEST_NAME].decode(errors="ignore")
    level = "" if strength is None else f"-{plain_number(strength)}"
    return f"{prompt:02d}-{seed}-{lora:02d}-{short}{level}.png"


def plain_number(number: float) -> str:
    """Return a number as short as can be without becoming another."""
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


def _told_of_time(
    cfg: DrawConfig, found: Iterable[tuple[Picture, Image.Image]], total: int
) -> Iterator[tuple[Picture, Image.Image]]:
    """Yield the same, and say after the first batch about how long all take; a terminal's bar says it by itself."""
    begin, is_told = time.monotonic(), not cfg.progress or sys.stderr.isatty() or total <= cfg.batch_size
    for one in found:
        if not is_told:
            is_told = True
            seconds = (time.monotonic() - begin) * total / cfg.batch_size
            print(f"about {tqdm.format_interval(seconds)} for all, by the first", flush=True)
        yield one


def _stamp(path: Path) -> list[tuple[str, int, int]]:
    """Return what tells whether a file, or one in a folder, is still the same: its name, size and time."""
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    facts = [(one, one.stat()) for one in files if one.is_file()]
    return [(one.name, stat.st_size, stat.st_mtime_ns) for one, stat in facts]
