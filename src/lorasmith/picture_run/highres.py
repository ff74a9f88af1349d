"""The second pass of a picture (highres fix): what was drawn small is enlarged, and drawn on from.

A model draws well at the size that it was trained at; much larger, it repeats itself.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from lorasmith import plugins
from lorasmith.config import GenerateConfig
from lorasmith.data.buckets import Size
from lorasmith.errors import UserError
from lorasmith.memory import is_out_of_memory
from lorasmith.models.base import LatentDiffusion, ModelFacts
from lorasmith.sampling import Beginning, Drawing, check_settings, decoded, drawn_steps

_OURS = ("latent", "lanczos")


class Highres:
    """How the second pass is drawn.

    Raises:
        UserError: there is no such upscaler.
    """

    def __init__(self, cfg: GenerateConfig, facts: ModelFacts) -> None:
        assert cfg.highres_scale is not None
        self._scale, self._steps, self._denoise = cfg.highres_scale, cfg.highres_steps, cfg.highres_denoise
        self._name, self._sigmas, self._facts = cfg.highres_upscaler, cfg.sigmas, facts
        self._enlarge = None if self._name in _OURS else _function(self._name)

    def size(self, size: Size) -> Size:
        """Return the size of the second pass's pictures, rounded down to what the model can draw."""
        factor = self._facts.latent_factor
        width, height = (int(round(side * self._scale, 6)) // factor * factor for side in size)
        return width, height

    def steps(self, steps: int) -> int:
        """Return the steps of the second pass, of which some are drawn, by those of the first."""
        return self._steps or steps

    def drawn_steps(self, steps: int) -> int:
        """Return how many steps of the second pass are drawn."""
        return drawn_steps(self.steps(steps), self._denoise)

    def check(self, one: Drawing) -> None:
        """Check that there is something to draw in the second pass.

        Raises:
            UserError: there is not, or a picture of this size cannot be drawn.
        """
        size = self.size(one.size)
        if size[0] <= one.size[0] or size[1] <= one.size[1]:
            raise UserError(
                f"--highres-scale {self._scale:g} makes {size[0]}x{size[1]} of {one.size[0]}x{one.size[1]}, for sides "
                f"are multiples of {self._facts.latent_factor}; give a larger one."
            )
        check_settings(self._facts, size, self.steps(one.steps), one.sampler, self._sigmas)
        if not self.drawn_steps(one.steps):
            raise UserError(
                f"--highres-denoise {self._denoise:g} of {self.steps(one.steps)} steps is less than one; give more of "
                "either."
            )

    @torch.no_grad()
    def beginning(self, model: LatentDiffusion, latents: Tensor, size: Size) -> Beginning:
        """Return what to draw on from: the latents (B, C, h, w) of small pictures, enlarged to `size` in pixels.

        Raises:
            UserError: the upscaler fails, or gives no picture.
        """
        if self._name == "latent":
            shape = (size[1] // model.latent_factor, size[0] // model.latent_factor)
            return Beginning((F.interpolate(latents.float(), shape, mode="bilinear"), None), self._denoise)
        posteriors = [model.encode_image(fitted(self._enlarged(one), size)) for one in decoded(model, latents)]
        mean, std = (torch.cat([posterior[part] for posterior in posteriors]) for part in (0, 1))
        return Beginning((mean, std), self._denoise)

    def facts(self, one: Drawing) -> dict[str, str]:
        """Return what is written into a picture, by WebUI's names; its steps are those that are drawn."""
        return {
            "Denoising strength": f"{self._denoise:g}",
            "Hires upscale": f"{self._scale:g}",
            **({} if self._steps is None else {"Hires steps": str(self.drawn_steps(one.steps))}),
            "Hires upscaler": self._name.capitalize() if self._name in _OURS else self._name,
        }

    def _enlarged(self, picture: Image.Image) -> Image.Image:
        if self._enlarge is None:
            return picture
        try:
            found = self._enlarge(picture)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise UserError(f"--highres-upscaler {self._name} failed: {type(error).__name__}: {error}") from error
        if not isinstance(found, Image.Image):
            raise UserError(
                f"--highres-upscaler {self._name} gave {type(found).__name__}; a PIL picture is expected of it."
            )
        return found


def _function(name: str) -> Callable[[Image.Image], object]:
    if "." not in name:
        raise UserError(
            f"--highres-upscaler {name}: there are {', '.join(_OURS)}, and any function of a picture by its dotted "
            "name (my_module.enlarge)."
        )
    try:
        found = plugins.find("upscalers", name)
    except UserError as error:
        raise UserError(f"--highres-upscaler: {error}") from error
    if not callable(found):
        raise UserError(f"--highres-upscaler {name} is no function; give one that makes a PIL picture of another.")
    return found


def fitted(picture: Image.Image, size: Size) -> Tensor:
    """Return a picture, (1, 3, H, W) in [-1, 1], made as large as is needed; what is too much is cut off its sides."""
    levels = np.asarray(ImageOps.fit(picture.convert("RGB"), size, Image.Resampling.LANCZOS), dtype=np.float32)
    return torch.from_numpy(levels).permute(2, 0, 1)[None] / 127.5 - 1
