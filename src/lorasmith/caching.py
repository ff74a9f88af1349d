"""What is encoded once and used again: the latents of pictures and the conditioning of captions.

Both come from the cache folder where it has them (`cache_folder.py`), and what is encoded is put there. The bits are
the same either way: entries are exact, and each is encoded alone, so that it does not depend on its neighbours. What
has gone from the folder while a run goes on, or is found damaged, is encoded again.
"""

import hashlib
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lorasmith.cache_folder import Part, Say, Store, identify
from lorasmith.data.buckets import CropPlan
from lorasmith.data.captions import plain
from lorasmith.data.dataset import Posteriors, plain_pixels, read_ahead
from lorasmith.data.records import ImageRecord
from lorasmith.data.subsets import Subset
from lorasmith.errors import UserError
from lorasmith.file_facts import FileFacts
from lorasmith.memory import lent
from lorasmith.models.base import Conditioning, LatentDiffusion
from lorasmith.processes import Processes
from lorasmith.progress import counted

_PIXELS = 1  # count up when a picture would become other pixels than before
_NUM_REMEMBERED = 1024  # captions in memory, of 0.2 MB for every 75 tokens
Encoded = Literal["latents", "text"]
LatentKey = tuple[int, bool]  # record index, whether mirrored


@dataclass(frozen=True)
class Wanted:
    """A picture as it is trained: all that its latents are made from, besides the VAE."""

    record: ImageRecord
    crop: CropPlan
    subset: Subset
    is_mirrored: bool = False

    @property
    def name(self) -> str:
        """What its latents are called in the cache."""
        assert self.record.content_hash, "a source tells every picture's hash"
        made_from = [self.record.content_hash, self.subset.alpha_color, self.crop.resize, self.crop.crop]
        return identify([*made_from, self.is_mirrored])

    @property
    def is_shared(self) -> bool:
        """Whether all processes may need it; else the one that reads its shard."""
        return self.record.shard is None

    def pixels(self) -> Tensor:
        """Return what is encoded: (3, H, W) in [-1, 1]."""
        pixels = plain_pixels(self.record, self.crop, self.subset)
        return pixels.flip(-1) if self.is_mirrored else pixels


# ---- model parts ---------------------------------------------------------------------------------------------------


def part_of_model(kind: Encoded, model: LatentDiffusion, device: torch.device, name: str) -> Part:
    """Return the part that encodes: its weights and all else that decides the result, the kind of device included."""
    module, settings = (
        (model.vae, model.image_encoding()) if kind == "latents" else (model.text_encoder, model.text_encoding())
    )
    dtype = str(next(module.parameters()).dtype)
    made_from = [kind, _PIXELS, weights_hash(module), settings, dtype, device.type]
    return Part(kind, identify(made_from), name)


def weights_hash(module: nn.Module) -> str:
    """Return the SHA-256 of a module's weights: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


@dataclass(frozen=True)
class Maker:
    """Where a model part comes from: its file or folder, and the options that decide what it makes."""

    place: Path
    options: tuple[object, ...]


def latents_maker(place: Path, device: torch.device) -> Maker:
    """Return what encodes pictures: the VAE's file or folder, or that of a whole model. It always computes in fp32."""
    return Maker(place, (device.type,))


def open_store(
    kind: Encoded, cache: Path | None, model: LatentDiffusion, maker: Maker, device: torch.device, say: Say
) -> Store:
    """Return the store of what a loaded model encodes on the device; without a cache one in memory."""
    if cache is None:
        return Store(None, Part(kind, "", ""), say)
    part = part_of_model(kind, model, device, maker.place.name)
    files, asked = _files_of(maker), _asked(kind, maker)
    memory = _memory(cache)
    known = memory.known(files)
    with suppress(OSError, UserError):  # the store will tell
        memory.remember({file: {**known.get(file, {}), asked: part.id} for file in files})
    return Store(cache, part, say)


def count_cached(kind: Encoded, cache: Path, maker: Maker, names: Collection[str], say: Say) -> set[str] | None:
    """Return which of these entries are in the cache, without loading the model.

    None: its files are new to the cache or have changed, so that only the loaded weights can tell.
    """
    files, asked = _files_of(maker), _asked(kind, maker)
    known = _memory(cache).known(files)
    identities = {known.get(file, {}).get(asked) for file in files}
    if len(identities) != 1 or None in identities:
        return None
    store = Store(cache, Part(kind, identities.pop(), ""), say)
    store.look_up(names)
    return {name for name in names if name in store}


def _memory(cache: Path) -> FileFacts:
    """Return what remembers of a model's files which part they made."""
    return FileFacts(cache / "facts", "model parts 1")


def _files_of(maker: Maker) -> list[Path]:
    place = maker.place
    return sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]


def _asked(kind: Encoded, maker: Maker) -> str:
    return identify([kind, _PIXELS, *maker.options])


# ---- latents -------------------------------------------------------------------------------------------------------


class _Latents(Mapping[LatentKey, tuple[Tensor, Tensor]]):
    """Mean and std of each picture, read when asked for; encoded again if it is not to be had any more."""

    def __init__(self, model: LatentDiffusion, wanted: Mapping[LatentKey, Wanted], store: Store) -> None:
        self.model, self._wanted, self._store = model, wanted, store
        self._names = {key: one.name for key, one in wanted.items()}
        self._encoding = threading.Lock()

    def __getitem__(self, key: LatentKey) -> tuple[Tensor, Tensor]:
        moments = self.moments(self._names[key], self._wanted[key])
        return moments[0], moments[1]

    def __contains__(self, key: object) -> bool:
        return key in self._names

    def __iter__(self) -> Iterator[LatentKey]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def moments(self, name: str, wanted: Wanted) -> Tensor:
        """Return (2, C, H/f, W/f): mean and std."""
        entry = self._store.get(name)
        if entry is None:
            with self._encoding, lent(self.model.vae, self.model.device):
                entry = {"moments": encode(self.model, wanted.pixels())}
                self._store.put(name, entry)
        return entry["moments"]


def cached_posteriors(
    model: LatentDiffusion,
    wanted: Mapping[LatentKey, Wanted],
    store: Store,
    processes: Processes,
    *,
    workers: int,
    is_shown: bool,
) -> Posteriors:
    """Return the latents of all that is wanted; what is not in the store is encoded, each process its share.

    Args:
        wanted: in the same order in all processes, but for what only one of them reads.
        workers: threads that read pictures ahead.
        is_shown: whether to tell how many are encoded.
    """
    latents = _Latents(model, wanted, store)
    shared = {one.name: one for one in wanted.values() if one.is_shared}
    own = {one.name: one for one in wanted.values() if not one.is_shared}
    with processes.together():
        store.look_up([*shared, *own])
    owners = _owners(processes, store, list(shared))
    missing = [one for one, has in zip(shared.values(), owners.any(dim=0).tolist(), strict=True) if not has]
    mine = [*missing[processes.index :: processes.count], *(one for name, one in own.items() if name not in store)]
    with processes.together(), lent(model.vae, model.device):
        pixels = read_ahead(Wanted.pixels, mine, workers=workers)
        is_shown = is_shown and bool(mine)
        for one, picture in zip(mine, counted(pixels, len(mine), "caching latents", is_shown=is_shown), strict=True):
            store.put(one.name, {"moments": encode(model, picture)})
        store.flush()
    with processes.together():
        store.look_up(list(shared))
    _give_to_those_without(latents, shared, store, processes)
    return latents


def _give_to_those_without(latents: _Latents, shared: Mapping[str, Wanted], store: Store, processes: Processes) -> None:
    """Send what not all processes find, for their folders are on different machines or nothing is kept on the disk."""
    owners = _owners(processes, store, list(shared))
    for (name, one), has in zip(shared.items(), owners.T.tolist(), strict=True):
        if all(has):
            continue
        moments = latents.moments(name, one) if has[processes.index] else _empty_moments(latents.model, one)
        received = processes.share(moments, source=has.index(True))
        if not has[processes.index]:
            store.keep(name, {"moments": received})


def _owners(processes: Processes, store: Store, names: Sequence[str]) -> Tensor:
    """Return which process has which entry: (processes, names), bool."""
    own = torch.tensor([name in store for name in names], dtype=torch.uint8)
    return torch.stack([processes.share(own, source=source) for source in range(processes.count)]).bool()


def _empty_moments(model: LatentDiffusion, wanted: Wanted) -> Tensor:
    (width, height), factor = wanted.crop.shape, model.latent_factor
    return torch.empty(2, model.latent_channels, height // factor, width // factor)


@torch.no_grad()
def encode(model: LatentDiffusion, pixels: Tensor) -> Tensor:
    """Return (2, C, H/f, W/f), mean and std of one picture's latents: alone, since its neighbours would change bits."""
    return torch.cat(model.encode_image(pixels[None])).cpu()


# ---- captions ------------------------------------------------------------------------------------------------------


def caption_name(caption: str) -> str:
    """Return what a caption's conditioning is called in the cache."""
    return identify(caption)


def lasting_captions(records: Iterable[ImageRecord], subsets: Sequence[Subset]) -> set[str]:
    """Return the captions that the text encoder is given of these records again and again: none of those that vary."""
    found = set()
    for record in records:
        options = subsets[record.subset].captions
        if not (options.moves_parts or options.wildcards):
            found.add(plain(record.caption, options))
            if options.dropout or options.dropout_every_epochs:
                found.add("")
    return found


def cached_encoder(
    model: LatentDiffusion, store: Store, lasting: Collection[str], processes: Processes
) -> Callable[[list[str]], Conditioning]:
    """Return what turns captions into conditioning, without gradients, and remembers it.

    Args:
        lasting: the captions to look for in the store and to put there; others have no end.
    """
    store.look_up([caption_name(caption) for caption in lasting])
    remembered: dict[str, Conditioning] = {}  # the last used last

    def find(caption: str) -> Conditioning | None:
        if caption in remembered:
            return remembered[caption]
        found = store.get(caption_name(caption))
        return None if found is None else {key: tensor.to(model.device) for key, tensor in found.items()}

    def keep(caption: str, encoded: Conditioning) -> None:
        if caption in lasting and store.is_writable:
            store.put(caption_name(caption), {key: tensor.cpu() for key, tensor in encoded.items()})

    @torch.no_grad()
    def encode(captions: list[str]) -> Conditioning:
        found = {caption: find(caption) for caption in captions}
        missing = [caption for caption, encoded in found.items() if encoded is None]
        for number in range(processes.most(len(missing))):
            caption = missing[number] if number < len(missing) else ""  # for the others, who share the encoder
            encoded = model.encode_text([caption])
            if number < len(missing):
                found[caption] = encoded
                keep(caption, encoded)
        known = {caption: encoded for caption, encoded in found.items() if encoded is not None}
        for caption, encoded in known.items():
            remembered.pop(caption, None)
            remembered[caption] = encoded
        while len(remembered) > _NUM_REMEMBERED:
            del remembered[next(iter(remembered))]
        rows = [known[caption] for caption in captions]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    return encode
