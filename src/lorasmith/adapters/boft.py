"""BOFT: delta(W) = (R_m ... R_1 - I) W, rotations that mix ever farther outputs (Liu et al. 2023, 2311.06243; LyCORIS).

`oft_blocks` is (stages, number, size, size). Stage i puts outputs at a distance of 2^i * size / 2 into the same block,
so that after log2(number) + 1 stages each output depends on all. The multiplier scales the whole delta here; in LyCORIS
it scales R - I of each stage, so the two agree at 1 only.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from lorasmith.adapters._rotation import Rotation
from lorasmith.adapters._tensors import show, split_shape


class BOFT(Rotation):
    """A butterfly of rotations.

    New blocks are even and a power of two in number, so the smallest that a layer allows is taken where all are larger
    than the rank (10 for 320 outputs).
    """

    blocks = "stages x number x size x size"
    lycoris_args = "algo=boft"

    @classmethod
    def matches(cls, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether the names fit and the blocks have 4 dimensions; others are OFT's."""
        return super().matches(tensors) and tensors["oft_blocks"].dim() == 4

    @staticmethod
    def new_blocks(layer_shape: Sequence[int], rank: int) -> tuple[int, ...]:
        """Return (stages, number, size, size), as many stages as there can be.

        Raises:
            ValueError: the number of outputs is odd.
        """
        num_out, _, _ = split_shape(layer_shape)
        if num_out % 2:
            raise ValueError(
                f"the layer's weight is {show(layer_shape)}, and BOFT needs an even number of outputs to pair them"
            )
        numbers = [2**exponent for exponent in range(num_out.bit_length()) if num_out % 2 ** (exponent + 1) == 0]
        number = next((number for number in numbers if num_out // number <= rank), numbers[-1])
        return number.bit_length(), number, num_out // number, num_out // number

    @staticmethod
    def is_fitting(blocks: Sequence[int], num_out: int) -> bool:
        """Return whether blocks of this shape turn so many outputs, and the last stage's pairs are among them."""
        if len(blocks) != 4:
            return False
        stages, number, size, other = blocks
        return size == other and size % 2 == 0 and number * size == num_out and number % 2 ** (stages - 1) == 0

    def turn_rows(self, turns: Tensor, rows: Tensor) -> Tensor:
        """Return how far the stages, one after the other, take the rows from where they were."""
        stages, number, size, _ = turns.shape
        turned = rows
        for stage in range(stages):
            distance = 2**stage * size // 2
            mixed = turned.unflatten(0, (-1, 2, distance)).transpose(1, 2).reshape(number, size, -1)
            mixed = mixed + turns[stage] @ mixed
            turned = mixed.reshape(-1, distance, 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)
        return turned - rows


ADAPTER = BOFT
