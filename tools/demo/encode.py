"""Training pictures as latents, in shards: (means, deviations, labels), both (N, 4, 16, 16) in fp16 and scaled to 1."""

from pathlib import Path

import recipe
import torch
from torch import Tensor

from lorasmith.checkpoint import atomic_file
from lorasmith.models.sd import LATENT_SCALE

SHARD_SIZE = 2000  # pictures
_BATCH_SIZE = 50


def shard_path(work: Path, number: int) -> Path:
    return work / f"latents-{number:03d}.pt"


@torch.no_grad()
def encode(vae_path: Path, first: int, number: int, target: Path) -> None:
    """Draw the pictures from `first` on, encode them and write them as one shard."""
    vae = recipe.build_vae().eval()
    vae.load_state_dict(torch.load(vae_path))
    means: list[Tensor] = []
    deviations: list[Tensor] = []
    labels: list[recipe.Label] = []
    for start in range(first, first + number, _BATCH_SIZE):
        samples = [recipe.sample(index) for index in range(start, min(start + _BATCH_SIZE, first + number))]
        pixels = recipe.to_pixels([picture for _, picture in samples])
        posterior = vae.encode(pixels).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        means.append((posterior.mean * LATENT_SCALE).half())
        deviations.append((posterior.std * LATENT_SCALE).half())
        labels += [label for label, _ in samples]
    with atomic_file(target) as temporary:
        torch.save((torch.cat(means), torch.cat(deviations), labels), temporary)


class Latents:
    """The pictures in memory, as many shards of them as were asked for."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._means: list[Tensor] = []
        self._deviations: list[Tensor] = []
        self.labels: list[recipe.Label] = []

    def grow(self, num_shards: int) -> None:
        """Read shards until there are so many."""
        for number in range(len(self._means), num_shards):
            means, deviations, labels = torch.load(shard_path(self._work, number))
            self._means.append(means)
            self._deviations.append(deviations)
            self.labels += labels

    def draw(self, indices: list[int], generator: torch.Generator) -> Tensor:
        """Return samples of the pictures' posteriors, (B, 4, 16, 16)."""
        means, deviations = (self._gather(shards, indices) for shards in (self._means, self._deviations))
        return means + deviations * torch.randn(means.shape, generator=generator)

    @staticmethod
    def _gather(shards: list[Tensor], indices: list[int]) -> Tensor:
        size = len(shards[0])
        return torch.stack([shards[index // size][index % size] for index in indices]).float()
