"""Reading without executing, writing whole or not at all."""

import errno
import io
import os
import pickle
import shutil
import struct
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.checkpoint import atomic_file, open_checkpoint, synced_folder, write_safetensors, write_torch
from lorasmith.errors import UserError
from tests import hostile


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


def test_a_folder_is_whole_when_the_deletion_of_the_older_one_is_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    with synced_folder(target) as folder:
        (folder / "x").write_text("old")

    def cut(path: Path, **_: object) -> None:
        if path.exists():
            (path / "x").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", cut)
    with pytest.raises(KeyboardInterrupt), synced_folder(target) as folder:
        (folder / "x").write_text("new")
    assert (target / "x").read_text() == "new"


def header(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A .safetensors file with this header."""
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: str = "[2]", begin: int = 0, end: int = 8, dtype: str = '"F32"', name: str = "a") -> bytes:
    return f'{{"{name}":{{"dtype":{dtype},"shape":{shape},"data_offsets":[{begin},{end}]}}}}'.encode()


BROKEN = {
    "a header of 100 MB": header(b"{}", length=100_000_001),
    "a header of 2^63": header(b"{}", length=1 << 63),
    "a header of 2^64 - 1": header(b"{}", length=(1 << 64) - 1),
    "no UTF-8": header(b'{"\xff\xfe": 1}'),
    "nested 100,000 times": header(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "lists 100,000 deep": header(b'{"a":' + b"[" * 100_000),
    "a list": header(b"{[]}"),
    "a number for an entry": header(b'{"a":1}'),
    "metadata of numbers": header(b'{"__metadata__":{"a":1}}'),
    "two entries of one name": header(entry()[:-1] + b"," + entry()[1:], bytes(8)),
    "two tensors in one place": header(entry()[:-1] + b"," + entry(name="b")[1:], bytes(8)),
    "a gap": header(entry(begin=8, end=16), bytes(16)),
    "offsets below 0": header(entry(begin=-8, end=0), b""),
    "offsets backwards": header(entry(begin=8, end=0), bytes(8)),
    "offsets over 2^64": header(entry(end=1 << 70), bytes(8)),
    "offsets behind the end": header(entry(end=800), bytes(8)),
    "offsets in halves": header(entry().replace(b",8]", b",8.0]"), bytes(8)),
    "a number too many": header(entry("[3]"), bytes(8)),
    "sides that multiply to 2^64 + 2": header(entry("[4294967296,4294967296,2]"), bytes(8)),
    "a side of 2^70": header(entry("[1180591620717411303424,0]", end=0), b""),
    "a thousand sides": header(entry(f"[{','.join('1' * 1000)}]", end=4), bytes(4)),
    "a side that is text": header(entry('["2"]'), bytes(8)),
    "a type not known": header(entry(dtype='"F99"'), bytes(8)),
    "a type that is a number": header(entry(dtype="1"), bytes(8)),
    "types that are a number and a text": header(entry(dtype="1")[:-1] + b"," + entry(name="b")[1:], bytes(8)),
    "a type that is a list": header(entry(dtype="[]"), bytes(8)),
    "a name with NUL": header(entry(name="a\\u0000b"), bytes(8)),
    "a name that moves the cursor": header(entry(name="a\\u001b[2J"), bytes(8)),
    "half a letter for a name": header(entry(name="\\ud800"), bytes(8)),
    "a name of 1 MB": header(entry(name="a" * 1_000_000), bytes(8)),
    "two entries of 1 MB": header(b'{"' + b"a" * 1_000_000 + b'":1,"' + b"a" * 1_000_000 + b'":1}'),
}


def read_within(path: Path, limit: int) -> None:
    """Read everything, and see that it is refused in one sentence and within this memory."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as error:
            read_all(path)
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_header_is_told(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(BROKEN[name])
    read_within(path, 1_000_000 + 100 * len(BROKEN[name]))


SAFE = {"zero": torch.empty(0, 3), "single": torch.tensor(2.0), "nan": torch.tensor([float("nan"), float("inf")])}


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_empty_single_and_infinite_tensors_are_read_as_they_are(tmp_path: Path, form: str) -> None:
    path = tmp_path / "model.bin"
    if form == "safetensors":
        write_safetensors(path, SAFE, {})
    else:
        torch.save(SAFE, path, _use_new_zipfile_serialization=form == "zip")
    found = read_all(path)
    for name, tensor in SAFE.items():
        assert found[name].shape == tensor.shape and torch.equal(found[name].nan_to_num(), tensor.nan_to_num())


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_a_file_cut_anywhere_is_told(tmp_path: Path, form: str) -> None:
    path = tmp_path / "model.bin"
    if form == "safetensors":
        write_safetensors(path, {"a": TENSORS["a"]}, {})
    else:
        hostile.LAYOUTS[form](path, hostile.state_dict(2))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            read_all(path)


def zip_of(*entries: tuple[str, bytes], packing: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, data in entries:
            archive.writestr(name, data)
    return file.getvalue()


def lying(data: bytes, name: bytes, **sizes: int) -> bytes:
    """An archive whose list says something else of an entry: its `packed` and `unpacked` size, or where it `begins`."""
    changed = bytearray(data)
    at = changed.rindex(b"PK\x01\x02", 0, changed.rindex(name))
    for what, value in sizes.items():
        struct.pack_into("<I", changed, at + {"packed": 20, "unpacked": 24, "begins": 42}[what], value)
    return bytes(changed)


GOOD = hostile.state_dict(2)
PICKLE, DATA = ("archive/data.pkl", GOOD), ("archive/data/0", bytes(16))
MANY = b"}(" + b"".join(hostile.text(str(n)) + b"h\x01" for n in range(2000)) + b"u."
ARCHIVES = {
    "packed zeros": zip_of(PICKLE, ("archive/data/0", bytes(30_000_000)), packing=zipfile.ZIP_DEFLATED),
    "a packed pickle": zip_of(("archive/data.pkl", b"]0" * 10_000_000 + b"."), DATA, packing=zipfile.ZIP_DEFLATED),
    "more than it says": lying(
        zip_of(PICKLE, ("archive/data/0", bytes(30_000_000)), packing=zipfile.ZIP_DEFLATED), b"archive/data/0",
        unpacked=16,
    ),
    "a claim of 4 GB": lying(zip_of(PICKLE, DATA), b"archive/data/0", unpacked=0xFFFFFFF0),
    "an entry behind the end": lying(zip_of(PICKLE, DATA), b"archive/data/0", begins=0x7FFFFFFF),
    "an entry that is another": lying(zip_of(PICKLE, DATA), b"archive/data/0", begins=0),
    "too short a storage": zip_of(PICKLE, ("archive/data/0", bytes(12))),
    "no storage": zip_of(PICKLE),
    "two entries of one name": zip_of(PICKLE, DATA, DATA),
    "another way of packing": zip_of(PICKLE, DATA, packing=zipfile.ZIP_BZIP2),
    "no model": zip_of(("readme.txt", b"")),
    "one storage, many names": zip_of(
        ("archive/data.pkl", b"\x80\x02" + hostile.tensor(hostile.text("0"), 2, shape=b"M\xe8\x03M\xe8\x03\x86",
                                                          size=b"J\x40\x42\x0f\x00") + b"q\x010" + MANY),
        ("archive/data/0", bytes(4_000_000)),
    ),
    "a dictionary in itself": zip_of(
        ("archive/data.pkl", b"}q\x01" + hostile.text("state_dict") + b"h\x01s" + b"."), DATA),
    "dictionaries in dictionaries": zip_of(
        ("archive/data.pkl", b"}" + b"".join(
            b"q" + bytes([n]) + b"0}" + b"".join(hostile.text(key) + b"h" + bytes([n]) + b"s" for key in
                                               ("state_dict", "model", "module")) for n in range(100)) + b"."), DATA),
    "a name with NUL": zip_of(
        ("archive/data.pkl", b"}" + hostile.text("a\0") + hostile.tensor(hostile.text("0"), 2) + b"s."), DATA),
    "a storage above the folder": zip_of(
        ("archive/data.pkl", b"}" + hostile.text("a") + hostile.tensor(hostile.text("../../0"), 2) + b"s."), DATA),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_broken_archive_is_told(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(ARCHIVES[name])
    read_within(path, 2_000_000 + 20 * len(ARCHIVES[name]))


@pytest.mark.parametrize("size", [b"K\x03", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f"])
@pytest.mark.parametrize("count", [3, -1, 1 << 40, (1 << 63) - 1])
def test_an_old_file_whose_storage_has_another_size_than_said(tmp_path: Path, size: bytes, count: int) -> None:
    path = tmp_path / "model.pt"
    tensor = hostile.tensor(hostile.text("0"), 2, size=size)
    hostile.write_legacy(path, b"\x80\x02}" + hostile.text("a") + tensor + b"s.")
    data = path.read_bytes()
    path.write_bytes(data[:-24] + struct.pack("<q", count) + data[-16:])
    read_within(path, 2_000_000)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"weight_map": {"a": [], "b": 1}}', '{"weight_map": {"a": "../../x.bin"}}', "\xff"]
)
def test_a_broken_list_of_parts_is_told(tmp_path: Path, text: str) -> None:
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.parent.mkdir()
    index.write_text(text, encoding="latin-1")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(UserError, match="get the model folder anew"):
        open_checkpoint(tmp_path)
