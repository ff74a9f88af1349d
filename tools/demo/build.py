"""Rebuilds the embedded model from nothing, stage by stage; what is finished in the work folder is not done again.

    python tools/demo/build.py --work DIR --output sd1-mini.safetensors

Hours on two cores. `--quick` does a few steps of everything, which makes a file that can be read but draws nothing.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import text
import torch
import unet
import vae
from encode import SHARD_SIZE, encode, shard_path
from journal import Journal
from pack import pack


@dataclass(frozen=True)
class Amounts:
    """How much of everything; as they stand, what the shipped model was given."""

    vae_shape_steps: int = 2001
    vae_drawing_steps: int = 1100
    num_shards: int = 20
    shard_size: int = SHARD_SIZE
    text_steps: int = 500
    unet_first_steps: int = 5200
    unet_first_decay: int = 3900
    unet_second_steps: int = 2600
    unet_second_decay: int = 1300


QUICK = Amounts(
    vae_shape_steps=1, vae_drawing_steps=1, num_shards=2, shard_size=2, text_steps=1, unet_first_steps=1,
    unet_first_decay=0, unet_second_steps=1, unet_second_decay=0,
)  # fmt: skip


def build(work: Path, output: Path, amounts: Amounts) -> None:
    """Go through all stages and write the model."""
    work.mkdir(parents=True, exist_ok=True)
    for target, make in _stages(work, amounts):
        if not target.exists():
            _announce(target)
            make()
    _train_unet(work, amounts)
    pack(work / "unet-2.pt", work / "text.pt", work / "vae.pt", output)


def _stages(work: Path, amounts: Amounts) -> list[tuple[Path, Callable[[], None]]]:
    """Return what is made in one go, each with how: a file that is there is finished."""
    shapes, drawings, folded, encoder = (work / name for name in ("vae-1.pt", "vae-2.pt", "vae.pt", "text.pt"))
    first, second = vae.first_stage(amounts.vae_shape_steps), vae.second_stage(amounts.vae_drawing_steps)
    size = amounts.shard_size
    shards: list[tuple[Path, Callable[[], None]]] = [
        (path, lambda path=path, start=number * size: encode(folded, start, size, path))
        for number, path in ((number, shard_path(work, number)) for number in range(amounts.num_shards))
    ]
    return [
        (shapes, lambda: vae.train(first, None, shapes, _journal(shapes))),
        (drawings, lambda: vae.train(second, shapes, drawings, _journal(drawings))),
        (folded, lambda: vae.fold(drawings, folded, _journal(folded))),
        *shards,
        (encoder, lambda: text.train(amounts.text_steps, encoder, _journal(encoder))),
    ]


def _train_unet(work: Path, amounts: Amounts) -> None:
    """Bring both stages to their ends, from the last checkpoint on."""
    first, second = work / "unet-1.pt", work / "unet-2.pt"
    if unet.steps_done(first) < amounts.unet_first_steps:
        _announce(first)
        stage = unet.first_stage(amounts.unet_first_steps, amounts.unet_first_decay)
        unet.train_with_text(stage, work, amounts.num_shards, first, _journal(first))
    if unet.steps_done(second) < amounts.unet_second_steps:
        _announce(second)
        stage = unet.second_stage(amounts.unet_second_steps, amounts.unet_second_decay)
        unet.train_alone(stage, first, work / "text.pt", work, amounts.num_shards, second, _journal(second))


def _announce(target: Path) -> None:
    print(f"making {target.name}", flush=True)


def _journal(target: Path) -> Journal:
    """Return the log beside what a stage makes: a new one, unless the stage goes on from a checkpoint."""
    path = target.with_suffix(".jsonl")
    if not target.exists():
        path.unlink(missing_ok=True)
    return Journal(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made on the way; about 1 GB")
    parser.add_argument("--output", type=Path, required=True, help="the model's file")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to try the chain")
    parser.add_argument("--threads", type=int, default=2, help="that torch computes with; the shipped model had 2")
    parser.add_argument("--unet-steps", type=int, help="of the U-Net's second stage")
    parser.add_argument("--unet-decay-from", type=int, help="step of the second stage from which its rate falls")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    amounts = QUICK if given.quick else Amounts()
    changes = {"unet_second_steps": given.unet_steps, "unet_second_decay": given.unet_decay_from}
    amounts = replace(amounts, **{name: value for name, value in changes.items() if value is not None})
    build(given.work, given.output, amounts)


if __name__ == "__main__":
    main()
