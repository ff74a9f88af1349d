"""Dropout against masks drawn one by one, and that it is the same however a step is spread, cut or computed again."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorasmith.dropout import Dropout, DropoutRates
from lorasmith.network import Network, Rule
from lorasmith.seeds import derive

NAMES = [f"lora_unet_{i}" for i in range(40)]


def dropout(samples: tuple[int, ...] = (0, 1, 2), *, step: int = 3, seed: int = 5, **rates: Any) -> Dropout:
    return Dropout(DropoutRates(**rates), seed, step, samples)


def test_modules_are_left_out_at_their_rate_and_other_ones_in_each_step() -> None:
    steps = [dropout(step=step, module=0.3).left_out(NAMES) for step in range(200)]
    assert sum(map(len, steps)) == pytest.approx(200 * 40 * 0.3, rel=0.1)
    assert len({frozenset(step) for step in steps}) == 200
    assert steps[3] == dropout((7,), module=0.3).left_out(NAMES)  # whoever asks, of whichever samples
    assert steps[3] != dropout(seed=6, module=0.3).left_out(NAMES)
    assert dropout(rank=0.3).left_out(NAMES) == set()


def test_one_module_always_stays_so_that_a_step_has_gradients() -> None:
    assert {len(dropout(step=step, module=0.999).left_out(NAMES[:3])) for step in range(50)} == {2}
    assert dropout(module=0.999).left_out(NAMES[:1]) == set()


def mask_by_hand(kind: str, sample: int, shape: tuple[int, ...], rate: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(derive(5, f"{kind} dropout/a", 3, sample))
    return (torch.rand(shape, generator=generator) >= rate).float() / (1 - rate)


@pytest.mark.parametrize("shape", [(3, 7, 4), (3, 4), (6, 7, 4)], ids=["tokens", "vectors", "two chunks of a caption"])
def test_what_a_linear_layer_leaves_out(shape: tuple[int, ...]) -> None:
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    chunks = shape[0] // 3
    ones = [1] * (len(shape) - 2)
    found = dropout(neuron=0.4).inner("a", hidden, -1)
    ranks = dropout(rank=0.4).inner("a", hidden, -1)
    for i in range(3):
        part = slice(i * chunks, (i + 1) * chunks)
        torch.testing.assert_close(found[part], hidden[part] * mask_by_hand("neuron", i, (chunks, *shape[1:]), 0.4))
        torch.testing.assert_close(ranks[part], hidden[part] * mask_by_hand("rank", i, (1, *ones, 4), 0.4))


def test_what_a_convolution_leaves_out() -> None:
    hidden = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    ranks = dropout(rank=0.4).inner("a", hidden, 1)
    both = dropout(rank=0.4, neuron=0.2).inner("a", hidden, 1)
    for i in range(3):
        mask = mask_by_hand("rank", i, (1, 4, 1, 1), 0.4)[0]
        torch.testing.assert_close(ranks[i], hidden[i] * mask)
        torch.testing.assert_close(both[i], hidden[i] * mask * mask_by_hand("neuron", i, (1, 4, 6, 5), 0.2)[0])


def test_a_sample_loses_the_same_in_every_company_and_the_mean_stays() -> None:
    hidden = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0))
    rates: dict[str, Any] = {"neuron": 0.3, "rank": 0.2}
    together = dropout(**rates).inner("a", hidden, -1)
    for i in range(3):
        assert torch.equal(dropout((i,), **rates).inner("a", hidden[i : i + 1], -1)[0], together[i])
    assert not torch.equal(together, dropout(**rates).inner("b", hidden, -1))
    assert not torch.equal(together, dropout(step=4, **rates).inner("a", hidden, -1))
    many = dropout(tuple(range(3000)), **rates).inner("a", torch.ones(3000, 7, 4), -1)
    assert many.mean().item() == pytest.approx(1, abs=0.02)


# ---- in a network ---------------------------------------------------------------------------------------------------


def make_network(adapter: str = "lora") -> tuple[nn.Sequential, Network]:
    torch.manual_seed(0)
    layers: Any = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Flatten(2), nn.Linear(30, 5)).requires_grad_(False)
    targets = {"lora_unet_a": layers[0], "lora_unet_b": layers[2]}
    network = Network.create(targets, [Rule(adapter=adapter, rank=4)], seed=1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    network.attach()
    return layers, network


X = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(3))


def gradients(layers: nn.Module, network: Network, rates: dict[str, Any], *, is_checkpointed: bool) -> list[Any]:
    network.zero_grad()
    with network.dropping(dropout(**rates)):
        output = checkpoint(layers, X, use_reentrant=False) if is_checkpointed else layers(X)
        output.square().sum().backward()
    return [parameter.grad for parameter in network.parameters()]


@pytest.mark.parametrize("rates", [{"neuron": 0.3}, {"rank": 0.4}, {"module": 0.9}], ids=str)
def test_computing_again_drops_the_same(rates: dict[str, Any]) -> None:
    layers, network = make_network()
    plain = gradients(layers, network, rates, is_checkpointed=False)
    again = gradients(layers, network, rates, is_checkpointed=True)
    whole = gradients(layers, network, {}, is_checkpointed=False)
    for a, b in zip(plain, again, strict=True):
        assert a is b is None or torch.equal(a, b)
    assert any(a is None or not torch.equal(a, b) for a, b in zip(plain, whole, strict=True))


def test_ranks_that_are_dropped_learn_nothing_from_a_sample() -> None:
    layers, network = make_network()
    with network.dropping(dropout((0,), rank=0.5)):
        layers(X[:1]).square().sum().backward()
    down = network.adapters["lora_unet_b"].get_parameter("lora_down.weight").grad
    generator = torch.Generator().manual_seed(derive(5, "rank dropout/lora_unet_b", 3, 0))
    is_kept = (torch.rand((1, 1, 4), generator=generator) >= 0.5)[0, 0]
    assert down is not None and 0 < is_kept.sum() < 4
    assert ((down != 0).any(dim=1) == is_kept).all()


def test_a_left_out_module_is_as_if_it_were_not_there_in_every_type() -> None:
    for adapter in ("lora", "loha", "dora", "full"):
        layers, network = make_network(adapter)
        names = dropout(module=0.9).left_out(network.adapters)
        assert len(names) == 1
        with network.dropping(dropout(module=0.9)):
            dropped = layers(X)
        for name in names:
            network.adapters[name].multiplier = 0.0
        assert torch.equal(layers(X), dropped)
        network.multiplier = 1.0
        assert not torch.equal(layers(X), dropped)


def test_outside_of_training_nothing_is_dropped_also_after_an_error() -> None:
    layers, network = make_network()
    before = layers(X)
    with pytest.raises(KeyError), network.dropping(dropout(neuron=0.5, module=0.5)):
        assert not torch.equal(layers(X), before)
        raise KeyError
    assert torch.equal(layers(X), before)
