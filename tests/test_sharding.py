"""A shared model over two real processes of gloo, against the same model whole."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.adapters.lora import LoRA
from lorasmith.memory import set_gradient_checkpointing
from lorasmith.models.sd import StableDiffusion
from lorasmith.network import Network, Rule
from lorasmith.processes import Processes
from lorasmith.sharding import held_bytes, shard, whole
from tests.test_processes import in_two
from tests.tiny import build_tiny

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no fork")


def tiny() -> StableDiffusion:
    unet, vae, text = build_tiny(width=16)
    return StableDiffusion("sd1", unet, text, vae, "epsilon", clip_skip=2)


def share(processes: Processes, model: StableDiffusion) -> None:
    processes.shares_model = True
    for part in (model.denoiser, model.text_encoder):
        shard(part, processes.device)


def prediction(model: StableDiffusion, number: int) -> Tensor:
    x_t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(number))
    return model(x_t, torch.tensor([500]), model.encode_text([f"a picture of {number}"]))


def gradients(network: Network, output: Tensor) -> Tensor:
    network.zero_grad()
    output.square().mean().backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def compare(processes: Processes) -> Any:
    """Return what is held of each part, and how outputs and gradients compare with those of the whole model."""
    torch.set_num_threads(1)
    model = tiny()
    network = Network.create(model.adapter_targets(), [Rule(rank=2)], seed=1)
    for adapter in network.adapters.values():  # as after some training, so that all of it has gradients
        assert isinstance(adapter, LoRA)
        torch.nn.init.constant_(adapter.lora_up.weight, 0.01)
    network.attach()
    name = next(name for name in network.adapters if "attn1" in name)
    layer = model.adapter_targets()[name]
    weight, norms = layer.get_parameter("weight").clone(), network.delta_norms()
    expected = prediction(model, processes.index)
    wanted = gradients(network, expected)
    share(processes, model)
    parts = [held_bytes(part) for part in (model.denoiser, model.text_encoder)]
    same, off = [], []
    for is_checkpointed in (False, True):
        set_gradient_checkpointing(model, is_checkpointed)
        with processes.in_step():
            output = prediction(model, processes.index)
            off.append(float((gradients(network, output) - wanted).norm() / wanted.norm()))
        same.append(torch.equal(output, expected))
    again = [held_bytes(part) for part in (model.denoiser, model.text_encoder)]
    held = [own / total for own, total in parts]
    is_local = layer.get_parameter("weight").to_local().numel() < weight.numel()  # type: ignore[attr-defined]
    return (
        held,
        again == parts,
        same,
        off,
        is_local,
        torch.equal(whole(layer.get_parameter("weight")), weight),
        (network.delta_norms() == norms),
    )


def test_each_holds_half_and_computes_what_the_whole_model_does() -> None:
    for held, is_dropped, same, off, is_local, is_whole, has_norms in in_two(compare):  # type: ignore[misc]
        assert all(0.5 <= share < 0.56 for share in held)
        assert is_dropped and is_local and is_whole and has_norms
        assert same == [True, True]  # to the bit
        assert max(off) < 1e-5  # gradients are summed in another order


def fail_before(processes: Processes) -> Any:
    """Let process 1 fail where process 0 goes on to the model."""
    processes.shares_model = True
    told = ""
    try:
        with processes.together():
            if processes.index == 1:
                raise KeyError("mine")
            with processes.in_step():
                raise AssertionError("the model would run here")
    except Exception as error:
        told = repr(error)
    return told, processes.most(processes.index + 3)


def test_what_fails_before_the_model_works_fails_in_both() -> None:
    assert in_two(fail_before) == [("""UserError("process 1: KeyError('mine')")""", 4), ("KeyError('mine')", 4)]


def test_a_weight_that_is_whole_stays_as_it_is() -> None:
    weight = torch.ones(2)
    assert whole(weight) is weight
    alone = Processes("cpu")
    assert alone.most(3) == 3
    with pytest.raises(KeyError), alone.in_step():
        raise KeyError
