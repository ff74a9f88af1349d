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
from lorasmith.errors import UserError
from lorasmith.network import Network, Rule, adapter_class, check_ranks, recognise

LAYERS = {
    "linear": lambda: nn.Linear(12, 20),
    "linear_no_bias": lambda: nn.Linear(20, 12, bias=False),
    "conv1x1": lambda: nn.Conv2d(8, 12, 1),
    "conv3x3": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "conv3x3_strided": lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1),
    "conv3x2_dilated": lambda: nn.Conv2d(8, 12, (3, 2), dilation=2, padding=(2, 1)),
    "layer_norm": lambda: nn.LayerNorm(20),
    "group_norm": lambda: nn.GroupNorm(4, 20),
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # every type as it is, and what its options make another of
    **{name: (name, {}) for name in plugins.names("adapters")},
    "lora_tucker": ("lora", {"use_tucker": True}),
    "dora_on_inputs": ("dora", {"wd_on_output": False}),
    "loha_tucker": ("loha", {"use_tucker": True}),
    "loha_decomposed": ("loha", {"dora_wd": True}),
    "lokr_both": ("lokr", {"decompose_both": True, "factor": 4, "rank": 1}),
    "lokr_tucker": ("lokr", {"use_tucker": True, "rank": 1}),
    "lokr_full": ("lokr", {"full_matrix": True, "factor": 2}),
    "lokr_unbalanced": ("lokr", {"unbalanced_factorization": True, "factor": 2, "rank": 1}),
    "lokr_decomposed": ("lokr", {"dora_wd": True, "wd_on_output": False}),
    "ia3_on_inputs": ("ia3", {"train_on_input": True}),
    "oft_rescaled": ("oft", {"rescaled": True}),
    "boft_rescaled": ("boft", {"rescaled": True}),
}
WITHOUT_MULTIPLES = {"dora", "oft", "boft", "dora_on_inputs", "loha_decomposed", "lokr_decomposed"}
WITHOUT_MULTIPLES |= {"oft_rescaled", "boft_rescaled"}
NORMS, ON_NORMS = {"layer_norm", "group_norm"}, {"full", "norm"}  # norm goes nowhere else
DTYPES = {"fp32": (torch.float32, 1e-5), "bf16": (torch.bfloat16, 3e-2)}


def make_layer(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    layer: Any = LAYERS[kind]()
    if kind in NORMS:  # which are all ones and zeros when new
        with torch.no_grad():
            layer.weight.uniform_(0.2, 0.8)
            layer.bias.uniform_(-0.3, 0.3)
    return layer.to(dtype).requires_grad_(False)


def make_input(layer: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if isinstance(layer, (nn.Linear, nn.LayerNorm)):
        shape = (3, 5, layer.weight.shape[-1])
    else:
        shape = (3, layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.in_channels, 9, 7)
    return torch.randn(shape, generator=generator).to(dtype)


def make_rule(variant: str, *, rank: int = 3, alpha: float | None = 2.0) -> Rule:
    adapter, given = VARIANTS[variant]
    options = dict(given)
    return Rule(adapter=adapter, rank=options.pop("rank", rank), alpha=alpha, options=options)


def make_network(layer: nn.Module, variant: str) -> Network:
    """An adapter whose parameters are all random, so that its delta is not zero."""
    network = Network.create({"lora_unet_a": layer}, [make_rule(variant)], seed=7)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)
    return network


def merged(layer: Any, one: Adapter, dtype: torch.dtype, multiplier: float = 1.0) -> tuple[Any, Any]:
    """The layer's weight and bias with the adapter in them."""
    change, bias = one.delta_bias(layer.bias), None if layer.bias is None else layer.bias.to(dtype)
    if change is not None:
        bias = multiplier * change.to(dtype) + (0 if bias is None else bias)
    return layer.weight.to(dtype) + multiplier * one.delta(layer.weight).to(dtype), bias


def only_adapter(network: Network) -> Adapter:
    return network.adapters["lora_unet_a"]


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


def goes_on(variant: str, kind: str) -> bool:
    adapter, _ = VARIANTS[variant]
    return adapter in ON_NORMS if kind in NORMS else adapter != "norm"


every_variant = pytest.mark.parametrize("adapter", VARIANTS)
every_adapter_and_layer = pytest.mark.parametrize(
    ("adapter", "kind"), [(variant, kind) for variant in VARIANTS for kind in LAYERS if goes_on(variant, kind)]
)


@every_adapter_and_layer
@pytest.mark.parametrize("precision", DTYPES)
def test_forward_equals_delta_applied_to_the_weight(adapter: str, kind: str, precision: str) -> None:
    dtype, tolerance = DTYPES[precision]
    layer = make_layer(kind, dtype)
    x = make_input(layer, dtype)
    network = make_network(layer, adapter)
    network.multiplier = 0.7
    exact = make_layer(kind, dtype).double()  # the oracle: fp64 with the delta in the weight
    weight, bias = merged(layer, only_adapter(network), torch.float64, 0.7)
    expected, plain = apply_weight(exact, weight, bias, x.double()), layer(x)
    network.attach()
    adapted = layer(x)
    assert adapted.dtype == dtype and adapted.shape == expected.shape
    assert relative_error(adapted, expected) < tolerance
    assert relative_error(plain, expected) > 0.1  # the delta is not a trifle


@every_adapter_and_layer
def test_the_general_forward_of_the_base_class_agrees(adapter: str, kind: str) -> None:
    layer = make_layer(kind)
    x, one = make_input(layer), only_adapter(make_network(layer, adapter))
    torch.testing.assert_close(one(layer, x, layer(x)), Adapter.forward(one, layer, x, layer(x)), atol=1e-4, rtol=1e-4)


@every_adapter_and_layer
def test_a_new_adapter_changes_nothing(adapter: str, kind: str) -> None:
    layer = make_layer(kind)
    x = make_input(layer)
    before = layer(x)
    network = Network.create({"lora_unet_a": layer}, [make_rule(adapter, alpha=None)], seed=1)
    assert torch.count_nonzero(only_adapter(network).delta(layer.weight)) == 0
    network.attach()
    assert torch.equal(layer(x), before)
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())


@every_adapter_and_layer
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


@every_adapter_and_layer
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


@every_adapter_and_layer
def test_gradients_equal_those_through_delta(adapter: str, kind: str) -> None:
    layer = make_layer(kind)
    x, one = make_input(layer), only_adapter(make_network(layer, adapter))
    fast = torch.autograd.grad(one(layer, x, layer(x)).square().mean(), list(one.parameters()))
    slow = torch.autograd.grad(
        apply_weight(layer, *merged(layer, one, torch.float32), x).square().mean(), list(one.parameters())
    )
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@every_adapter_and_layer
def test_tensors_make_the_same_adapter_again(adapter: str, kind: str) -> None:
    layer = make_layer(kind)
    one = only_adapter(make_network(layer, adapter))
    tensors = one.state_dict()
    assert [kind for kind in map(adapter_class, plugins.names("adapters")) if kind.matches(tensors)] == [type(one)]
    again = recognise(tensors).from_tensors(tuple(layer.weight.shape), tensors)
    assert all(again.get_parameter(name).requires_grad for name, _ in one.named_parameters())
    assert {name: value.shape for name, value in again.state_dict().items()} == {k: v.shape for k, v in tensors.items()}
    assert torch.equal(again.delta(layer.weight), one.delta(layer.weight))
    assert again.required_names <= set(one.state_dict()) <= again.required_names | again.optional_names


@every_adapter_and_layer
@given(factor=st.floats(0.01, 10))
@settings(max_examples=5, deadline=None)
def test_norm_and_scale_speak_of_delta(adapter: str, kind: str, factor: float) -> None:
    layer = make_layer(kind)
    one = only_adapter(make_network(layer, adapter))
    delta = one.delta(layer.weight).detach()
    torch.testing.assert_close(one.delta_norm(layer.weight), delta.norm(), atol=0, rtol=1e-5)
    if adapter in WITHOUT_MULTIPLES:
        with pytest.raises(ValueError, match="set the multiplier"):
            one.scale_(factor)
        return
    one.scale_(factor)
    torch.testing.assert_close(one.delta(layer.weight).detach(), delta * factor, atol=1e-5, rtol=1e-4)


@every_variant
def test_delta_is_fp32_even_under_autocast(adapter: str) -> None:
    layer = make_layer("linear" if goes_on(adapter, "linear") else "layer_norm", torch.bfloat16)
    one = only_adapter(make_network(layer, adapter))
    outside = one.delta(layer.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = one.delta(layer.weight)
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)


@every_variant
def test_tensors_of_another_layer_are_refused_with_both_shapes(adapter: str) -> None:
    """Whatever is in the file: another layer's sizes, a tensor less, nothing in one, any number of dimensions."""
    layer = make_layer("conv3x3" if goes_on(adapter, "linear") else "layer_norm")
    one = only_adapter(make_network(layer, adapter))
    tensors, shape = one.state_dict(), tuple(layer.weight.shape)
    others = [(14, 10, 3, 3), (14, 8, 3, 3), (12, 10, 3, 3), (12, 8, 3, 2), (14, 10), (10,), (20, 20)]
    for other in others:
        if not is_blind(adapter, shape, other):
            with pytest.raises(ValueError, match=r"weight is"):
                type(one).from_tensors(other, tensors)
    for name, tensor in tensors.items():
        for odd in (tensor.new_zeros(0), tensor.new_zeros((*tensor.shape, 2)), tensor.new_zeros((1, 0, 3, 3))):
            with pytest.raises(ValueError, match=r"in the file"):
                type(one).from_tensors(shape, {**tensors, name: odd})


def is_blind(variant: str, shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """True for types that do not see all of a layer's sizes: only its outputs, or only its inputs."""
    adapter, options = VARIANTS[variant]
    seen = {"oft": 0, "boft": 0, "ia3": 1 if options.get("train_on_input") else 0}.get(adapter)
    return seen is not None and len(other) > 1 and shape[seen] == other[seen]


@every_variant
def test_layers_that_a_type_does_not_go_on_are_told_before_anything_is_loaded(adapter: str) -> None:
    unfit = [kind for kind in LAYERS if not goes_on(adapter, kind)]
    for kind in unfit:
        shapes = {"lora_unet_a": tuple(make_layer(kind).weight.shape)}
        with pytest.raises(UserError, match=r"does not go on lora_unet_a: .*weight is"):
            check_ranks(shapes, [make_rule(adapter)])
    assert unfit or VARIANTS[adapter][0] == "full"
