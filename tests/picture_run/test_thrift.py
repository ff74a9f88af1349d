"""Drawing with less memory each time it runs out, up to an end."""

import weakref
from typing import Any

import pytest
import torch

from lorasmith.config import GenerateConfig
from lorasmith.picture_run import thrift
from lorasmith.picture_run.thrift import Thrift


class _Vae:
    """Stands on a device that there need not be."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def parameters(self) -> Any:
        return iter([self])

    def to(self, device: torch.device) -> None:
        self.device = device


class _Model:
    def __init__(self, device: str = "cuda") -> None:
        self.device, self.vae = torch.device(device), _Vae(device)


@pytest.fixture(autouse=True)
def attentions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(thrift, "set_attention", lambda _, kind, nets: found.extend([kind, *nets]))
    return found


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_each_time_less_is_used_and_told_until_nothing_is_left(
    attentions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = _Model()
    room, sizes = Thrift(GenerateConfig(batch_size=100), model, ["net"]), []  # type: ignore[list-item]
    for _ in range(4):  # seven pictures, of which all are tried at once
        assert room.tried(min(7, room.batch_size), out_of_memory) is None
        sizes.append(room.batch_size)
    assert sizes == [3, 1, 1, 1] and attentions == ["sliced", "net"] and model.vae.device.type == "cpu"
    told = capsys.readouterr().out.splitlines()
    assert [line.partition("with ")[2] for line in told] == [
        "--batch-size 3.", "--batch-size 1.", "--attention sliced.", "the VAE on the CPU, which is slower."
    ]  # fmt: skip
    with pytest.raises(torch.OutOfMemoryError):
        room.tried(1, out_of_memory)


def test_what_is_saved_already_is_not_tried_again(attentions: list[str]) -> None:
    room = Thrift(GenerateConfig(attention="sliced"), _Model("cpu"))  # type: ignore[arg-type]
    with pytest.raises(torch.OutOfMemoryError):
        room.tried(1, out_of_memory)
    assert not attentions


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("shapes differ"), KeyboardInterrupt()])
def test_other_errors_are_none_of_its_business(error: BaseException) -> None:
    def work() -> None:
        raise error

    room = Thrift(GenerateConfig(batch_size=4), _Model())  # type: ignore[arg-type]
    with pytest.raises(type(error)):
        room.tried(4, work)
    assert room.batch_size == 4


def test_what_was_computed_is_gone_before_it_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error holds the frames that it went through, and these hold what fills the memory."""
    held: list[weakref.ref[torch.Tensor]] = []

    def work() -> None:
        large = torch.zeros(8)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError

    def release() -> None:
        assert held[0]() is None

    monkeypatch.setattr(thrift, "release_memory", release)
    assert Thrift(GenerateConfig(batch_size=2), _Model()).tried(2, work) is None  # type: ignore[arg-type]
