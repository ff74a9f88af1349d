"""Sums, sharing and failing together, over two real processes of gloo, against the same computed by one."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from lorasmith.errors import UserError
from lorasmith.processes import Processes, ProcessLostError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no fork")


def in_two(work: Callable[[Processes], object]) -> list[object]:
    """Return what `work` returned in process 0 and in process 1."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "accelerate"])
    with ProcessPoolExecutor(1, mp_context=context) as first, ProcessPoolExecutor(1, mp_context=context) as second:
        results = [pool.submit(_one, work, i, port) for i, pool in enumerate((first, second))]
        return [result.result() for result in results]


def _one(work: Callable[[Processes], object], index: int, port: int) -> object:
    os.environ.update(
        RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    processes = Processes("cpu")
    try:
        return work(processes)
    finally:
        processes.close()


def who(processes: Processes) -> object:
    return processes.index, processes.count, processes.is_main, processes.device.type


def sums(processes: Processes) -> object:
    return processes.sums([0.1, 10.0 * processes.index, float("nan") if processes.index else 1.0])


def gradients(processes: Processes) -> object:
    model, rows = halves()
    loss = model(rows[processes.index :: processes.count]).square().sum()
    loss.backward()
    unused = nn.Parameter(torch.ones(2))
    processes.sum_gradients_([*model.parameters(), unused])
    return [p.grad for p in model.parameters()], unused.grad


def halves() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(6, 3)


def shared(processes: Processes) -> object:
    mine = torch.tensor([processes.index - 1.0, -0.0, float("nan")])
    return [processes.share(mine, source=source).numpy().tobytes() for source in range(2)]


def gathered(processes: Processes) -> object:
    return processes.gather({"from": processes.index})


def fail_in_an_inner_block(processes: Processes) -> object:
    """Fail in one process, in the inner block or before it, and see that all are together afterwards."""
    told = []
    for before in (False, True):
        with pytest.raises((UserError, KeyError)) as caught, processes.together():
            if before and processes.index == 1:
                raise UserError("before")
            with processes.together():
                if processes.index == 1:
                    raise KeyError("inside")
            processes.gather("never reached")
        told.append(repr(caught.value))
    return told, processes.gather(processes.index)


def succeed_then_fail(processes: Processes) -> object:
    with processes.together():
        pass
    try:
        with processes.together():
            if processes.index == 1:
                raise UserError("mine")
    except UserError as error:
        message = str(error)
    else:
        message = ""
    with processes.together():  # the group is whole afterwards
        pass
    return message


def fail_in_both(processes: Processes) -> object:
    with pytest.raises(UserError) as caught, processes.together():
        raise UserError(f"of {processes.index}")
    return str(caught.value)


def fail_by_a_bug(processes: Processes) -> object:
    with pytest.raises((KeyError, UserError)) as caught, processes.together():
        if processes.index == 1:
            raise KeyError("x")
    return repr(caught.value)


def leave_alone(processes: Processes) -> object:
    if processes.index == 1:
        return None
    with pytest.raises(ProcessLostError) as caught, processes.together():
        pass
    return str(caught.value)


def test_each_knows_its_place() -> None:
    assert in_two(who) == [(0, 2, True, "cpu"), (1, 2, False, "cpu")]


def test_sums_are_alike_in_both() -> None:
    for total in in_two(sums):
        assert isinstance(total, list)
        assert total[:2] == [0.2, 10.0] and total[2] != total[2]


def test_summed_gradients_are_those_of_all_samples_at_once() -> None:
    model, rows = halves()
    model(rows).square().sum().backward()
    for found in in_two(gradients):
        assert isinstance(found, tuple)
        for ours, parameter in zip(found[0], model.parameters(), strict=True):
            torch.testing.assert_close(ours, parameter.grad)
        assert found[1] is None


def test_a_shared_tensor_is_the_source_s_to_the_bit() -> None:
    expected = [torch.tensor([index - 1.0, -0.0, float("nan")]).numpy().tobytes() for index in range(2)]
    assert in_two(shared) == [expected, expected]


def test_what_each_gives_is_gathered_in_their_order() -> None:
    assert in_two(gathered) == [[{"from": 0}, {"from": 1}]] * 2


def test_what_fails_in_an_inner_block_is_told_once() -> None:
    before = "UserError('before')"
    assert in_two(fail_in_an_inner_block) == [
        (["""UserError("process 1: KeyError('inside')")""", before], [0, 1]),
        (["KeyError('inside')", before], [0, 1]),
    ]


@pytest.mark.parametrize(
    ("work", "messages"),
    [
        (succeed_then_fail, ["mine", "mine"]),
        (fail_in_both, ["of 0", "of 0"]),
        (fail_by_a_bug, ["""UserError("process 1: KeyError('x')")""", "KeyError('x')"]),
    ],
)
def test_what_fails_in_one_fails_in_both(work: Callable[[Processes], object], messages: list[str]) -> None:
    assert in_two(work) == messages


def test_one_left_alone_is_told_so() -> None:
    message, _ = in_two(leave_alone)
    assert str(message).startswith("another process of this run has ended")


def test_alone_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes = Processes("cpu")
    assert (processes.index, processes.count, processes.is_main) == (0, 1, True)
    assert processes.sums([1.5, 2.0]) == [1.5, 2.0]
    assert processes.gather("mine") == ["mine"]
    tensor = torch.ones(2)
    assert processes.share(tensor, source=0) is tensor
    with pytest.raises(KeyError), processes.together():
        raise KeyError
    processes.close()
