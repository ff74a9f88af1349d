"""Draws `docs/grid-steps.png` and `docs/grid-strengths.png`: what `lorasmith grid` makes of the demo's LoRA.

    python tools/grids_picture.py [FOLDER]

Trains the LoRA as the demo does, with a save every 100 steps, into a folder, where it is used again: minutes on a CPU.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lorasmith.cli import main
from lorasmith.commands import demo
from lorasmith.config import DemoConfig

_ROOT = Path(__file__).resolve().parent.parent
_COMMON = ("--base", str(demo.BASE), "--guidance", "2", "--batch-size", "8")
_ROBOT = "a sks robot on a brown background"
_OF_STEPS = ("--prompt", _ROBOT, "a sks robot on a pink background", "a red car on a blue background", "--seeds", "5")
_OF_STRENGTHS = (
    "--prompt", _ROBOT, "--seeds", "1", "5", "8", "--strengths", "0.25", "0.5", "0.75", "1", "1.25"
)  # fmt: skip


def train(folder: Path) -> Path:
    """Return the output folder of the run, which is made if it is not there."""
    cfg = DemoConfig()
    if not (folder / "lora" / "robot.safetensors").exists():
        shutil.rmtree(folder, ignore_errors=True)
        demo.write_regularization(demo.load_base(), folder / "regularization", cfg.seed)
        main([*demo.train_command(folder, cfg), "--name", "robot", "--save-every-steps", "100"])
    return folder / "lora"


def write(path: Path, loras: Path, options: Sequence[str], work: Path) -> None:
    """Write the sheet of a grid, in 256 colours, so that it is small."""
    main(["grid", str(loras), *options, *_COMMON, "--output", str(work)])
    with Image.open(work / "sheet.png") as sheet:
        sheet.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "grids-picture")
    run = train(folder)
    write(_ROOT / "docs" / "grid-steps.png", run, _OF_STEPS, folder / "steps")
    write(_ROOT / "docs" / "grid-strengths.png", run / "robot.safetensors", _OF_STRENGTHS, folder / "strengths")
