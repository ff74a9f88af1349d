"""Damages files of each kind that is read, and looks whether the readers keep their promise: the file is read, or a
UserError says why not; nothing else is raised, and nothing of the file is run.

    python tools/fuzz_readers.py --seconds 300

With atheris (the extra `fuzz`) the damage is led by what it reaches in the code, else it is drawn at random.
"""

import argparse
import importlib.util
import json
import os
import random
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import safetensors.torch
import torch

from lorasmith.checkpoint import open_checkpoint
from lorasmith.errors import UserError
from lorasmith.formats import kohya
from lorasmith.formats.dialects import read_any

NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**33, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "shutil.rmtree",
             "os.remove", "os.mkdir", "pty.spawn", "webbrowser.open")  # fmt: skip
LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
Kind = tuple[bytes, Callable[[bytes], bytes]]  # what is damaged -> the file that it is in


def tensors() -> dict[str, torch.Tensor]:
    """Return the smallest LoRA."""
    down, up = torch.arange(8.0).reshape(2, 4).half(), torch.arange(6.0).reshape(3, 2).half()
    return {f"{LAYER}.lora_down.weight": down, f"{LAYER}.lora_up.weight": up, f"{LAYER}.alpha": torch.tensor(1.0)}


def kinds() -> dict[str, Kind]:
    """Return a sound file of each kind; of those with a checksum or a length, its inside too."""
    safe = safetensors.torch.save(tensors(), {"ss_steps": "1"})
    colons = {"unet:0:up": torch.ones(3, 2), "unet:0:down": torch.ones(2, 4)}
    length = struct.unpack("<Q", safe[:8])[0]
    archive, old = saved({"state_dict": tensors()}), saved(tensors(), is_zip=False)
    as_list = saved([torch.ones(3, 2), torch.ones(2, 4)])
    return {
        "safetensors": (safe, bytes),
        "header": (safe[8 : 8 + length], lambda text: struct.pack("<Q", len(text)) + text + safe[8 + length :]),
        "cloneofsimo": (safetensors.torch.save(colons), bytes),
        "archive": (archive, bytes),
        "pickle": (pickle_in(archive), lambda data: with_pickle(archive, data)),
        "list": (pickle_in(as_list), lambda data: with_pickle(as_list, data)),
        "old": (old, bytes),
    }


def saved(content: object, *, is_zip: bool = True) -> bytes:
    file = BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=is_zip)
    return file.getvalue()


def pickle_in(archive: bytes) -> bytes:
    with zipfile.ZipFile(BytesIO(archive)) as reading:
        return reading.read(next(name for name in reading.namelist() if name.endswith("data.pkl")))


def with_pickle(archive: bytes, data: bytes) -> bytes:
    """Return an archive with another pickle in it."""
    file = BytesIO()
    with zipfile.ZipFile(BytesIO(archive)) as reading, zipfile.ZipFile(file, "w") as writing:
        for name in reading.namelist():
            writing.writestr(name, data if name.endswith("data.pkl") else reading.read(name))
    return file.getvalue()


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Return bytes with a few changes: flipped, cut out, put in, repeated, or a number that is often too large."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(changed) + 1)
        end = min(len(changed), at + draw.choice((1, 1, 4, 8, 64)))
        number = draw.choice(NUMBERS)
        changed[at:end] = draw.choice((
            draw.randbytes(end - at),
            draw.randbytes(draw.choice((1, 4, 16))),
            b"",
            changed[at:end] * 2,
            struct.pack("<Q", number)[: end - at],
            str(number).encode(),
        ))  # fmt: skip
    return bytes(changed[: draw.randrange(len(changed) + 1)] if draw.random() < 0.1 else changed)


def read(path: Path) -> None:
    """Read a file in every way that there is."""

    def whole() -> None:
        with open_checkpoint(path) as checkpoint:
            for name in checkpoint.names():
                found = checkpoint.tensor(name)
                assert (tuple(found.shape), found.dtype) == (checkpoint.shape(name), checkpoint.dtype(name)), name

    for way in (whole, lambda: kohya.read(path), lambda: read_any(path)):
        try:
            way()
        except UserError as error:
            if len(str(error)) > 2000 or not all(line.isprintable() for line in str(error).splitlines()):
                raise AssertionError("a message that cannot be shown") from error


def forbid(event: str, _arguments: object) -> None:
    """Stop the program, whatever catches exceptions, if anything is run; called by Python for each such thing."""
    if event in FORBIDDEN:
        traceback.print_stack()
        print(f"a file had something run: {event}", file=sys.stderr, flush=True)
        os._exit(3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="another one draws other damage")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-found"), help="a folder for files that break a reader")
    options = parser.parse_args()
    sound = kinds()
    folder = Path(tempfile.mkdtemp())
    read_each = {kind: folder / kind for kind in sound}
    for kind, (data, wrap) in sound.items():
        read_each[kind].write_bytes(wrap(data))
        read(read_each[kind])  # imports what is imported late
    options.keep.mkdir(parents=True, exist_ok=True)

    def attempt(kind: str, data: bytes) -> None:
        path = read_each[kind]
        path.write_bytes(sound[kind][1](data))
        try:
            read(path)
        except BaseException:
            place = options.keep / f"{kind}-{abs(hash(data)):x}"
            place.write_bytes(path.read_bytes())
            print(f"{place}:", file=sys.stderr)
            raise

    if importlib.util.find_spec("atheris"):
        corpus = folder / "corpus"
        corpus.mkdir()
        for number, (kind, (data, _)) in enumerate(sound.items()):
            (corpus / kind).write_bytes(bytes([number]) + data)
        sys.addaudithook(forbid)
        return fuzz_with_atheris(options.seconds, corpus, list(sound), attempt)
    print("atheris is not installed (pip install lorasmith[fuzz]): the damage is drawn at random.")
    sys.addaudithook(forbid)
    return fuzz_at_random(options.seconds, options.seed, sound, attempt)


def fuzz_with_atheris(seconds: int, corpus: Path, names: list[str], attempt: Callable[[str, bytes], None]) -> int:
    import atheris  # type: ignore[import-not-found]

    atheris.instrument_all()  # type: ignore[attr-defined]
    atheris.Setup(
        [sys.argv[0], f"-max_total_time={seconds}", "-max_len=8192", str(corpus)],
        lambda data: attempt(names[data[0] % len(names)], data[1:]) if data else None,
    )
    atheris.Fuzz()
    return 0


def fuzz_at_random(seconds: int, seed: int, sound: dict[str, Kind], attempt: Callable[[str, bytes], None]) -> int:
    draw, end = random.Random(seed), time.monotonic() + seconds
    count, found = 0, dict.fromkeys(sound, 0)
    while time.monotonic() < end:
        kind = draw.choice(list(sound))
        try:
            attempt(kind, damaged(sound[kind][0], draw))
        except Exception:
            traceback.print_exc()
            found[kind] += 1
        count += 1
    print(json.dumps({"files": count, "broke a reader": found}))
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
