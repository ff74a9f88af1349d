"""Reads torch checkpoints (`.ckpt`, `.pt`, `.bin`) without ever executing what is in them.

A pickle is a program. The unpickler here knows a short list of harmless names and builds descriptions of tensors for
them; every other class becomes an inert stand-in, so checkpoints with training callbacks still load; a reference to
something that only an attack needs is refused. Memory stays in proportion to the pickle's length: nothing is copied,
hashed or printed that a few bytes could have made large.
"""

import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, ClassVar

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
_LARGEST = 2**63 - 1  # of numbers of elements, as torch has them
_MOST_SIDES = 64  # of a tensor, as torch has them
_MOST_SHOWN = 200  # letters of a name in a message
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


class Parameters(Inert):
    """Stands in for torch's ParameterDict, whose tensors are in an attribute: `named`, if that is a dictionary."""

    named: Any = None


def shown(text: str) -> str:
    """Return a text out of a file as a message can hold it: short, and without what moves a terminal's cursor."""
    printable = repr(text[:_MOST_SHOWN])[1:-1]
    return printable if len(text) <= _MOST_SHOWN else f"{printable}..."


class Named(dict[Any, Any]):
    """A dictionary of a pickle: what is called by a text or a number. Nothing here needs other keys, and the hash of a
    nested one may take forever.
    """

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, (str, int)):
            return
        if key in self:
            raise pickle.UnpicklingError(f"two entries are called {shown(str(key))}")
        super().__setitem__(key, value)


class _Limited:
    """The part of a file that a pickle may take."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._file, self._left = file, limit

    def read(self, size: int) -> bytes:
        return self._counted(self._file.read(min(size, self._left)))

    def readline(self) -> bytes:
        return self._counted(self._file.readline(self._left))

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        return data


class InertUnpickler(pickle._Unpickler):  # the one in Python: each step of it is readable
    """Unpickles descriptions; runs nothing that the file names.

    Args:
        where: the file's name, for messages.
        limit: how many bytes of the file the pickle may take.
    """

    stack: list[Any]  # these four are the other class's own
    read: Callable[[int], bytes]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: IO[bytes], where: str, limit: int) -> None:
        super().__init__(_Limited(file, limit), encoding="latin-1")  # type: ignore[arg-type]
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
            return Inert
        full = f"{module}.{name}"
        if module.partition(".")[0] in _DANGEROUS_MODULES or any(full.startswith(bad) for bad in _DANGEROUS_NAMES):
            raise UserError(
                f"{self._where} tries to run code when it is loaded: it calls {shown(full)}. Nothing of it was run. "
                "Do not use this file in other programs either; get the model as .safetensors from a source you trust."
            )
        return Inert

    def get_extension(self, code: int) -> Any:
        """Refuse what is named by its number in a list that the program itself keeps."""
        raise pickle.UnpicklingError(f"a class that is called by the number {code}")

    def persistent_load(self, pid: Any) -> StorageKey:
        """Return the description of a storage: ("storage", type, key, device, number of elements[, view])."""
        if not (isinstance(pid, tuple) and len(pid) >= 5 and isinstance(pid[1], _StorageType)):
            raise pickle.UnpicklingError("a reference to something that is no tensor storage")
        if not isinstance(pid[2], (str, int)):
            raise pickle.UnpicklingError(f"a storage that is called by a {type(pid[2]).__name__}")
        (size,) = _numbers((pid[4],))
        return StorageKey(str(pid[2]), pid[1].dtype, size)

    def _build(self) -> None:
        """BUILD gives the last object its attributes; but for one none matters here, and some could harm the reader."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Parameters) and isinstance(state, dict):
            self.stack[-1].named = state.get("_parameters")

    def _dictionary(self) -> None:
        self.append(Named())

    def _filled_dictionary(self) -> None:
        items = self.pop_mark()
        found = Named()
        for key, value in zip(items[::2], items[1::2], strict=True):
            found[key] = value
        self.append(found)

    def _set(self) -> None:
        self.append(Inert())

    def _frozen_set(self) -> None:
        self.pop_mark()
        self.append(Inert())

    def _byte_array(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(length))  # the way of the class above takes the memory before it reads

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: _build,
        pickle.EMPTY_DICT[0]: _dictionary,
        pickle.DICT[0]: _filled_dictionary,
        pickle.EMPTY_SET[0]: _set,
        pickle.FROZENSET[0]: _frozen_set,
        pickle.BYTEARRAY8[0]: _byte_array,
    }


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype

    def __call__(self, *_: Any, **__: Any) -> Inert:
        return Inert()


def _numbers(values: Any) -> tuple[int, ...]:
    """Return sizes as they are, checked."""
    if not isinstance(values, (tuple, list)) or len(values) > _MOST_SIDES:
        raise pickle.UnpicklingError("a tensor whose shape is none")
    if not all(isinstance(value, int) and 0 <= value <= _LARGEST for value in values):
        raise pickle.UnpicklingError("a tensor of which a size is no number that torch could have written")
    return tuple(values)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Any:
    if not isinstance(storage, StorageKey):
        return Inert()
    (begin,), sides, steps = _numbers((offset,)), _numbers(shape), _numbers(stride)
    if len(sides) != len(steps):
        raise pickle.UnpicklingError(f"a tensor of {len(sides)} sides with {len(steps)} steps")
    return TensorDescription(storage, begin, sides, steps)


def _named() -> Named:
    return Named()


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _named,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch", "Size"): _numbers,
    ("torch.nn.modules.container", "ParameterDict"): Parameters,
}
