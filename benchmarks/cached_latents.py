"""One training step with cached latents against one whose latents are encoded on the fly.

    python benchmarks/cached_latents.py [--full] [--resolution 256] [--repeats 7]

Both sides read the same pictures through the same plan and seed, so their losses agree, which is checked. The time of
filling the cache is told beside it: after how many steps it has paid for itself.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring.models import write_model
from measuring.turns import print_ratio, print_times, take_turns
from measuring.workers import Step, Worker
from PIL import Image

from lorasmith import model_families
from lorasmith.checkpoint import open_checkpoint
from lorasmith.data.buckets import cover_and_crop
from lorasmith.data.dataset import Dataset, Posteriors, plain_pixels
from lorasmith.data.plan import build_plan
from lorasmith.data.records import ImageRecord
from lorasmith.data.subsets import Subset
from lorasmith.memory import set_attention
from lorasmith.network import PARTS, Network, PartRate, Rule
from lorasmith.optimizers import adamw
from lorasmith.processes import Processes
from lorasmith.training import Stepper


@dataclass(frozen=True)
class Task:
    """What both sides do."""

    model: Path
    pictures: tuple[Path, ...]
    resolution: int
    batch_size: int

    def records(self) -> list[ImageRecord]:
        return [ImageRecord(path, "a photo of sks dog", Image.open(path).size) for path in self.pictures]


def load(task: Task) -> Any:
    with open_checkpoint(task.model) as checkpoint:
        return model_families.load(checkpoint, dtype=torch.float32, device=torch.device("cpu"), vae=None)


def make_dataset(task: Task, model: Any, encode: Callable[[int], Any] | None) -> Dataset:
    records, shape = task.records(), (task.resolution, task.resolution)
    crops = [cover_and_crop(record.size, shape) for record in records]
    plan = build_plan(
        records,
        [shape] * len(records),
        batch_sizes=[task.batch_size],
        num_processes=1,
        gradient_accumulation=1,
        seed=42,
    )
    latents: Posteriors = {}
    if encode is not None:
        latents = {(number, False): encode(number) for number in range(len(records))}
    return Dataset(plan, records, crops, [Subset()], seed=42, sample_t=model.schedule.sample_t, latents=latents)


def make_step(task: Task, is_cached: bool) -> Step:
    """A step with everything that belongs to it: reading the pictures too, where latents are encoded on the fly."""
    model = load(task)
    network = Network.create(model.adapter_targets(), [Rule(rank=4)], seed=42)
    network.attach()
    set_attention(model, "sdpa")
    optimizer = adamw.build(network.param_groups(dict.fromkeys(PARTS.values(), PartRate(1e-4))))
    stepper = Stepper(
        model, list(network.parameters()), optimizer, Processes("cpu"), model.encode_text, max_grad_norm=1.0,
        is_fp16=False,
    )  # fmt: skip
    dataset = make_dataset(task, model, encoder(task, model) if is_cached else None)
    numbers = count()

    def step() -> float:
        number = next(numbers)
        return stepper.step(dataset.batch(number, 0), 1.0, step=number, stop_signal=lambda: None).loss

    return step


def make_encoding(task: Task) -> Step:
    """Reading and encoding of one picture, as filling the cache does it."""
    model = load(task)
    encode, numbers = encoder(task, model), count()
    return lambda: float(encode(next(numbers) % len(task.pictures))[0].mean())


def encoder(task: Task, model: Any) -> Callable[[int], Any]:
    """Return what gives the posterior of the picture of a number."""
    records = task.records()

    def encode(number: int) -> Any:
        crop = cover_and_crop(records[number].size, (task.resolution, task.resolution))
        mean, std = model.encode_image(plain_pixels(records[number], crop, Subset())[None])
        return mean[0], std[0]

    return encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=96, help="channels at the finest level; the real model has 320")
    parser.add_argument("--full", action="store_true", help="full-size SD1: needs 16 GB of memory and many minutes")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model.safetensors", options.width, is_full=options.full)
        pictures = []
        for number in range(options.pictures):
            pictures.append(Path(folder) / f"{number}.png")
            Image.effect_noise((options.resolution * 3 // 2, options.resolution), 50).convert("RGB").save(pictures[-1])
        task = Task(model, tuple(pictures), options.resolution, options.batch_size)
        workers = {
            "cached": Worker(make_step, task, True, threads=options.threads),
            "on the fly": Worker(make_step, task, False, threads=options.threads),
            "encoding one": Worker(make_encoding, task, threads=options.threads),
        }
        seconds = take_turns(workers, options.repeats)
        for worker in workers.values():
            worker.finish()
    for one, two in zip(workers["cached"].losses, workers["on the fly"].losses, strict=True):
        assert abs(one - two) < 1e-3 * two, f"the sides compute different losses, {one} and {two}"
    print_times(seconds)
    print_ratio("cached", "on the fly", seconds)
    saved = median(b - a for a, b in zip(seconds["cached"], seconds["on the fly"], strict=True))
    per_picture = median(seconds["encoding one"])
    print(f"filling the cache has paid for itself after {per_picture / saved:.1f} steps for each picture")


if __name__ == "__main__":
    main()
