"""What is trained on, as the command line or a dataset file says it: data sets, made of subsets with own rules.

A data set decides shapes and batch size; a subset decides where pictures come from and what becomes of them and of
their captions. The words are sd-scripts' (`[[datasets]]`, `[[datasets.subsets]]`).
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lorasmith.data.buckets import Buckets, Size
from lorasmith.data.captions import CaptionOptions, settled


@dataclass(frozen=True)
class Augmentation:
    """How pictures vary; see `images.prepare`."""

    flip: bool = False
    colour: bool = False
    random_crop: bool = False
    face_portions: tuple[float, float] | None = None

    @property
    def has_still_faces(self) -> bool:
        """Whether nothing is random about crops around faces, so that they belong to the plan."""
        ends = self.face_portions
        return ends is not None and ends[0] == ends[1] and not self.random_crop

    @property
    def has_still_crops(self) -> bool:
        """Whether each time the same part of a picture is trained, mirrored or not."""
        return not self.random_crop and (self.face_portions is None or self.has_still_faces)

    @property
    def changing(self) -> list[str]:
        """The options that are on and give other pixels each time, so that they cannot be cached; a mirror can."""
        moving_faces = self.face_portions is not None and self.face_portions[0] != self.face_portions[1]
        are_on = {"color": self.colour, "random_crop": self.random_crop, "face_crop_aug_range": moving_faces}
        return [name for name, is_on in are_on.items() if is_on]


@dataclass(frozen=True)
class Subset:
    """Pictures from one place, and the rules for them.

    source: a plug of `data/sources`, or `auto`: chosen by the place. place: its folder, pattern or hub id. metadata: a
    file with their captions. image_column, caption_column, dataset_split: of a Hugging Face data set; None: guessed.
    caption: of pictures that have none of their own. recursive: also folders in folders. all_lines: captions are all
    lines of their files. alpha_color: what is seen through transparent pictures. masks: folder of pictures that say how
    much each place is learned; see `data/masks.py`. alpha_mask: the pictures' own transparency says that.
    keeps_output: what is learned is what the base model makes of them, so that it stays. in_dataset_file: a dataset
    file says all this, not the command line; then folders' names mean nothing.
    """

    place: str = ""
    source: str = "auto"
    metadata: Path | None = None
    image_column: str | None = None
    caption_column: str | None = None
    dataset_split: str = "train"
    is_prior: bool = False
    repeats: int = 1
    caption: str | None = None
    caption_extension: str | None = None
    recursive: bool = False
    skip_unreadable: bool = False
    alpha_color: str = "white"
    masks: Path | None = None
    alpha_mask: bool = False
    keeps_output: bool = False
    in_dataset_file: bool = False
    captions: CaptionOptions = field(default_factory=CaptionOptions)
    augmentation: Augmentation = field(default_factory=Augmentation)

    def for_run_of(self, total_steps: int) -> "Subset":
        """Return the subset with a token warm-up given as a share of the run told in steps."""
        warmup = self.captions.token_warmup_steps
        steps = warmup if warmup >= 1 else math.floor(warmup * total_steps)
        return replace(self, captions=replace(self.captions, token_warmup_steps=steps))

    @property
    def settled(self) -> "Subset":
        """The subset with nothing left out of its captions and no augmentation: how pictures are validated."""
        return replace(self, captions=settled(self.captions), augmentation=Augmentation())

    @property
    def placeless(self) -> "Subset":
        """The subset without where it lies and how it is read, which a resumed run may change."""
        source: dict[str, Any] = {"source": "", "image_column": None, "caption_column": None, "dataset_split": ""}
        return replace(self, place="", metadata=None, masks=None, skip_unreadable=False, **source)


@dataclass(frozen=True)
class DatasetRules:
    """One data set: subsets that share shapes and batch size.

    resolution: (width, height) in pixels of every picture, or with `buckets` the area of their shapes. batch_size:
    pictures per process and micro-batch. validation_split: share of the training pictures that is held out, chosen by
    `validation_seed`.
    """

    subsets: tuple[Subset, ...]
    resolution: Size = (512, 512)
    buckets: Buckets | None = None
    batch_size: int = 1
    validation_split: float = 0.0
    validation_seed: int = 0

    @property
    def changing_augmentations(self) -> list[str]:
        """The augmentations of any subset that forbid to cache the data set's latents."""
        return list(dict.fromkeys(name for subset in self.subsets for name in subset.augmentation.changing))
