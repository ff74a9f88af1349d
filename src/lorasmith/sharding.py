"""Base models too large for one card: each process holds a part of every frozen weight, and all of a block's while it
is used.

torch does the work (FSDP2, `torch.distributed.fsdp.fully_shard`): a block's weights are gathered before its forward and
its backward pass, and dropped after them. Adapters stay whole in each process. All processes must run the blocks in the
same order (`Processes.in_step`). The parts of torch.distributed are imported with the first model, as diffusers does.
"""

from typing import Any

import torch
from torch import Tensor, nn


def shard(part: nn.Module, device: torch.device) -> None:
    """Cut up a frozen part of a model among all processes of the run, on the device; it may lie elsewhere before.

    Cut up are the blocks that the part's library does not split either, one after the other, so that the device never
    holds more than one whole block. What is in none of them, some 4 % of Stable Diffusion's U-Net, stays whole: it is
    needed all the time.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import PreTrainedModel

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    names: Any = part._no_split_modules  # of diffusers' and transformers' models alike
    blocks = [module for module in part.modules() if type(module).__name__ in names]
    in_blocks = {parameter for block in blocks for parameter in block.parameters()}
    rest = {parameter for parameter in part.parameters() if parameter not in in_blocks}
    for parameter in rest:
        parameter.data = parameter.data.to(device)
    for block in reversed(blocks):  # those within others come first
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    if not isinstance(part, PreTrainedModel):  # transformers knows these by their class, which would be another
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=rest)  # gathers ahead, on a GPU


def whole(weight: Tensor) -> Tensor:
    """Return a weight as it is without sharding; where it is sharded, all processes must call this together."""
    from torch.distributed.tensor import DTensor

    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def held_bytes(part: nn.Module) -> tuple[int, int]:
    """Return how many bytes of a part's weights this process holds while no block is used, and how many there are."""
    from torch.distributed.tensor import DTensor

    weights = list(part.parameters())
    held = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
    return sum(weight.nbytes for weight in held), sum(weight.nbytes for weight in weights)
