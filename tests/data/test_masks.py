"""Masks follow their pictures everywhere, and what is wrong with them is told for all at once."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from lorasmith.data.buckets import CropPlan, cover_and_crop
from lorasmith.data.dataset import Batch, Dataset
from lorasmith.data.faces import Face
from lorasmith.data.images import Draws, prepare
from lorasmith.data.masks import attach, files_in, latent_mask, look_at, open_mask
from lorasmith.data.plan import build_plan
from lorasmith.data.records import ImageRecord, Mask
from lorasmith.data.subsets import Augmentation, Subset
from lorasmith.errors import UserError
from lorasmith.losses import mask_factors
from tests.data.test_images import rgb_profile

SHAPES = [(64, 64), (48, 64), (96, 40)]


def blocks(size: tuple[int, int], seed: int, side: int = 16) -> Image.Image:
    """A mask of large black and white blocks."""
    cells = np.random.default_rng(seed).integers(0, 2, (-(-size[1] // side), -(-size[0] // side)), dtype=np.uint8)
    return Image.fromarray(np.kron(cells, np.full((side, side), 255, dtype=np.uint8))[: size[1], : size[0]])


def red_over_latents(pixels: torch.Tensor, factor: int = 8) -> torch.Tensor:
    """The oracle: what a picture's red channel, in [-1, 1], is over each latent."""
    return torch.nn.functional.avg_pool2d((pixels[:1][None] + 1) / 2, factor)[0]


@given(
    size=st.tuples(st.integers(48, 300), st.integers(48, 300)),
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 1000),
    flip=st.booleans(),
    random_crop=st.booleans(),
    portions=st.sampled_from([None, (1.0, 1.0), (1.0, 3.0)]),
)
@example(size=(64, 64), shape=(64, 64), seed=0, flip=True, random_crop=False, portions=None)
def test_a_mask_is_what_the_red_channel_of_its_picture_becomes(
    size: tuple[int, int],
    shape: tuple[int, int],
    seed: int,
    flip: bool,
    random_crop: bool,
    portions: tuple[float, float] | None,
) -> None:
    mask = blocks(size, seed)
    picture = Image.merge("RGB", [mask, Image.new("L", size, 90), Image.new("L", size, 20)])
    where: dict[str, Any] = {
        "draws": Draws.of(random.Random(seed)),
        "flip": flip,
        "random_crop": random_crop,
        "face": Face((size[0] // 3, size[1] // 2), (24, 30)),
        "face_portions": portions,
    }
    crop = cover_and_crop(size, shape)
    ours, oracle = latent_mask(mask, crop, 8, **where), red_over_latents(prepare(picture, crop, **where))
    assert ours.shape == oracle.shape == (1, shape[1] // 8, shape[0] // 8) and ours.dtype == torch.float32
    assert ours.min() >= 0 and ours.max() <= 1
    # Boxes and Lanczos differ at edges by half a pixel; a shift of one latent would differ by 1 along all edges
    assert (ours - oracle).abs().mean() < 0.03 and (ours - oracle).abs().max() < 0.3


def test_at_the_same_size_latents_are_the_exact_means_of_their_pixels() -> None:
    mask = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 96), dtype=np.uint8))
    expected = np.asarray(mask, dtype=np.float64).reshape(5, 8, 12, 8).mean(axis=(1, 3)) / 255
    found = latent_mask(mask, cover_and_crop((96, 40), (96, 40)), 8, draws=Draws.of(random.Random(0)))
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-6)
    assert torch.equal(
        latent_mask(
            Image.new("L", (300, 177), 255), cover_and_crop((300, 177), (64, 64)), 8, draws=Draws.of(random.Random(0))
        ),
        torch.ones(1, 8, 8),
    )


class Data:
    """Pictures whose red channel is their mask, but for the last, which has none."""

    def __init__(self, path: Path, sizes: list[tuple[int, int]]) -> None:
        self.pictures, self.masks = path / "pictures", path / "masks"
        self.pictures.mkdir()
        self.masks.mkdir()
        self.records = []
        for number, size in enumerate(sizes):
            mask = blocks(size, number)
            file = self.pictures / f"{number}_30_40_20_20.png"
            Image.merge("RGB", [mask, Image.new("L", size, 90), Image.new("L", size, 20)]).save(file)
            if number < len(sizes) - 1:
                mask.save(self.masks / f"{file.stem}.png")
            self.records.append(ImageRecord(file, "a thing", size))
        self.crops: list[CropPlan] = [cover_and_crop(size, (64, 48)) for size in sizes]
        self.subset = Subset(str(self.pictures), masks=self.masks)

    def attached(self, **changes: Any) -> list[ImageRecord]:
        return attach(replace(self.subset, **changes), self.records, self.crops)[0]

    def notes(self) -> str:
        return "; ".join(attach(self.subset, self.records, self.crops)[1])

    def refusal(self, **changes: Any) -> str:
        with pytest.raises(UserError) as error:
            self.attached(**changes)
        return str(error.value)

    def batches(self, augmentation: Augmentation, *, is_cached: bool = False, **options: Any) -> list[Batch]:
        records = self.attached(augmentation=augmentation)
        plan = build_plan(
            records,
            [crop.shape for crop in self.crops],
            batch_sizes=[2],
            num_processes=1,
            gradient_accumulation=1,
            seed=5,
        )
        latent = (torch.zeros(4, 6, 8), torch.ones(4, 6, 8))
        dataset = Dataset(
            plan,
            records,
            self.crops,
            [replace(self.subset, augmentation=augmentation)],
            seed=5,
            sample_t=lambda n, generator: torch.randint(0, 1000, (n,), generator=generator),
            latents={(i, flip): latent for i in range(len(records)) for flip in (False, True)} if is_cached else {},
            **options,
        )
        return [batch for step in range(12) for batch in dataset.batch(step, 0)]


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path, [(80, 64), (64, 96), (128, 96), (64, 48)])


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(),
        Augmentation(flip=True),
        Augmentation(flip=True, random_crop=True),
        Augmentation(flip=True, face_portions=(1.0, 2.0)),
        Augmentation(random_crop=True, face_portions=(1.0, 1.0)),
    ],
    ids=repr,
)
def test_every_batchs_mask_lies_on_its_pictures(data: Data, augmentation: Augmentation) -> None:
    is_whole = []
    for batch in data.batches(augmentation, mask_by_area=False):
        assert batch.pixels is not None
        mask = torch.ones(len(batch.pixels), 1, 6, 8) if batch.mask is None else batch.mask
        for pixels, own in zip(batch.pixels, mask, strict=True):
            is_whole.append(bool((own == 1).all()))
            assert is_whole[-1] or (own - red_over_latents(pixels)).abs().mean() < 0.03
    assert 0 < sum(is_whole) < len(is_whole)  # the picture without a mask came up, and others


def test_colours_leave_the_mask_alone_and_caching_gives_the_same_masks(data: Data) -> None:
    plain = data.batches(Augmentation(flip=True))
    for others in (
        data.batches(Augmentation(flip=True, colour=True)),
        data.batches(Augmentation(flip=True), is_cached=True),
    ):
        for ours, theirs in zip(plain, others, strict=True):
            assert (ours.mask is None) == (theirs.mask is None)
            assert ours.mask is None or theirs.mask is None or torch.equal(ours.mask, theirs.mask)


def test_cached_masks_are_read_once(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(
        "lorasmith.data.dataset.open_mask", lambda record: read.append(record.path) or open_mask(record)
    )
    data.batches(Augmentation(flip=True), is_cached=True)
    assert len(read) == 3


@pytest.mark.parametrize("by_area", [False, True])
def test_a_batch_holds_the_factors_of_the_loss(data: Data, by_area: bool) -> None:
    plain = data.batches(Augmentation(), mask_by_area=False)
    for ours, masks in zip(
        data.batches(Augmentation(), mask_background=0.25, mask_by_area=by_area), plain, strict=True
    ):
        if masks.mask is not None:
            assert ours.mask is not None
            torch.testing.assert_close(ours.mask, mask_factors(masks.mask, background=0.25, by_area=by_area))


def test_no_masks_no_mask(data: Data) -> None:
    assert all(batch.mask is None for batch in Data.batches(_without(data), Augmentation()))


def _without(data: Data) -> Data:
    data.subset = replace(data.subset, masks=None)
    return data


def test_a_changed_mask_is_another_identity_and_is_noticed_while_training(data: Data) -> None:
    records = data.attached()
    blocks((80, 64), 99).save(data.masks / f"{records[0].path.stem}.png")
    changed = data.attached()
    assert records[0].identity != changed[0].identity
    assert [record.identity for record in records[1:]] == [record.identity for record in changed[1:]]
    with pytest.raises(UserError, match="has changed during the run"):
        open_mask(records[0])


# ---- what is read --------------------------------------------------------------------------------------------------


def grey_values(path: Path) -> set[int]:
    return set(np.asarray(look_at(path)[0]).ravel().tolist())


def test_values_are_those_in_the_file_and_of_colours_the_red(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (128, 128, 128)).save(tmp_path / "grey.png", icc_profile=rgb_profile("linear"))
    Image.new("RGB", (4, 4), (200, 10, 90)).save(tmp_path / "coloured.png")
    Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.uint16)).save(tmp_path / "deep.png")
    Image.new("1", (4, 4), 1).save(tmp_path / "bits.png")
    Image.new("LA", (4, 4), (255, 0)).save(tmp_path / "transparent.png")
    names = {"grey": 128, "coloured": 200, "deep": 128, "bits": 255, "transparent": 0}
    assert {name: grey_values(tmp_path / f"{name}.png") for name in names} == {n: {v} for n, v in names.items()}
    assert look_at(tmp_path / "coloured.png")[1].is_coloured and not look_at(tmp_path / "grey.png")[1].is_coloured


def test_masks_are_turned_upright_and_kept_apart_from_hidden_files(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (8, 4), 255).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / ".thumbs").mkdir()
    (tmp_path / "in").mkdir()
    for name in (".hidden.png", ".thumbs/a.png", "in/b.png", "notes.txt"):
        Image.new("L", (4, 4)).save(tmp_path / name, "PNG")
    assert look_at(tmp_path / "a.jpg")[1].size == (4, 8)
    assert files_in(tmp_path) == [tmp_path / "a.jpg", tmp_path / "in" / "b.png"]


def test_coverage_is_that_of_what_is_trained(data: Data) -> None:
    data.records, data.crops = data.records[:1], [cover_and_crop((80, 64), (64, 64))]  # 8 pixels cut at either side
    mask = Image.new("L", (80, 64))
    mask.paste(255, (0, 0, 24, 64))
    mask.save(data.masks / f"{data.records[0].path.stem}.png")
    for augmentation, expected in ((Augmentation(), 16 / 64), (Augmentation(random_crop=True), 24 / 80)):
        (record,) = data.attached(augmentation=augmentation)
        assert record.mask is not None and record.mask.coverage == pytest.approx(expected)


def test_transparency_is_a_mask_wherever_the_picture_lies(data: Data) -> None:
    class Archived:
        def __init__(self, path: Path) -> None:
            self.path = path

        def read(self) -> bytes:
            return self.path.read_bytes()

    alpha = blocks((80, 64), 3)
    picture = noise = Image.effect_noise((80, 64), 60).convert("RGB")
    picture.putalpha(alpha)
    picture.save(data.pictures / "see-through.png")
    opaque = noise.convert("RGBA")
    opaque.putalpha(255)
    opaque.save(data.pictures / "opaque.png")
    file, other = data.pictures / "see-through.png", data.pictures / "opaque.png"
    data.records = [
        ImageRecord(file, "", (80, 64)),
        ImageRecord(Path("in/archive.png"), "", (80, 64), data=Archived(file)),
        ImageRecord(other, "", (80, 64)),
    ]
    data.crops = [cover_and_crop((80, 64), (80, 64))] * 3
    first, archived, whole = data.attached(masks=None, alpha_mask=True)
    coverage = np.asarray(alpha).mean() / 255
    assert first.mask == archived.mask == Mask(None, "", float(coverage))
    assert whole.mask is None
    assert open_mask(archived).tobytes() == open_mask(first).tobytes() == alpha.tobytes()


# ---- what is refused, and what is said -----------------------------------------------------------------------------


def test_every_unreadable_mask_is_named(data: Data) -> None:
    files = files_in(data.masks)
    files[0].write_bytes(b"")
    files[2].write_bytes(files[2].read_bytes()[:60])
    message = data.refusal()
    assert "2 masks cannot be read" in message and "the file is empty" in message
    assert str(files[0]) in message and str(files[2]) in message and str(files[1]) not in message


def test_every_mask_of_another_shape_is_named_with_both_sizes(data: Data) -> None:
    files = files_in(data.masks)
    Image.new("L", (64, 80), 255).save(files[0])
    Image.new("L", (100, 96), 255).save(files[2])
    message = data.refusal()
    assert "2 masks of another aspect ratio" in message
    assert f"{files[0]}: 64x80, but {data.records[0].path.name} is 80x64" in message
    assert f"{files[2]}: 100x96, but {data.records[2].path.name} is 128x96" in message


@pytest.mark.parametrize("level, advice", [(0, False), (1, True), (7, True)])
def test_black_masks_are_named(data: Data, level: int, advice: bool) -> None:
    file = files_in(data.masks)[1]
    Image.new("L", (64, 96), level).save(file)
    message = data.refusal()
    assert f"{file}: black everywhere" in message and ("save it as 0 and 255" in message) == advice


def test_a_mask_that_the_crop_leaves_black_is_named_unless_crops_move(data: Data) -> None:
    mask = Image.new("L", (64, 96))
    mask.paste(255, (0, 0, 64, 8))  # the crop of 64x96 to 64x48 begins at 24
    mask.save(files_in(data.masks)[1])
    assert "black in all that the crop keeps" in data.refusal()
    assert data.attached(augmentation=Augmentation(random_crop=True))[1].mask is not None


def test_a_smaller_mask_is_resized_and_said(data: Data) -> None:
    file = files_in(data.masks)[0]
    blocks((80, 64), 0).resize((160, 128), Image.Resampling.NEAREST).save(file)
    assert f"masks of another size than their pictures, resized (1): {file.name}" in data.notes()
    assert open_mask(data.attached()[0]).tobytes() == blocks((80, 64), 0).tobytes()


def test_colours_and_masks_of_nothing_are_said(data: Data) -> None:
    Image.new("RGB", (80, 64), (255, 0, 0)).save(files_in(data.masks)[0])
    Image.new("L", (9, 9)).save(data.masks / "other.png")
    assert "masks with colours, of which only the red channel counts (1)" in data.notes()
    assert "masks without a picture, not used (1): other.png" in data.notes()


def test_no_match_at_all_shows_a_name_of_each(data: Data) -> None:
    for file in files_in(data.masks):
        file.rename(file.with_name(f"{file.stem}_mask.png"))
    message = data.refusal()
    assert str(data.records[0].path) in message and str(files_in(data.masks)[0]) in message
    for file in files_in(data.masks):
        file.unlink()
    assert "there are no pictures in it at all" in data.refusal()
    assert "there is no folder" in data.refusal(masks=data.masks / "none")


def test_what_cannot_be_meant_is_refused(data: Data) -> None:
    assert "leave out one" in data.refusal(alpha_mask=True)
    assert "none of the 4 pictures has any" in data.refusal(masks=None, alpha_mask=True)
    assert "4 of the pictures lie in the folder of masks" in data.refusal(masks=data.pictures)
    file = files_in(data.masks)[0]
    blocks((80, 64), 0).save(file.with_suffix(".webp"))
    assert f"{file} or {file.with_suffix('.webp')}" in data.refusal()
