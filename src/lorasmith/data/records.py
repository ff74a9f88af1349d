"""What is known of a picture before it is opened again: the common words of sources, buckets, plan and dataset."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ImageRecord:
    """One picture with its caption.

    size: (width, height) in pixels, after the EXIF orientation. repeats: how often it counts in an epoch.
    is_prior: a regularization picture. group: the name of the folder it came from. content_hash: SHA-256 of the file.
    """

    path: Path
    caption: str
    size: tuple[int, int]
    repeats: int = 1
    is_prior: bool = False
    group: str = ""
    content_hash: str = ""


@dataclass(frozen=True)
class Scan:
    """What a source found: the pictures, and plain sentences about them for the printed plan."""

    records: list[ImageRecord]
    notes: list[str] = field(default_factory=list)
