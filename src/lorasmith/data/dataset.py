"""Batches: what the training step needs for step N, as a pure function of (plan, options, N).

Every random number of a sample (noise, timestep, caption variant, crop, flip, colour) is drawn here, on the CPU, from a
generator of its own that is seeded by the run's seed, a purpose, the step and the sample's index in the global batch.
So neither the number of processes nor of workers, nor resuming, nor reading ahead can change a batch.

Batches are prepared ahead by threads, not processes: Pillow and numpy release the GIL where their time goes; forking
after torch has started threads may deadlock; and threads behave the same on Windows and in notebooks and pass tensors
without copying.
"""

import copy
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from lorasmith.data import captions
from lorasmith.data.buckets import CropPlan
from lorasmith.data.faces import face_of
from lorasmith.data.images import Draws, open_with_alpha, prepare
from lorasmith.data.masks import STILL, latent_mask, open_mask
from lorasmith.data.plan import MicroBatch, Plan, Sample
from lorasmith.data.records import ImageRecord
from lorasmith.data.subsets import Subset
from lorasmith.errors import UserError
from lorasmith.losses import mask_factors
from lorasmith.noise import NoiseDraws, NoiseOptions
from lorasmith.seeds import derive

Item = TypeVar("Item")
Result = TypeVar("Result")

# (record index, whether mirrored) -> (mean, std) of the VAE's scaled posterior, each (C, H/f, W/f)
Posteriors = Mapping[tuple[int, bool], tuple[Tensor, Tensor]]

_NO_LATENTS: Posteriors = {}
_READ_AHEAD = 2  # items in work or waiting, per worker


@dataclass(frozen=True)
class Batch:
    """What one process works on at once, on the CPU, float32; B samples of one shape.

    latents: (B, C, H/f, W/f), drawn from cached posteriors; else None. pixels: (B, 3, H, W) in [-1, 1]; else None.
    mask: (B, 1, H/f, W/f), what each place's error is multiplied by (`losses.mask_factors`); None: there are no masks.
    posterior_noise, noise: (B, C, H/f, W/f), standard normal. t: (B,), what the model calls time. noise_draws: what
    makes the noise another; None: nothing. keeps_output: (B,), whether a sample's target is the base model's output;
    None: no sample's. indexes: of the samples in the global batch of their step.
    weight: (B,), of each sample's loss; 0 for padding. count: samples of the whole global step, over all processes
    and micro-batches, without padding; the sum of weight * loss over all of them, divided by it, is the step's mean.
    """

    latents: Tensor | None
    pixels: Tensor | None
    posterior_noise: Tensor
    noise: Tensor
    t: Tensor
    captions: list[str]
    weight: Tensor
    count: int
    mask: Tensor | None = None
    noise_draws: NoiseDraws | None = None
    keeps_output: Tensor | None = None
    indexes: Sequence[int] = ()


class Dataset:
    """Builds the batches of any step.

    Args:
        crops: how each record's picture is brought to its shape.
        subsets: the rules that records follow, counted over all data sets.
        sample_t: (n, generator) -> (n,) timesteps.
        latent_channels, latent_factor: C, and f = pixels per latent, of the model.
        latents: cached posteriors of all records of some data sets, made by the caller from `plain_pixels`, mirrored
            ones too where a subset flips; of other records pixels are given.
        prior_loss_weight: weight of regularization pictures.
        mask_background, mask_by_area: see `losses.mask_factors`.
        noise: how noise differs from independent normal numbers; None: not at all.
    """

    def __init__(
        self,
        plan: Plan,
        records: Sequence[ImageRecord],
        crops: Sequence[CropPlan],
        subsets: Sequence[Subset],
        *,
        seed: int,
        sample_t: Callable[[int, torch.Generator], Tensor],
        latent_channels: int = 4,
        latent_factor: int = 8,
        latents: Posteriors = _NO_LATENTS,
        prior_loss_weight: float = 1.0,
        mask_background: float = 0.0,
        mask_by_area: bool = True,
        noise: NoiseOptions | None = None,
    ) -> None:
        self._plan, self._records, self._crops, self._subsets = plan, records, crops, subsets
        self._has_kept_outputs = any(subset.keeps_output for subset in subsets)
        self._seed, self._sample_t, self._latents = seed, sample_t, latents
        self._latent_channels, self._latent_factor = latent_channels, latent_factor
        self._prior_loss_weight = prior_loss_weight
        self._mask_background, self._mask_by_area = mask_background, mask_by_area
        self._noise = noise
        self._still_masks: dict[int, Tensor] = {}  # a memory only: of records whose latents are cached

    def batch(self, step: int, process_index: int) -> list[Batch]:
        """Return one process's batches of a step, one for each unit of gradient accumulation.

        Raises:
            UserError: a picture is no longer what it was when the run began.
        """
        count = self._plan.num_samples(step)
        return [self._build(micro_batch, step, count) for micro_batch in self._plan.step(step, process_index)]

    def prefetch(self, steps: Iterable[int], process_index: int = 0, workers: int = 0) -> Iterator[list[Batch]]:
        """Yield the batches of these steps in order, prepared ahead by `workers` threads; their number changes nothing.

        Errors come out where the batch would have.
        """
        return read_ahead(lambda step: self.batch(step, process_index), steps, workers=workers)

    def held_out(self, plan: Plan) -> "Dataset":
        """Return the data set of the same records that follows a validation plan.

        Its captions are whole, its pictures not augmented, and its draws follow from that plan's seed.
        """
        held_out = copy.copy(self)
        held_out._plan, held_out._seed = plan, plan.seed
        held_out._subsets = [subset.settled for subset in self._subsets]
        return held_out

    def _build(self, micro_batch: MicroBatch, step: int, count: int) -> Batch:
        samples, (width, height), factor = micro_batch.samples, micro_batch.shape, self._latent_factor
        shape = (self._latent_channels, height // factor, width // factor)

        def normal(purpose: str) -> Tensor:
            draws = [torch.randn(shape, generator=self._generator(purpose, step, sample)) for sample in samples]
            return torch.stack(draws)  # (B, C, H/f, W/f)

        posterior_noise = normal("posterior")
        is_cached = (samples[0].record, False) in self._latents
        pictures = [] if is_cached else [self._picture(step, sample) for sample in samples]
        masks = [self._still_mask(step, sample) for sample in samples] if is_cached else [mask for _, mask in pictures]
        keeps_output = [self._subset(sample).keeps_output for sample in samples]
        t = torch.cat([self._sample_t(1, self._generator("timestep", step, sample)) for sample in samples])
        return Batch(
            latents=self._draw_latents(step, samples, posterior_noise) if is_cached else None,
            pixels=None if is_cached else torch.stack([pixels for pixels, _ in pictures]),
            posterior_noise=posterior_noise,
            noise=normal("noise"),
            t=t,
            captions=[self._caption(step, sample) for sample in samples],
            weight=torch.tensor([self._weight(*pair) for pair in zip(samples, micro_batch.is_padding, strict=True)]),
            count=count,
            mask=self._mask_factors(masks, (1, *shape[1:])),
            noise_draws=self._draw_noise(step, samples, shape),
            keeps_output=torch.tensor(keeps_output) if self._has_kept_outputs else None,
            indexes=[sample.index for sample in samples],
        )

    def _draw_noise(self, step: int, samples: Sequence[Sample], shape: tuple[int, int, int]) -> NoiseDraws | None:
        if self._noise is None:
            return None
        return NoiseDraws.stack(
            [self._noise.draw(shape, lambda purpose, s=s: self._generator(purpose, step, s)) for s in samples]
        )

    def _generator(self, purpose: str, step: int, sample: Sample) -> torch.Generator:
        return torch.Generator().manual_seed(derive(self._seed, purpose, step, sample.index))

    def _random(self, purpose: str, step: int, sample: Sample) -> random.Random:
        return random.Random(derive(self._seed, purpose, step, sample.index))

    def _picture_draws(self, step: int, sample: Sample) -> Draws:
        return Draws.of(self._random("picture", step, sample))

    def _subset(self, sample: Sample) -> Subset:
        return self._subsets[self._records[sample.record].subset]

    def _draw_latents(self, step: int, samples: Sequence[Sample], posterior_noise: Tensor) -> Tensor:
        moments = []
        for sample in samples:
            is_mirrored = self._subset(sample).augmentation.flip and self._picture_draws(step, sample).is_mirrored
            moments.append(self._latents[sample.record, is_mirrored])
        mean = torch.stack([mean for mean, _ in moments]).float()
        std = torch.stack([std for _, std in moments]).float()
        return mean + std * posterior_noise

    def _picture(self, step: int, sample: Sample) -> tuple[Tensor, Tensor | None]:
        """Return a sample's pixels (3, H, W), and its mask (1, H/f, W/f) if it has one."""
        record, crop, subset = self._records[sample.record], self._crops[sample.record], self._subset(sample)
        augmentation = subset.augmentation
        portions = None if augmentation.has_still_faces else augmentation.face_portions
        image, alpha = _open_unchanged(record, subset.alpha_color)
        where: dict[str, Any] = {
            "draws": self._picture_draws(step, sample),
            "flip": augmentation.flip,
            "random_crop": augmentation.random_crop,
            "face": face_of(record.path) if portions else None,
            "face_portions": portions,
        }
        pixels = prepare(image, crop, colour=augmentation.colour, **where)
        if record.mask is None:
            return pixels, None
        mask = alpha if record.mask.path is None and alpha is not None else open_mask(record)
        return pixels, latent_mask(mask, crop, self._latent_factor, **where)

    def _still_mask(self, step: int, sample: Sample) -> Tensor | None:
        """Return the mask (1, H/f, W/f) of a sample that is only ever mirrored, read once and kept."""
        record = self._records[sample.record]
        if record.mask is None:
            return None
        if sample.record not in self._still_masks:
            mask = latent_mask(open_mask(record), self._crops[sample.record], self._latent_factor, draws=STILL)
            self._still_masks[sample.record] = mask
        mask = self._still_masks[sample.record]
        is_mirrored = self._subset(sample).augmentation.flip and self._picture_draws(step, sample).is_mirrored
        return mask.flip(-1) if is_mirrored else mask

    def _mask_factors(self, masks: Sequence[Tensor | None], shape: tuple[int, ...]) -> Tensor | None:
        if all(mask is None for mask in masks):
            return None
        whole = torch.stack([torch.ones(shape) if mask is None else mask for mask in masks])  # (B, 1, H/f, W/f)
        return mask_factors(whole, background=self._mask_background, by_area=self._mask_by_area)

    def _caption(self, step: int, sample: Sample) -> str:
        return captions.process(
            self._records[sample.record].caption,
            self._subset(sample).captions,
            draws=lambda purpose: self._random(f"caption {purpose}", step, sample),
            step=step,
            epoch=sample.epoch,
        )

    def _weight(self, sample: Sample, is_padding: bool) -> float:
        if is_padding:
            return 0.0
        return self._prior_loss_weight if self._records[sample.record].is_prior else 1.0


def plain_pixels(record: ImageRecord, crop: CropPlan, subset: Subset) -> Tensor:
    """Return a record's pixels (3, H, W) in [-1, 1], cropped as planned and not augmented: what is cached as latents.

    Raises:
        UserError: the picture is no longer what it was when the run began.
    """
    return prepare(_open_unchanged(record, subset.alpha_color)[0], crop, draws=STILL)


def _open_unchanged(record: ImageRecord, alpha_color: str) -> tuple[Image.Image, Image.Image | None]:
    image, alpha = open_with_alpha(record, alpha_color=alpha_color)
    if image.size != record.size:
        raise UserError(
            f"{record.path} has changed during the run: it was {record.size[0]}x{record.size[1]} at the start and is "
            f"{image.width}x{image.height} now; leave the pictures alone while training and start the run again."
        )
    return image, alpha


def read_ahead(make: Callable[[Item], Result], items: Iterable[Item], *, workers: int) -> Iterator[Result]:
    """Yield make(item) for each item, in order; `workers` threads work ahead, a bounded number of items (0: none).

    An error comes out in the place of its result; work not yet begun is dropped when the consumer stops.
    """
    if not workers:
        yield from map(make, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="read-ahead")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) == workers * _READ_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
