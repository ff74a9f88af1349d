"""LoRA: its formula against plain torch and peft, and what a file may look like."""

import math
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lorasmith.adapters.lora import LoRA, product_norm


def random_lora(shape: tuple[int, ...], rank: int, alpha: float | None) -> LoRA:
    adapter = LoRA(shape, rank, alpha)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return adapter


@pytest.mark.parametrize("shape", [(20, 12), (20, 12, 1, 1), (20, 12, 3, 3)])
def test_delta_equals_pefts(shape: tuple[int, ...]) -> None:
    layer: Any = nn.Linear(12, 20) if len(shape) == 2 else nn.Conv2d(12, 20, shape[-1])
    wrapped: Any = peft.get_peft_model(
        nn.ModuleDict({"layer": layer}), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["layer"])
    )
    theirs = wrapped.base_model.model["layer"]
    ours = random_lora(shape, 4, 6)
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(ours.lora_down.weight)
        theirs.lora_B["default"].weight.copy_(ours.lora_up.weight)
    torch.testing.assert_close(ours.delta(layer.weight), theirs.get_delta_weight("default"), atol=1e-5, rtol=1e-5)


def test_state_dict_has_the_saved_names_and_native_shapes() -> None:
    shapes = {key: tuple(value.shape) for key, value in LoRA((20, 12, 3, 3), 4).state_dict().items()}
    assert shapes == {"alpha": (), "lora_down.weight": (4, 12, 3, 3), "lora_up.weight": (20, 4, 1, 1)}
    shapes = {key: tuple(value.shape) for key, value in LoRA((20, 12), 4).state_dict().items()}
    assert shapes == {"alpha": (), "lora_down.weight": (4, 12), "lora_up.weight": (20, 4)}


def test_alpha_left_out_is_the_rank() -> None:
    assert LoRA((20, 12), 4).alpha == 4
    adapter = random_lora((20, 12), 4, 1.0)
    tensors = {k: v for k, v in adapter.state_dict().items() if k != "alpha"}
    weight = torch.zeros(20, 12)
    loaded = LoRA.from_tensors((20, 12), tensors)
    torch.testing.assert_close(loaded.delta(weight), adapter.delta(weight) * 4)


def test_alpha_changed_after_building_changes_forward_and_delta_alike() -> None:
    layer, adapter = nn.Linear(12, 20), random_lora((20, 12), 4, 4.0)
    x = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    adapter.load_state_dict({**adapter.state_dict(), "alpha": torch.tensor(1.0)})
    expected = layer(x) + x @ adapter.delta(layer.weight).T
    torch.testing.assert_close(adapter(layer, x, layer(x)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stored, wanted", [((20, 12), (20, 12, 1, 1)), ((20, 12, 1, 1), (20, 12))])
def test_a_1x1_convolution_may_be_stored_as_linear_and_the_other_way(
    stored: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    adapter = random_lora(stored, 3, 2.0)
    loaded = LoRA.from_tensors(wanted, adapter.state_dict())
    assert torch.equal(loaded.delta(torch.zeros(wanted)).flatten(), adapter.delta(torch.zeros(stored)).flatten())


@pytest.mark.parametrize("wanted", [(20, 13), (21, 12), (20, 12, 3, 3), (12, 20)])
def test_factors_of_another_layer_are_refused_with_both_shapes(wanted: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="down 3 x 12 and up 20 x 3 in the file; the layer's weight is"):
        LoRA.from_tensors(wanted, random_lora((20, 12), 3, 2.0).state_dict())


def test_down_and_up_of_different_ranks_are_refused() -> None:
    tensors = {"lora_down.weight": torch.zeros(3, 12), "lora_up.weight": torch.zeros(20, 4)}
    with pytest.raises(ValueError, match="up 20 x 4"):
        LoRA.from_tensors((20, 12), tensors)


def test_an_alpha_per_channel_is_refused() -> None:
    tensors = {**random_lora((20, 12), 3, 2.0).state_dict(), "alpha": torch.ones(3)}
    with pytest.raises(ValueError, match="single number"):
        LoRA.from_tensors((20, 12), tensors)


def test_integer_alpha_as_sd_scripts_writes_it_is_read() -> None:
    tensors = {**random_lora((20, 12), 3, 2.0).state_dict(), "alpha": torch.tensor(1)}
    assert LoRA.from_tensors((20, 12), tensors).alpha.item() == 1.0


@pytest.mark.parametrize("shape, largest", [((20, 12), 12), ((4, 300), 4), ((64, 4, 3, 3), 36), ((8, 20, 1, 1), 8)])
def test_largest_rank_is_that_of_a_random_full_weight(shape: tuple[int, ...], largest: int) -> None:
    full = torch.randn(shape, generator=torch.Generator().manual_seed(0)).flatten(1)
    assert LoRA.largest_rank(shape) == largest == torch.linalg.matrix_rank(full)


def test_down_starts_as_torchs_own_layers_do_and_without_the_global_generator() -> None:
    adapter, state = LoRA((640, 320), 16), torch.get_rng_state()
    adapter.reset(torch.zeros(640, 320), torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(adapter.lora_down.weight, nn.Linear(320, 16, bias=False).weight)
    assert adapter.lora_down.weight.abs().max() <= 1 / math.sqrt(320)


def test_product_norm_of_a_large_product() -> None:
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(8, 30, 3, 3, generator=generator), torch.randn(50, 8, 1, 1, generator=generator)
    torch.testing.assert_close(product_norm(down, up), (up.flatten(1) @ down.flatten(1)).norm(), atol=0, rtol=1e-5)
