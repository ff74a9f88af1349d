"""How long a user waits: `lorasmith --help` against importing torch, and a run's start to its first step.

    python benchmarks/start_up.py [--repeats 5]

The first step is compared with a program that only imports what any such trainer needs: torch, diffusers' models and
transformers' text encoder. The model is a random miniature, so that what is measured is not its size. Counted is
processor time, which other programs on the machine disturb less than the clock on the wall (not on Windows, which does
not tell it).
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from measuring.models import write_model
from measuring.turns import Side, print_ratio, print_times, take_turns
from PIL import Image

IMPORTS = (
    "import torch; from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL; "
    "from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel; "
    "from transformers import CLIPTextModel, CLIPTokenizer"
)


def children_seconds() -> float:
    """Return the processor time of all processes that this one started and that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def until_its_end(command: Sequence[str]) -> Side:
    def side() -> float:
        start = children_seconds()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return children_seconds() - start

    return side


def until_it_prints(command: Sequence[str], beginning: str) -> Side:
    """Time a command up to the first line that begins so; it is then ended."""

    def side() -> float:
        start, lines = children_seconds(), [""]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if line.startswith(beginning):
                    process.kill()
                    break
        if not lines[-1].startswith(beginning):
            raise RuntimeError(f"{command} never printed {beginning!r}:\n{''.join(lines)}")
        return children_seconds() - start

    return side


def train_command(folder: Path) -> list[str]:
    """Write a model and pictures, and return the command that trains on them."""
    model = write_model(folder / "model.safetensors", 32, is_full=False)
    for number in range(4):
        (folder / "pictures").mkdir(exist_ok=True)
        Image.effect_noise((64, 64), 50).convert("RGB").save(folder / "pictures" / f"{number}.png")
    options = {"base": model, "images": folder / "pictures", "output": folder / "out", "resolution": 64, "steps": 10}
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    switches = ["--caption", "sks dog", "--device", "cpu", "--no-before-after", "--overwrite", "--no-disk-cache"]
    return [sys.executable, "-m", "lorasmith", "train", *given, *switches]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            "lorasmith --help": until_its_end([sys.executable, "-m", "lorasmith", "--help"]),
            "lorasmith train --help": until_its_end([sys.executable, "-m", "lorasmith", "train", "--help"]),
            "import torch": until_its_end([sys.executable, "-c", "import torch"]),
            "all imports": until_its_end([sys.executable, "-c", IMPORTS]),
            "first step": until_it_prints(train_command(Path(folder)), "step 1/10"),
        }
        seconds = take_turns(sides, options.repeats)
    print_times(seconds)
    print_ratio("lorasmith --help", "import torch", seconds)
    print_ratio("lorasmith train --help", "import torch", seconds)
    print_ratio("first step", "all imports", seconds)


if __name__ == "__main__":
    main()
