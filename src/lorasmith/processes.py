"""One run over several processes: who am I, and sums over all of us.

Started by `accelerate launch` or `torchrun`; alone, every sum is its own argument. The base model is never wrapped:
only the adapter's gradients, a few megabytes, travel.
"""

import os
from collections.abc import Iterable

import torch
from torch import Tensor


class Processes:
    """The processes of this run; `index` counts from 0, process 0 prints and writes."""

    def __init__(self, device: str = "auto") -> None:
        self._is_alone = int(os.environ.get("WORLD_SIZE", "1")) < 2
        self.index, self.count = 0, 1
        self.device = torch.device(choose_device(device))
        if self._is_alone:
            return
        # accelerate reads its own and torchrun's variables and chooses the backend (gloo on the CPU).
        from accelerate import PartialState

        state = PartialState(cpu=self.device.type == "cpu")
        assert state.device is not None
        self.index, self.count, self.device = state.process_index, state.num_processes, state.device

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over all processes and return it."""
        if not self._is_alone:
            torch.distributed.all_reduce(tensor)
        return tensor

    def sum_gradients_(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace each gradient by its sum over all processes, in one message."""
        if self._is_alone:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = self.sum_(torch.cat([g.flatten() for g in gradients]))
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def wait(self) -> None:
        """Return when every process has come here."""
        if not self._is_alone:
            torch.distributed.barrier()

    def close(self) -> None:
        """Leave the group, so that no process hangs at exit."""
        if not self._is_alone:
            torch.distributed.destroy_process_group()


def choose_device(name: str) -> str:
    """Return the device that `auto` means here, or `name` itself."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
