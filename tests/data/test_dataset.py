"""Batches: a pure function of the step, whatever the workers, the processes and the order of asking."""

import itertools
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from lorasmith.data.buckets import CropPlan, cover_and_crop
from lorasmith.data.captions import CaptionOptions
from lorasmith.data.dataset import Batch, Dataset, plain_pixels, read_ahead
from lorasmith.data.images import Draws, open_image, prepare
from lorasmith.data.plan import Plan, build_plan
from lorasmith.data.records import ImageRecord
from lorasmith.data.subsets import Augmentation, Subset
from lorasmith.errors import UserError
from lorasmith.seeds import derive

from .conftest import MakePicture

SIZES = [(64, 64), (64, 80), (96, 64), (40, 40), (64, 64)]
SHAPES = [(64, 64), (48, 64), (64, 48)]
AUGMENTED = Augmentation(flip=True, colour=True, random_crop=True)
VARIED = CaptionOptions(shuffle=True, keep_tokens=1, dropout=0.2)


def sample_t(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 1000, (n,), generator=generator)


class Data:
    """Five pictures, one of them for regularization, in three shapes."""

    def __init__(self, picture: MakePicture) -> None:
        paths = [picture(f"{i}.png", size) for i, size in enumerate(SIZES)]
        for i, path in enumerate(paths):
            left_right = Image.linear_gradient("L").rotate(90).resize(SIZES[i])
            Image.merge("RGB", [left_right, Image.new("L", SIZES[i], 40 * i), Image.new("L", SIZES[i], 90)]).save(path)
        self.records = [
            ImageRecord(path, f"id{i}, a, b, c, d", SIZES[i], repeats=2, is_prior=i == 4)
            for i, path in enumerate(paths)
        ]
        shapes = [SHAPES[0], SHAPES[1], SHAPES[2], SHAPES[0], SHAPES[0]]
        self.crops: list[CropPlan] = [cover_and_crop(size, shape) for size, shape in zip(SIZES, shapes, strict=True)]

    def plan(self, batch_size: int = 2, num_processes: int = 1, accumulation: int = 2, seed: int = 3) -> Plan:
        return build_plan(
            self.records,
            [crop.shape for crop in self.crops],
            batch_sizes=[batch_size],
            num_processes=num_processes,
            gradient_accumulation=accumulation,
            seed=seed,
        )

    def posteriors(self) -> dict[tuple[int, bool], tuple[Tensor, Tensor]]:
        rng = torch.Generator().manual_seed(0)

        def random_latent(shape: tuple[int, int]) -> Tensor:
            return torch.rand((4, shape[1] // 8, shape[0] // 8), generator=rng)

        return {
            (i, is_mirrored): (random_latent(crop.shape), random_latent(crop.shape))
            for i, crop in enumerate(self.crops)
            for is_mirrored in (False, True)
        }

    def dataset(
        self, plan: Plan | None = None, *, seed: int = 3, is_cached: bool = False, weight: float = 1.0
    ) -> Dataset:
        return Dataset(
            plan or self.plan(seed=seed),
            self.records,
            self.crops,
            [Subset(captions=VARIED, augmentation=Augmentation(flip=True) if is_cached else AUGMENTED)],
            seed=seed,
            sample_t=sample_t,
            latents=self.posteriors() if is_cached else {},
            prior_loss_weight=weight,
        )


@pytest.fixture
def data(picture: MakePicture) -> Data:
    return Data(picture)


def same(a: object, b: object) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


def assert_same(ours: Sequence[Batch], theirs: Sequence[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        different = [field.name for field in fields(Batch) if not same(getattr(a, field.name), getattr(b, field.name))]
        assert not different


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_nothing(data: Data, workers: int, is_cached: bool) -> None:
    dataset = data.dataset(is_cached=is_cached)
    inline = list(dataset.prefetch(range(12), workers=0))
    ahead = list(data.dataset(is_cached=is_cached).prefetch(range(12), workers=workers))
    for ours, theirs in zip(inline, ahead, strict=True):
        assert_same(ours, theirs)


def test_resuming_anywhere_and_asking_in_any_order_gives_the_same(data: Data) -> None:
    straight = list(data.dataset().prefetch(range(10)))
    for start in (3, 7):
        for step, batches in enumerate(data.dataset().prefetch(range(start, 10), workers=2), start=start):
            assert_same(batches, straight[step])
    shuffled = random.Random(0).sample(range(10), 10)
    dataset = data.dataset()
    for step in shuffled:
        assert_same(dataset.batch(step, 0), straight[step])


def joined(parts: Sequence[Batch]) -> dict[str, object]:
    """The real samples of several processes' batches of one unit, put together."""
    kept = [(part, (part.weight > 0).nonzero()[:, 0]) for part in parts]
    names = ("pixels", "posterior_noise", "noise", "t", "weight")
    tensors = {name: torch.cat([getattr(part, name)[rows] for part, rows in kept]) for name in names}
    texts = [part.captions[int(row)] for part, rows in kept for row in rows]
    return {**tensors, "captions": texts, "count": {part.count for part in parts}}


@pytest.mark.parametrize("num_processes", [2, 3])
def test_n_processes_of_batch_1_see_what_one_of_batch_n_sees(data: Data, num_processes: int) -> None:
    one = data.dataset(data.plan(batch_size=num_processes))
    many = data.dataset(data.plan(batch_size=1, num_processes=num_processes))
    for step in range(8):
        parts = [many.batch(step, process) for process in range(num_processes)]
        for whole, *unit in zip(one.batch(step, 0), *parts, strict=True):
            ours, theirs = joined([whole]), joined(unit)
            assert [name for name in ours if not same(ours[name], theirs[name])] == []


def test_shapes_weights_and_counts(data: Data) -> None:
    plan = data.plan(batch_size=1, num_processes=3)
    dataset = data.dataset(plan, weight=0.25)
    for step in range(plan.steps_per_epoch):
        weights: list[float] = []
        counts = set()
        for process in range(3):
            for batch, micro_batch in zip(dataset.batch(step, process), plan.step(step, process), strict=True):
                (width, height), n = micro_batch.shape, len(micro_batch.samples)
                assert batch.latents is None and batch.pixels is not None
                assert batch.pixels.shape == (n, 3, height, width) and batch.pixels.dtype == torch.float32
                assert batch.noise.shape == batch.posterior_noise.shape == (n, 4, height // 8, width // 8)
                assert batch.t.shape == batch.weight.shape == (n,) and len(batch.captions) == n
                expected = [
                    0.0 if is_padding else 0.25 if data.records[sample.record].is_prior else 1.0
                    for sample, is_padding in zip(micro_batch.samples, micro_batch.is_padding, strict=True)
                ]
                assert batch.weight.tolist() == expected
                weights += expected
                counts.add(batch.count)
        assert counts == {sum(weight > 0 for weight in weights)} == {plan.num_samples(step)}


def all_batches(dataset: Dataset, steps: int) -> Iterator[Batch]:
    return itertools.chain.from_iterable(dataset.prefetch(range(steps)))


def test_every_draw_is_new_for_every_sample_and_step_and_follows_the_seed(data: Data) -> None:
    batches = list(all_batches(data.dataset(), 12))
    noises = [noise.flatten()[0].item() for batch in batches for noise in (*batch.noise, *batch.posterior_noise)]
    assert len(set(noises)) == len(noises) > 80
    assert len({t for batch in batches for t in batch.t.tolist()}) > 0.9 * sum(len(batch.t) for batch in batches)
    other = list(all_batches(data.dataset(data.plan(seed=3), seed=4), 12))
    assert not any(torch.equal(a.noise, b.noise) for a, b in zip(batches, other, strict=True))
    assert [batch.captions for batch in batches] != [batch.captions for batch in other]


def test_noise_is_standard_normal(data: Data) -> None:
    values = torch.cat([batch.noise.flatten() for batch in all_batches(data.dataset(is_cached=True), 60)])
    assert len(values) > 40_000
    assert abs(float(values.mean())) < 0.02 and abs(float(values.std()) - 1) < 0.02


def test_cached_posteriors_are_drawn_anew_each_time(data: Data) -> None:
    posteriors, plan, dataset = data.posteriors(), data.plan(), data.dataset(is_cached=True)
    seen = set()
    for step in range(10):
        for batch, micro_batch in zip(dataset.batch(step, 0), plan.step(step, 0), strict=True):
            assert batch.pixels is None and batch.latents is not None
            for i, sample in enumerate(micro_batch.samples):
                is_mirrored = Draws.of(random.Random(derive(3, "picture", step, sample.index))).is_mirrored
                mean, std = posteriors[sample.record, is_mirrored]
                assert torch.allclose((batch.latents[i] - mean) / std, batch.posterior_noise[i], atol=1e-3)
                seen.add(is_mirrored)
    assert seen == {False, True}


def test_a_mirrored_picture_has_mirrored_latents_at_the_same_steps(data: Data) -> None:
    """The oracle is a VAE that keeps every eighth pixel: its latents can be told from the pixels of the other way."""
    data.crops = [cover_and_crop(size, (64, 64)) for size in SIZES]
    plan, subsets = data.plan(), [Subset(augmentation=Augmentation(flip=True))]

    def encoded(pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean = pixels[:, ::8, ::8]
        return torch.cat([mean, mean[:1]]), torch.zeros(4, 8, 8)

    latents = {}
    for i, (record, crop) in enumerate(zip(data.records, data.crops, strict=True)):
        pixels = plain_pixels(record, crop, subsets[0])
        latents[i, False], latents[i, True] = encoded(pixels), encoded(pixels.flip(-1))
    cached = Dataset(plan, data.records, data.crops, subsets, seed=3, sample_t=sample_t, latents=latents)
    uncached = Dataset(plan, data.records, data.crops, subsets, seed=3, sample_t=sample_t)
    for ours, theirs in zip(all_batches(cached, 12), all_batches(uncached, 12), strict=True):
        assert ours.latents is not None and theirs.pixels is not None
        assert torch.equal(ours.latents, torch.stack([encoded(pixels)[0] for pixels in theirs.pixels]))


def test_every_subset_has_rules_of_its_own(data: Data) -> None:
    records = [replace(record, subset=i % 2) for i, record in enumerate(data.records)]
    subsets = [Subset(), Subset(captions=CaptionOptions(prefix="painted"), augmentation=Augmentation(colour=True))]
    plan = data.plan()
    dataset = Dataset(plan, records, data.crops, subsets, seed=3, sample_t=sample_t)
    is_changed = {0: False, 1: False}
    for step in range(24):
        for batch, micro_batch in zip(dataset.batch(step, 0), plan.step(step, 0), strict=True):
            assert batch.pixels is not None
            for pixels, caption, sample in zip(batch.pixels, batch.captions, micro_batch.samples, strict=True):
                record = records[sample.record]
                assert caption == ("painted " * record.subset + record.caption)
                plain = plain_pixels(record, data.crops[sample.record], subsets[0])
                is_changed[record.subset] |= not torch.equal(pixels, plain)
    assert is_changed == {0: False, 1: True}


class InMemory:
    """Bytes of a picture that has no file."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def read(self) -> bytes:
        return self.content


def test_a_picture_without_a_file_is_read_from_where_it_is(data: Data) -> None:
    record, crop = data.records[0], data.crops[0]
    elsewhere = replace(record, path=Path("archive.tar/0.png"), data=InMemory(record.path.read_bytes()))
    assert torch.equal(plain_pixels(elsewhere, crop, Subset()), plain_pixels(record, crop, Subset()))


def test_caching_changes_neither_noise_nor_timesteps_nor_captions(data: Data) -> None:
    for cached, uncached in zip(
        all_batches(data.dataset(is_cached=True), 6), all_batches(data.dataset(), 6), strict=True
    ):
        for name in ("posterior_noise", "noise", "t", "captions", "weight", "count"):
            assert same(getattr(cached, name), getattr(uncached, name)), name


def test_captions_vary_and_pictures_are_augmented(data: Data) -> None:
    plan, seen = data.plan(), set()
    dataset = data.dataset(plan)
    is_changed = []
    for step in range(24):
        for batch, micro_batch in zip(dataset.batch(step, 0), plan.step(step, 0), strict=True):
            assert batch.pixels is not None
            for pixels, caption, sample in zip(batch.pixels, batch.captions, micro_batch.samples, strict=True):
                record = data.records[sample.record]
                assert caption == "" or sorted(caption.split(", ")) == sorted(record.caption.split(", "))
                assert caption == "" or caption.startswith(f"id{sample.record}, ")
                seen.add(caption)
                is_changed.append(not torch.equal(pixels, plain_pixels(record, data.crops[sample.record], Subset())))
    assert "" in seen and len(seen) > 20
    assert 0.4 < sum(is_changed) / len(is_changed) < 1


def test_without_options_pictures_and_captions_are_as_they_are(data: Data) -> None:
    plan = data.plan()
    dataset = Dataset(plan, data.records, data.crops, [Subset()], seed=3, sample_t=sample_t)
    for batch, micro_batch in zip(dataset.batch(0, 0), plan.step(0, 0), strict=True):
        assert batch.pixels is not None
        for pixels, caption, sample in zip(batch.pixels, batch.captions, micro_batch.samples, strict=True):
            record, crop = data.records[sample.record], data.crops[sample.record]
            assert caption == record.caption
            assert torch.equal(pixels, prepare(open_image(record.path), crop, draws=Draws.of(random.Random(1))))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_changes_or_vanishes_stops_the_run_by_name(data: Data, workers: int) -> None:
    path: Path = data.records[0].path
    Image.new("RGB", (10, 10)).save(path)
    with pytest.raises(UserError, match=r"0\.png has changed during the run: it was 64x64 .* 10x10 now"):
        list(data.dataset().prefetch(range(12), workers=workers))
    path.unlink()
    with pytest.raises(UserError, match=r"0\.png: the file cannot be opened"):
        list(data.dataset().prefetch(range(12), workers=workers))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_reading_ahead_keeps_order_and_raises_in_place(workers: int) -> None:
    def reciprocal(n: int) -> float:
        return 1 / n

    results = read_ahead(reciprocal, [4, 2, 1, 0, 5], workers=workers)
    assert [next(results) for _ in range(3)] == [0.25, 0.5, 1.0]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_reading_ahead_is_bounded_and_stops_with_its_consumer() -> None:
    started = 0
    lock = threading.Lock()

    def count(n: int) -> int:
        nonlocal started
        with lock:
            started += 1
        return n

    results = read_ahead(count, itertools.count(), workers=2)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    results.close()  # pyright: ignore[reportAttributeAccessIssue]  (it is a generator)
    assert 5 <= started <= 5 + 2 * 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
