"""The decay of the product and the limit of norms against what they mean for the whole weight."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorasmith.dropout import DropoutRates
from lorasmith.network import Network, Rule
from lorasmith.regularizers import Regularizers

LAYERS: dict[str, Any] = {"linear": lambda: nn.Linear(8, 6), "conv": lambda: nn.Conv2d(4, 6, 3, padding=1)}
TYPES = ["lora", "dora", "loha", "lokr", "full"]


def make_network(adapter: str, kind: str, **options: Any) -> tuple[Network, Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[kind]().requires_grad_(False)
    network = Network.create(
        {"lora_unet_a": layer}, [Rule(adapter=adapter, rank=2, alpha=1.5, options=options)], seed=1
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return network, layer.weight


def regularizers(network: Network, decay: float = 0.0, max_norm: float | None = None) -> Regularizers:
    return Regularizers(network, DropoutRates(), seed=1, product_decay=decay, max_norm=max_norm)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("adapter", TYPES)
def test_the_square_is_that_of_delta_and_so_are_its_gradients(adapter: str, kind: str) -> None:
    network, weight = make_network(adapter, kind)
    one = network.adapters["lora_unet_a"]
    expected = one.delta(weight).square().sum()
    torch.testing.assert_close(one.delta_square(weight), expected)
    theirs = torch.autograd.grad(expected / 2, list(one.parameters()))
    for _, found in network.decay_gradients():
        for a, b in zip(found, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_a_loras_decay_is_the_formula_of_the_docs_with_each_factors_rate() -> None:
    network, _ = make_network("lora", "linear")
    one: Any = network.adapters["lora_unet_a"]
    a, b = one.lora_down.weight.detach().clone(), one.lora_up.weight.detach().clone()
    groups = [
        {"params": [one.lora_down.weight], "lr": 0.01},
        {"params": [one.lora_up.weight], "lr": 0.03},
    ]
    assert regularizers(network, decay=0.5).after_step_(groups) is None
    s = 1.5 / 2
    torch.testing.assert_close(one.lora_down.weight.detach(), a - 0.01 * 0.5 * s**2 * b.T @ b @ a)
    torch.testing.assert_close(one.lora_up.weight.detach(), b - 0.03 * 0.5 * s**2 * b @ a @ a.T)


def test_where_the_optimizer_finds_the_rate_it_is_that_rates_decay() -> None:
    """Prodigy's rate is d times the given one, which is 1 as a rule."""
    changes = []
    for group in ({"lr": 0.01}, {"lr": 1.0, "d": 0.01}):
        network, _ = make_network("lora", "linear")
        regularizers(network, decay=0.5).after_step_([{"params": list(network.parameters()), **group}])
        changes.append(torch.cat([parameter.detach().flatten() for parameter in network.parameters()]))
    torch.testing.assert_close(changes[0], changes[1])


def test_as_long_as_an_adapter_adds_nothing_its_decay_changes_nothing() -> None:
    layer = LAYERS["linear"]().requires_grad_(False)
    network = Network.create({"lora_unet_a": layer}, [Rule(rank=2)], seed=1)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    regularizers(network, decay=0.5).after_step_([{"params": list(network.parameters()), "lr": 0.1}])
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_what_is_not_trained_does_not_decay() -> None:
    network, _ = make_network("lora", "linear")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.requires_grad_(False)
    regularizers(network, decay=0.5).after_step_([])
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("adapter", ["lora", "loha", "lokr", "full"])
def test_a_norm_above_the_limit_comes_down_to_it_and_is_counted(adapter: str) -> None:
    network, weight = make_network(adapter, "linear")
    one = network.adapters["lora_unet_a"]
    norm = one.delta(weight).norm().item()
    assert regularizers(network, max_norm=2 * norm).after_step_([]) == 0
    assert one.delta(weight).norm().item() == norm
    assert regularizers(network, max_norm=norm / 3).after_step_([]) == 1
    assert one.delta(weight).norm().item() == pytest.approx(norm / 3, rel=1e-5)
