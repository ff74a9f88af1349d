"""lorasmith's way to draw pictures against diffusers' StableDiffusionPipeline, and what batches, bf16 and compiling do.

    python benchmarks/generate.py [--full] [--size 256] [--steps 4] [--pictures 2] [--device cuda]
        [--variants batch bf16 channels-last compile]

All sides load one random model and draw the same pictures from the same seeds with the same sampler; that they agree
is checked. Each is a process of its own, and they take turns. On a GPU the clock on the wall counts, not the processor.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring.models import write_model
from measuring.turns import print_ratio, print_times, take_turns
from measuring.workers import Step, Worker

from lorasmith import model_families
from lorasmith.checkpoint import open_checkpoint
from lorasmith.memory import set_attention
from lorasmith.models.tokenizer import build as build_tokenizer
from lorasmith.sampling import generate
from lorasmith.speed import compile_denoiser, use_channels_last

PROMPT, NEGATIVE, GUIDANCE = "a photo of a robot in a garden", "blurred", 7.5
OURS, THEIRS = "lorasmith", "diffusers"


@dataclass(frozen=True)
class Task:
    """What a side does: so many pictures of size x size pixels."""

    model: Path
    size: int
    steps: int
    pictures: int
    device: str
    batch_size: int = 1
    precision: str = "fp32"
    channels_last: bool = False
    compiled: bool = False


def load(task: Task) -> Any:
    dtype = torch.bfloat16 if task.precision == "bf16" else torch.float32
    with open_checkpoint(task.model) as checkpoint:
        return model_families.load(checkpoint, dtype=dtype, device=torch.device(task.device), vae=None)


def make_ours(task: Task) -> Step:
    """Draw as `lorasmith generate` does."""
    model = load(task)
    set_attention(model, "sdpa")
    if task.channels_last:
        use_channels_last(model)
    if task.compiled:
        compile_denoiser(model)
    seeds = list(range(task.pictures))

    def step() -> float:
        pictures = generate(
            model, [PROMPT] * task.pictures, seeds=seeds, size=(task.size, task.size), negative=NEGATIVE,
            steps=task.steps, guidance=GUIDANCE, sampler="dpm++", batch_size=task.batch_size,
        )  # fmt: skip
        return mean(pictures)

    return step


def make_theirs(task: Task) -> Step:
    """Draw with diffusers' pipeline as it comes, one picture at a time."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    model = load(task)
    words = build_tokenizer()
    words.model_max_length, words.pad_token = 77, "<|endoftext|>"
    scheduler: Any = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    make: Any = StableDiffusionPipeline
    pipeline = make(
        vae=model.vae, unet=model.denoiser, text_encoder=model.text_encoder, tokenizer=words, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)

    def step() -> float:
        pictures = [
            pipeline(
                PROMPT, negative_prompt=NEGATIVE, width=task.size, height=task.size, num_inference_steps=task.steps,
                guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(seed),
            ).images[0]
            for seed in range(task.pictures)
        ]  # fmt: skip
        return mean(pictures)

    return step


def mean(pictures: list[Any]) -> float:
    """The pictures' mean in grey levels, by which the sides are compared."""
    return float(np.mean([np.asarray(one, dtype=np.float64) for one in pictures]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=96, help="channels at the finest level; the real model has 320")
    parser.add_argument("--full", action="store_true", help="full-size SD1: needs 12 GB of memory and many minutes")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    changes: dict[str, dict[str, Any]] = {
        "batch": {}, "bf16": {"precision": "bf16"}, "channels-last": {"channels_last": True},
        "compile": {"compiled": True},
    }  # fmt: skip
    parser.add_argument("--variants", nargs="*", choices=changes, default=["batch"], help="each against ours")
    options = parser.parse_args()
    changes["batch"] = {"batch_size": options.pictures}
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder) / "model.safetensors", options.width, is_full=options.full)
        task = Task(path, options.size, options.steps, options.pictures, options.device)
        sides = {OURS: (make_ours, task), THEIRS: (make_theirs, task)}
        for name in options.variants:
            sides[f"{OURS}, {name}"] = (make_ours, Task(**{**vars(task), **changes[name]}))
        workers = {
            name: Worker(make, own, threads=options.threads, on_wall=options.device != "cpu")
            for name, (make, own) in sides.items()
        }
        seconds = take_turns(workers, options.repeats)
    peaks = {name: worker.finish() for name, worker in workers.items()}
    for name, worker in workers.items():
        tolerance = 3.0 if "bf16" in name else 0.5
        for one, two in zip(workers[OURS].losses, worker.losses, strict=True):
            assert abs(one - two) < tolerance, f"{OURS} and {name} draw different pictures, of mean {one} and {two}"
    told = {name: f"peak {peak / 2**20:.0f} MiB" if peak else "peak not known" for name, peak in peaks.items()}
    print_times(seconds, told)
    print_ratio(OURS, THEIRS, seconds)
    for name in list(sides)[2:]:
        print_ratio(name, OURS, seconds)


if __name__ == "__main__":
    main()
