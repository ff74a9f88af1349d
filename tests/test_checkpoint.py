"""Reading without executing, writing whole or not at all."""

import errno
import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.checkpoint import atomic_file, open_checkpoint, synced_folder, write_safetensors, write_torch
from lorasmith.errors import UserError


class Attack:
    """Runs a shell command when unpickled by anything that trusts it."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


class EvalAttack(Attack):
    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.canary)!r}, 'w')",)


class Callback:
    """A harmless class of another package, as Lightning leaves in checkpoints."""

    def __init__(self) -> None:
        self.best = {"loss": 1.0}


TENSORS = {
    "a": torch.arange(12.0).reshape(3, 4),
    "b": torch.arange(6).half(),
    "c": torch.tensor(2.5, dtype=torch.bfloat16),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
}


def read_all(path: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as checkpoint:
        found = {name: checkpoint.tensor(name) for name in checkpoint.names()}
        for name, tensor in found.items():
            assert checkpoint.shape(name) == tuple(tensor.shape) and checkpoint.dtype(name) == tensor.dtype
    return found


def assert_same(found: dict[str, torch.Tensor]) -> None:
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("wrap", [dict, OrderedDict])
def test_torch_files_read_as_torch_reads_them(tmp_path: Path, is_zip: bool, wrap: Any) -> None:
    path = tmp_path / "model.ckpt"
    content = {"state_dict": wrap(TENSORS), "epoch": 3, "callbacks": {"checkpoint": Callback()}}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    assert_same(read_all(path))


def test_safetensors_round_trip_and_equal_bytes(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    write_safetensors(tmp_path / "a.safetensors", tensors, {"z": "1", "a": "2"})
    write_safetensors(tmp_path / "b.safetensors", tensors, {"a": "2", "z": "1"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert_same(read_all(tmp_path / "a.safetensors"))
    write_torch(tmp_path / "a.pt", tensors)
    assert_same(read_all(tmp_path / "a.pt"))


@pytest.mark.parametrize("attack", [Attack, EvalAttack])
@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("nest", [lambda a: a, lambda a: {"state_dict": {"w": a}}, lambda a: ([{"x": (a,)}],)])
def test_an_attack_in_a_torch_file_never_runs(tmp_path: Path, attack: Any, is_zip: bool, nest: Any) -> None:
    canary, path = tmp_path / "canary", tmp_path / "model.ckpt"
    torch.save({**TENSORS, "evil": nest(attack(canary))}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UserError, match="tries to run code"):
        open_checkpoint(path)
    assert not canary.exists()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("attack", [Attack, EvalAttack])
def test_a_bare_pickle_never_runs_whatever_its_protocol(tmp_path: Path, attack: Any, protocol: int) -> None:
    canary, path = tmp_path / "canary", tmp_path / "model.pt"
    path.write_bytes(pickle.dumps({"w": attack(canary)}, protocol))
    with pytest.raises(UserError):
        open_checkpoint(path)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["subprocess\nPopen", "builtins\nexec", "importlib\nimport_module", "torch.hub\nload"])
def test_a_global_written_by_hand_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"\x80\x02c" + name.encode() + b"\n(X\x01\x00\x00\x00xtR.")
    with pytest.raises(UserError, match=name.replace("\n", r"\.")):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        (struct.pack("<Q", 1 << 40) + b"{}", "header"),
        (struct.pack("<Q", 4) + b"{[}]", "header"),
        (b"just some text", "no model file"),
    ],
)
def test_what_is_no_model_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_checkpoint(path)


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_a_truncated_file_is_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"model{ending}"
    if ending == ".ckpt":
        write_torch(path, TENSORS)
    else:
        write_safetensors(path, {"a": TENSORS["a"]}, {})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="again"):
        open_checkpoint(path)


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "modle.safetensors").touch()
    with pytest.raises(UserError, match=r"did you mean .*modle\.safetensors"):
        open_checkpoint(tmp_path / "model.safetensors")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("broken")])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "last.safetensors"
    path.write_text("old")
    expected = UserError if isinstance(error, OSError) else RuntimeError
    with pytest.raises(expected), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_failed_folder_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "step-1"
    with synced_folder(target) as folder:
        (folder / "x").write_text("old")
    with pytest.raises(UserError, match="disk is full"), synced_folder(target) as folder:
        (folder / "x").write_text("new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (target / "x").read_text() == "old" and list(tmp_path.iterdir()) == [target]
