"""A picture to draw, with the LoRAs it is drawn with."""

from collections.abc import Collection
from dataclasses import dataclass

from lorasmith.data.buckets import Size
from lorasmith.errors import UserError
from lorasmith.models.base import ModelFacts
from lorasmith.prompt_syntax import LoraTag
from lorasmith.sampling import Drawing, check_settings

_LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Picture(Drawing):
    """One picture to draw.

    Args:
        prompt: without LoRAs.
        loras: these, in their order.
        negative_guidance: scale for the negative prompt; None: that of the prompt.
        denoise: share of the steps that are drawn on from a picture; None: it is drawn from noise alone.
        file: pattern of its name; None: as for all.
    """

    loras: tuple[LoraTag, ...] = ()
    negative_guidance: float | None = None
    denoise: float | None = None
    file: str | None = None

    @property
    def settings(self) -> tuple[Size, int, float, str, float | None]:
        """What pictures must have in common to be drawn at once."""
        return self.size, self.steps, self.guidance, self.sampler, self.denoise


def check_pictures(pictures: Collection[Picture], facts: ModelFacts, sigmas: str) -> None:
    """Check that a model can draw these.

    Raises:
        UserError: a seed is too large, or as for `check_settings`.
    """
    for one in pictures:
        if one.seed > _LARGEST_SEED:
            raise UserError(f"seed {one.seed} is too large; seeds go up to {_LARGEST_SEED}.")
    for size, steps, sampler in dict.fromkeys((one.size, one.steps, one.sampler) for one in pictures):
        check_settings(facts, size, steps, sampler, sigmas)
