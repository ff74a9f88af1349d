"""Masks through the command: what they change, what the plan says of them, what is refused."""

import contextlib
import io
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

from lorasmith.cli import main
from tests.commands.test_train_pictures import Place, noise, place, same

__all__ = ["place"]  # the fixture


def masks_for(folder: Path, **masks: Image.Image) -> Path:
    """Write masks beside a DreamBooth folder, in a folder of their own with the same folder in it; return it."""
    own = folder.parent.parent / f"{folder.parent.name}-masks"
    (own / folder.name).mkdir(parents=True)
    for name, mask in masks.items():
        mask.save(own / folder.name / f"{name}.png")
    return own


def left_half(size: tuple[int, int] = (64, 64), level: int = 255) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(level, (0, 0, size[0] // 2, size[1]))
    return mask


def losses(output: Path) -> str:
    return (output / "logs" / "loss.jsonl").read_text()


@pytest.mark.parametrize("caching", ["--cache-latents", "--no-cache-latents"])
@pytest.mark.parametrize("loss", [[], ["--mask-loss", "all"], ["--mask-background", "0.5"]])
def test_white_masks_train_to_the_same_bytes_as_none(place: Place, caching: str, loss: list[str]) -> None:
    folder = place.folder(a=noise((64, 64)), b=noise((80, 64), 1))
    masks = masks_for(folder, a=Image.new("L", (64, 64), 255), b=Image.new("1", (80, 64), 1))
    options = [caching, "--flip", "--batch-size", 2, "--steps", 2]
    plain, masked = (place.run(folder.parent, *options, *more)[3] for more in ([], ["--masks", masks, *loss]))
    assert (plain / "last.safetensors").read_bytes() != b"" and losses(plain) == losses(masked)
    assert same(load_file(plain / "last.safetensors"), load_file(masked / "last.safetensors"))


def test_a_mask_changes_what_is_learned_and_each_option_does(place: Place) -> None:
    folder = place.folder(a=noise((64, 64)))
    masks = ["--masks", masks_for(folder, a=left_half())]
    runs = [
        place.learned(folder.parent, *options)
        for options in ([], masks, [*masks, "--mask-loss", "all"], [*masks, "--mask-background", 0.25])
    ]
    assert not any(same(a, b) for i, a in enumerate(runs) for b in runs[:i])
    assert same(runs[1], place.learned(folder.parent, *masks, "--no-cache-latents"))


def test_the_mean_over_all_places_is_the_share_of_that_over_the_area(place: Place) -> None:
    folder = place.folder(a=noise((64, 64)))
    masks = ["--masks", masks_for(folder, a=left_half(level=128))]
    outputs = [place.run(folder.parent, *masks, "--mask-loss", kind)[3] for kind in ("area", "all")]
    area, everything = (float(losses(output).split('"loss": ')[1].split(",")[0]) for output in outputs)
    assert everything == pytest.approx(area * 128 / 255 / 2, rel=1e-5)


@pytest.mark.parametrize("caching", ["--cache-latents", "--no-cache-latents"])
def test_masks_are_mirrored_with_their_pictures(place: Place, caching: str) -> None:
    """A mirrored picture with its mask, flipped or not, is trained as picture and mask mirrored by hand are."""
    folder = place.folder(a=noise((64, 64)))
    other = place.folder(a=ImageOps.mirror(noise((64, 64))))
    options = [caching, "--flip", "--steps", 3]
    found = []
    for own, mask in ((folder, left_half()), (other, ImageOps.mirror(left_half())), (other, left_half())):
        code, _, errors, output = place.run(own.parent, *options, "--masks", masks_for_each(own, len(found), mask))
        assert code == 0, errors
        found.append(losses(output))
    assert found[0] != found[1] != found[2]  # other sides come up, and the side of the mask matters
    plain = place.run(folder.parent, caching, "--steps", 3, "--masks", masks_for_each(folder, 9, left_half()))[3]
    assert losses(plain) != found[0]


def masks_for_each(folder: Path, number: int, mask: Image.Image) -> Path:
    own = folder.parent.parent / f"{folder.parent.name}-masks-{number}"
    (own / folder.name).mkdir(parents=True)
    mask.save(own / folder.name / "a.png")
    return own


def test_transparency_as_a_mask_is_the_same_as_a_file_of_it(place: Place) -> None:
    see_through = noise((64, 64)).convert("RGBA")
    see_through.putalpha(left_half())
    on_blue = noise((64, 64))
    on_blue.paste("#2040ff", (32, 0, 64, 64))
    by_file = place.folder(a=on_blue)
    masks = masks_for(by_file, a=left_half())
    for caching in ("--cache-latents", "--no-cache-latents"):
        ours = place.learned(place.folder(a=see_through), "--alpha-mask", "--alpha-color", "#2040ff", caching)
        assert same(ours, place.learned(by_file.parent, "--masks", masks, caching))


def test_regularization_pictures_stay_whole(place: Place) -> None:
    folder, class_folder = place.folder(a=noise((64, 64))), place.folder(a=noise((64, 64), 5))
    masks = masks_for(folder, a=left_half())
    plan = place.plan(folder.parent, "--regularization", class_folder.parent, "--masks", masks)
    assert "1 of 1 picture, from a file each 50% is learned" in plan


def test_the_plan_tells_of_masks(place: Place) -> None:
    folder = place.folder(a=noise(), b=noise(), c=noise())
    masks = masks_for(folder, a=left_half((80, 64)), b=Image.new("L", (40, 32), 51), other=left_half())
    plan = place.plan(folder.parent, "--masks", masks, "--mask-background", 0.1)
    assert "masks 2 of 3 pictures, from a file each; all is learned of the other 1: c.png" in plan
    assert "35% is learned on average, the least is 20% (b.png); masked-out places count 0.1" in plan
    assert "over each mask's area, so that a small one teaches as much" in plan
    assert "masks without a picture, not used (1): other.png" in plan
    assert "resized (1): b.png" in plan
    assert "the loss is the mean over all places" in place.plan(folder.parent, "--masks", masks, "--mask-loss", "all")
    assert "masks" not in place.plan(folder.parent)


def test_what_cannot_be_meant_is_refused(place: Place) -> None:
    folder = place.folder(a=noise())
    masks = masks_for(folder, a=left_half())
    assert "leave out one of them" in place.refusal(folder.parent, "--masks", masks, "--alpha-mask")
    message = place.refusal(folder.parent, "--mask-loss", "all", "--mask-background", 0.5)
    assert "mask_loss and mask_background say what masks do" in message and "--masks" in message
    assert "64x64, but a.png is 80x64" in place.refusal(folder.parent, "--masks", masks)
    assert "whose" not in place.refusal(folder.parent, "--alpha-mask") and "--mask-background" in place.refusal(
        folder.parent, "--masks", masks, "--mask-background", 2
    )


def resume(output: Path, *options: object) -> tuple[int, str]:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main(["train", "--resume", str(output), *map(str, options)])
    return code, errors.getvalue()


def test_a_resumed_run_keeps_its_masks_wherever_they_lie_and_refuses_others(place: Place) -> None:
    folder = place.folder(a=noise((64, 64)), b=noise((64, 64), 1))
    masks = masks_for(folder, a=left_half(), b=ImageOps.mirror(left_half()))
    options = ["--masks", masks, "--flip"]
    straight = place.run(folder.parent, *options, "--steps", 3)[3]
    code, _, errors, output = place.run(folder.parent, *options, "--steps", 2)
    assert code == 0, errors
    left_half(level=200).save(masks / folder.name / "a.png")
    code, errors = resume(output, "--steps", 3)
    assert code == 2 and "the pictures, captions or masks are not those" in errors
    left_half().save(masks / folder.name / "a.png")
    code, errors = resume(output, "--steps", 3, "--mask-loss", "all")
    assert code == 2 and "data.mask_loss was area, now all" in errors
    moved = masks.rename(masks.with_name("moved"))
    code, errors = resume(output, "--steps", 3)
    assert code == 2 and "give its new place with --masks" in errors
    code, errors = resume(output, "--steps", 3, "--masks", moved)
    assert code == 0, errors
    ours, theirs = (load_file(run / "last.safetensors") for run in (output, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
