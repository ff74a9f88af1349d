"""One training step of lorasmith against the same step written with diffusers and peft.

    python benchmarks/train_step.py [--full] [--resolution 256] [--rank 4] [--repeats 7]

Both load one random model, train LoRA on the same layers from the same start, and take the same batch; that their
losses agree is checked. Each is a process of its own, and they take turns.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring.models import write_model
from measuring.turns import print_ratio, print_times, take_turns
from measuring.workers import Step, Worker

from lorasmith import model_families
from lorasmith.checkpoint import open_checkpoint
from lorasmith.data.dataset import Batch
from lorasmith.memory import set_attention, set_gradient_checkpointing
from lorasmith.models.keys import sd as keys
from lorasmith.models.tokenizer import build as build_tokenizer
from lorasmith.network import PARTS, Network, PartRate, Rule
from lorasmith.optimizers import adamw
from lorasmith.processes import Processes
from lorasmith.training import Stepper

LEARNING_RATE, CLIP = 1e-4, 1.0


@dataclass(frozen=True)
class Task:
    """What both sides do."""

    model: Path
    rank: int
    batch_size: int
    resolution: int

    def batch(self) -> Batch:
        """Cached latents, noise, timesteps and captions; the same for both sides and every step."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.batch_size, 4, self.resolution // 8, self.resolution // 8)
        return Batch(
            latents=torch.randn(shape, generator=generator),
            pixels=None,
            posterior_noise=torch.zeros(shape),
            noise=torch.randn(shape, generator=generator),
            t=torch.randint(0, 1000, (self.batch_size,), generator=generator),
            captions=[f"a photo of sks dog, number {number}" for number in range(self.batch_size)],
            weight=torch.ones(self.batch_size),
            count=self.batch_size,
        )


def load(task: Task) -> Any:
    with open_checkpoint(task.model) as checkpoint:
        return model_families.load(checkpoint, dtype=torch.float32, device=torch.device("cpu"), vae=None)


def make_ours(task: Task) -> Step:
    """lorasmith's own step, as `lorasmith train` puts it together."""
    model = load(task)
    network = Network.create(model.adapter_targets(), [Rule(rank=task.rank)], seed=42)
    network.attach()
    set_attention(model, "sdpa")
    set_gradient_checkpointing(model, False)
    optimizer = adamw.build(network.param_groups(dict.fromkeys(PARTS.values(), PartRate(LEARNING_RATE))))
    parameters = list(network.parameters())
    stepper = Stepper(
        model, parameters, optimizer, Processes("cpu"), model.encode_text, max_grad_norm=CLIP, is_fp16=False
    )
    batch = task.batch()
    return lambda: stepper.step([batch], 1.0, step=0, stop_signal=lambda: None).loss


def make_theirs(task: Task) -> Step:
    """The step of diffusers' examples/text_to_image/train_text_to_image_lora.py, with the text encoder trained too."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from peft import LoraConfig

    model = load(task)
    unet, text_encoder = model.denoiser, model.text_encoder
    modules = {"unet": keys.unet_targets(), "text_encoder": keys.text_targets("sd1")}
    for part, names in ((unet, modules["unet"]), (text_encoder, modules["text_encoder"])):
        part.add_adapter(LoraConfig(r=task.rank, lora_alpha=task.rank, target_modules=list(names.values())))
    start_as_ours({"unet": unet, "text_encoder": text_encoder}, modules, task.rank)
    parameters = [p for part in (unet, text_encoder) for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    scheduler: Any = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    tokenizer: Any = build_tokenizer()
    batch = task.batch()
    assert batch.latents is not None
    latents = batch.latents

    def step() -> float:
        ids = tokenizer(batch.captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        text = text_encoder(ids.input_ids)[0]
        noisy = scheduler.add_noise(latents, batch.noise, batch.t)
        prediction = unet(noisy, batch.t, text, return_dict=False)[0]
        loss = F.mse_loss(prediction.float(), batch.noise.float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def start_as_ours(parts: dict[str, Any], modules: dict[str, dict[str, str]], rank: int) -> None:
    """Give peft's layers the values that ours begin with."""
    adapted = {part: dict(parts[part].named_modules()) for part in parts}
    originals = {
        name: adapted[part][module].base_layer for part, names in modules.items() for name, module in names.items()
    }
    start = Network.create(originals, [Rule(rank=rank)], seed=42).state_dict()
    with torch.no_grad():
        for part, names in modules.items():
            for name, module in names.items():
                layer = adapted[part][module]
                layer.lora_A["default"].weight.copy_(start[f"{name}.lora_down.weight"])
                layer.lora_B["default"].weight.copy_(start[f"{name}.lora_up.weight"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=96, help="channels at the finest level; the real model has 320")
    parser.add_argument("--full", action="store_true", help="full-size SD1: needs 12 GB of memory and many minutes")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder) / "model.safetensors", options.width, is_full=options.full)
        task = Task(path, options.rank, options.batch_size, options.resolution)
        workers = {
            "lorasmith": Worker(make_ours, task, threads=options.threads),
            "diffusers + peft": Worker(make_theirs, task, threads=options.threads),
        }
        seconds = take_turns(workers, options.repeats)
    peaks = {name: worker.finish() for name, worker in workers.items()}
    ours, theirs = workers
    for one, two in zip(workers[ours].losses, workers[theirs].losses, strict=True):
        assert abs(one - two) < 1e-3 * two, f"the sides compute different losses, {one} and {two}"
    told = {name: f"peak {peak / 2**20:.0f} MiB" if peak else "peak not known" for name, peak in peaks.items()}
    print_times(seconds, told)
    print_ratio(ours, theirs, seconds)
    if (one := peaks[ours]) and (two := peaks[theirs]):
        print(f"peak memory {ours} / {theirs}: {one / two:.3f}")


if __name__ == "__main__":
    main()
