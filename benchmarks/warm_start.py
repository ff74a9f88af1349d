"""How long a user waits for the plan of 10,000 pictures: a second run, with a warm cache, against one without a cache.

    python benchmarks/warm_start.py [--pictures 10000] [--repeats 3]

Each side is a whole `lorasmith train --dry-run`: the interpreter and torch are loaded, the pictures and their captions
found and read, crops chosen, tokens counted, the plan printed. The text encoder is not trained, so that the cache is
asked for both latents and text embeddings; it holds them for all, written by the benchmark as a run would. Times are
both of the processor and on the wall: only the latter tells how long one waits, and only on an idle machine. Importing
torch and the tokenizer alone is measured beside it, to tell how busy the machine was.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from measuring.models import write_model
from measuring.turns import Side, print_ratio, print_times, take_turns
from PIL import Image

from lorasmith import model_families
from lorasmith.cache_folder import open_cache
from lorasmith.caching import Maker, Wanted, caption_name, open_store
from lorasmith.checkpoint import open_checkpoint
from lorasmith.data.buckets import Buckets, bucket_crops
from lorasmith.data.sources.folder import scan
from lorasmith.data.subsets import Subset

WORDS = ["photo", "sks", "dog", "cat", "house", "tree", "river", "sky", "blue", "red", "standing", "hat", "street"]
SIZES = [(320, 256), (256, 320), (288, 288), (384, 256), (256, 400)]
RESOLUTION = 256
IMPORTS = "import torch, numpy, PIL.Image, pydantic; from transformers import CLIPTokenizer"


def make_pictures(folder: Path, number: int) -> None:
    """Write small pictures, nine of ten as JPEG, each with a caption of its own."""
    folder.mkdir()
    rng = random.Random(0)
    for i in range(number):
        picture = Image.frombytes("RGB", (16, 16), rng.randbytes(768)).resize(rng.choice(SIZES))
        picture.save(folder / f"{i:06}.{'jpg' if i % 10 else 'png'}")
        caption = " ".join(rng.choices(WORDS, k=rng.randint(8, 30)))
        (folder / f"{i:06}.txt").write_text(f"{caption}, number {i}\n", encoding="utf-8")


def fill(cache: Path, model_file: Path, pictures: Path) -> None:
    """Put an entry for every picture and caption into the cache; their values are of no account here."""
    with open_checkpoint(model_file) as checkpoint:
        model = model_families.load(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    records = scan(pictures).records
    crops = bucket_crops(records, Buckets((RESOLUTION, RESOLUTION)))
    assert open_cache(cache, print) is not None
    latents = open_store("latents", cache, model, Maker(model_file, ("cpu",)), model.device, print)
    text_maker = Maker(model_file, ("cpu", "fp32", 1, 75, False, "sdpa"))
    text = open_store("text", cache, model, text_maker, model.device, print)
    for record, crop in zip(records, crops, strict=True):
        width, height = crop.shape
        moments = torch.zeros(2, 4, height // 8, width // 8)
        latents.put(Wanted(record, crop, Subset()).name, {"moments": moments})
        text.put(caption_name(record.caption), {"text": torch.zeros(1, 77, 96)})
    latents.flush()
    text.flush()


def until_its_end(command: Sequence[str], wall: list[float]) -> Side:
    """Return a side that runs the command and gives its processor time; its time on the wall is added to the list."""

    def side() -> float:
        before, start = os.times(), time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall.append(time.monotonic() - start)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    return side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, pictures, cache = (
            write_model(folder / "model.safetensors", 32, is_full=False),
            folder / "set",
            folder / "c",
        )
        make_pictures(pictures, options.pictures)
        time.sleep(2.5)  # facts of files that are younger than two seconds are not kept
        given = {"base": model, "images": pictures, "output": folder / "out", "resolution": RESOLUTION, "train": "unet"}
        words = [text for key, value in given.items() for text in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "lorasmith", "train", *words, "--dry-run", "--buckets", "--device", "cpu"]
        warm = [*command, "--cache-dir", str(cache)]
        times: dict[str, list[float]] = {"first run": [], "warm cache": [], "no cache": [], "imports alone": []}
        until_its_end(warm, times["first run"])()
        fill(cache, model, pictures)
        plan = " ".join(subprocess.run(warm, check=True, capture_output=True, text=True).stdout.split())
        everything = f"{options.pictures:,} of {options.pictures:,} are there"
        assert plan.count(everything) == 2, f"the cache is not warm:\n{plan}"
        sides = {
            "warm cache": until_its_end(warm, times["warm cache"]),
            "no cache": until_its_end([*command, "--no-disk-cache"], times["no cache"]),
            "imports alone": until_its_end([sys.executable, "-c", IMPORTS], times["imports alone"]),
        }
        seconds = take_turns(sides, options.repeats)
    print("of the processor:")
    print_times(seconds)
    print_ratio("warm cache", "no cache", seconds)
    print_ratio("warm cache", "imports alone", seconds)
    print("on the wall:")
    print_times(times)


if __name__ == "__main__":
    main()
