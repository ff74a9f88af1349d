"""A picture to draw, with the LoRAs it is drawn with."""

from dataclasses import dataclass

from lorasmith.data.buckets import Size
from lorasmith.prompt_syntax import LoraTag
from lorasmith.sampling import Drawing


@dataclass(frozen=True)
class Picture(Drawing):
    """One picture to draw: `prompt` is without LoRAs, and these are in their order."""

    loras: tuple[LoraTag, ...] = ()

    @property
    def settings(self) -> tuple[Size, int, float, str]:
        """What pictures must have in common to be drawn at once."""
        return self.size, self.steps, self.guidance, self.sampler
