"""Merging a LoRA into a model against loading everything with diffusers, fusing and saving.

    python benchmarks/merge.py [--full] [--rank 16] [--repeats 3]

The sides read the same model in fp16, as a diffusers folder or a file, and write another: `lorasmith merge`,
diffusers' fuse_lora, and plain copying of the file, twice. The merged U-Nets are compared, and a difference is an
error. Counted is the time of the clock, since much of it is spent with the disk; memory is the most that each held
above what it held before its first turn.
"""

import argparse
import contextlib
import importlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from measuring.models import write_model
from measuring.turns import print_ratio, print_times, take_turns
from measuring.workers import Step, Worker
from safetensors.torch import load_file

from lorasmith import model_families
from lorasmith.adapters.lora import LoRA
from lorasmith.checkpoint import open_checkpoint
from lorasmith.cli import main as run_command
from lorasmith.formats import kohya
from lorasmith.models.keys import sd as keys
from tests.tiny import make_empty, write_folder


@dataclass(frozen=True)
class Task:
    """Where all is."""

    file: Path
    folder: Path
    lora: Path
    results: Path


def memory_before(step: Callable[[], object]) -> Step:
    """A step that returns how many bytes the process held before it, in place of a loss."""

    def measured() -> float:
        before = psutil.Process().memory_info().rss
        step()
        return float(before)

    return measured


def make_ours(task: Task, model: Path, result: Path) -> Step:
    arguments = ["merge", "--model", model, "--lora", task.lora, "--ratio", "0.8", "--output", result, "--overwrite"]
    importlib.import_module("lorasmith.commands.merge")  # imports are not what is measured

    def step() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            assert run_command(list(map(str, arguments))) == 0

    return memory_before(step)


def make_fusing(task: Task) -> Step:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from transformers import CLIPTextModel

    make_pipeline: Any = StableDiffusionPipeline

    def step() -> None:
        parts: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
        loaded = {
            name: part.from_pretrained(task.folder / name, torch_dtype=torch.float16) for name, part in parts.items()
        }
        pipeline = make_pipeline(
            **loaded, tokenizer=None, scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipeline.load_lora_weights(task.lora)
        pipeline.fuse_lora(lora_scale=0.8)
        pipeline.unload_lora_weights()
        for name in parts:
            getattr(pipeline, name).save_pretrained(task.results / "fused" / name)
        _sync(task.results / "fused")

    return memory_before(step)


def make_copying(task: Task) -> Step:
    def step() -> None:
        for number in range(2):
            target = task.results / f"copy{number}.safetensors"
            shutil.copyfile(task.file, target)
            _sync(target)

    return memory_before(step)


def _sync(path: Path) -> None:
    """Have what was written on the disk, as `lorasmith merge` does."""
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        with file.open("rb+") as written:
            os.fsync(written.fileno())


def write_models(folder: Path, width: int, rank: int) -> Task:
    """Write a model as a file and as a diffusers folder, both in fp16, and a LoRA of all its layers."""
    is_full = width == 320
    file = write_model(folder / "model.safetensors", width, is_full=is_full)
    parts = keys.from_ldm({name: tensor.half() for name, tensor in load_file(file).items()})
    widths = (width, 2 * width, 4 * width, 4 * width)
    first = parts.vae["encoder.conv_in.weight"].shape[0]
    text_width = parts.text["final_layer_norm.weight"].shape[0]
    modules: tuple[Any, ...] = make_empty("sd1", widths, (first, 2 * first, 4 * first, 4 * first), text_width)
    for module, tensors in zip(modules, (parts.unet, parts.vae, parts.text), strict=True):
        shaped = {name: tensor.contiguous() for name, tensor in tensors.items()}
        module.load_state_dict(shaped, assign=True)
    unet, vae, text = modules
    write_folder(folder / "model", unet, vae, text, None)
    with open_checkpoint(file) as checkpoint:
        shapes = model_families.target_shapes(checkpoint)
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        adapter = LoRA(shape, rank, alpha=rank / 2)
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
        tensors |= {f"{name}.{key}": value.detach() for key, value in adapter.state_dict().items()}
    kohya.write(folder / "lora.safetensors", tensors, {})
    return Task(file, folder / "model", folder / "lora.safetensors", folder)


def check_same(task: Task) -> None:
    """Compare the U-Nets that both sides wrote; fp16 sums differ in their last place."""
    name = "unet/diffusion_pytorch_model.safetensors"
    ours, theirs = load_file(task.results / "ours" / name), load_file(task.results / "fused" / name)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(
            tensor.float(), theirs[key].float(), atol=2e-3, rtol=4e-3, msg=lambda t, k=key: k + t
        )


def clocked(worker: Worker) -> Callable[[], float]:
    def side() -> float:
        start = time.perf_counter()
        worker()
        return time.perf_counter() - start

    return side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=96, help="channels at the finest level; the real model has 320")
    parser.add_argument("--full", action="store_true", help="full-size SD1: 13 GB of disk, and minutes")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        task = write_models(Path(folder), 320 if options.full else options.width, options.rank)
        workers = {
            "merge, folder": Worker(make_ours, task, task.folder, task.results / "ours", threads=options.threads),
            "merge, file": Worker(
                make_ours, task, task.file, task.results / "ours.safetensors", threads=options.threads
            ),
            "diffusers": Worker(make_fusing, task, threads=options.threads),
            "copying twice": Worker(make_copying, task, threads=options.threads),
        }
        seconds = take_turns({name: clocked(worker) for name, worker in workers.items()}, options.repeats)
        check_same(task)
        peaks = {name: (worker.finish() or 0) - worker.losses[0] for name, worker in workers.items()}
        sizes = f"model {task.file.stat().st_size / 1e6:.0f} MB, LoRA {task.lora.stat().st_size / 1e6:.1f} MB"
    print(sizes)
    print_times(seconds, {name: f"peak {peak / 1e6:7.0f} MB" for name, peak in peaks.items()})
    print_ratio("merge, folder", "diffusers", seconds)
    print_ratio("merge, file", "copying twice", seconds)
    for name in ("merge, folder", "merge, file"):
        print(f"memory {name} / diffusers: {peaks[name] / peaks['diffusers']:.3f}")


if __name__ == "__main__":
    main()
