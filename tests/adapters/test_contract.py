"""What every adapter promises, on every kind of layer: `delta` defines it, and everything else agrees with that."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorasmith import plugins
from lorasmith.adapters.base import Adapter, apply_weight
from lorasmith.network import Network, Rule, adapter_class

LAYERS = {
    "linear": lambda: nn.Linear(12, 20),
    "linear_no_bias": lambda: nn.Linear(20, 12, bias=False),
    "conv1x1": lambda: nn.Conv2d(8, 12, 1),
    "conv3x3": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "conv3x3_strided": lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1),
    "conv3x2_dilated": lambda: nn.Conv2d(8, 12, (3, 2), dilation=2, padding=(2, 1)),
}
DTYPES = {"fp32": (torch.float32, 1e-5), "bf16": (torch.bfloat16, 3e-2)}


def make_layer(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return LAYERS[kind]().to(dtype).requires_grad_(False)


def make_input(layer: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (3, 5, layer.in_features) if isinstance(layer, nn.Linear) else (3, layer.in_channels, 9, 7)
    return torch.randn(shape, generator=generator).to(dtype)


def make_network(layer: nn.Module, adapter: str, *, rank: int = 3, alpha: float | None = 2.0) -> Network:
    """An adapter whose parameters are all random, so that its delta is not zero."""
    network = Network.create({"lora_unet_a": layer}, [Rule(adapter=adapter, rank=rank, alpha=alpha)], seed=7)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return network


def only_adapter(network: Network) -> Adapter:
    return network.adapters["lora_unet_a"]


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


every_adapter = pytest.mark.parametrize("adapter", plugins.names("adapters"))
every_layer = pytest.mark.parametrize("kind", LAYERS)


@every_adapter
@every_layer
@pytest.mark.parametrize("precision", DTYPES)
def test_forward_equals_delta_applied_to_the_weight(adapter: str, kind: str, precision: str) -> None:
    dtype, tolerance = DTYPES[precision]
    layer = make_layer(kind, dtype)
    x = make_input(layer, dtype)
    network = make_network(layer, adapter)
    network.multiplier = 0.7
    exact = make_layer(kind, dtype).double()  # the oracle: fp64 with the delta in the weight
    weight = layer.weight.double() + 0.7 * only_adapter(network).delta(layer.weight).double()
    expected, plain = apply_weight(exact, weight, exact.bias, x.double()), layer(x)
    network.attach()
    adapted = layer(x)
    assert adapted.dtype == dtype and adapted.shape == expected.shape
    assert relative_error(adapted, expected) < tolerance
    assert relative_error(plain, expected) > 0.1  # the delta is not a trifle


@every_adapter
@every_layer
def test_the_general_forward_of_the_base_class_agrees(adapter: str, kind: str) -> None:
    layer = make_layer(kind)
    x, one = make_input(layer), only_adapter(make_network(layer, adapter))
    torch.testing.assert_close(one(layer, x, layer(x)), Adapter.forward(one, layer, x, layer(x)), atol=1e-4, rtol=1e-4)


@every_adapter
@every_layer
def test_a_new_adapter_changes_nothing(adapter: str, kind: str) -> None:
    layer = make_layer(kind)
    x = make_input(layer)
    before = layer(x)
    network = Network.create({"lora_unet_a": layer}, [Rule(adapter=adapter, rank=4)], seed=1)
    assert torch.count_nonzero(only_adapter(network).delta(layer.weight)) == 0
    network.attach()
    assert torch.equal(layer(x), before)
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())


@every_adapter
@every_layer
def test_detach_leaves_the_layer_bit_for_bit_as_it_was(adapter: str, kind: str) -> None:
    layer = make_layer(kind, torch.bfloat16)
    x = make_input(layer, torch.bfloat16)
    weights, before = {k: v.clone() for k, v in layer.state_dict().items()}, layer(x)
    network = make_network(layer, adapter)
    network.attach()
    assert not torch.equal(layer(x), before)
    network.multiplier = 0.0
    assert torch.equal(layer(x), before)
    network.detach()
    network.multiplier = 1.0
    assert torch.equal(layer(x), before)
    assert layer.state_dict().keys() == weights.keys()
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in weights.items())


@every_adapter
@every_layer
def test_gradients_are_the_same_with_and_without_checkpointing(adapter: str, kind: str) -> None:
    layer = make_layer(kind)
    x = make_input(layer)
    network = make_network(layer, adapter)
    network.attach()

    def gradients(run: Any) -> list[torch.Tensor]:
        return list(torch.autograd.grad(run(x).square().mean(), list(network.parameters())))

    plain = gradients(layer)
    again = gradients(lambda x: checkpoint(layer, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in plain)


@every_adapter
@every_layer
def test_gradients_equal_those_through_delta(adapter: str, kind: str) -> None:
    layer = make_layer(kind)
    x, one = make_input(layer), only_adapter(make_network(layer, adapter))
    fast = torch.autograd.grad(one(layer, x, layer(x)).square().mean(), list(one.parameters()))
    merged = apply_weight(layer, layer.weight + one.delta(layer.weight), layer.bias, x)
    slow = torch.autograd.grad(merged.square().mean(), list(one.parameters()))
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@every_adapter
@every_layer
def test_tensors_make_the_same_adapter_again(adapter: str, kind: str) -> None:
    layer = make_layer(kind)
    one = only_adapter(make_network(layer, adapter))
    again = adapter_class(adapter).from_tensors(tuple(layer.weight.shape), one.state_dict())
    assert torch.equal(again.delta(layer.weight), one.delta(layer.weight))
    assert again.required_names <= set(one.state_dict()) <= again.required_names | again.optional_names


@every_adapter
@every_layer
@given(factor=st.floats(0.01, 10))
@settings(max_examples=5, deadline=None)
def test_norm_and_scale_speak_of_delta(adapter: str, kind: str, factor: float) -> None:
    layer = make_layer(kind)
    one = only_adapter(make_network(layer, adapter))
    delta = one.delta(layer.weight).detach()
    torch.testing.assert_close(one.delta_norm(layer.weight), delta.norm(), atol=0, rtol=1e-5)
    one.scale_(factor)
    torch.testing.assert_close(one.delta(layer.weight).detach(), delta * factor, atol=1e-5, rtol=1e-4)


@every_adapter
def test_delta_is_fp32_even_under_autocast(adapter: str) -> None:
    layer = make_layer("linear", torch.bfloat16)
    one = only_adapter(make_network(layer, adapter))
    outside = one.delta(layer.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = one.delta(layer.weight)
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)
