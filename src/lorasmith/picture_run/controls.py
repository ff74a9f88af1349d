"""The ControlNets that pictures are drawn with: what each is shown, how strongly and when it takes part."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from lorasmith import model_families
from lorasmith.checkpoint import Checkpoint, open_checkpoint
from lorasmith.config import GenerateConfig, canny_thresholds, share_of_steps
from lorasmith.data.buckets import Size
from lorasmith.data.images import open_image
from lorasmith.edges import canny
from lorasmith.errors import UserError
from lorasmith.metadata import legacy_hash
from lorasmith.models.base import ControlNet, ModelFacts
from lorasmith.sampling import Control, is_in_share

_HASHED = 0x110000  # bytes of a file that WebUI's short hash of a model looks at


@dataclass(frozen=True)
class _Given:
    """A ControlNet as it is asked for. thresholds: of the edges that it is shown; None: the picture as it is."""

    name: str
    picture: Image.Image
    thresholds: tuple[float, float] | None
    weight: float
    share: tuple[float, float]


class Controls:
    """The ControlNets that are given, checked against the base model.

    Raises:
        UserError: one is none, or for another model; or a picture cannot be read.
    """

    def __init__(self, cfg: GenerateConfig, base: Checkpoint, facts: ModelFacts) -> None:
        self._base = base
        self._nets: list[ControlNet] = []
        count = len(cfg.control)
        pictures = [open_image(path) for path in cfg.control_picture]
        pictures = pictures * count if len(pictures) == 1 else pictures
        thresholds = map(canny_thresholds, cfg.control_preprocessor or ["none"] * count)
        weights = cfg.control_weight or [1.0] * count
        shares = map(share_of_steps, cfg.control_range or ["0,1"] * count)
        self._given = [_Given(*one) for one in zip(cfg.control, pictures, thresholds, weights, shares, strict=True)]
        for name in cfg.control:
            with open_checkpoint(name) as checkpoint:
                model_families.check_control(checkpoint, base, facts)

    def check_steps(self, steps: int) -> None:
        """Check that each takes part in pictures of so many steps.

        Raises:
            UserError: one does not.
        """
        for one in self._given:
            if not any(is_in_share(one.share, done, steps) for done in range(steps)):
                start, end = one.share
                raise UserError(
                    f"--control-range {start:g},{end:g}: none of {steps} steps lies in it, so {one.name} would do "
                    "nothing; make it wider, or leave the ControlNet out."
                )

    def load(self, dtype: torch.dtype, device: torch.device) -> None:
        """Load the networks.

        Raises:
            UserError: one is damaged.
        """
        for one in self._given:
            with open_checkpoint(one.name) as checkpoint:
                self._nets.append(model_families.load_control(checkpoint, self._base, dtype=dtype, device=device))

    def nets(self) -> list[nn.Module]:
        """Return what computes in them, loaded."""
        return [one.net for one in self._nets]

    def at(self, size: Size) -> list[Control]:
        """Return them, loaded, as they take part in pictures of a size."""
        return [
            Control(net, _shown(one, size), one.weight, one.share)
            for net, one in zip(self._nets, self._given, strict=True)
        ]

    def facts(self) -> dict[str, str]:
        """Return what is written of them into each picture, as WebUI's extension does."""
        return {f"ControlNet {number}": _fact(one) for number, one in enumerate(self._given)}


def _shown(one: _Given, size: Size) -> Tensor:
    """Return the picture, cut to a size, as the network reads it, (1, 3, H, W) in [0, 1]."""
    fitted = ImageOps.fit(one.picture.convert("RGB"), size, Image.Resampling.LANCZOS)
    pixels = np.asarray(fitted)
    if one.thresholds is not None:
        edges = canny(pixels, *one.thresholds)
        pixels = np.stack([edges] * 3, axis=2).astype(np.uint8) * 255
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)[None]


def _fact(one: _Given) -> str:
    path = Path(one.name)
    model = path.stem if path.is_file() else path.name
    if path.is_file():
        with path.open("rb") as file:
            model = f"{model} [{legacy_hash(file.read(_HASHED))}]"
    thresholds = zip(("Threshold A", "Threshold B"), one.thresholds or (), strict=False)  # none, or both
    facts = {
        "Module": "none" if one.thresholds is None else "canny",
        "Model": model.replace(",", " ").replace(":", " "),
        "Weight": f"{one.weight:g}",
        "Resize Mode": "Crop and Resize",
        **{name: f"{value:g}" for name, value in thresholds},
        "Guidance Start": f"{one.share[0]:g}",
        "Guidance End": f"{one.share[1]:g}",
        "Pixel Perfect": "True",
        "Control Mode": "Balanced",
    }
    return ", ".join(f"{name}: {value}" for name, value in facts.items())
