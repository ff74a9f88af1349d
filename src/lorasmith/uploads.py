"""What a run saves, uploaded to the hub while the run goes on: beside it, one after another, in the order of saving.

An upload that fails is told, and tried once more when the run is over. What waits is held by hard links, so the run may
remove its own files meanwhile.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from lorasmith.errors import UserError
from lorasmith.hub import Target, send


@dataclass(frozen=True)
class _Package:
    """Files as they will lie in the repository, and what of the repository's is removed if it is not among them."""

    title: str
    folder: Path
    mirrored: str | None


class Uploads:
    """Uploads files and folders to one place.

    Args:
        scratch: a folder for what waits, on the disk where the files are; emptied now, and removed by `close`.
    """

    def __init__(self, target: Target, scratch: Path) -> None:
        from huggingface_hub.utils import disable_progress_bars  # only uploads need it

        disable_progress_bars()  # they would be drawn into the run's own
        self._target, self._scratch = target, scratch
        shutil.rmtree(scratch, ignore_errors=True)
        self._worker = ThreadPoolExecutor(1, "upload")
        self._waiting: list[Future[_Package | None]] = []

    def add(self, title: str, files: Mapping[str, Path], *, mirrored: str | None = None) -> None:
        """Upload files and folders, as they are now, by their names in the repository; return at once.

        Args:
            title: what it is, for messages.
            mirrored: a pattern (fnmatch) of names; what is in the repository under such and is not given is removed.
        """
        self._scratch.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=self._scratch))
        for name, path in files.items():
            _link(path, folder / name)
        self._waiting.append(self._worker.submit(self._upload, _Package(title, folder, mirrored)))

    def finish(self) -> None:
        """Wait for all that was added, and try what failed once more; tell what is not in the repository then."""
        if any(not one.done() for one in self._waiting):
            print(f"uploading to {self._target.repository}", flush=True)
        failed = [package for one in self._waiting if (package := one.result()) is not None]
        self._waiting.clear()
        lost = [package.title for package in failed if self._upload(package, is_last=True) is not None]
        if lost:
            _tell(f"not in {self._target.repository}: {', '.join(lost)}; upload them from the output folder by hand.")

    def close(self) -> None:
        """Drop what waits; an upload that is under way ends first."""
        self._worker.shutdown(cancel_futures=True)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _upload(self, package: _Package, is_last: bool = False) -> _Package | None:
        """Upload, and return what is to be tried again."""
        try:
            send(package.folder, self._target, f"Upload {package.title}", mirrored=package.mirrored)
        except UserError as error:
            _tell(f"{package.title}: {error}" + ("" if is_last else " It is tried again when the run is over."))
            return package
        shutil.rmtree(package.folder)
        return None


def _link(path: Path, place: Path) -> None:
    """Let a file or all files of a folder be at a second place, where that can be without copying them."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, place, copy_function=_link_file)
    else:
        _link_file(path, place)


def _link_file(path: str | Path, place: str | Path) -> None:
    try:
        os.link(path, place)
    except OSError:  # not on every disk
        shutil.copyfile(path, place)


def _tell(text: str) -> None:
    tqdm.write(f"lorasmith: {text}", file=sys.stderr)
