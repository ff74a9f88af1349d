"""What OFT and BOFT share: rotations of a layer's outputs, made of free matrices, and factors of the outputs."""

import sys
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lorasmith.adapters._tensors import build, show, split_shape, zeros
from lorasmith.adapters.base import Adapter


class Rotation(Adapter):
    """A change of a Linear or Conv2d that turns its outputs by the rotations in `oft_blocks`.

    Each block B, a square, makes R = (I + Q) (I - Q)^-1 with Q = B - B^T (Cayley). `alpha` is the constraint: the norm
    of all Q of a layer together stays within alpha * out; 0 means no constraint. With `rescale` (out, 1, ...) each
    output is multiplied too.
    """

    required_names = frozenset({"oft_blocks"})
    optional_names = frozenset({"alpha", "rescale"})
    alpha_means = "constraint"

    blocks: ClassVar[str]  # the shape of `oft_blocks`, for messages

    def __init__(
        self, layer_shape: Sequence[int], rank: int, alpha: float | None = None, *, rescaled: bool = False
    ) -> None:
        """Build for a layer.

        Args:
            rank: the size that a block should have at most; see the type for what is possible.
            alpha: the constraint; None: none.
            rescaled: train a factor for each output too.

        Raises:
            ValueError: the layer cannot be adapted in this way.
        """
        super().__init__(layer_shape, rank, alpha)
        num_out, _, kernel = split_shape(layer_shape)
        self.oft_blocks = zeros(*self.new_blocks(layer_shape, rank))
        self.rescale = zeros(num_out, 1, *(1 for _ in kernel)) if rescaled else None
        self.alpha: Tensor
        self.register_buffer("alpha", torch.tensor(float(alpha or 0)))

    @staticmethod
    @abstractmethod
    def new_blocks(layer_shape: Sequence[int], rank: int) -> tuple[int, ...]:
        """Return the shape of new blocks.

        Raises:
            ValueError: none fits the layer.
        """

    @staticmethod
    @abstractmethod
    def is_fitting(blocks: Sequence[int], num_out: int) -> bool:
        """Return whether blocks of this shape turn so many outputs."""

    @abstractmethod
    def turn_rows(self, turns: Tensor, rows: Tensor) -> Tensor:
        """Return the change of rows (out, n) by the rotations, of which R - I is given in the blocks' shape."""

    @classmethod
    def from_tensors(cls, layer_shape: Sequence[int], tensors: Mapping[str, Tensor]) -> "Rotation":
        """Build from `oft_blocks` and what the file has of `alpha` (absent: no constraint) and `rescale`.

        Raises:
            ValueError: they do not fit a layer of this shape.
        """
        num_out, _, _ = split_shape(layer_shape)
        shape = tuple(tensors["oft_blocks"].shape)
        if not all(shape) or not cls.is_fitting(shape, num_out):
            raise ValueError(
                f"oft_blocks {show(shape)} in the file; {cls.blocks} with number * size = {num_out} is needed, for the "
                f"layer's weight is {show(layer_shape)}"
            )

        def make() -> Rotation:
            adapter = cls(layer_shape, 1, rescaled="rescale" in tensors)
            adapter.oft_blocks = zeros(*shape)
            return adapter

        return build(make, layer_shape, {"alpha": torch.tensor(0.0), **tensors})

    @classmethod
    def largest_rank(cls, layer_shape: Sequence[int]) -> int:
        """Return sys.maxsize: the rank is an upper limit.

        Raises:
            ValueError: the layer cannot be adapted in this way.
        """
        cls.new_blocks(layer_shape, 1)
        return sys.maxsize

    def reset(self, weight: Tensor, generator: torch.Generator) -> None:
        """Turn by nothing."""
        with torch.no_grad():
            self.oft_blocks.zero_()
            if self.rescale is not None:
                self.rescale.fill_(1)

    def delta(self, weight: Tensor) -> Tensor:
        """Return R W - W, or rescale * R W - W, in fp32 and of the weight's shape."""
        with torch.autocast(weight.device.type, enabled=False):
            turns = cayley(self.oft_blocks.float(), self.alpha * weight.shape[0])
            change = self.turn_rows(turns, weight.float().flatten(1)).view(weight.shape)
            if self.rescale is None:
                return change
            return self.rescale * change + (self.rescale - 1) * weight.float()

    def scale_(self, factor: float) -> None:
        """Refuse: a multiple of a rotation is none.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "the strength of a rotation (OFT, BOFT) cannot be changed in its tensors; set the multiplier instead, or "
            "train without a limit of the norm"
        )


def cayley(blocks: Tensor, limit: Tensor) -> Tensor:
    """Return R - I for each block B (..., size, size), exactly 0 where B is 0.

    limit: 0-dim; the norm of all Q = B - B^T together is brought down to it; 0: any.
    """
    q = blocks - blocks.mT
    shrink = (limit / (q.norm() + 1e-8)).clamp_max(1)
    q = q * torch.where(limit > 0, shrink, torch.ones_like(shrink))
    identity = torch.eye(q.shape[-1], device=q.device)
    return torch.linalg.solve(identity - q, identity + q) - identity  # the two commute
