"""What is known of a picture before it is opened again: the common words of sources, buckets, plan and dataset."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


class PictureData(Protocol):
    """Where a picture's bytes are that has no file of its own, such as in an archive."""

    def read(self) -> bytes:
        """Return the bytes of the picture file. OSError: they are not there any more."""
        ...


@dataclass(frozen=True)
class ByteRange:
    """A picture in an archive that is not compressed, by where its bytes are."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Return the bytes. OSError: they are not there any more."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise OSError(f"{self.path} is shorter than it was")
        return data


@dataclass(frozen=True)
class Mask:
    """How much each place of a picture is learned.

    path: the picture of it; None: the transparency of the masked picture itself. content_hash: SHA-256 of the file, ""
    without one. coverage: the mean, in [0, 1], over what is trained of the picture.
    """

    path: Path | None
    content_hash: str
    coverage: float


@dataclass(frozen=True)
class ImageRecord:
    """One picture with its caption.

    path: the file; with `data`, its place in an archive. size: (width, height) in pixels, after the EXIF orientation.
    repeats: how often it counts in an epoch. is_prior: a regularization picture. group: the name of the folder it came
    from. content_hash: SHA-256 of the file. dataset, subset: indexes of the rules that it follows, subsets counted over
    all data sets. shard: number of the archive that it lies in, which one process alone reads; None: all read it.
    is_validation: held out, never trained on. mask: None: all of it is learned alike.
    """

    path: Path
    caption: str
    size: tuple[int, int]
    repeats: int = 1
    is_prior: bool = False
    group: str = ""
    content_hash: str = ""
    dataset: int = 0
    subset: int = 0
    shard: int | None = None
    data: PictureData | None = field(default=None, compare=False)
    is_validation: bool = False
    mask: Mask | None = None

    @property
    def identity(self) -> tuple[object, ...]:
        """All that training depends on in one process, and nothing about where the picture lies."""
        return (
            self.path.name, self.caption, self.size, self.repeats, self.is_prior, self.content_hash, self.dataset,
            self.subset, self.is_validation,
            self.mask and self.mask.content_hash,
        )  # fmt: skip


@dataclass(frozen=True)
class Scan:
    """What a source found: the pictures, and plain sentences about them for the printed plan.

    shards: the names of all archives, whichever process reads them, if the source is read by shard.
    """

    records: Sequence[ImageRecord]
    notes: Sequence[str] = field(default_factory=list)
    shards: Sequence[str] = ()
