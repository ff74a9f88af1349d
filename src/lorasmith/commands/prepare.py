"""`lorasmith prepare`: encode pictures ahead of training, into the cache folder or into sd-scripts' .npz files.

    lorasmith prepare photos --base model.safetensors --buckets
    lorasmith prepare photos --base model.safetensors --npz --shard 2/4

What is there already is left alone. The same command, started again, goes on.
"""

import hashlib
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lorasmith import model_families
from lorasmith.cache_folder import Say, default_place, in_words, open_cache
from lorasmith.caching import Wanted, count_cached, encode, latents_maker, open_store
from lorasmith.checkpoint import atomic_file, open_checkpoint
from lorasmith.config import PrepareConfig
from lorasmith.data import metadata_files, npz_latents, tag_metadata
from lorasmith.data.buckets import Buckets, Size
from lorasmith.data.dataset import plain_pixels
from lorasmith.data.gathering import plan_crops
from lorasmith.data.images import UnreadablePicture, probe_readable, remembering, require_folder, set_pixel_limit
from lorasmith.data.labelling import (
    Outcome,
    Shard,
    choose_shard,
    enough_memory,
    foreign_notes,
    summary,
    told_by_all,
    work_through,
)
from lorasmith.data.metadata_files import Entry
from lorasmith.data.npz_latents import Form, Unfit, Wish
from lorasmith.data.records import ImageRecord
from lorasmith.data.sources import metadata_json
from lorasmith.data.sources.folder import find_parts, nothing_found
from lorasmith.data.subsets import DatasetRules, Subset
from lorasmith.errors import UserError
from lorasmith.models.base import LatentDiffusion, ModelFacts
from lorasmith.processes import make_deterministic
from lorasmith.seeds import derive
from lorasmith.taggers.base import choose_home

Job = Sequence[Wanted]  # what is encoded of one picture: itself, its mirror image, or both
_GO_ON = "; going on in memory"  # what training does where the cache cannot be used, and this command does not


@dataclass(frozen=True)
class Coder:
    """What encodes: a VAE, its place, and how it is started."""

    base: str
    vae: str | None
    device: torch.device
    shard: Shard

    @property
    def place(self) -> Path:
        """Where the VAE lies."""
        with open_checkpoint(self.vae or self.base) as checkpoint:
            return checkpoint.path

    def load(self) -> LatentDiffusion:
        """Load the model; all but the VAE in 16 bit, since it is not needed."""
        advice = f"the model on {self.device}: close other programs, or --device cpu"
        with enough_memory(advice), open_checkpoint(self.base) as checkpoint:
            return model_families.load(checkpoint, dtype=torch.bfloat16, device=self.device, vae=self.vae)

    def encode(
        self,
        model: LatentDiffusion,
        jobs: Sequence[Job],
        keep: Callable[[Job, list[Tensor]], None],
        require_room: Callable[[], None],
    ) -> Outcome:
        """Encode pictures one by one, since in a batch each would change the others' last bits.

        Args:
            keep: is given a picture's means and stds, each (2, C, H/f, W/f).
            require_room: raises a UserError if nothing more can be kept.
        """

        def make(pictures: list[list[Tensor]]) -> list[list[Tensor]]:
            require_room()
            return [[encode(model, pixels) for pixels in one] for one in pictures]

        advice = f"one picture on {self.device}: a lower --resolution, or --device cpu; what is written stays"
        return work_through(jobs, _pixels, make, keep, batch_size=1, shard=self.shard, advice=advice)


def run(cfg: PrepareConfig) -> int:
    """Encode the folder; return the exit code: 0, 1 if pictures were left out, 130 / 143 when stopped."""
    folder = _require(cfg)
    device, _ = choose_home(cfg.device, "fp32")
    make_deterministic(device)
    set_pixel_limit(cfg.max_megapixels)
    with open_checkpoint(cfg.base) as checkpoint:
        facts = model_families.describe(checkpoint, prediction=cfg.prediction, vae=cfg.vae)
    pictures, notes = _pictures(cfg, folder)
    say, coder = _teller(), Coder(cfg.base, cfg.vae, device, choose_shard(cfg.shard))
    place = open_cache(cfg.cache_dir or default_place(), say)
    if place is None and not cfg.npz:
        raise UserError("nothing that is encoded could be kept; give another cache folder with --cache-dir.")
    own = coder.shard.of(pictures)
    print(f"looking at {len(own):,} of {len(pictures):,} pictures in {folder}", flush=True)
    with told_by_all():
        with remembering(place, say):
            probed, unreadable = probe_readable(own)
        records = [
            ImageRecord(path, "", size, content_hash=content_hash) for path, (size, content_hash) in probed.items()
        ]
        jobs = _jobs(cfg, facts, records)
        if cfg.npz:
            files = _Files(cfg, folder, facts, pictures)
            outcome, num_existing = fill_files(files, coder, jobs)
            done = f"encoded into .npz files {f'in {cfg.npz_dir}' if cfg.npz_dir else 'beside them'}"
            if cfg.output is not None:
                written = tag_metadata.of_shard(cfg.output, coder.shard)
                _write_resolutions(written, cfg.captions, folder, files.whole)
                notes.append(f"train_resolution of {len(files.whole):,} pictures in {written}")
        else:
            assert place is not None
            outcome, num_existing, size = fill_cache(place, coder, jobs, say)
            done = f"encoded, {in_words(size)} into the cache folder {place}"
    outcome.problems[:0] = map(str, unreadable)
    print(summary(outcome, coder.shard, f"pictures {done}", num_existing, notes, hint=""))
    return outcome.exit_code


# ---- what there is to do -------------------------------------------------------------------------------------------


def _require(cfg: PrepareConfig) -> Path:
    """Return the folder; ask for what cannot be guessed, and refuse places that cannot be written to."""
    if cfg.folder is None or not cfg.base:
        missing = [*(["DIR (the folder of pictures)"] if cfg.folder is None else []),
                   *([] if cfg.base else ["--base (the model that you will train for)"])]  # fmt: skip
        raise UserError(
            f"missing: {', '.join(missing)}. For example: lorasmith prepare photos --base model.safetensors"
        )
    require_folder(cfg.folder)
    if cfg.output is not None:
        tag_metadata.check_path(cfg.output)
    if cfg.npz_dir is not None and cfg.npz_dir.exists() and not cfg.npz_dir.is_dir():
        raise UserError(f"--npz-dir {cfg.npz_dir}: this is a file; give a folder, which may be a new one.")
    if cfg.npz_dir is not None and cfg.npz_dir.resolve().is_relative_to(cfg.folder.resolve()):
        raise UserError(
            f"--npz-dir {cfg.npz_dir} lies in {cfg.folder} itself; leave it out to have the files beside the pictures, "
            "or give a folder elsewhere."
        )
    return cfg.folder


def _pictures(cfg: PrepareConfig, folder: Path) -> tuple[list[Path], list[str]]:
    """Return the pictures that would be trained, sorted, and notes on what is left out."""
    if cfg.captions is not None:
        named = metadata_json.captions_of(cfg.captions, folder)
        return sorted(named, key=lambda path: path.as_posix()), []
    parts, notes = find_parts(folder, None, 1, recursive=cfg.recursive)
    pictures = [picture for part in parts for picture in part.pictures]
    if not pictures:
        raise UserError(nothing_found(folder))
    return pictures, [*notes, *foreign_notes([part.folder for part in parts])]


def _jobs(cfg: PrepareConfig, facts: ModelFacts, records: Sequence[ImageRecord]) -> list[Job]:
    """Return how each picture is encoded, as training would."""
    subset, resolution = Subset(alpha_color=cfg.alpha_color), cfg.resolution or facts.resolution
    buckets = Buckets(
        resolution,
        cfg.bucket_min,
        cfg.bucket_max,
        cfg.bucket_step,
        cfg.bucket_rule == "sd-scripts",
        cfg.bucket_no_upscale,
    )
    crops, _ = plan_crops(DatasetRules((subset,), resolution, buckets if cfg.buckets else None), [subset], records)
    return [
        [Wanted(record, crop, subset, is_mirrored) for is_mirrored in ((False, True) if cfg.flip else (False,))]
        for record, crop in zip(records, crops, strict=True)
    ]


@dataclass(frozen=True)
class _Bytes:
    content: bytes

    def read(self) -> bytes:
        return self.content


def _pixels(job: Job) -> list[Tensor]:
    """Return what is encoded of a picture.

    Raises:
        UnreadablePicture: it is not what it was when this command looked at it, maybe hours ago.
    """
    record = job[0].record
    try:
        content = record.path.read_bytes()
    except OSError as error:
        raise UnreadablePicture(record.path, f"the file cannot be opened any more ({error.strerror})") from error
    if hashlib.sha256(content).hexdigest() != record.content_hash:
        raise UnreadablePicture(record.path, "it was changed while this command ran; start it again")
    pixels = plain_pixels(replace(record, data=_Bytes(content)), job[0].crop, job[0].subset)
    return [pixels.flip(-1) if one.is_mirrored else pixels for one in job]


def _teller() -> Say:
    """Return what tells of trouble with the cache, the same thing once."""

    @cache
    def say(text: str) -> None:
        tqdm.write(text.removesuffix(_GO_ON), file=sys.stderr)

    return say


# ---- into the cache folder -----------------------------------------------------------------------------------------


def fill_cache(place: Path, coder: Coder, jobs: Sequence[Job], say: Say) -> tuple[Outcome, int, int]:
    """Encode what the cache lacks; return what was done, how many pictures had all, and the bytes added.

    Raises:
        UserError: the cache cannot be written to.
    """
    maker = latents_maker(coder.place, coder.device)
    found = count_cached("latents", place, maker, {one.name for job in jobs for one in job}, say)
    if found is not None and not _missing(jobs, found):
        return Outcome(), len(jobs), 0
    model, size = coder.load(), 0
    store = open_store("latents", place, model, maker, coder.device, say)
    names = {one.name for job in jobs for one in job}
    store.look_up(names)
    missing = _missing(jobs, {name for name in names if name in store})

    def keep(job: Job, moments: list[Tensor]) -> None:
        nonlocal size
        for one, values in zip(job, moments, strict=True):
            store.put(one.name, {"moments": values})
            size += values.nbytes

    def require_room() -> None:
        if not store.is_writable:
            raise UserError(
                f"the cache folder {place} takes nothing more, so this stops; what it has stays. Make room, or give "
                "another folder with --cache-dir."
            )

    outcome = Outcome()
    if missing:
        with ExitStack() as stack:
            stack.callback(store.flush)
            outcome = coder.encode(model, missing, keep, require_room)
        require_room()
    return outcome, len(jobs) - len(missing), size


def _missing(jobs: Sequence[Job], found: set[str]) -> list[Job]:
    """Return what is to be encoded; of pictures that are the same, the first."""
    seen, missing = set(found), []
    for job in jobs:
        if lacking := [one for one in job if one.name not in seen]:
            missing.append(lacking)
            seen.update(one.name for one in lacking)
    return missing


# ---- into .npz files -----------------------------------------------------------------------------------------------


class _Files:
    """Which .npz files belong to each picture, and which are there.

    whole: the shape of each picture whose files are there.
    """

    def __init__(self, cfg: PrepareConfig, folder: Path, facts: ModelFacts, pictures: Sequence[Path]) -> None:
        self._cfg, self._facts = cfg, facts
        self.form: Form = cfg.npz_form
        self.whole: dict[Path, Size] = {}
        self._stems = {path: npz_latents.stem_of(path, folder, cfg.npz_dir) for path in pictures}
        self._owners: dict[Path, Path] = {}  # of stems, told by all pictures: those of other parts count too
        for path, stem in self._stems.items():
            self._owners.setdefault(stem, path)
            if cfg.flip and cfg.npz_form == "2022":
                self._owners.setdefault(stem.with_name(f"{stem.name}_flip"), path)

    def wish(self, job: Job) -> Wish:
        """Return what a picture's files are to hold.

        Raises:
            UserError: another picture has files of that name.
        """
        one, factor = job[0], self._facts.latent_factor
        path, (width, height) = one.record.path, one.crop.shape
        owner = self._owners[self._stems[path]]
        if owner != path:
            raise UserError(f"{path}: its file would be called as that of {owner}; rename one of them")
        shape = (self._facts.latent_channels, height // factor, width // factor)
        return Wish(self._stems[path], one.record.size, one.crop, shape, self._cfg.flip)

    def missing(self, job: Job) -> list[Path]:
        """Return the files that are to be written.

        Raises:
            UserError: as `wish`; or one is there, is not what it should be, and is not to be overwritten.
        """
        wish = self.wish(job)
        files = wish.files(self.form)
        if self._cfg.overwrite:
            return files
        return [file for file in files if not _is_there(file, wish)]


def _is_there(file: Path, wish: Wish) -> bool:
    try:
        npz_latents.check(file, wish)
    except FileNotFoundError:
        return False
    except Unfit as error:
        raise UserError(f"{file} is there, but {error}; --overwrite writes it anew") from error
    return True


def fill_files(files: _Files, coder: Coder, jobs: Sequence[Job]) -> tuple[Outcome, int]:
    """Encode the pictures that lack a file; return what was done, and how many pictures had all.

    Raises:
        UserError: the disk is full.
    """
    missing: dict[Path, list[Path]] = {}
    problems, failures = [], list[UserError]()
    for job in jobs:
        path = job[0].record.path
        try:
            lacking = files.missing(job)
        except UserError as error:
            problems.append(str(error))
            continue
        if lacking:
            missing[path] = lacking
        else:
            files.whole[path] = job[0].crop.shape
    num_existing = len(files.whole)
    outcome = Outcome()
    if missing:
        model = coder.load()

        def keep(job: Job, moments: list[Tensor]) -> None:
            path = job[0].record.path
            try:
                _write(
                    files,
                    job,
                    [_draw(*pair) / model.latent_scale for pair in zip(job, moments, strict=True)],
                    missing[path],
                )
            except UserError as error:
                failures.append(error)
                raise
            files.whole[path] = job[0].crop.shape

        def require_room() -> None:
            if failures:
                raise failures[0]

        outcome = coder.encode(model, [job for job in jobs if job[0].record.path in missing], keep, require_room)
    outcome.problems[:0] = problems
    return outcome, num_existing


def _write(files: _Files, job: Job, latents: list[Tensor], missing: list[Path]) -> None:
    wish = files.wish(job)
    if files.form == "today":
        npz_latents.write_today(missing[0], wish, latents[0], latents[1] if wish.has_mirrored else None)
        return
    for file, values in zip(wish.files("2022"), latents, strict=True):
        if file in missing:
            npz_latents.write_2022(file, values)


def _draw(wanted: Wanted, moments: Tensor) -> Tensor:
    """Return one sample of a picture's latents; the draw follows from its content, so each start draws the same."""
    seed = derive(0, "npz latents", int(wanted.record.content_hash, 16), int(wanted.is_mirrored))
    mean, std = moments
    return mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))


def _new_key(picture: Path, folder: Path, metadata: Path) -> str:
    place = picture.relative_to(folder)
    return (place if metadata_files.is_lines(metadata) else place.with_suffix("")).as_posix()


def _write_resolutions(path: Path, captions: Path | None, folder: Path, resolutions: dict[Path, Size]) -> None:
    """Write a metadata file with each picture's train_resolution; all else in it, or else of the captions, stays."""
    entries = {} if captions is None else metadata_files.read(captions)
    entries |= metadata_files.read(path) if path.exists() else {}
    keys = {picture: key for key, picture in metadata_json.find_pictures(path, entries, folder).items()}
    for picture, shape in resolutions.items():
        key = keys.get(picture) or _new_key(picture, folder, path)
        entry = entries.get(key, Entry())
        entries[key] = replace(entry, others={**entry.others, "train_resolution": list(shape)})
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(metadata_files.lines_to_write(path, entries))
