"""One run over several processes: who am I, sums over all of us, and failing together.

Started by `accelerate launch` or `torchrun`; alone, every sum is its own argument. Only the adapter's gradients, a few
megabytes, travel, unless the processes share the base model's weights (`lorasmith.sharding`): then all must run it in
the same order, which is what `in_step` and `most` are for.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from lorasmith.devices import choose_device
from lorasmith.errors import UserError
from lorasmith.memory import is_out_of_memory

Thing = TypeVar("Thing")

# How long one may wait for the others: as long as process 0 needs to draw samples. One that ends is noticed at once.
_PATIENCE = timedelta(days=1)


class ProcessLostError(UserError):
    """Another process of the run has ended without a word to this one."""


class Processes:
    """The processes of this run; `index` counts from 0, process 0 prints and writes.

    shares_model: each holds a part of the base model's weights, so that none can run it without the others.
    """

    def __init__(self, device: str = "auto") -> None:
        self.shares_model = False
        self._is_alone = int(os.environ.get("WORLD_SIZE", "1")) < 2
        self._told: Exception | None = None  # the last failure that all know of, or that cannot be told
        self.index, self.count = 0, 1
        self.device = torch.device(choose_device(device))
        if self._is_alone:
            return
        # accelerate reads its own and torchrun's variables and chooses the backend (gloo on the CPU).
        from accelerate import PartialState

        state = PartialState(cpu=self.device.type == "cpu", timeout=_PATIENCE)
        assert state.device is not None
        self.index, self.count, self.device = state.process_index, state.num_processes, state.device

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each number over all processes."""
        if self._is_alone:
            return list(values)
        return self._sum_(torch.tensor(values, dtype=torch.float64, device=self._message_device)).tolist()

    def sum_gradients_(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace each gradient by its sum over all processes, in one message."""
        if self._is_alone:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = self._sum_(torch.cat([g.flatten() for g in gradients]))
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def share(self, tensor: Tensor, *, source: int) -> Tensor:
        """Return process `source`'s tensor, on the CPU; the others give one of its shape and dtype, of any content."""
        if self._is_alone:
            return tensor
        message = tensor.to(self._message_device, copy=True)
        with _peers():
            torch.distributed.broadcast(message, source)
        return message.cpu()

    def gather(self, thing: Thing) -> list[Thing]:
        """Return what each process gives, in the order of their indexes: plain things that can be pickled."""
        if self._is_alone:
            return [thing]
        things: list[Thing | None] = [None] * self.count
        with _peers():
            torch.distributed.all_gather_object(things, thing)
        return things  # type: ignore[return-value]  # each is filled now

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave the block with all processes: what fails in one of them fails in all, so that none waits for it.

        Blocks may stand in blocks: what has failed in the inner one is known to all.

        Raises:
            UserError: in every process, with the message of the first that failed. Where the failure is a bug, its own
                process raises it as it is.
        """
        if self._is_alone:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except ProcessLostError:
            raise  # nobody is there to agree with
        except Exception as error:
            if error is self._told:
                raise
            failure = error
        if self.sums([float(failure is not None)]) != [0.0]:
            self._fail_together(failure)

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Run the model within, in all processes; where they do not share its weights, this does nothing.

        What has failed before in one of them fails in all, as after `together`. Who fails within ends alone: the others
        wait for its weights, where it cannot reach them, and learn that it has gone.

        Raises:
            ProcessLostError: another one has gone.
        """
        if not self.shares_model:
            yield
            return
        with self.together():
            pass
        try:
            yield
        except ProcessLostError:
            raise
        except Exception as error:
            if _is_of_a_lost_peer(error):
                raise _lost(error) from error
            self._told = error
            if not self.is_main and is_out_of_memory(error):
                # all others print themselves, or are met by process 0 too
                print(f"lorasmith: process {self.index} ({self.device}) has too little memory", file=sys.stderr)
            raise

    def most(self, number: int) -> int:
        """Return how often all run the model, where they share its weights and this one needs it `number` times."""
        if not self.shares_model:
            return number
        message = torch.tensor(number, device=self._message_device)
        with _peers():
            torch.distributed.all_reduce(message, torch.distributed.ReduceOp.MAX)
        return int(message)

    def _fail_together(self, failure: Exception | None) -> NoReturn:
        told = str(failure) if isinstance(failure, UserError) else failure and f"process {self.index}: {failure!r}"
        messages: list[str | None] = [None] * self.count
        with _peers():
            torch.distributed.all_gather_object(messages, told)
        if failure is not None and not isinstance(failure, UserError):
            self._told = failure
            raise failure
        self._told = UserError(next(message for message in messages if message))
        raise self._told from failure

    def _sum_(self, tensor: Tensor) -> Tensor:
        with _peers():
            torch.distributed.all_reduce(tensor)
        return tensor

    @property
    def _message_device(self) -> torch.device:
        """What the backend sends from: NCCL from GPUs, gloo from the CPU."""
        return self.device if self.device.type == "cuda" else torch.device("cpu")

    def close(self) -> None:
        """Leave the group, so that no process hangs at exit."""
        if not self._is_alone:
            torch.distributed.destroy_process_group()


@contextmanager
def _peers() -> Iterator[None]:
    """Tell of a process that has gone, in place of the backend's words for a closed connection."""
    try:
        yield
    except RuntimeError as error:
        raise _lost(error) from error


def _is_of_a_lost_peer(error: Exception) -> bool:
    """Whether a backend says, amid a model's work, that a connection was closed; gloo has no type of its own for it."""
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _lost(error: Exception) -> ProcessLostError:
    return ProcessLostError(
        "another process of this run has ended, and one alone cannot go on; what it said last tells why. "
        f"To go on from the last state, start them all again with --resume. ({str(error).splitlines()[0]})"
    )


def make_deterministic(device: torch.device) -> None:
    """Let equal work on a GPU give equal bytes; on the CPU it does so anyway."""
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # finds bugs, costs time
