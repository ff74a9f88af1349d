"""Devices: what is named is taken if it is here, and each has its precision."""

import pytest
import torch

from lorasmith.devices import check_device, choose_device, choose_precision
from lorasmith.errors import UserError


@pytest.mark.parametrize("name", ["cpu", "mps", "cuda:1"])
def test_a_device_that_is_named_is_taken(name: str) -> None:
    assert choose_device(name) == name


def test_a_device_that_is_not_here_is_refused_with_those_that_are() -> None:
    check_device("auto")
    check_device("cpu")
    with pytest.raises(UserError, match=r"--device cuda:99: not here; on this computer there are auto, cpu"):
        check_device("cuda:99")


def test_half_precision_is_refused_on_a_cpu_and_chosen_by_itself_only_where_it_is_quick() -> None:
    cpu = torch.device("cpu")
    assert [choose_precision(name, cpu) for name in ("auto", "fp32", "bf16")] == ["fp32", "fp32", "bf16"]
    with pytest.raises(UserError, match="--precision fp16 needs a GPU"):
        choose_precision("fp16", cpu)
