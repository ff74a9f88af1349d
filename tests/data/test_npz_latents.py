import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.data import npz_latents
from lorasmith.data.buckets import CropPlan, cover_and_crop
from lorasmith.data.npz_latents import Unfit, Wish, WithFiles
from lorasmith.errors import UserError

SIZE, SHAPE = (80, 64), (64, 64)
LATENTS = torch.arange(256, dtype=torch.float32).reshape(4, 8, 8)
sides = st.integers(16, 4000)


def wish(folder: Path, *, has_mirrored: bool = True, crop: CropPlan | None = None) -> Wish:
    return Wish(folder / "a.b", SIZE, crop or cover_and_crop(SIZE, SHAPE), (4, 8, 8), has_mirrored)


def write(folder: Path, name: str, **arrays: Any) -> None:
    np.savez(folder / name, **arrays)


def today(**other: Any) -> dict[str, Any]:
    arrays = {"latents": LATENTS.numpy(), "latents_flipped": -LATENTS.numpy(), "original_size": SIZE}
    return {**arrays, "crop_ltrb": (0.0, 6.0, 64.0, 57.2), **other}


@given(st.tuples(sides, sides), st.tuples(st.integers(1, 32), st.integers(1, 32)))
def test_crop_ltrb_is_the_whole_picture_in_the_middle_of_the_shape(size: Any, blocks: Any) -> None:
    shape = (blocks[0] * 64, blocks[1] * 64)
    left, top, right, bottom = npz_latents.crop_ltrb(shape, size)
    assert (right - left) / (bottom - top) == pytest.approx(size[0] / size[1])
    assert right - left == shape[0] or bottom - top == shape[1]
    for begin, end, whole in ((left, right, shape[0]), (top, bottom, shape[1])):
        assert begin == int(begin) >= 0 and 0 <= whole - end - begin < 2  # rounded down, so nearly in the middle


def test_what_is_written_is_found_again(tmp_path: Path) -> None:
    one = wish(tmp_path)
    npz_latents.write_today(one.files("today")[0], one, LATENTS, -LATENTS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.b_0080x0064_sd.npz"]
    found = npz_latents.find(one)
    assert found.mirrored is not None
    assert torch.equal(found.latents, LATENTS) and torch.equal(found.mirrored, -LATENTS)
    with np.load(one.files("today")[0]) as stored:
        assert {name: value.dtype for name, value in stored.items() if "latents" in name} == {
            "latents": np.float32,
            "latents_flipped": np.float32,
        }
        assert stored["original_size"].tolist() == [80, 64]
        assert stored["crop_ltrb"].tolist() == pytest.approx([0, 6, 64, 57.2])  # 64 * 64 / 80 = 51.2 high


def test_the_files_of_2022_are_found_and_todays_before_them(tmp_path: Path) -> None:
    one = wish(tmp_path)
    for file, values in zip(one.files("2022"), (LATENTS, -LATENTS), strict=True):
        npz_latents.write_2022(file, values)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b.npz", "a.b_flip.npz"]
    found = npz_latents.find(one)
    assert found.mirrored is not None
    assert torch.equal(found.latents, LATENTS) and torch.equal(found.mirrored, -LATENTS)
    npz_latents.write_today(one.files("today")[0], one, LATENTS + 1, LATENTS)
    assert torch.equal(npz_latents.find(one).latents, LATENTS + 1)


def test_versions_in_between_wrote_todays_keys_under_the_old_name(tmp_path: Path) -> None:
    write(tmp_path, "a.b.npz", **today(alpha_mask=np.ones((64, 64), np.float32)))
    found = npz_latents.find(wish(tmp_path))
    assert torch.equal(found.latents, LATENTS) and found.has_mask


def test_half_precision_is_taken_too(tmp_path: Path) -> None:
    write(tmp_path, "a.b.npz", arr_0=LATENTS.numpy().astype(np.float16))
    found = npz_latents.find(wish(tmp_path, has_mirrored=False))
    assert found.latents.dtype == torch.float32 and torch.equal(found.latents, LATENTS)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        (today(latents=np.zeros((4, 16, 16), np.float32)), "latents is of shape (4, 16, 16) instead of (4, 8, 8)"),
        (today(latents_flipped=np.zeros((4, 8), np.float32)), "latents_flipped is of shape (4, 8)"),
        (today(latents=np.full((4, 8, 8), np.nan, np.float32)), "latents holds what is no number"),
        (today(latents=np.zeros((4, 8, 8), int)), "latents holds what is no number"),
        (today(original_size=(64, 80)), "original_size is [64, 80] instead of [80, 64]"),
        (today(original_size=80), "original_size is 80 instead of [80, 64]"),
        (today(crop_ltrb=(0.0, 0.0, 64.0, 64.0)), "crop_ltrb is [0.0, 0.0, 64.0, 64.0] instead of"),
        ({"latents_8x8": LATENTS.numpy()}, "it holds no latents, but latents_8x8"),
        ({key: value for key, value in today().items() if key != "crop_ltrb"}, "crop_ltrb is [] instead of"),
        ({}, "it holds no latents, but nothing"),
    ],
)
def test_a_file_that_does_not_fit_says_why(tmp_path: Path, arrays: dict[str, Any], reason: str) -> None:
    write(tmp_path, "a.b_0080x0064_sd.npz", **arrays)
    with pytest.raises(Unfit) as error:
        npz_latents.find(wish(tmp_path))
    assert f"a.b_0080x0064_sd.npz: {reason}" in str(error.value)


def damaged() -> dict[str, bytes]:
    whole, objects, huge = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez(whole, arr_0=LATENTS.numpy())
    np.savez(objects, arr_0=np.array([{}], dtype=object))
    with zipfile.ZipFile(huge, "w") as archive:
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (900000000000, 900), }"
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    single = io.BytesIO()
    np.save(single, LATENTS.numpy())
    content = whole.getvalue()
    return {
        "empty": b"",
        "cut off": content[: len(content) // 2],
        "a bit turned": content[:300] + bytes([content[300] ^ 1]) + content[301:],
        "another kind": b"a photo",
        "a pickle": objects.getvalue(),
        "larger than any memory": huge.getvalue(),
        "a single array": single.getvalue(),
    }


@pytest.mark.parametrize("kind", damaged())
def test_a_damaged_file_is_told_of_and_runs_nothing(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.b.npz").write_bytes(damaged()[kind])
    with pytest.raises(Unfit, match=r"a\.b\.npz: it is damaged \("):
        npz_latents.find(wish(tmp_path, has_mirrored=False))


def test_a_mirror_image_that_is_wanted_must_be_there(tmp_path: Path) -> None:
    write(tmp_path, "a.b.npz", arr_0=LATENTS.numpy())
    assert npz_latents.find(wish(tmp_path, has_mirrored=False)).mirrored is None
    with pytest.raises(Unfit, match="the mirror image's file is missing"):
        npz_latents.find(wish(tmp_path))


def test_sd_scripts_cuts_out_the_middle_only(tmp_path: Path) -> None:
    write(tmp_path, "a.b.npz", **today())
    middle = cover_and_crop(SIZE, SHAPE)
    aside = CropPlan(middle.resize, (0, 0, 64, 64), middle.lost_area)
    with pytest.raises(Unfit, match="another part than the middle"):
        npz_latents.find(wish(tmp_path, crop=aside))


def test_files_in_a_folder_of_their_own_lie_as_the_pictures_do(tmp_path: Path) -> None:
    picture = tmp_path / "photos" / "1_cat" / "a.b.png"
    assert npz_latents.stem_of(picture, tmp_path / "photos", None) == picture.with_name("a.b")
    assert npz_latents.stem_of(picture, tmp_path / "photos", tmp_path / "npz") == tmp_path / "npz" / "1_cat" / "a.b"
    with pytest.raises(UserError, match=r"a\.b\.png lies outside of .*; leave npz_dir out"):
        npz_latents.stem_of(picture, tmp_path / "other", tmp_path / "npz")


def test_latents_of_files_are_scaled_and_have_no_spread_and_those_of_others_stay(tmp_path: Path) -> None:
    write(tmp_path, "a.b.npz", **today())
    one = wish(tmp_path)
    others = {(0, False): (LATENTS, LATENTS)}
    latents = WithFiles({1: (one, npz_latents.find(one).content_hash)}, 0.5, others)
    assert set(latents) == {(0, False), (1, False), (1, True)} and len(latents) == 3
    assert (1, True) in latents and (2, False) not in latents
    assert latents[0, False] == others[0, False]
    mean, std = latents[1, True]
    assert torch.equal(mean, LATENTS * -0.5) and not std.any()
    write(tmp_path, "a.b.npz", **today(latents=LATENTS.numpy() + 1))
    with pytest.raises(UserError, match=r"changed during the run \(it holds other values"):
        latents[1, False]
    (tmp_path / "a.b.npz").unlink()
    with pytest.raises(UserError, match=r"changed during the run \(no file"):
        latents[1, False]


def test_a_full_disk_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = wish(tmp_path, has_mirrored=False)
    file = one.files("today")[0]
    npz_latents.write_today(file, one, LATENTS, None)
    before = file.read_bytes()

    def full(stream: Any, **arrays: Any) -> None:
        stream.write(b"PK")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match="full"):
        npz_latents.write_today(file, one, LATENTS + 1, None)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
