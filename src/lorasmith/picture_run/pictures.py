"""A picture to draw, with the LoRAs it is drawn with."""

from dataclasses import dataclass

from lorasmith.data.buckets import Size
from lorasmith.prompt_syntax import LoraTag
from lorasmith.sampling import Drawing


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
