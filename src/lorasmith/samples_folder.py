"""The sample pictures of a run: a folder a moment, and a sheet of the moments that can be compared.

Beside a moment's pictures stands what they were drawn from. A resumed run may ask for other prompts or settings; then a
new sheet begins, so that a caption is always the prompt of the pictures below it.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lorasmith.sheets import sheet

_DRAWN_FROM = "drawn-from.json"
_NAME = re.compile(r"step-(\d{8,})")


class SamplesFolder:
    """Pictures of drawings: each a `prompt` with its settings, plain values.

    Args:
        done: steps done when the run starts; moments after it belong to a course that was gone back on, and go.
    """

    def __init__(self, path: Path, drawings: Sequence[Mapping[str, Any]], *, done: int) -> None:
        self._path, self._prompts = path, [drawing["prompt"] for drawing in drawings]
        # as JSON has it, so that it compares equal to what is read
        self._drawn_from: list[dict[str, Any]] = json.loads(json.dumps(drawings))
        for step, moment in self._moments().items():
            if step > done:
                shutil.rmtree(moment)

    def add(self, step: int, pictures: Sequence[Image.Image]) -> None:
        """Keep the pictures after `step` steps, one for each prompt, and draw the sheet anew."""
        moment = self._path / f"step-{step:08d}"
        moment.mkdir(parents=True, exist_ok=True)
        for old in moment.glob("*.png"):
            old.unlink()
        for number, picture in enumerate(pictures):
            picture.save(moment / f"{number:02d}.png")
        (moment / _DRAWN_FROM).write_text(json.dumps(self._drawn_from, indent=1, ensure_ascii=False), encoding="utf-8")
        rows = [(f"step {step}" if step else "before", self.pictures(step)) for step in self._moments()]
        sheet(self._prompts, [row for row in rows if row[1]]).save(self._path / "sheet.png")

    def pictures(self, step: int) -> list[Image.Image]:
        """Return a moment's pictures in the prompts' order; none where it was drawn from something else, or not."""
        moment = self._path / f"step-{step:08d}"
        if _read(moment / _DRAWN_FROM) != self._drawn_from:
            return []
        return [
            Image.open(path).convert("RGB")
            for path in sorted(moment.glob("*.png"), key=lambda path: (len(path.name), path))
        ]

    def has(self, step: int) -> bool:
        """Return whether the pictures of a moment are there, whatever they were drawn from."""
        return (self._path / f"step-{step:08d}" / _DRAWN_FROM).exists()

    def _moments(self) -> dict[int, Path]:
        found = {int(match[1]): path for path in self._path.glob("step-*") if (match := _NAME.fullmatch(path.name))}
        return dict(sorted(found.items()))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or a run was killed while writing it
        return None
