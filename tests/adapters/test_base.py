"""What the adapters' base class does for all: applies a changed weight and bias to every kind of layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorasmith.adapters.base import Adapter, apply_weight


class Constant(Adapter):
    """Adds 0.5 to a weight, and 0.25 to a bias."""

    required_names = frozenset({"half"})
    optional_names = frozenset({"alpha"})

    @classmethod
    def from_tensors(cls, layer_shape: Sequence[int], tensors: Mapping[str, Tensor]) -> "Constant":
        raise AssertionError("not needed")

    @classmethod
    def largest_rank(cls, layer_shape: Sequence[int]) -> int:
        return 1

    def reset(self, weight: Tensor, generator: torch.Generator) -> None:
        raise AssertionError("not needed")

    def delta(self, weight: Tensor) -> Tensor:
        return torch.full(weight.shape, 0.5)

    def delta_bias(self, bias: Tensor | None) -> Tensor | None:
        return torch.full((6,), 0.25)

    def scale_(self, factor: float) -> None:
        raise AssertionError("not needed")


LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), (2, 4)),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), (2, 4)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2), (2, 4, 8, 9)),
    "grouped conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "layer norm": (lambda: nn.LayerNorm(6), (2, 5, 6)),
    "group norm": (lambda: nn.GroupNorm(3, 6), (2, 6, 4, 4)),
}


def make(kind: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    layer: Any = build()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer.requires_grad_(False), torch.randn(shape)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_with_its_own_weight_and_bias_is_that_layer(kind: str) -> None:
    layer, x = make(kind)
    assert torch.equal(apply_weight(layer, layer.weight, layer.bias, x), layer(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_weight_and_bias_change_by_the_multiplier(kind: str) -> None:
    layer, x = make(kind)
    adapter, (changed, _) = Constant((6, 4), 1), make(kind)
    adapter.multiplier = 0.8
    bias = torch.zeros(6) if layer.bias is None else layer.bias
    changed.weight, changed.bias = (nn.Parameter(changed.weight + 0.4), nn.Parameter(bias + 0.2))
    torch.testing.assert_close(adapter(layer, x, layer(x)), changed(x))


def test_a_type_matches_by_its_names() -> None:
    half, alpha, other = torch.zeros(1), torch.zeros(()), torch.zeros(2)
    assert Constant.matches({"half": half}) and Constant.matches({"half": half, "alpha": alpha})
    assert not Constant.matches({"alpha": alpha}) and not Constant.matches({"half": half, "other": other})
