"""Pickles are read as descriptions: harmless ones come out right, strange classes do nothing, code is never run."""

import copyreg
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith import inert_pickle
from lorasmith.errors import UserError
from lorasmith.inert_pickle import Inert, InertUnpickler, TensorDescription
from tests import hostile

ran: list[str] = []


def run_me(word: str) -> None:
    ran.append(word)


class Calls:
    """Pickles into a call of a function by name."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


class Callback:
    """A training callback as Lightning leaves it in checkpoints."""

    def __init__(self) -> None:
        self.state = {"best": 1.5}
        self.history = [1, 2]

    def __setstate__(self, state: Any) -> None:
        run_me("set state")


def read(data: bytes) -> Any:
    return InertUnpickler(io.BytesIO(data), "model.ckpt", len(data)).load()


def of_name(module: str, name: str) -> bytes:
    """A pickle that calls module.name("x") without needing the module to exist here."""
    return f"c{module}\n{name}\n(S'x'\ntR.".encode()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_come_out_as_they_went_in(protocol: int) -> None:
    value = {
        "text": "größer", "number": 3, "real": 0.1, "none": None, "flag": True, "list": [1, [2, (3,)]],
        "long": 2**70, "dict": OrderedDict(a=1, b=2),
    }  # fmt: skip
    assert read(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"), ("posix", "system"), ("nt", "system"), ("subprocess", "Popen"), ("builtins", "eval"),
        ("builtins", "exec"), ("__builtin__", "getattr"), ("builtins", "__import__"), ("importlib", "import_module"),
        ("runpy", "run_path"), ("torch", "load"), ("torch.hub", "load"), ("pickle", "loads"),
        ("operator", "attrgetter"), ("functools", "partial"), ("os.path", "join"), ("shutil", "rmtree"),
        ("numpy", "load"), ("socket", "socket"),
    ],
)  # fmt: skip
def test_a_pickle_that_wants_to_run_code_is_refused_by_name(module: str, name: str) -> None:
    with pytest.raises(UserError) as error:
        read(of_name(module, name))
    assert f"{module}.{name}" in str(error.value) and "model.ckpt" in str(error.value)
    assert "Nothing of it was run" in str(error.value)


@pytest.mark.parametrize(
    ("module", "name"),
    [("some.library", "Callback"), ("pytorch_lightning.callbacks", "ModelCheckpoint"), ("tests", "nothing"),
     ("platform", "popen"), (__name__, "run_me"), ("torch.nn", "Linear"), ("numpy", "ndarray"), ("", ""), ("x", "a.b")],
)  # fmt: skip
def test_a_name_that_is_not_known_becomes_something_that_does_nothing(module: str, name: str) -> None:
    found = read(of_name(module, name))
    assert isinstance(found, Inert)
    assert ran == []


def test_nothing_that_is_really_there_is_called(tmp_path: Path) -> None:
    target = tmp_path / "written"
    with pytest.raises(UserError):
        read(pickle.dumps(Calls(open, str(target), "w")))
    assert isinstance(read(pickle.dumps({"a": Calls(run_me, "called")}))["a"], Inert)
    assert ran == [] and not target.exists()


def test_values_beside_a_strange_object_are_still_read() -> None:
    content = read(pickle.dumps({"callbacks": [Callback(), Callback()], "step": 7}))
    assert content["step"] == 7
    assert all(isinstance(callback, Inert) for callback in content["callbacks"])
    assert ran == []


def test_the_result_of_a_strange_call_can_be_used_in_the_pickle_and_still_does_nothing() -> None:
    filled = b"cstrange\nThing\n(tR(S'key'\nI1\nS'other'\nI2\nu."  # items are set on it
    appended = b"cstrange\nThing\n(tR(I1\nI2\ne."  # items are appended to it
    built = b"cstrange\nThing\n(tR(dS'a'\nI1\nsb."  # its attributes are set
    called = b"cstrange\nThing\n(tR(I1\ntR."  # it is called
    for data in (filled, appended, built, called):
        assert isinstance(read(data), Inert)


def test_tensors_are_described_and_not_read() -> None:
    file = io.BytesIO()
    torch.save({"weight": torch.arange(12.0).view(3, 4).T, "half": torch.ones(5).half()}, file)
    with zipfile.ZipFile(file) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        content = read(archive.read(name))
    assert (content["weight"].shape, content["weight"].stride) == ((4, 3), (1, 4))
    assert (content["weight"].storage.dtype, content["weight"].storage.size) == (torch.float32, 12)
    assert (content["half"].shape, content["half"].storage.dtype) == ((5,), torch.float16)


@pytest.mark.parametrize("pid", [("storage",), "x", ("storage", 1, "key", "cpu", 3)])
def test_a_reference_that_is_no_storage_is_an_error(pid: object) -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return pid if obj == "here" else None

    file = io.BytesIO()
    Pickler(file).dump({"weight": "here"})
    with pytest.raises(pickle.UnpicklingError, match="no tensor storage"):
        read(file.getvalue())


@pytest.fixture
def extension() -> Any:
    """A number for os.mkdir, in the list of such numbers that all unpicklers share."""
    name = os.mkdir.__module__, "mkdir"
    copyreg.add_extension(*name, 240)
    yield
    copyreg.remove_extension(*name, 240)
    copyreg._extension_cache.clear()  # type: ignore[attr-defined]


class Trusting(pickle._Unpickler):
    def persistent_load(self, pid: Any) -> Any:
        return torch.storage.TypedStorage(wrap_storage=torch.UntypedStorage(16), dtype=torch.float32, _internal=True)


WAYS = list(hostile.attacks(Path(), 2))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("way", WAYS)
def test_no_attack_runs_in_any_protocol(tmp_path: Path, extension: None, way: str, protocol: int) -> None:
    canary = tmp_path / "canary"
    data = hostile.state_dict(protocol, evil=hostile.attacks(canary, protocol)[way])
    try:
        content = read(data)
    except (UserError, pickle.UnpicklingError) as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(content["good"], TensorDescription)
    assert not canary.exists()
    with suppress(Exception):
        Trusting(io.BytesIO(data), encoding="latin-1").load()
    assert canary.exists(), "it was no attack"


def test_a_pickle_cannot_change_its_reader() -> None:
    function = inert_pickle._rebuild_tensor
    before = dict(vars(function)), function.__defaults__, function.__doc__
    name = hostile.named("torch._utils", "_rebuild_tensor_v2", 2)
    state = b"}" + hostile.text("x") + b"K\x01s" + b"}" + hostile.text("__defaults__") + b"K\x01\x85s\x86"
    read(b"\x80\x02" + name + state + b"b.")
    assert (dict(vars(function)), function.__defaults__, function.__doc__) == before
    storage = hostile.named("torch", "FloatStorage", 2) + b"}" + hostile.text("dtype") + b"K\x01sb"
    key = b"(" + hostile.text("storage") + storage + hostile.text("0") + hostile.text("cpu") + b"K\x04tQ."
    assert read(b"\x80\x02" + key).dtype is torch.float32


def doubled(start: bytes, times: int) -> bytes:
    """A tuple of itself twice, again and again: 2^times leaves in a few bytes."""
    return start + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(times))


LARGE = {
    "a long frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b".",
    "long bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 34) + b"x.",
    "a long array of bytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 33) + b"x.",
    "a long text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 34) + b"x.",
    "a long number": b"\x80\x02\x8b" + struct.pack("<i", (1 << 31) - 1) + b"x.",
    "a number in letters": b"L" + b"9" * 100_000 + b"L\n.",
    "a far place in the memo": b"\x80\x02Nr" + struct.pack("<I", (1 << 32) - 1) + b".",
    "a tuple doubled, as a key": b"\x80\x02}" + doubled(b"K\x01\x85", 60) + b"K\x01s.",
    "a tuple doubled, in a set": b"\x80\x04\x8f(" + doubled(b"K\x01\x85", 60) + b"\x90.",
    "a tuple doubled, in a frozen set": b"\x80\x04(" + doubled(b"K\x01\x85", 60) + b"\x91.",
    "a tuple doubled, as a dictionary": b"\x80\x02(" + doubled(b"K\x01\x85", 60) + b"K\x01d.",
    "a tuple doubled, as text": b"\x80\x02cbuiltins\nstr\n" + doubled(b"K\x01\x85", 60) + b"\x85R.",
    "a tuple doubled, as a storage": b"\x80\x02" + doubled(b"K\x01\x85", 60) + b"Q.",
    "a tuple doubled, as a storage's name": b"\x80\x02" + hostile.tensor(doubled(b"K\x01\x85", 60), 2) + b".",
    "a range": b"\x80\x02cbuiltins\nlist\ncbuiltins\nrange\nJ\xff\xff\xff\x7f\x85R\x85R.",
    "zeros": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "a list copied": b"\x80\x02](" + b"K\x01" * 5000 + b"eq\x000" + b"cbuiltins\nlist\nh\x00\x85R" * 5000 + b".",
    "a size copied": b"\x80\x02(" + b"K\x01" * 5000 + b"tq\x000" + b"ctorch\nSize\nh\x00\x85R" * 5000 + b".",
    "many classes": b"\x80\x02" + b"ca\nb\n" * 20_000 + b".",
    "deep": b"\x80\x02" + b"N" + b"\x85" * 200_000 + b".",
    "deep, as a key": b"\x80\x02}N" + b"\x85" * 200_000 + b"K\x01s.",
    "marks": b"\x80\x02" + b"(" * 100_000 + b".",
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_memory_stays_in_proportion_to_the_pickle(name: str) -> None:
    data = LARGE[name]
    tracemalloc.start()
    try:
        with suppress(Exception):
            read(data)
        assert tracemalloc.get_traced_memory()[1] < 200_000 + 120 * len(data)
    finally:
        tracemalloc.stop()


SIZES = {
    "negative": b"J\xff\xff\xff\xffK\x02\x86", "larger than any": b"\x8a\x09" + b"\xff" * 8 + b"\x00\x85",
    "a text": hostile.text("22"), "texts": hostile.text("2") + b"\x85", "one too few": b"K\x04\x85",
    "too many": b"(" + b"K\x01" * 65 + b"t", "none": b"N",
}  # fmt: skip


@pytest.mark.parametrize("shape", SIZES)
def test_a_shape_that_is_none(shape: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match="a tensor "):
        read(hostile.state_dict(2, bad=hostile.tensor(hostile.text("0"), 2, shape=SIZES[shape])))


def test_two_entries_of_one_name_are_refused() -> None:
    with pytest.raises(pickle.UnpicklingError, match="two entries are called twice"):
        read(b"\x80\x02}" + (hostile.text("twice") + b"K\x01s") * 2 + b".")
