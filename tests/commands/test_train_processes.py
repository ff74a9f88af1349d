"""`lorasmith train` over two processes (gloo on the CPU): the same weights as one, and all end together.

The processes are started by hand, as a launcher does: forked from a server that has imported everything once.
"""

import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from lorasmith import training
from lorasmith.cli import main
from lorasmith.data.dataset import Batch, Dataset
from lorasmith.errors import UserError
from tests.tiny import write_tiny

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no fork and cannot send signals")
COMMON = [
    "--resolution", "64", "--no-before-after", "--no-tensorboard", "--rank", "2", "--learning-rate", "0.001",
    "--device", "cpu", "--save-precision", "float",
]  # fmt: skip
STEPS = ["--steps", "3", "--batch-size", "1", "--precision", "fp32", "--workers", "0"]
BOTH = (0, 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("base") / "tiny.safetensors", "sd1")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures") / "1_sks thing", 3).parent


def make_pictures(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = random.Random(number).randbytes(80 * 64 * 3)
        Image.frombytes("RGB", (80, 64), pixels).save(folder / f"{number}.png")
    return folder


def command(base: Path, pictures: Path, output: Path, *more: str) -> list[str]:
    return ["train", "--base", str(base), "--images", str(pictures), "--output", str(output), *COMMON, *more]


@dataclass(frozen=True)
class Event:
    """What happens in one process when it reads the pictures of a step, which counts from 0, or has run the model."""

    process: int
    step: int
    signal_number: int | None = None
    error: BaseException | None = None
    is_amid_work: bool = False  # after the model's forward pass

    def happen(self) -> None:
        if self.signal_number is not None:
            os.kill(os.getpid(), self.signal_number)
        if self.error is not None:
            raise self.error


@dataclass(frozen=True)
class Ended:
    """How two processes ended: their exit codes and what they wrote."""

    codes: list[int | None]
    outputs: list[str]
    errors: list[str]


def run_two(
    arguments: Sequence[str],
    logs: Path,
    *events: Event,
    folders: tuple[Path, Path] = (Path(), Path()),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Ended:
    """Run the command line in two processes, each in a folder, and wait for both."""
    logs.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "lorasmith.commands.train", "accelerate"])
    port = free_port()
    places = [folder.resolve() for folder in folders]
    own = dict(environment)
    processes = [
        context.Process(target=_one, args=(list(arguments), i, port, logs, events, places[i], own)) for i in BOTH
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    outputs, errors = ([(logs / f"{i}.{name}").read_text() for i in BOTH] for name in ("out", "err"))
    return Ended([process.exitcode for process in processes], outputs, errors)


def _one(
    arguments: list[str],
    index: int,
    port: int,
    logs: Path,
    events: Sequence[Event],
    folder: Path,
    environment: dict[str, str],
) -> None:
    """Be one of the processes, as a launcher would have started it."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(logs / f"{index}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(
        RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), SOURCE_DATE_EPOCH="1700000000", OMP_NUM_THREADS="1",
        LORASMITH_CACHE=str(logs / "cache"), **environment,
    )  # fmt: skip
    torch.set_num_threads(1)
    os.chdir(folder)
    read = Dataset.batch

    def read_with_events(self: Dataset, step: int, process_index: int) -> list[Batch]:
        for event in events:
            if (event.process, event.step) == (process_index, step) and not event.is_amid_work:
                event.happen()
        return read(self, step, process_index)

    accumulate, count = training.weighted_loss, itertools.count()

    def lose_with_events(*given: Any) -> Tensor:
        loss, step = accumulate(*given), next(count)
        for event in events:
            if (event.process, event.step) == (index, step) and event.is_amid_work:
                event.happen()
        return loss

    Dataset.batch = read_with_events  # for this run only, after which the process ends
    training.weighted_loss = lose_with_events
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "logs" / "loss.jsonl").read_text().splitlines()]


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the norm of the difference over the norm of `b`."""
    assert a.keys() == b.keys()
    squares = sum(float((a[name] - b[name]).double().square().sum()) for name in b)
    return (squares / sum(float(tensor.double().square().sum()) for tensor in b.values())) ** 0.5


def learned(output: Path) -> dict[str, Tensor]:
    """Return the half of the LoRA that begins at zero: all of it was learned."""
    return {name: t for name, t in load_file(output / "last.safetensors").items() if name.endswith("lora_up.weight")}


@pytest.fixture(autouse=True)
def fixed_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


@pytest.mark.parametrize(
    ("options", "has_prior", "precision"),
    [
        (["--epochs", "2"], False, "fp32"),  # three pictures: every second step has a padding sample
        (["--epochs", "1", "--gradient-accumulation", "2", "--no-cache-latents", "--color"], True, "fp32"),
        pytest.param(["--epochs", "2"], False, "bf16", marks=pytest.mark.slow),
    ],
)
def test_two_processes_of_batch_one_train_as_one_of_batch_two(
    base: Path, pictures: Path, tmp_path: Path, options: list[str], has_prior: bool, precision: str
) -> None:
    if has_prior:
        make_pictures(tmp_path / "prior" / "1_thing", 2)
        options = [*options, "--regularization", str(tmp_path / "prior"), "--prior-loss-weight", "0.3"]
    one, two = tmp_path / "one", tmp_path / "two"
    options = [*options, "--precision", precision]
    assert main(command(base, pictures, one, *options, "--batch-size", "2")) == 0
    ended = run_two(command(base, pictures, two, *options, "--batch-size", "1"), tmp_path / "logs")
    assert ended.codes == [0, 0], ended.errors
    is_cached = "--no-cache-latents" not in options
    assert ("caching latents: 2 to do" in ended.outputs[0]) == is_cached  # the other one does the third
    loss_tolerance, tolerance = {"fp32": (1e-5, 1e-3), "bf16": (1e-2, 0.1)}[precision]
    assert losses(two) == pytest.approx(losses(one), rel=loss_tolerance)
    assert distance(learned(two), learned(one)) < tolerance


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([(1, signal.SIGINT)], 130),  # process 0, which saves, learns of it from the other
        pytest.param([(1, signal.SIGTERM)], 143, marks=pytest.mark.slow),
        pytest.param([(0, signal.SIGTERM), (1, signal.SIGTERM)], 143, marks=pytest.mark.slow),
        pytest.param([(0, signal.SIGINT), (1, signal.SIGTERM)], 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_both_after_the_same_step_and_they_go_on_to_the_same_bytes(
    base: Path, pictures: Path, tmp_path: Path, whole: bytes, signals: list[tuple[int, int]], code: int
) -> None:
    cut = tmp_path / "cut"
    events = [Event(process, step=1, signal_number=number) for process, number in signals]
    ended = run_two(command(base, pictures, cut, *STEPS), tmp_path / "logs", *events)
    assert ended.codes == [code, code], ended.errors
    assert "stopped after step 2 of 3" in ended.outputs[0]
    assert [path.name for path in (cut / "states").iterdir()] == ["step-00000002"]
    answer = "stopping after this step, then saving; once more ends at once, without saving"
    told = answer if 0 in dict(signals) else ""
    assert (ended.outputs[1], [error.strip() for error in ended.errors]) == ("", [told, ""])
    ended = run_two(["train", "--resume", str(cut)], tmp_path / "logs")
    assert ended.codes == [0, 0], ended.errors
    assert (cut / "last.safetensors").read_bytes() == whole


@pytest.fixture(scope="module")
def whole(base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The LoRA of an uninterrupted run over two processes."""
    folder = tmp_path_factory.mktemp("whole")
    ended = run_two(command(base, pictures, folder / "out", *STEPS), folder / "logs")
    assert ended.codes == [0, 0], ended.errors
    return (folder / "out" / "last.safetensors").read_bytes()


def test_a_mistake_ends_both_with_one_message(base: Path, pictures: Path, tmp_path: Path) -> None:
    too_fast = ["--learning-rate", "1e30", "--max-grad-norm", "0"]
    ended = run_two(command(base, pictures, tmp_path / "out", *STEPS, *too_fast), tmp_path / "logs")
    assert ended.codes == [2, 2]
    assert ended.errors[0].count("the loss became") == 1 and ended.errors[1] == ""
    assert not (tmp_path / "out" / "last.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rnak", "3"], "there is no option --rnak"),  # seen by each before they know of each other
        (["--rank", "4000"], "rank 4000 is larger"),
        pytest.param(["--resume", "nowhere"], "--resume nowhere: there is no such folder", marks=pytest.mark.slow),
        pytest.param(["--images", "nowhere"], "there is no folder nowhere", marks=pytest.mark.slow),
    ],
)
def test_a_mistake_before_the_first_step_is_told_once(
    base: Path, pictures: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    ended = run_two(command(base, pictures, tmp_path / "out", *STEPS, *options), tmp_path / "logs")
    assert ended.codes == [2, 2]
    assert ended.errors[0].startswith(f"lorasmith: {message}") and ended.errors[0].count("\n") == 1
    assert (ended.outputs, ended.errors[1]) == (["", ""], "")


@pytest.mark.parametrize(
    ("process", "error", "codes", "message"),
    [
        (1, UserError("cat.png has changed"), [2, 2], "cat.png has changed"),
        (1, SystemExit(9), [2, 9], "another process of this run has ended"),  # killed, say
        pytest.param(0, UserError("cat.png has changed"), [2, 2], "cat.png has changed", marks=pytest.mark.slow),
        pytest.param(1, KeyError("cat"), [2, 1], "process 1: KeyError('cat')", marks=pytest.mark.slow),  # a bug
    ],
)
def test_what_fails_in_one_process_ends_both(
    base: Path, pictures: Path, tmp_path: Path, process: int, error: BaseException, codes: list[int], message: str
) -> None:
    arguments = command(base, pictures, tmp_path / "out", *STEPS)
    ended = run_two(arguments, tmp_path / "logs", Event(process, 1, error=error))
    assert ended.codes == codes
    assert ended.errors[0].startswith(f"lorasmith: {message}") and ended.errors[0].count("\n") == 1
    assert ("Traceback" in ended.errors[1]) == (codes[1] == 1)


LAUNCHERS = [
    ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"],
    # `accelerate launch --cpu` starts one process, whatever number it is given, unless MPI is there.
    ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "--module"],
]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS, ids=["torchrun", "accelerate"])
def test_launchers_start_both_and_a_signal_to_them_saves_what_was_reached(
    base: Path, pictures: Path, tmp_path: Path, launcher: list[str]
) -> None:
    out = tmp_path / "out"
    arguments = command(base, pictures, out, "--steps", "60", "--batch-size", "1")
    run = subprocess.Popen(
        [sys.executable, "-m", *launcher, "lorasmith", *arguments],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )
    assert run.stdout is not None
    lines = iter(run.stdout.readline, "")
    plan = list(itertools.takewhile(lambda line: not line.startswith("step "), lines))
    assert any("1 on each of 2 processes" in line for line in plan)
    run.send_signal(signal.SIGTERM)
    rest = "".join(lines)
    assert run.wait() != 0  # the launcher's own code for having been stopped
    stopped = re.search(r"stopped after step (\d+) of 60", rest)
    assert stopped is not None
    assert (out / "states" / f"step-{int(stopped[1]):08d}" / "state.json").is_file()
    assert not (out / "last.safetensors").exists()
