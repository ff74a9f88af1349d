"""What is done when memory runs out while pictures are drawn: they are drawn again with less, and it is told how."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import nn
from tqdm import tqdm

from lorasmith.config import DrawConfig
from lorasmith.memory import is_out_of_memory, release_memory, set_attention
from lorasmith.models.base import LatentDiffusion

Result = TypeVar("Result")


class Thrift:
    """How much memory drawing takes: as much as was asked for, and less each time that was too much.

    None of it changes a picture but for rounding. There are few ways to save, so trying again comes to an end.

    Args:
        nets: of ControlNets.
    """

    def __init__(self, cfg: DrawConfig, model: LatentDiffusion, nets: Sequence[nn.Module] = ()) -> None:
        self.batch_size = cfg.batch_size
        self._model, self._nets, self._is_sliced = model, nets, cfg.attention == "sliced"
        self._savings = self._save() if cfg.on_out_of_memory == "retry" else iter(())

    def tried(self, count: int, work: Callable[[], Result]) -> Result | None:
        """Return what work gives; None: memory ran out, and it is to be tried again.

        Args:
            count: pictures that the work draws at once.

        Raises:
            RuntimeError: as raised for want of memory, where there is nothing left to save, or no leave to.
        """
        try:
            return work()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.batch_size = count
            saving = next(self._savings, None)
            if saving is None:
                raise
        release_memory()  # not before the error is gone, which holds all that was computed
        tqdm.write(f"{self._model.device} ran out of memory; drawing goes on with {saving}.", file=sys.stdout)
        return None

    def _save(self) -> Iterator[str]:
        while self.batch_size > 1:
            self.batch_size //= 2
            yield f"--batch-size {self.batch_size}"
        if not self._is_sliced:
            set_attention(self._model, "sliced", self._nets)
            yield "--attention sliced"
        if next(self._model.vae.parameters()).device.type != "cpu":
            self._model.vae.to(torch.device("cpu"))
            yield "the VAE on the CPU, which is slower"
