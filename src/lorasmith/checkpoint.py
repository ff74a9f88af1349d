"""Reads and writes files of tensors: `.safetensors`, torch's `.ckpt`/`.pt`/`.bin` (nothing in them is executed), and
diffusers folders. Tensors are read when asked for, one at a time; files are written beside their place and renamed.
"""

import difflib
import errno
import hashlib
import json
import math
import operator
import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import safetensors
import torch
from safetensors.torch import save as serialize
from torch import Tensor

from lorasmith.errors import FullDisk, UserError
from lorasmith.inert_pickle import InertUnpickler, Parameters, StorageKey, TensorDescription, shown

_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit, and here that of a pickle too
_MAX_NAME = 1000  # letters of a tensor's name
_MAX_SIDES, _MAX_SIDE = 64, 2**63 - 1  # of a tensor, as torch has them
_MAX_UNPACKED = 20  # times the file's size: what a packed archive, or tensors that share their numbers, may come to
_MAX_NESTING = 3  # dictionaries around a state dict
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # starts a legacy torch file
_PARTS = ("unet", "vae", "text_encoder")
_NESTED = ("state_dict", "model", "module")
_WORDS = "string_to_param"  # what WebUI's embeddings call the tensors of theirs
_DAMAGED = (
    ValueError, LookupError, TypeError, RuntimeError, OverflowError, EOFError, struct.error, zlib.error,
    zipfile.BadZipFile, safetensors.SafetensorError,
)  # fmt: skip
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class _Reader(Protocol):
    """One file: what it holds and how a tensor of it is read."""

    path: Path
    metadata: dict[str, str]
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]

    def tensor(self, name: str) -> Tensor: ...


class Checkpoint:
    """Tensors by name, read lazily. A context manager: files are closed at its end.

    format: `safetensors`, `torch` or `diffusers`. metadata: the safetensors header's strings.
    configs: a diffusers folder's JSON files by part (`unet`, `scheduler`, ...), else empty.
    """

    def __init__(
        self,
        path: Path,
        format: str,
        readers: Mapping[str, _Reader],
        configs: Mapping[str, dict[str, Any]],
        stack: ExitStack,
    ) -> None:
        self.path, self.format, self.configs = path, format, dict(configs)
        self.metadata: dict[str, str] = {}
        self._places: dict[str, tuple[_Reader, str]] = {}
        for prefix, reader in readers.items():
            self.metadata.update(reader.metadata)
            start = prefix.partition("#")[0]
            self._places.update({start + name: (reader, name) for name in reader.shapes})
            _refuse_unreadable_names(reader)
        self._stack = stack

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names(self) -> list[str]:
        """Return every tensor's name, in the order of the file."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        reader, own = self._places[name]
        return reader.shapes[own][0]

    def dtype(self, name: str) -> torch.dtype:
        reader, own = self._places[name]
        return reader.shapes[own][1]

    def tensor(self, name: str) -> Tensor:
        """Read one tensor onto the CPU.

        Raises:
            UserError: the file is damaged there.
        """
        reader, own = self._places[name]
        with _damage_told(self.path):
            return reader.tensor(own)

    def files(self) -> dict[Path, dict[str, str]]:
        """Return which file holds what: path -> the name in the file -> the name here."""
        found: dict[Path, dict[str, str]] = {}
        for name, (reader, own) in self._places.items():
            found.setdefault(reader.path, {})[own] = name
        return found

    def archive_entry(self, name: str) -> tuple[str, TensorDescription] | None:
        """Return which entry of a torch archive holds a tensor, and how; None: the file is no such archive."""
        reader, own = self._places[name]
        return reader.entry(own) if isinstance(reader, _TorchZip) else None


def _refuse_unreadable_names(reader: _Reader) -> None:
    if name := next((name for name in reader.shapes if len(name) > _MAX_NAME or not name.isprintable()), None):
        raise UserError(
            f"{reader.path} holds a tensor with a name of {len(name):,} letters that is none ({shown(name)}): it is "
            "damaged, or was made to do harm; get the file again."
        )


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model or LoRA: a file, told by its content, a diffusers folder, or a hub id (`organisation/name`).

    Raises:
        UserError: missing, empty, truncated, something else, or a pickle that tries to run code.
    """
    given, path = str(path), Path(path)
    if not path.exists():
        path = _download(given) if _is_hub_id(given) else _refuse_missing(path)
    with ExitStack() as stack:
        if path.is_dir():
            readers, configs = _open_folder(path, stack)
            return Checkpoint(path, "diffusers", readers, configs, stack.pop_all())
        format, reader = _open_file(path, stack)
        return Checkpoint(path, format, {"": reader}, {}, stack.pop_all())


def _open_file(path: Path, stack: ExitStack) -> tuple[str, _Reader]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
    if not size:
        raise UserError(f"{path} is empty (0 bytes); download or copy it again.")
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        raise UserError(f"{path} is a web page, not a model: the site's page was saved; download the file itself.")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a git-lfs pointer, not the model; run `git lfs pull`, or download the file itself.")
    if start.startswith(b"PK\x03\x04"):
        return "torch", _TorchZip(path, stack)
    if start[8:9] == b"{" or path.suffix == ".safetensors":  # before the pickles: a length too can start with 0x80
        return "safetensors", _SafeTensors(path, size, stack)
    if start[:1] == b"\x80":
        return "torch", _TorchLegacy(path, stack)
    raise UserError(
        f"{path} is no model file: it starts with {start[:8]!r}. Expected are .safetensors, .ckpt, .pt or .bin files, "
        "or a diffusers folder."
    )


class _SafeTensors:
    def __init__(self, path: Path, size: int, stack: ExitStack) -> None:
        header = read_header(path, size)
        self.path = path
        self.metadata = dict(header.pop("__metadata__", {}))
        self.shapes = {name: (tuple(info["shape"]), SAFE_DTYPES[info["dtype"]]) for name, info in header.items()}
        try:
            self._file = stack.enter_context(safetensors.safe_open(path, "pt"))  # type: ignore[no-untyped-call]
        except safetensors.SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}); download or copy it again.") from error

    def tensor(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


SAFE_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def read_header(path: Path, size: int) -> dict[str, Any]:
    """Return a safetensors header after checking that it and the file's size agree.

    Raises:
        UserError: they do not, or it cannot be read.
    """
    again = "the download or copy was cut short or damaged; get the file again."
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > _MAX_HEADER or length + 8 > size:
            raise UserError(f"{path} is no whole .safetensors file (header of {length}, file of {size} bytes): {again}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_doubles)
        metadata = header.get("__metadata__", {})
        entries = [info for name, info in header.items() if name != "__metadata__"]
        ends = [operator.index(info["data_offsets"][1]) for info in entries]
        dtypes = {str(info["dtype"]) for info in entries}
        if any(len(info["shape"]) > _MAX_SIDES for info in entries):
            raise ValueError(f"a shape with more than {_MAX_SIDES} sides")
        if any(not 0 <= operator.index(side) <= _MAX_SIDE for info in entries for side in info["shape"]):
            raise ValueError(f"a shape with a side below 0 or above {_MAX_SIDE}")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: its header cannot be read ({shown(str(error))}): {again}") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise UserError(f"{path} has {size} bytes, but {expected} are announced in its header: {again}")
    if unknown := sorted(dtypes - SAFE_DTYPES.keys()):
        raise UserError(f"{path} holds numbers of type {shown(', '.join(unknown))}, not read here; convert it to fp16.")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path}: the metadata in its header are not all text: {again}")
    return header


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; one of two entries of one name would be lost."""
    if double := next((name for name, count in Counter(name for name, _ in pairs).items() if count > 1), None):
        raise ValueError(f"two entries are called {shown(double)}")
    return dict(pairs)


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """Turn what a damaged file makes of its readers into a message."""
    try:
        yield
    except UserError:
        raise
    except (*_DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is a place that no file has
            raise
        raise UserError(f"{path} is truncated or damaged ({shown(str(error))}); download or copy it again.") from error


class _Torch:
    """What both torch layouts share: descriptions by name; a storage is read when a tensor of it is."""

    def __init__(self, path: Path, content: Any) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        with _damage_told(path):
            self._descriptions = _tensors_in(content, _MAX_NESTING)
        if not self._descriptions:
            raise UserError(f"{path} holds no tensors by name; expected is a model or LoRA (a dict of tensors).")
        self.shapes = {name: (d.shape, d.storage.dtype) for name, d in self._descriptions.items()}
        _refuse_bomb(path, sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.shapes.values()))

    def tensor(self, name: str) -> Tensor:
        description = self._descriptions[name]
        storage, count = self._storage(description.storage), math.prod(description.shape)
        if count > storage.numel():  # as no tensor that was saved; it may be larger than the memory
            raise ValueError(f"{count:,} numbers are announced, {storage.numel():,} are there")
        return torch.as_strided(storage, description.shape, description.stride, description.offset).clone()

    def _storage(self, key: StorageKey) -> Tensor:
        """Return all elements of a storage, 1-D."""
        raise AssertionError("defined by both layouts")


class _TorchZip(_Torch):
    def __init__(self, path: Path, stack: ExitStack) -> None:
        with _damage_told(path):
            self._zip = stack.enter_context(zipfile.ZipFile(path))
            entries = self._zip.infolist()
            _refuse_bomb(path, sum(entry.file_size for entry in entries))
            if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
                raise UserError(f"{path} is packed in a way that is not read here; unpack it, and pack it without.")
            _without_doubles([(entry.filename, entry) for entry in entries])
            pickles = [entry.filename for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
            if not pickles:
                raise UserError(f"{path} is a zip archive without a model in it; unpack it, or give the model itself.")
            self._folder = pickles[0].rpartition("/")[0]
            with self._zip.open(pickles[0]) as file:
                content = _unpickle(file, path, self._zip.getinfo(pickles[0]).file_size)
        super().__init__(path, content)

    def entry(self, name: str) -> tuple[str, TensorDescription]:
        """Return the archive's entry that holds a tensor, and which part of it the tensor is."""
        description = self._descriptions[name]
        return self._entry_of(description.storage), description

    def _entry_of(self, key: StorageKey) -> str:
        return f"{self._folder}/data/{key.key}".lstrip("/")

    def _storage(self, key: StorageKey) -> Tensor:
        entry = self._zip.getinfo(self._entry_of(key))
        with self._zip.open(entry) as file:
            data = bytearray(file.read(entry.file_size))  # never more: what is packed may be larger than it says
        return torch.frombuffer(data, dtype=key.dtype) if data else torch.empty(0, dtype=key.dtype)


class _TorchLegacy(_Torch):
    """The layout before torch 1.6: five pickles, then each storage as a count and its elements."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._file: IO[bytes] = stack.enter_context(path.open("rb"))
        end = path.stat().st_size

        def part() -> Any:
            return _unpickle(self._file, path, end - self._file.tell())

        magic = part()
        if magic != _MAGIC_NUMBER:
            super().__init__(path, magic)  # a bare pickle: no tensors to be had, said in the same words
            return
        for _ in range(2):  # protocol version, system information
            part()
        content, keys = part(), part()
        super().__init__(path, content)
        dtypes = {d.storage.key: d.storage.dtype for d in self._descriptions.values()}
        self._places: dict[str, tuple[int, int]] = {}  # where a storage begins, and how many bytes it has
        for key in keys if isinstance(keys, list) else []:
            if not isinstance(key, (str, int)) or str(key) in self._places:
                raise UserError(f"{path} is damaged: its list of storages is none; download or copy it again.")
            count = struct.unpack("<q", self._file.read(8).ljust(8, b"\0"))[0]
            begin, length = self._file.tell(), count * dtypes.get(str(key), torch.float32).itemsize
            if count < 0 or begin + length > end:
                raise UserError(f"{path} is truncated; download or copy it again.")
            self._places[str(key)] = begin, length
            self._file.seek(begin + length)

    def _storage(self, key: StorageKey) -> Tensor:
        begin, length = self._places[key.key]
        self._file.seek(begin)
        data = bytearray(self._file.read(length))
        return torch.frombuffer(data, dtype=key.dtype) if data else torch.empty(0, dtype=key.dtype)


def _refuse_bomb(path: Path, size: int) -> None:
    """Refuse what a small file makes large."""
    if size > _MAX_UNPACKED * (own := path.stat().st_size):
        raise UserError(
            f"{path} has {own:,} bytes and would become {shown(f'{size:,}')}: it is damaged, or was made to fill the "
            "memory; get the model as .safetensors."
        )


def _unpickle(file: IO[bytes], path: Path, size: int) -> Any:
    """Return what a pickle of at most `size` bytes describes."""
    try:
        return InertUnpickler(file, str(path), min(size, _MAX_HEADER)).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way at all; none of it is ours
        raise UserError(
            f"{path} cannot be read ({shown(str(error))}): damaged or no model; download or copy it again."
        ) from error


def _tensors_in(content: Any, depth: int) -> dict[str, TensorDescription]:
    """Return the named tensors of a checkpoint, out of `state_dict` and the like; those of a list by their number.

    A tensor alone is a list of one.
    """
    if isinstance(content, TensorDescription):
        content = [content]
    if isinstance(content, list) and all(isinstance(value, TensorDescription) for value in content):
        return {str(number): value for number, value in enumerate(content)}
    if not isinstance(content, dict):
        return {}
    for name in _NESTED if depth else ():
        if isinstance(content.get(name), dict) and (nested := _tensors_in(content[name], depth - 1)):
            return nested
    words = content.get(_WORDS)
    words = words.named if isinstance(words, Parameters) else words
    places = {"": content, f"{_WORDS}.": words if isinstance(words, dict) else {}}
    return {
        f"{start}{name}": value
        for start, place in places.items()
        for name, value in place.items()
        if isinstance(value, TensorDescription)
    }


def _open_folder(path: Path, stack: ExitStack) -> tuple[dict[str, _Reader], dict[str, dict[str, Any]]]:
    """Open a diffusers folder, or one component of it."""
    configs = {
        file.parent.name: _read_json(file)
        for pattern in ("*/config.json", "*/scheduler_config.json")
        for file in sorted(path.glob(pattern))
    }
    readers: dict[str, _Reader] = {}
    for part in _PARTS:
        for number, file in enumerate(_weight_files(path / part)):
            readers[f"{part}/#{number}"] = _open_file(file, stack)[1]
    if not readers:
        for number, file in enumerate(_weight_files(path)):
            readers[f"#{number}"] = _open_file(file, stack)[1]
    if not readers:
        inside = sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", ".ckpt", ".pt"))
        hint = f"give one of the files in it: {', '.join(inside[:5])}" if inside else "give a model file"
        raise UserError(f"{path} is no diffusers model (which has folders unet, vae, text_encoder); {hint}.")
    return readers, configs


def _weight_files(folder: Path) -> list[Path]:
    """Return a component's weights: sharded or single, full or fp16, safetensors before bin."""
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
        for ending in ("safetensors", "fp16.safetensors", "bin", "fp16.bin"):
            if (file := folder / f"{stem}.{ending}").is_file():
                return [file]
            index = folder / f"{stem}.{ending}.index.json"
            if index.is_file():
                return _shards(index)
    return []


def _shards(index: Path) -> list[Path]:
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(_is_file_name(name) for name in names.values()):
        raise UserError(f"{index} names no files with weights; get the model folder anew.")
    files = [index.parent / name for name in sorted(set(names.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{index.parent} is incomplete: {', '.join(missing)} are missing; get the model folder anew.")
    return files


def _is_file_name(name: Any) -> bool:
    """True for the name of a file in the same folder."""
    return isinstance(name, str) and name.isprintable() and name not in ("", "..") and Path(name).name == name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); get the model folder anew.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; get the model folder anew.")
    return content


def _is_hub_id(text: str) -> bool:
    parts = text.split("/")
    if len(parts) != 2 or not all(parts) or text.startswith((".", "~")) or Path(text).suffix in _SUFFIXES:
        return False
    return not Path(parts[0]).is_dir()  # a misspelt name in a folder that is here is no reason to ask the hub


_SUFFIXES = {".safetensors", ".ckpt", ".pt", ".bin", ".pth"}


def _download(name: str) -> Path:
    """Fetch a diffusers model from the Hugging Face hub, or find it in the local cache."""
    from huggingface_hub import snapshot_download  # only this way of naming a model needs it

    patterns = [f"{part}/*.{ending}" for part in _PARTS for ending in ("safetensors", "json")]
    alone = ["config.json", "diffusion_pytorch_model.safetensors"]  # a VAE's or a ControlNet's own folder
    try:
        return Path(snapshot_download(name, allow_patterns=[*patterns, *alone, "scheduler/*.json", "model_index.json"]))
    except Exception as error:  # the hub client raises many kinds: offline, not found, gated
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name} is no file or folder here, and the hub did not give it ({reason}); "
            "give the path of a downloaded model, or check the name and the connection."
        ) from error


def _refuse_missing(path: Path) -> Path:
    folder = path.parent
    near = difflib.get_close_matches(path.name, os.listdir(folder), n=1, cutoff=0.5) if folder.is_dir() else []
    hint = f"did you mean {folder / near[0]}?" if near else "check the path."
    raise UserError(f"{path}: there is no such file or folder; {hint}")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it takes the place of `path` in one step.

    Raises:
        FullDisk: an older file is then left as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        with _explained(path):
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def synced_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; when the block ends well it takes the place of `target`.

    Raises:
        FullDisk: an older folder is then left as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    older = temporary.with_name(f"{temporary.name}.older")
    try:
        with _explained(target):
            yield temporary
            for file in temporary.rglob("*"):
                _sync(file)
            temporary.chmod(0o777 & ~_umask())
            if target.exists():
                os.replace(target, older)  # to delete it takes longer, and what is half deleted is lost
            os.replace(temporary, target)
            _sync(target.parent)
            shutil.rmtree(older, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn a full disk into a message."""
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        code = error.errno if isinstance(error, OSError) else None
        if code not in _NO_SPACE and "No space left" not in str(error):
            raise
        free = shutil.disk_usage(path.parent).free
        raise FullDisk(
            f"{path} could not be saved: the disk is full ({free / 2**20:.0f} MiB free). "
            "Whatever was there before is untouched; make room and start again, or save elsewhere."
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    """Have a file or folder written to the disk; Windows has no such call for folders."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a `.safetensors` file atomically; equal input gives equal bytes."""
    data = serialize({name: tensor.contiguous() for name, tensor in tensors.items()})
    length = struct.unpack("<Q", data[:8])[0]
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(data[8 : 8 + length])}
    text = json.dumps(header if metadata else json.loads(data[8 : 8 + length]), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8, as safetensors itself has it
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.write(memoryview(data)[8 + length :])


def write_torch(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a plain dict of tensors with torch, atomically."""
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        torch.save(dict(tensors), file)


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
