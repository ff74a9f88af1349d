"""What a file's tensors may look like besides the usual: other shapes, other orders, some left out."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.adapters.base import Adapter
from lorasmith.network import Network, Rule, recognise

SHAPES = {"linear": (20, 12), "conv": (20, 12, 3, 3), "conv1x1": (20, 12, 1, 1)}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.5


def make(adapter: str, kind: str, **options: Any) -> tuple[Tensor, Adapter, dict[str, Tensor]]:
    """Return a weight, an adapter of random values for it, and its tensors."""
    weight = random(*SHAPES[kind])
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    network = Network.create({"lora_unet_a": layer}, [Rule(adapter=adapter, rank=2, options=options)], seed=1)
    one = network.adapters["lora_unet_a"]
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.copy_(random(*parameter.shape))
    return weight, one, one.state_dict()


def delta(weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    return recognise(tensors).from_tensors(tuple(weight.shape), tensors).delta(weight)


@pytest.mark.parametrize("adapter", ["lora", "dora", "loha", "lokr", "glora", "oft", "boft"])
def test_alpha_left_out_is_a_scale_of_one_and_no_constraint(adapter: str) -> None:
    weight, one, tensors = make(adapter, "linear")
    assert torch.equal(delta(weight, {k: v for k, v in tensors.items() if k != "alpha"}), one.delta(weight))


@pytest.mark.parametrize("adapter", ["full", "ia3"])
def test_alpha_where_it_means_nothing_changes_nothing(adapter: str) -> None:
    weight, one, tensors = make(adapter, "conv")
    assert torch.equal(delta(weight, {**tensors, "alpha": torch.tensor(7.0)}), one.delta(weight))


@pytest.mark.parametrize("kind", SHAPES)
def test_early_glora_has_the_two_of_each_pair_the_other_way_round(kind: str) -> None:
    weight, one, tensors = make("glora", kind)
    swapped = {key.translate({ord("1"): "2", ord("2"): "1"}): value for key, value in tensors.items()}
    assert torch.equal(delta(weight, swapped), one.delta(weight))


def test_lokrs_second_factor_may_keep_the_kernels_dimensions() -> None:
    weight, one, tensors = make("lokr", "conv", factor=2)
    assert tensors["lokr_w2_b"].shape == (2, 54)
    assert torch.equal(
        delta(weight, {**tensors, "lokr_w2_b": tensors["lokr_w2_b"].view(2, 6, 3, 3)}), one.delta(weight)
    )


@pytest.mark.parametrize(("w1", "w2"), [((4, 3), (5, 4)), ((5, 12), (4, 1)), ((1, 1), (20, 12)), ((20, 12), (1, 1))])
def test_lokr_of_any_division_of_the_layer(w1: tuple[int, ...], w2: tuple[int, ...]) -> None:
    tensors = {"lokr_w1": random(*w1), "lokr_w2": random(*w2), "alpha": torch.tensor(0.25)}
    expected = torch.kron(tensors["lokr_w1"], tensors["lokr_w2"])  # both are whole: no scale
    torch.testing.assert_close(delta(torch.zeros(20, 12), tensors), expected)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("on_output", [True, False])
def test_dora_scale_has_the_axis_that_its_shape_tells(kind: str, on_output: bool) -> None:
    """The oracle is the formula, on the weight as rows of outputs or of inputs."""
    weight, one, tensors = make("dora", kind, wd_on_output=on_output)
    merged = weight + delta(weight, {k: v for k, v in tensors.items() if k != "dora_scale"})
    rows = merged if on_output else merged.transpose(0, 1)
    norms = rows.flatten(1).norm(dim=1).view(-1, *(1 for _ in SHAPES[kind][1:]))
    scaled = rows / norms * tensors["dora_scale"].view(norms.shape)
    expected = (scaled if on_output else scaled.transpose(0, 1)) - weight
    torch.testing.assert_close(one.delta(weight), expected)
    for shape in [(20,), (20, 1)] if on_output else [(1, 12)]:
        torch.testing.assert_close(
            delta(weight, {**tensors, "dora_scale": tensors["dora_scale"].view(shape)}), expected
        )


def test_a_square_layers_single_row_of_scales_belongs_to_the_inputs() -> None:
    weight = random(6, 6)
    tensors = {"lora_down.weight": random(2, 6), "lora_up.weight": random(6, 2), "dora_scale": torch.ones(1, 6)}
    torch.testing.assert_close((weight + delta(weight, tensors)).norm(dim=0), torch.ones(6))
    torch.testing.assert_close(
        (weight + delta(weight, {**tensors, "dora_scale": torch.ones(6, 1)})).norm(dim=1), torch.ones(6)
    )


def test_a_change_of_the_bias_may_stand_alone() -> None:
    for tensors, shape in [({"diff_b": random(20)}, (20, 12)), ({"b_norm": random(20)}, (20,))]:
        one = recognise(tensors).from_tensors(shape, tensors)
        assert torch.count_nonzero(one.delta(torch.zeros(shape))) == 0
        change = one.delta_bias(torch.zeros(20))
        assert change is not None and torch.equal(change, *tensors.values())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1"], "in question: hada_t1"),
        (["lokr_w1", "lokr_w2_a"], "no complete adapter"),
        (["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2"], "no complete adapter"),
        (["lora_down.weight"], "no complete adapter"),
        (["lora_down.weight", "lora_up.weight", "oft_blocks"], "no complete adapter"),
        (["oft_blocks"], r"oft_blocks 2 x 2 in the file; number x size x size with number \* size = 20"),
        (["alpha"], "no complete adapter"),
        (["on_input", "weight"], "on_input 2 x 2 in the file; a single number is needed"),
    ],
)
def test_incomplete_or_mixed_tensors_are_refused(tensors: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        delta(random(20, 12), {name: torch.ones(2, 2) for name in tensors})


def test_absurd_ranks_cost_no_memory() -> None:
    """A view of one number with the shape of terabytes, as a damaged file might say."""
    huge = torch.zeros(1).expand(10**9, 12)
    for tensors in (
        {"lora_down.weight": huge, "lora_up.weight": torch.zeros(20, 2)},
        {"hada_w1_a": torch.zeros(20, 2), "hada_w1_b": huge, "hada_w2_a": torch.zeros(20, 2), "hada_w2_b": huge},
        {"lokr_w1": torch.zeros(4, 3), "lokr_w2_a": torch.zeros(5, 2), "lokr_w2_b": huge},
        {"a1.weight": huge, "a2.weight": huge, "b1.weight": huge, "b2.weight": huge},
    ):
        with pytest.raises(ValueError, match="1000000000"):
            delta(torch.zeros(20, 12), tensors)
