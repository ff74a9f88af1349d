"""Files that do harm to a reader that trusts them: pickles that run code, spelled by hand in each way that there is."""

import pickle
import struct
import zipfile
from pathlib import Path

from lorasmith.checkpoint import _MAGIC_NUMBER

MAGIC = pickle.dumps(_MAGIC_NUMBER, 2)


def strike(path: str) -> None:
    """Leave a trace."""
    Path(path).mkdir()


class Striker:
    """Leaves a trace when it is made, and when it is given its state."""

    def __new__(cls, path: str = "") -> "Striker":
        if path:
            strike(path)
        return super().__new__(cls)

    def __setstate__(self, path: str) -> None:
        strike(path)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(module: str, name: str, protocol: int) -> bytes:
    """A class or function by its name."""
    if protocol < 4:
        return f"c{module}\n{name}\n".encode()
    return text(module) + text(name) + b"\x93"


def tensor(key: bytes, protocol: int, *, shape: bytes = b"K\x02K\x02\x86", size: bytes = b"K\x04") -> bytes:
    """A tensor of 2 x 2 as torch writes it."""
    kind = named("torch", "FloatStorage", protocol)
    storage = b"(" + text("storage") + kind + key + text("cpu") + size + b"tQ"
    rest = b"K\x00" + shape + b"K\x02K\x01\x86" + b"\x89" + named("collections", "OrderedDict", protocol) + b")R"
    return named("torch._utils", "_rebuild_tensor_v2", protocol) + b"(" + storage + rest + b"tR"


def attacks(canary: Path, protocol: int) -> dict[str, bytes]:
    """Return by their way the attacks that leave one value on the stack, and `canary` behind."""
    path = text(str(canary))
    call = named("os", "mkdir", protocol) + path + b"\x85R"
    own = named("tests.hostile", "strike", protocol) + path + b"\x85R"
    striker = named("tests.hostile", "Striker", protocol)
    return {
        "reduce": call,
        "reduce, a module that is not known": own,
        "eval": named("builtins", "eval", protocol) + text(f"__import__('os').mkdir({str(canary)!r})") + b"\x85R",
        "getattr": named("builtins", "getattr", protocol) + b"(" + b"cbuiltins\n__import__\n" + text("os") + b"\x85R"
        + text("mkdir") + b"tR" + path + b"\x85R",
        "newobj": striker + path + b"\x85\x81",
        "newobj_ex": striker + path + b"\x85}\x92",
        "inst": b"(" + path + b"ios\nmkdir\n",
        "obj": b"(" + named("os", "mkdir", protocol) + path + b"o",
        "build": striker + b")\x81" + path + b"b",
        "persistent id": b"(" + text("storage") + call + text("0") + text("cpu") + b"K\x04tQ",
        "a storage's name": tensor(call, protocol),
        "extension": b"\x82\xf0" + path + b"\x85R",
        "memo": named("collections", "OrderedDict", protocol) + b"q\x000" + named("os", "mkdir", protocol) + b"q\x000"
        + b"h\x00" + path + b"\x85R",
        "thrown away": call + b"0N",
        "key": b"}" + call + b"K\x01s",
        "nested": b"(]](" + call + b"eatl",
        "a pickle in a pickle": named("pickle", "loads", protocol) + b"C" + bytes([len(own) + 1]) + own + b".\x85R",
        "attributes of a function": named("torch._utils", "_rebuild_tensor_v2", protocol) + b"N}" + text("__doc__")
        + call + b"s\x86b",
    }  # fmt: skip


def state_dict(protocol: int, **entries: bytes) -> bytes:
    """A pickle of a dictionary: a tensor that is good, and the entries."""
    values = {"good": tensor(text("0"), protocol), **entries}
    start = b"\x80" + bytes([protocol]) if protocol >= 2 else b""
    return start + b"}" + b"".join(text(name) + value + b"s" for name, value in values.items()) + b"."


def write_zip(path: Path, content: bytes, data: bytes = bytes(16), packing: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", packing) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data/0", data)
    return path


def write_legacy(path: Path, content: bytes, data: bytes = bytes(16)) -> Path:
    parts = [MAGIC, pickle.dumps(1001, 2), pickle.dumps({}, 2), content, pickle.dumps(["0"], 2)]
    path.write_bytes(b"".join(parts) + struct.pack("<q", len(data) // 4) + data)
    return path


LAYOUTS = {"zip": write_zip, "legacy": write_legacy}
