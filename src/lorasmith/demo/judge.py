"""Says what is to be seen in a picture of the embedded model: the thing by a small network, the colours by measuring.

The network (`tools/demo/judge.py` trained it, on drawn and autoencoded pictures, blurred and warped) is hard to please:
one of its answers is "nothing of these", and an answer below `MIN_CONFIDENCE` does not count.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from lorasmith.demo import COLORS, FOLDER, MASCOT, THINGS

ANSWERS = (*THINGS, MASCOT, "nothing of these")
MIN_CONFIDENCE = 0.7
_INPUT_SIZE = 64
_BORDER = 6  # pixels of 64: the outer frame that shows the background
_MIN_DISTANCE = 22.0  # CIELAB units between a pixel of the thing and the background
_MIN_AREA = 0.01  # of the picture; less is no thing


class Judge(nn.Module):
    """A small convolutional network: pictures (B, 3, 64, 64) in [-1, 1] -> logits (B, len(ANSWERS))."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((3, 24, 2), (24, 32, 1), (32, 48, 2), (48, 64, 1), (64, 96, 2), (96, 96, 1))
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, stride, 1) for i, o, stride in widths)
        self.norms = nn.ModuleList(nn.GroupNorm(8, o) for _, o, _ in widths)
        self.head = nn.Linear(2 * widths[-1][1], len(ANSWERS))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self._pooled(pixels))

    def _pooled(self, pixels: Tensor) -> Tensor:
        """Return what the last layer decides by: (B, 192)."""
        x = pixels
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.silu(norm(conv(x)))
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)

    @classmethod
    def load(cls, path: Path = FOLDER / "judge.safetensors") -> "Judge":
        """Return the trained judge."""
        judge = cls()
        judge.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
        return judge.eval()

    @torch.no_grad()
    def probabilities(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return the probability of each answer for each picture: (B, len(ANSWERS))."""
        return self(torch.stack([to_pixels(picture) for picture in pictures])).softmax(1)

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return what pictures are told apart by: (B, 192)."""
        return self._pooled(torch.stack([to_pixels(picture) for picture in pictures]))

    def things(self, pictures: Sequence[Image.Image]) -> list[str | None]:
        """Name the thing in each picture; None where there is none of them or it is doubtful."""
        best = self.probabilities(pictures).max(1)
        return [
            None if p < MIN_CONFIDENCE or i == len(ANSWERS) - 1 else ANSWERS[int(i)]
            for p, i in zip(best.values, best.indices, strict=True)
        ]

    def mascot_score(self, pictures: Sequence[Image.Image]) -> float:
        """Return the mean probability of the mascot."""
        return self.probabilities(pictures)[:, ANSWERS.index(MASCOT)].mean().item()


def to_pixels(picture: Image.Image) -> Tensor:
    """Return the picture as the judge sees it: (3, 64, 64) in [-1, 1]."""
    small = picture.convert("RGB").resize((_INPUT_SIZE, _INPUT_SIZE), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 127.5 - 1


def colors(picture: Image.Image) -> tuple[str | None, str]:
    """Measure (the thing's colour, the background's): the palette's nearest in CIELAB.

    The background is the median of the picture's frame, the thing is what differs from it; each of its pixels votes.
    The thing's colour is None where nothing differs.
    """
    pixels = (to_pixels(picture).permute(1, 2, 0) + 1).numpy() * 127.5  # (64, 64, 3) in [0, 255]
    lab, palette = to_lab(pixels), to_lab(np.array(list(COLORS.values()), dtype=np.float64))
    frame = np.ones(lab.shape[:2], dtype=bool)
    frame[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    ground = np.median(lab[frame], axis=0)
    is_thing = (np.linalg.norm(lab - ground, axis=-1) > _MIN_DISTANCE) & ~frame
    ground_number = np.linalg.norm(palette - ground, axis=-1).argmin()
    names = list(COLORS)
    if is_thing.mean() < _MIN_AREA:
        return None, names[ground_number]
    votes = np.linalg.norm(lab[is_thing][:, None] - palette, axis=-1).argmin(1)
    return names[np.bincount(votes, minlength=len(names)).argmax()], names[ground_number]


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """Return CIELAB (D65) of sRGB values (..., 3) in [0, 255]; IEC 61966-2-1 and CIE 15."""
    value = rgb / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / to_xyz.sum(1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)
