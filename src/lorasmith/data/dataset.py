"""Batches: what the training step needs for step N, as a pure function of (plan, options, N).

Every random number of a sample (noise, timestep, caption variant, crop, flip, colour) is drawn here, on the CPU, from a
generator of its own that is seeded by the run's seed, a purpose, the step and the sample's index in the global batch.
So neither the number of processes nor of workers, nor resuming, nor reading ahead can change a batch.

Batches are prepared ahead by threads, not processes: Pillow and numpy release the GIL where their time goes; forking
after torch has started threads may deadlock; and threads behave the same on Windows and in notebooks and pass tensors
without copying.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from lorasmith.data import captions
from lorasmith.data.buckets import CropPlan, Size
from lorasmith.data.captions import CaptionOptions
from lorasmith.data.faces import face_of
from lorasmith.data.images import open_image, prepare
from lorasmith.data.plan import MicroBatch, Plan, Sample
from lorasmith.data.records import ImageRecord
from lorasmith.errors import UserError
from lorasmith.seeds import derive

Item = TypeVar("Item")
Result = TypeVar("Result")

# (record index, (width, height) in pixels) -> (mean, std) of the VAE's scaled posterior, each (C, H/f, W/f)
Posteriors = Mapping[tuple[int, Size], tuple[Tensor, Tensor]]

_AS_WRITTEN = CaptionOptions()
_READ_AHEAD = 2  # items in work or waiting, per worker


@dataclass(frozen=True)
class Batch:
    """What one process works on at once, on the CPU, float32; B samples of one shape.

    latents: (B, C, H/f, W/f), drawn from cached posteriors; else None. pixels: (B, 3, H, W) in [-1, 1]; else None.
    posterior_noise, noise: (B, C, H/f, W/f), standard normal. t: (B,), what the model calls time.
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


@dataclass(frozen=True)
class Augmentation:
    """How pictures vary; see `images.prepare`."""

    flip: bool = False
    colour: bool = False
    random_crop: bool = False
    face_portions: tuple[float, float] | None = None


class Dataset:
    """Builds the batches of any step.

    Args:
        crops: how each record's picture is brought to its shape.
        sample_t: (n, generator) -> (n,) timesteps.
        latent_channels, latent_factor: C, and f = pixels per latent, of the model.
        latents: cached posteriors of all records, made by the caller from `plain_pixels`; without it pixels are given.
        alpha_color: what is seen through transparent pictures.
        prior_loss_weight: weight of regularization pictures.
    """

    def __init__(
        self,
        plan: Plan,
        records: Sequence[ImageRecord],
        crops: Sequence[CropPlan],
        *,
        seed: int,
        sample_t: Callable[[int, torch.Generator], Tensor],
        latent_channels: int = 4,
        latent_factor: int = 8,
        latents: Posteriors | None = None,
        caption_options: CaptionOptions = _AS_WRITTEN,
        augmentation: Augmentation = Augmentation(),
        prior_loss_weight: float = 1.0,
        alpha_color: str = "white",
    ) -> None:
        assert latents is None or augmentation == Augmentation(), "cached latents cannot be augmented"
        self._plan, self._records, self._crops, self._seed = plan, records, crops, seed
        self._sample_t, self._latents = sample_t, latents
        self._latent_channels, self._latent_factor = latent_channels, latent_factor
        self._captions, self._augmentation, self._prior_loss_weight = caption_options, augmentation, prior_loss_weight
        self._alpha_color = alpha_color

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

    def _build(self, micro_batch: MicroBatch, step: int, count: int) -> Batch:
        samples, (width, height), factor = micro_batch.samples, micro_batch.shape, self._latent_factor
        shape = (self._latent_channels, height // factor, width // factor)

        def normal(purpose: str) -> Tensor:
            draws = [torch.randn(shape, generator=self._generator(purpose, step, sample)) for sample in samples]
            return torch.stack(draws)  # (B, C, H/f, W/f)

        posterior_noise = normal("posterior")
        t = torch.cat([self._sample_t(1, self._generator("timestep", step, sample)) for sample in samples])
        return Batch(
            latents=None if self._latents is None else self._draw_latents(self._latents, micro_batch, posterior_noise),
            pixels=torch.stack([self._pixels(step, sample) for sample in samples]) if self._latents is None else None,
            posterior_noise=posterior_noise,
            noise=normal("noise"),
            t=t,
            captions=[self._caption(step, sample) for sample in samples],
            weight=torch.tensor([self._weight(*pair) for pair in zip(samples, micro_batch.is_padding, strict=True)]),
            count=count,
        )

    def _generator(self, purpose: str, step: int, sample: Sample) -> torch.Generator:
        return torch.Generator().manual_seed(derive(self._seed, purpose, step, sample.index))

    def _random(self, purpose: str, step: int, sample: Sample) -> random.Random:
        return random.Random(derive(self._seed, purpose, step, sample.index))

    @staticmethod
    def _draw_latents(latents: Posteriors, micro_batch: MicroBatch, posterior_noise: Tensor) -> Tensor:
        moments = [latents[sample.record, micro_batch.shape] for sample in micro_batch.samples]
        mean = torch.stack([mean for mean, _ in moments]).float()
        std = torch.stack([std for _, std in moments]).float()
        return mean + std * posterior_noise

    def _pixels(self, step: int, sample: Sample) -> Tensor:
        record, crop, augmentation = self._records[sample.record], self._crops[sample.record], self._augmentation
        return prepare(
            _open_unchanged(record, self._alpha_color),
            crop,
            rng=self._random("picture", step, sample),
            flip=augmentation.flip,
            colour=augmentation.colour,
            random_crop=augmentation.random_crop,
            face=face_of(record.path) if augmentation.face_portions else None,
            face_portions=augmentation.face_portions,
        )

    def _caption(self, step: int, sample: Sample) -> str:
        return captions.process(
            self._records[sample.record].caption,
            self._captions,
            draws=lambda purpose: self._random(f"caption {purpose}", step, sample),
            step=step,
            epoch=sample.epoch,
        )

    def _weight(self, sample: Sample, is_padding: bool) -> float:
        if is_padding:
            return 0.0
        return self._prior_loss_weight if self._records[sample.record].is_prior else 1.0


def plain_pixels(record: ImageRecord, crop: CropPlan, alpha_color: str = "white") -> Tensor:
    """Return a record's pixels (3, H, W) in [-1, 1], cropped as planned and not augmented: what is cached as latents.

    Raises:
        UserError: the picture is no longer what it was when the run began.
    """
    return prepare(_open_unchanged(record, alpha_color), crop, rng=random.Random(0))


def _open_unchanged(record: ImageRecord, alpha_color: str) -> Image.Image:
    image = open_image(record.path, alpha_color=alpha_color)
    if image.size != record.size:
        raise UserError(
            f"{record.path} has changed during the run: it was {record.size[0]}x{record.size[1]} at the start and is "
            f"{image.width}x{image.height} now; leave the pictures alone while training and start the run again."
        )
    return image


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
