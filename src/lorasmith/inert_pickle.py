"""Reads torch checkpoints (`.ckpt`, `.pt`, `.bin`) without ever executing what is in them.

A pickle is a program. The unpickler here knows a short list of harmless names and builds descriptions of tensors for
them; every other class becomes an inert stand-in, so checkpoints with training callbacks still load; a reference to
something that only an attack needs is refused.
"""

import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import IO, Any

import torch

from lorasmith.errors import UserError

_DANGEROUS_MODULES = {
    "os", "posix", "nt", "posixpath", "ntpath", "subprocess", "sys", "shutil", "importlib", "runpy", "ctypes", "socket",
    "webbrowser", "pty", "code", "codeop", "commands", "pickle", "_pickle", "cloudpickle", "dill", "operator",
    "functools", "types", "marshal", "multiprocessing", "threading", "asyncio", "signal", "tempfile", "pathlib", "io",
    "http", "urllib", "requests", "builtins", "__builtin__", "inspect", "gc", "bdb", "pdb", "timeit", "pip", "venv",
}  # fmt: skip
_HARMLESS_BUILTINS = {"dict", "list", "tuple", "set", "frozenset", "int", "float", "complex", "bool", "str", "bytes",
                      "bytearray", "slice", "range", "object", "Exception"}  # fmt: skip
_DANGEROUS_NAMES = {"torch.load", "torch.hub", "torch.jit", "torch.ops", "torch.utils.cpp_extension", "numpy.load"}
_DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class StorageKey:
    """Which stored bytes are meant, and what they hold; `size` counts elements."""

    key: str
    dtype: torch.dtype
    size: int


@dataclass(frozen=True)
class TensorDescription:
    """A tensor that is described but not read: a view of a storage, in elements."""

    storage: StorageKey
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Inert:
    """Stands in for an object of a class that is not known here; takes everything and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass

    def __setitem__(self, _key: Any, _value: Any) -> None:
        pass

    def append(self, _item: Any) -> None:
        pass

    def extend(self, _items: Any) -> None:
        pass

    def add(self, _item: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> "Inert":
        return Inert()


class InertUnpickler(pickle._Unpickler):  # the one in Python: each step of it is readable
    """Unpickles descriptions; runs nothing that the file names."""

    def __init__(self, file: IO[bytes], where: str) -> None:
        super().__init__(file, encoding="latin-1")
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for `module.name` here.

        Raises:
            UserError: the name is one that code is run with.
        """
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _StorageType(_DTYPES[name])
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        is_builtin = module in ("builtins", "__builtin__")
        if is_builtin and name in _HARMLESS_BUILTINS:
            return _BUILTINS.get(name, Inert)
        full = f"{module}.{name}"
        if module.partition(".")[0] in _DANGEROUS_MODULES or any(full.startswith(bad) for bad in _DANGEROUS_NAMES):
            raise UserError(
                f"{self._where} tries to run code when it is loaded: it calls {full}. Nothing of it was run. "
                "Do not use this file in other programs either; get the model as .safetensors from a source you trust."
            )
        return type(name.rpartition(".")[2] or "Unknown", (Inert,), {"__module__": module})

    def persistent_load(self, pid: Any) -> StorageKey:
        """Return the description of a storage: ("storage", type, key, device, number of elements[, view])."""
        if not (isinstance(pid, tuple) and len(pid) >= 5 and isinstance(pid[1], _StorageType)):
            raise pickle.UnpicklingError(f"a reference to {pid!r:.80}, which is no tensor storage")
        return StorageKey(str(pid[2]), pid[1].dtype, int(pid[4]))


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype

    def __call__(self, *_: Any, **__: Any) -> Inert:
        return Inert()


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Any:
    if not isinstance(storage, StorageKey):
        return Inert()
    return TensorDescription(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _size(items: Any = ()) -> tuple[int, ...]:
    return tuple(items)


_BUILTINS: dict[str, Any] = {
    "dict": dict, "list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "int": int, "float": float,
    "complex": complex, "bool": bool, "str": str,
}  # fmt: skip
_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch", "Size"): _size,
}
