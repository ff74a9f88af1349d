"""Any optimizer class of torch's kind can be named; what cannot be used is refused before anything is loaded."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from lorasmith.errors import UserError
from lorasmith.optimizers import adamw
from lorasmith.optimizers.base import builder


class Insistent(torch.optim.SGD):
    """Wants its learning rate by name."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)


class Strange:
    """No optimizer."""


@pytest.fixture(autouse=True)
def own_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("own_optimizers")
    vars(module).update(Insistent=Insistent, Strange=Strange, number=3)
    monkeypatch.setitem(sys.modules, "own_optimizers", module)
    monkeypatch.setitem(sys.modules, "own.build_module", ModuleType("own.build_module"))
    vars(sys.modules["own.build_module"])["build"] = adamw.build


def groups() -> list[dict[str, Any]]:
    return [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": lr, "name": "unet"} for lr in (0.5, 0.25)]


def test_a_file_of_the_folder_and_a_module_of_ones_own_are_asked_to_build() -> None:
    assert builder("adamw") is adamw.build and builder("own.build_module") is adamw.build


@pytest.mark.parametrize("name", ["torch.optim.SGD", "torch.optim.RAdam", "own_optimizers.Insistent"])
def test_a_class_gets_the_groups_with_their_own_rates(name: str) -> None:
    optimizer = builder(name)(groups(), weight_decay=0.125)
    assert type(optimizer).__name__ == name.rpartition(".")[2]
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.125), (0.25, 0.125)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torch.optim.LBFGS", r"LBFGS\(param_groups, weight_decay=...\), but got an unexpected.*weight_decay"),
        ("torch.optim", r"found a module; did you mean torch\.optim\.\w+\?"),
        ("own_optimizers.Strange", "found a class"),
        ("own_optimizers.number", "found an? int"),
        ("torch.optim.lr_scheduler.StepLR", "found a class"),
        ("torch.optim.SDG", "it has no 'SDG'"),
        ("adamx", "did you mean adamw"),
    ],
)
def test_what_cannot_be_used_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        builder(name)
