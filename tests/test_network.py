"""Network: rules, starting values, file names, learning rates, and the report when a file does not fit."""

from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from lorasmith.errors import UserError
from lorasmith.network import Network, PartRate, Rule, check_ranks, match

TE = "lora_te_text_model_encoder_layers_0_mlp_fc1"
TO_K = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
PROJ = "lora_unet_mid_block_attentions_0_proj_in"


def make_targets(text_width: int = 24) -> dict[str, Any]:
    torch.manual_seed(0)
    return {PROJ: nn.Conv2d(16, 16, 1), TO_K: nn.Linear(text_width, 16), TE: nn.Linear(24, 48)}


def make_random(targets: dict[str, Any], seed: int = 0) -> Network:
    network = Network.create(targets, [Rule(rank=3, alpha=2)], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return network


def make_unet() -> Any:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=12,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return unet.requires_grad_(False)


def unet_targets(unet: Any) -> dict[str, Any]:
    """Every Linear and every convolution: 1x1, 3x3 and strided."""
    layers = ((name, layer) for name, layer in unet.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d)))
    return {f"lora_unet_{name.replace('.', '_')}": layer for name, layer in layers}


def unet_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(2, 5, 12, generator=generator)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 700]), text


def test_a_whole_unet_attached_equals_merged_and_detaching_restores_it() -> None:
    unet = make_unet()
    targets = unet_targets(unet)
    network = Network.create(targets, [Rule(rank=2)], seed=1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.05)
    network.multiplier = 0.8
    before, weights = unet(*unet_inputs()).sample, {key: value.clone() for key, value in unet.state_dict().items()}
    network.attach()
    attached = unet(*unet_inputs()).sample.detach()
    network.detach()
    assert torch.equal(unet(*unet_inputs()).sample, before)
    assert list(unet.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[key]) for key, value in unet.state_dict().items())
    with torch.no_grad():
        for name, adapter in network.adapters.items():
            targets[name].weight += 0.8 * adapter.delta(targets[name].weight)
    torch.testing.assert_close(unet(*unet_inputs()).sample, attached, atol=1e-4, rtol=1e-4)
    assert (attached - before).abs().max() > 0.05


def test_a_whole_unet_has_the_same_gradients_with_gradient_checkpointing() -> None:
    unet = make_unet().train()
    network = Network.create(unet_targets(unet), [Rule(rank=2)], seed=1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01)
    network.attach()

    def gradients() -> list[torch.Tensor]:
        loss = unet(*unet_inputs()).sample.square().mean()
        return list(torch.autograd.grad(loss, list(network.parameters())))

    plain = gradients()
    unet.enable_gradient_checkpointing()
    assert unet.is_gradient_checkpointing
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))
    assert all(gradient.abs().max() > 0 for gradient in plain)


def test_state_dict_is_the_file_sorted_whatever_the_order_of_targets() -> None:
    targets = make_targets()
    network = Network.create(targets, [Rule()], seed=1)
    keys = list(network.state_dict())
    tails = ("alpha", "lora_down.weight", "lora_up.weight")
    assert keys == [f"{name}.{tail}" for name in sorted(targets) for tail in tails]
    again = Network.create(dict(reversed(targets.items())), [Rule()], seed=1)
    assert list(again.state_dict()) == keys
    assert [id(p) for p in network.parameters()] == [id(network.get_parameter(k)) for k in keys if "alpha" not in k]


def test_base_layers_are_no_part_of_the_network() -> None:
    targets = make_targets()
    network = Network.create(targets, [Rule()], seed=1)
    ours = {id(parameter) for parameter in network.parameters()}
    assert not ours & {id(p) for layer in targets.values() for p in layer.parameters()}


def test_first_matching_rule_wins_and_unmatched_layers_stay_as_they_are() -> None:
    rules = [Rule("*attn2_to_k", rank=2), Rule("lora_unet_*", rank=3, alpha=1.5), Rule("lora_unet_mid*", rank=4)]
    targets = make_targets()
    network = Network.create(targets, rules, seed=1)
    assert {name: adapter.rank for name, adapter in network.adapters.items()} == {TO_K: 2, PROJ: 3}
    assert network.adapters[PROJ].alpha == 1.5 and network.adapters[TO_K].alpha == 2
    network.attach()
    assert not targets[TE]._forward_hooks


def test_rules_that_match_nothing_are_a_users_error() -> None:
    with pytest.raises(UserError, match=r"no layer matches 'lora_unet_up\*'.*names like lora_te_text"):
        match(make_targets(), [Rule("lora_unet_up*")])


def test_a_start_depends_on_seed_and_name_only() -> None:
    targets = make_targets()
    both = Network.create(targets, [Rule()], seed=5).state_dict()
    unet = Network.create({PROJ: targets[PROJ], TO_K: targets[TO_K]}, [Rule()], seed=5).state_dict()
    other = Network.create(targets, [Rule()], seed=6).state_dict()
    assert all(torch.equal(both[key], value) for key, value in unet.items())
    key = f"{PROJ}.lora_down.weight"
    assert not torch.equal(both[key], other[key])
    assert not torch.equal(both[key].flatten()[:16], both[f"{TO_K}.lora_down.weight"].flatten()[:16])


def test_nothing_is_drawn_from_the_global_generator() -> None:
    targets, state = make_targets(), torch.get_rng_state()
    Network.create(targets, [Rule()], seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_rank_too_large_is_told_from_shapes_alone() -> None:
    shapes = {PROJ: (320, 320, 1, 1), TO_K: (320, 768), TE: (3072, 768)}
    check_ranks(shapes, [Rule(rank=320)])
    with pytest.raises(UserError) as caught:
        check_ranks(shapes, [Rule("lora_unet*", rank=400), Rule(rank=768)])
    message = str(caught.value)
    assert "rank 400 is larger than 2 of 3 layers can use" in message
    assert f"{TO_K} (weight 320 x 768: at most 320)" in message and "at most 320 (--rank)" in message
    assert TE not in message
    with pytest.raises(UserError, match="rank 17 is larger"):
        Network.create(make_targets(), [Rule(rank=17)], seed=0)


def test_a_file_makes_the_same_network_again() -> None:
    targets = make_targets()
    network = make_random(targets)
    Network.check({name: tuple(layer.weight.shape) for name, layer in targets.items()}, network.state_dict())
    loaded = Network.load(targets, network.state_dict())
    assert loaded.state_dict().keys() == network.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in network.state_dict().items())


def test_ranks_and_alphas_may_differ_from_layer_to_layer_and_come_from_the_file() -> None:
    targets = make_targets()
    rules = [Rule("*to_k", rank=2, alpha=1), Rule("lora_te*", rank=5), Rule(rank=7)]
    tensors = {k: v for k, v in Network.create(targets, rules, seed=1).state_dict().items() if k != f"{PROJ}.alpha"}
    loaded: dict[str, Any] = dict(Network.load(targets, tensors).adapters)
    found = {name: (adapter.rank, float(adapter.alpha)) for name, adapter in loaded.items()}
    assert found == {TO_K: (2, 1), TE: (5, 5), PROJ: (7, 7)}


def test_one_report_of_everything_that_does_not_fit() -> None:
    targets = make_targets()
    tensors = make_random(targets).state_dict()
    del tensors[f"{PROJ}.lora_up.weight"]
    tensors[f"{TO_K}.lora_down.weight"] = torch.zeros(3, 99)
    for key in [key for key in tensors if key.startswith(TE)]:
        tensors[key.replace("fc1", "fc9")] = tensors.pop(key)
    with pytest.raises(UserError) as caught:
        Network.load(targets, tensors)
    message = str(caught.value)
    with pytest.raises(UserError) as caught_before_loading:
        Network.check({name: tuple(layer.weight.shape) for name, layer in targets.items()}, tensors)
    assert str(caught_before_loading.value) == message
    assert "0 of the 3 layers to train match" in message
    assert f"1 are missing from the file: {TE}" in message
    assert f"1 in the file are not among the layers to train: {TE.replace('fc1', 'fc9')}" in message
    assert f"{PROJ}: the file holds alpha, lora_down.weight, which is no complete adapter" in message
    assert f"{TO_K}: down 3 x 99 and up 16 x 3 in the file; the layer's weight is 16 x 24" in message


def test_a_file_of_another_family_is_named() -> None:
    tensors = make_random(make_targets(1024)).state_dict()
    with pytest.raises(UserError, match=r"file is for SD 2.x \(text width 1024\), the base model is SD 1.x"):
        Network.load(make_targets(768), tensors)


def test_multiplier_scales_every_layer_and_detach_ends_it() -> None:
    targets = make_targets()
    layer, x = targets[TE], torch.randn(2, 24, generator=torch.Generator().manual_seed(0))
    network, before = make_random(targets), layer(x)
    network.attach()
    change = layer(x) - before
    network.multiplier = 0.25
    torch.testing.assert_close(layer(x) - before, change * 0.25, atol=1e-4, rtol=1e-4)
    network.detach()
    assert torch.equal(layer(x), before)
    network.attach()
    torch.testing.assert_close(layer(x) - before, change * 0.25, atol=1e-4, rtol=1e-4)


def test_learning_rates_of_the_parts_and_of_rules() -> None:
    rules = [Rule("*to_k", lr_scale=0.5), Rule()]
    network = Network.create(make_targets(), rules, seed=1)
    groups = network.param_groups({"unet": PartRate(1e-4), "text_encoder": PartRate(1e-5)})
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("text_encoder", 1e-5), ("unet", 5e-5), ("unet", 1e-4)
    ]  # fmt: skip
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in network.parameters())


def test_what_has_a_rate_of_0_is_in_no_group() -> None:
    network = Network.create(make_targets(), [Rule()], seed=1)
    groups = network.param_groups({"unet": PartRate(1e-4), "text_encoder": PartRate(0.0, up_ratio=4)})
    assert [group["name"] for group in groups] == ["unet"]
    wanted = sum(len(list(a.parameters())) for name, a in network.adapters.items() if name.startswith("lora_unet"))
    assert len(groups[0]["params"]) == wanted


def test_the_up_halves_learn_faster_and_excluded_tensors_are_not_decayed() -> None:
    network = Network.create(make_targets(), [Rule("*to_k", lr_scale=0.5), Rule()], seed=1)
    rates = {"unet": PartRate(1e-4, up_ratio=16), "text_encoder": PartRate(1e-5)}
    groups = network.param_groups(rates, ["*to_k.lora_down.weight"])
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    seen = {}
    for group in groups:
        for parameter in group["params"]:
            seen[names[id(parameter)]] = group["lr"], group.get("weight_decay")
    assert seen.keys() == set(names.values())
    for name, (rate, decay) in seen.items():
        is_unet = name.startswith("lora_unet")
        expected = (1e-4 if is_unet else 1e-5) * (0.5 if "to_k" in name else 1)
        expected *= 16 if is_unet and name.endswith("lora_up.weight") else 1
        assert rate == pytest.approx(expected) and decay == (0.0 if name.endswith("to_k.lora_down.weight") else None)


def test_a_faster_up_half_needs_one() -> None:
    network = Network.create(make_targets(), [Rule(adapter="full")], seed=1)
    with pytest.raises(UserError, match=r"lora_plus_ratio is for adapters with a lora_up\.weight, and there is none"):
        network.param_groups({part: PartRate(1e-4, up_ratio=2) for part in ("unet", "text_encoder")})


def test_norms_are_those_of_delta_and_clipping_holds_them() -> None:
    targets = make_targets()
    network = make_random(targets)
    norms = network.delta_norms()
    for name, adapter in network.adapters.items():
        assert norms[name] == pytest.approx(adapter.delta(targets[name].weight).norm().item(), rel=1e-5)
    limit = sorted(norms.values())[1] * 1.0001
    assert network.clip_norms_(limit) == 1
    clipped = network.delta_norms()
    assert max(clipped.values()) == pytest.approx(limit, rel=1e-5)
    assert {n: clipped[n] for n in norms if norms[n] < limit} == {n: v for n, v in norms.items() if v < limit}


def test_training_a_layer_towards_another_works_end_to_end() -> None:
    torch.manual_seed(0)
    layer, wanted = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8).requires_grad_(False)
    network = Network.create({"lora_unet_x": layer}, [Rule(rank=8)], seed=0)
    network.attach()
    optimizer = torch.optim.Adam(network.param_groups({"unet": PartRate(0.02)}))
    x = torch.randn(64, 8)
    start = (layer(x) - wanted(x)).square().mean().item()
    for _ in range(300):
        loss = (layer(x) - wanted(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (
        layer(x) - wanted(x)
    ).square().mean().item() < 0.3 * start  # what is left is the bias, which LoRA does not touch
