"""Pickles are read as descriptions: harmless ones come out right, strange classes do nothing, code is never run."""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.errors import UserError
from lorasmith.inert_pickle import Inert, InertUnpickler

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
    return InertUnpickler(io.BytesIO(data), "model.ckpt").load()


def of_name(module: str, name: str) -> bytes:
    """A pickle that calls module.name("x") without needing the module to exist here."""
    return f"c{module}\n{name}\n(S'x'\ntR.".encode()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_come_out_as_they_went_in(protocol: int) -> None:
    value = {
        "text": "größer", "number": 3, "real": 0.1, "none": None, "flag": True, "list": [1, [2, (3,)]],
        "set": {1, 2}, "long": 2**70, "dict": OrderedDict(a=1, b=2),
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
