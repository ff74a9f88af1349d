"""Writes a model again with some of its tensors changed and everything else as it was, byte for byte.

A tensor at a time is in memory: the header of a `.safetensors` says beforehand where each will lie, and in an archive
of torch's only the data of the changed tensors are replaced. Two ways need the whole model in memory, since torch has
no other for them: from `.safetensors` to `.ckpt`, and a `.ckpt` whose numbers change their type.
"""

import json
import os
import shutil
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lorasmith.cache_folder import in_words
from lorasmith.checkpoint import SAFE_DTYPES, Checkpoint, atomic_file, read_header, synced_folder
from lorasmith.errors import UserError

Change = Callable[[str, Tensor], Tensor]  # a tensor's name and a copy of it, free to be changed -> what to store

TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
_WEIGHT_SUFFIXES = (".safetensors", *TORCH_SUFFIXES, ".msgpack", ".h5", ".onnx")
_CHANGED_PARTS = ("", "unet", "text_encoder")  # folders of a diffusers model where what was not read would be outdated
_BLOCK = 1 << 23
_ALIGNMENT = 64  # of tensors in torch's archives, for those who map them into memory
_SAFE_NAMES = {dtype: name for name, dtype in SAFE_DTYPES.items()}


@dataclass(frozen=True)
class Pending:
    """A tensor of a file that is yet to be written; it is made when its turn comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def check_output(checkpoint: Checkpoint, output: Path) -> None:
    """Check that a model of this form can be written there.

    Raises:
        UserError: the output's ending says otherwise.
    """
    suffix = output.suffix.lower()
    if checkpoint.format == "diffusers":
        if suffix in _WEIGHT_SUFFIXES:
            raise UserError(
                f"--output {output}: expected is the name of a folder, such as {output.with_suffix('')}, or of a file "
                "that ends in .safetensors or .ckpt."
            )
    elif suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise UserError(
            f"--output {output}: expected is a name that ends in .safetensors or .ckpt, such as {output}.safetensors, "
            "or one without an ending for a diffusers folder."
        )


def check_space(output: Path, needed: int) -> None:
    """Check that a model of so many bytes has room there.

    Raises:
        UserError: it has not.
    """
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"--output {output}: the model needs {in_words(needed)}, and {in_words(free)} are free there; "
            "make room, or write elsewhere. Nothing was written."
        )


def size_of(checkpoint: Checkpoint, dtypes: Mapping[str, torch.dtype]) -> int:
    """Return about how many bytes `rewrite` will write."""
    sizes = {name: torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names()}
    change = sum(sizes[name] * (dtype.itemsize - checkpoint.dtype(name).itemsize) for name, dtype in dtypes.items())
    if checkpoint.format == "diffusers":
        return sum((checkpoint.path / file).stat().st_size for file in _carried(checkpoint)[0]) + change
    return sum(sizes[name] * checkpoint.dtype(name).itemsize for name in sizes) + change


def rewrite(checkpoint: Checkpoint, output: Path, dtypes: Mapping[str, torch.dtype], change: Change) -> list[str]:
    """Write the model to `output`, in the form that its ending says, and return sentences on what was not kept.

    Args:
        dtypes: of the tensors that change, in the new file.
        change: is called once for each of them.

    Raises:
        UserError: the disk is full. Nothing is left behind then, and what was at `output` is as it was.
    """
    if checkpoint.format != "diffusers":
        (source,) = checkpoint.files()
        with atomic_file(output) as temporary:
            return _rewrite_file(checkpoint, source, temporary, output.suffix.lower(), dtypes, change)
    carried, outdated = _carried(checkpoint)
    notes = [f"not copied, for it holds the same weights without the change: {file}" for file in outdated]
    with synced_folder(output) as temporary:
        for file in carried:
            source, target = checkpoint.path / file, temporary / file
            target.parent.mkdir(parents=True, exist_ok=True)
            names = checkpoint.files().get(source, {}).values()
            if any(name in dtypes for name in names):
                notes += _rewrite_file(checkpoint, source, target, target.suffix.lower(), dtypes, change)
            else:
                shutil.copyfile(source, target)
    return notes


def _carried(checkpoint: Checkpoint) -> tuple[list[Path], list[Path]]:
    """Return the files of a diffusers folder that belong to the new one, and those that would be outdated in it."""
    read = {file.relative_to(checkpoint.path) for file in checkpoint.files()}
    every = (file.relative_to(checkpoint.path) for file in checkpoint.path.rglob("*") if file.is_file())
    files = sorted(file for file in every if not any(part.startswith(".") for part in file.parts))  # no .git, .cache
    outdated = [file for file in files if file not in read and _is_other_copy(file)]
    return [file for file in files if file not in outdated], outdated


def _is_other_copy(file: Path) -> bool:
    """True for weights, or an index of them, in a place where only those that were read are up to date."""
    is_weights = file.suffix.lower() in _WEIGHT_SUFFIXES or file.name.endswith(".index.json")
    return is_weights and str(file.parent) in (".", *_CHANGED_PARTS)


def _rewrite_file(
    checkpoint: Checkpoint, source: Path, target: Path, suffix: str, dtypes: Mapping[str, torch.dtype], change: Change
) -> list[str]:
    """Write one of the checkpoint's files again, and return sentences on what was not kept."""
    names = checkpoint.files()[source]
    own = {name: dtypes[full] for name, full in names.items() if full in dtypes}

    def changed(name: str, tensor: Tensor) -> Tensor:
        return change(names[name], tensor)

    if suffix == ".safetensors":
        if _is_safetensors(source):
            _copy_safetensors(source, target, own, changed)
            return []
        _stream_safetensors(checkpoint, names, target, own, changed)
        return [f"{source.name} held more than tensors (such as the number of steps); only tensors are kept."]
    if _can_be_patched(checkpoint, names, own):
        _patch_archive(checkpoint, source, names, target, own, changed)
        return []
    tensors = {name: _whole(checkpoint, full, name, own, changed) for name, full in names.items()}
    torch.save(tensors if checkpoint.format == "diffusers" else {"state_dict": tensors}, target)
    return [
        "the whole model was in memory to write a .ckpt in this way; only its tensors are kept, "
        "and neither metadata nor what a training program left beside them."
    ]


def _whole(checkpoint: Checkpoint, full: str, name: str, own: Mapping[str, torch.dtype], change: Change) -> Tensor:
    tensor = checkpoint.tensor(full).contiguous().clone()
    return change(name, tensor) if name in own else tensor


# --- safetensors ------------------------------------------------------------------------------------------------------


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:9] == b"{"


def _copy_safetensors(source: Path, target: Path, dtypes: Mapping[str, torch.dtype], change: Change) -> None:
    """Copy a file in its own order, with its metadata; only what changes is looked at."""
    header = read_header(source, source.stat().st_size)
    entries = {name: info for name, info in header.items() if name != "__metadata__"}
    order = sorted(entries, key=lambda name: entries[name]["data_offsets"])
    offset = 0
    for name in order:
        info = entries[name]
        begin, end = info["data_offsets"]
        info["source"] = begin
        if name in dtypes:
            old = SAFE_DTYPES[info["dtype"]]
            info["old"], info["dtype"] = old, _SAFE_NAMES[dtypes[name]]
            end = begin + (end - begin) // old.itemsize * dtypes[name].itemsize
        info["data_offsets"], offset = [offset, offset + end - begin], offset + end - begin
    with source.open("rb") as reading, target.open("wb") as writing:
        start = 8 + struct.unpack("<Q", reading.read(8))[0]
        _write_header(writing, _plain(header))
        for name in order:
            info = entries[name]
            reading.seek(start + info["source"])
            if name in dtypes:
                stored = _read(reading, info["shape"], info["old"])
                _write(writing, change(name, stored))
            else:
                _copy(reading, writing, info["data_offsets"][1] - info["data_offsets"][0])


def _plain(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return a header with what belongs into it."""
    wanted = ("dtype", "shape", "data_offsets")
    return {
        name: info if name == "__metadata__" else {key: info[key] for key in wanted} for name, info in header.items()
    }


def _stream_safetensors(
    checkpoint: Checkpoint, names: Mapping[str, str], target: Path, dtypes: Mapping[str, torch.dtype], change: Change
) -> None:
    """Write the tensors of a torch file."""
    kinds = {name: dtypes.get(name, checkpoint.dtype(full)) for name, full in names.items()}
    tensors = {
        name: Pending(checkpoint.shape(full), kinds[name], partial(_whole, checkpoint, full, name, dtypes, change))
        for name, full in names.items()
    }
    write_pending(target, tensors, {})


def write_pending(target: Path, tensors: Mapping[str, Pending], metadata: Mapping[str, str]) -> None:
    """Write a `.safetensors` file tensor by tensor, the widest numbers first: each lies at a multiple of its width."""
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}  # transformers asks for the format
    offset = 0
    for name in order:
        own = tensors[name]
        end = offset + own.num_bytes
        header[name] = {"dtype": _SAFE_NAMES[own.dtype], "shape": list(own.shape), "data_offsets": [offset, end]}
        offset = end
    with target.open("wb") as writing:
        _write_header(writing, header)
        for name in order:
            _write(writing, tensors[name].make())
        writing.flush()
        os.fsync(writing.fileno())


def _write_header(file: IO[bytes], header: Mapping[str, Any]) -> None:
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8, as safetensors itself has it
    file.write(struct.pack("<Q", len(text)) + text)


def _read(file: IO[bytes], shape: list[int], dtype: torch.dtype) -> Tensor:
    data = bytearray(torch.Size(shape).numel() * dtype.itemsize)
    count = file.readinto(data)  # type: ignore[attr-defined]
    assert count == len(data), "the header was checked against the file's size"
    return torch.frombuffer(data, dtype=dtype).view(shape)


def _write(file: Any, tensor: Tensor) -> None:
    if tensor.numel():
        file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _copy(reading: IO[bytes], writing: IO[bytes], count: int) -> None:
    while count:
        block = reading.read(min(count, _BLOCK))
        writing.write(block)
        count -= len(block)


# --- torch's archives -------------------------------------------------------------------------------------------------


def _can_be_patched(checkpoint: Checkpoint, names: Mapping[str, str], dtypes: Mapping[str, torch.dtype]) -> bool:
    """True if what changes can be replaced where it is: it keeps its type, and nothing else lies in its storage."""
    entries = {full: checkpoint.archive_entry(full) for full in names.values()}
    used = Counter(entry[0] for entry in entries.values() if entry)
    for name, dtype in dtypes.items():
        entry = entries[names[name]]
        if entry is None or used[entry[0]] > 1 or dtype != checkpoint.dtype(names[name]):
            return False
    return True


def _patch_archive(
    checkpoint: Checkpoint,
    source: Path,
    names: Mapping[str, str],
    target: Path,
    dtypes: Mapping[str, torch.dtype],
    change: Change,
) -> None:
    """Copy an archive entry by entry, and replace the data of what changes."""
    places = {}
    for name in dtypes:
        entry = checkpoint.archive_entry(names[name])
        assert entry is not None, "looked at before"
        places[entry[0]] = (name, entry[1])
    with zipfile.ZipFile(source) as reading, zipfile.ZipFile(target, "w", allowZip64=True) as writing:
        for info in reading.infolist():
            with reading.open(info) as data, writing.open(_aligned(info, writing), "w", force_zip64=True) as out:
                if info.filename not in places:
                    shutil.copyfileobj(data, out, _BLOCK)
                    continue
                name, description = places[info.filename]
                storage = torch.frombuffer(bytearray(data.read(info.file_size)), dtype=description.storage.dtype)
                view = torch.as_strided(storage, description.shape, description.stride, description.offset)
                view.copy_(change(name, view.contiguous()))
                _write(out, storage)


def _aligned(info: zipfile.ZipInfo, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """Return the entry for a copy whose data begin at a multiple of the alignment, by filling up its header."""
    copy = zipfile.ZipInfo(info.filename, info.date_time)
    copy.compress_type = info.compress_type
    begin = archive.start_dir + 30 + len(info.filename.encode()) + 20 + 4  # header, name, zip64's sizes, filler's head
    filler = -begin % _ALIGNMENT
    copy.extra = b"FB" + struct.pack("<H", filler) + b"Z" * filler
    return copy
