"""OFT: delta(W) = (R - I) W, where R turns blocks of outputs (Qiu et al. 2023, https://arxiv.org/abs/2306.07280).

`oft_blocks` is (number, size, size): output m of a block becomes the sum over n of R[n, m] times output n. LyCORIS
("diag-oft") and kohya-ss/sd-scripts (networks.oft) agree in this and in the constraint, alpha * out, save that with an
alpha of 0 kohya's changes nothing. The multiplier scales R - I as in both; LyCORIS leaves `rescale` out of it.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorasmith.adapters._rotation import Rotation
from lorasmith.adapters._tensors import split_shape


class OFT(Rotation):
    """Rotations of neighbouring outputs.

    New blocks have the largest divisor of the outputs up to the rank and up to their square root.
    """

    blocks = "number x size x size"
    lycoris_args = "algo=diag-oft"

    @classmethod
    def matches(cls, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether the names fit; blocks of 4 dimensions are BOFT's."""
        return super().matches(tensors) and tensors["oft_blocks"].dim() != 4

    @staticmethod
    def new_blocks(layer_shape: Sequence[int], rank: int) -> tuple[int, ...]:
        """Return (number, size, size)."""
        num_out, _, _ = split_shape(layer_shape)
        size = next(d for d in range(min(rank, math.isqrt(num_out)), 0, -1) if num_out % d == 0)
        return num_out // size, size, size

    @staticmethod
    def is_fitting(blocks: Sequence[int], num_out: int) -> bool:
        """Return whether blocks of this shape turn so many outputs."""
        return len(blocks) == 3 and blocks[1] == blocks[2] and blocks[0] * blocks[1] == num_out

    def turn_rows(self, turns: Tensor, rows: Tensor) -> Tensor:
        """Return R - I for each block, applied to its rows."""
        change = torch.einsum("k n m, k n i -> k m i", turns, rows.unflatten(0, turns.shape[:2]))
        return change.flatten(0, 1)


ADAPTER = OFT
