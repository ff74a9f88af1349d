"""A base model whose weights the processes share (`shard_base`): when they do, what the plan says, the sharing."""

import os

from lorasmith.config import TrainConfig, TrainingSection
from lorasmith.errors import UserError
from lorasmith.models.base import LatentDiffusion
from lorasmith.processes import Processes
from lorasmith.sharding import held_bytes, shard


def is_shared(options: TrainingSection, processes: Processes) -> bool:
    """Return whether several processes are to share the base model, as asked by option or by accelerate."""
    return processes.count > 1 and (_launcher_asks() if options.shard_base is None else options.shard_base)


def check_shareable(cfg: TrainConfig, processes: Processes) -> None:
    """Refuse to share a base model whose weights another program reads at any time, or whose code is compiled.

    Raises:
        UserError: `network_module` or `compile` is given.
    """
    if not is_shared(cfg.training, processes):
        return
    if cfg.training.compile is not None:
        raise UserError(
            "--compile is for models that each process has whole, and these would hold a part each; leave it out, or "
            "give --no-shard-base."
        )
    if cfg.network.network_module is not None:
        raise UserError(
            f"network_module = {cfg.network.network_module} reads the base model's weights whenever it likes, so the "
            "processes cannot share them; give --no-shard-base, or train one of our own types (--adapter)."
        )


def sharing_lines(options: TrainingSection, processes: Processes) -> list[str]:
    """Say for the plan that the base model is shared, and who asked for it; or why not, if it was asked for."""
    if is_shared(options, processes):
        asked = "" if options.shard_base else ", as accelerate's configuration asks for FSDP; none of its others count"
        return [f"each of the {processes.count} processes holds a part of the base model{asked}"]
    if options.shard_base:
        return ["shard_base does nothing for one process; several come with accelerate launch (docs/processes.md)"]
    return []


def _launcher_asks() -> bool:
    """Whether `accelerate launch` was configured to use FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")


def share(model: LatentDiffusion, processes: Processes) -> str:
    """Cut up denoiser and text encoder among the processes, each on its device; return what to say of it.

    The VAE stays whole: it is small, and each process has its own pictures to encode.
    """
    processes.shares_model = True
    held, total = 0, 0
    with processes.in_step():
        for part in (model.denoiser, model.text_encoder):
            shard(part, processes.device)
            own, whole = held_bytes(part)
            held, total = held + own, total + whole
    return (
        f"this process holds {held / 2**20:.1f} of the {total / 2**20:.1f} MiB of U-Net and text encoder, "
        f"the other {processes.count - 1} as much"
    )
