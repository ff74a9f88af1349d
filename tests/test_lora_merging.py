"""Sums of LoRAs without a base: held to the definition, layer by layer, for any ranks, alphas and ratios."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorasmith.errors import UserError
from lorasmith.formats.dialects import AnyLora
from lorasmith.lora_files import contents_of, energy_share, tensors_of
from lorasmith.lora_merging import MERGED_KEY, Merged, Ratios, merge, metadata
from tests.random_lora import CONV, PROJ_IN, SHAPES, TE, TO_K, deltas_of, make_lora, ranks_of

ratios_of = st.floats(-2, 2).filter(lambda ratio: abs(ratio) > 0.01)
names_of = st.sets(st.sampled_from(list(SHAPES)), min_size=1)
loras = st.builds(
    lambda names, rank, alpha, seed: make_lora({n: SHAPES[n] for n in names}, rank=rank, alpha=alpha, seed=seed),
    names_of, st.integers(1, 6), st.none() | st.floats(0.1, 8), st.integers(0, 1000),
)  # fmt: skip
weighted = st.lists(st.tuples(loras, ratios_of, ratios_of), min_size=1, max_size=3)
Weighted = list[tuple[dict[str, Tensor], float, float]]


def file_of(tensors: dict[str, Tensor], name: str = "a", family: str = "unknown", **header: str) -> AnyLora:
    return AnyLora(Path(f"{name}.safetensors"), "kohya", family, tensors, header, {})


def merge_files(files: Sequence[AnyLora], ratios: Sequence[Ratios], rank: int | None = None) -> Merged:
    return merge(files, [contents_of(file) for file in files], ratios, rank=rank)


def merged(given_loras: Weighted, rank: int | None = None) -> Merged:
    files = [file_of(tensors) for tensors, _, _ in given_loras]
    ratios = [{"unet": unet, "text_encoder": text_encoder} for _, unet, text_encoder in given_loras]
    return merge_files(files, ratios, rank)


def expected_sum(given_loras: Weighted) -> dict[str, Tensor]:
    """Return the sum from the definition, in fp64; what a file does not have counts as zero."""
    found: dict[str, Tensor] = {}
    for tensors, unet, text_encoder in given_loras:
        for name, delta in deltas_of(tensors).items():
            change = delta * (text_encoder if name.startswith("lora_te") else unet)
            found[name] = found[name] + change if name in found else change
    return found


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, atol=1e-6, rtol=1e-5)


@given(weighted)
def test_the_sum_is_that_of_the_products(given_loras: Weighted) -> None:
    found = merged(given_loras)
    assert_equal(deltas_of(tensors_of(found.layers)), expected_sum(given_loras))
    ranks = [ranks_of(tensors) for tensors, _, _ in given_loras]
    assert {name: layer.factors.rank for name, layer in found.layers.items()} == {
        name: sum(rank.get(name, 0) for rank in ranks) for name in found.layers
    }
    assert energy_share(found.kept.values()) == 1


@given(weighted)
def test_the_order_does_not_matter(given_loras: Weighted) -> None:
    one, other = merged(given_loras), merged(given_loras[::-1])
    assert_equal(deltas_of(tensors_of(one.layers)), deltas_of(tensors_of(other.layers)))


@given(weighted, st.integers(1, 20))
def test_a_cut_sum_is_the_nearest_of_its_rank_and_says_how_near(given_loras: Weighted, rank: int) -> None:
    found = merged(given_loras, rank=rank)
    deltas = deltas_of(tensors_of(found.layers))
    for name, whole in expected_sum(given_loras).items():
        values = torch.linalg.svdvals(whole)
        lost = (deltas[name] - whole).norm()
        torch.testing.assert_close(lost, values[rank:].norm(), atol=1e-5, rtol=1e-3)
        told = found.kept[name]
        assert told.rank == found.layers[name].factors.rank <= rank
        assert told.kept == pytest.approx(values[:rank].square().sum().item(), rel=1e-3, abs=1e-9)
        assert told.total == pytest.approx(values.square().sum().item(), rel=1e-3, abs=1e-9)


@given(weighted)
def test_a_rank_that_is_enough_loses_nothing(given_loras: Weighted) -> None:
    found = merged(given_loras, rank=24)
    assert_equal(deltas_of(tensors_of(found.layers)), expected_sum(given_loras))


def test_a_part_with_ratio_zero_is_left_out() -> None:
    found = merged([(make_lora(), 0.0, 1.0)])
    assert set(found.layers) == {TE}
    with pytest.raises(UserError, match="its ratio is 0"):
        merged([(make_lora(), 1.0, 1.0), (make_lora(), 0.0, 0.0)])


def test_a_1x1_convolution_may_be_stored_in_both_ways() -> None:
    tensors = make_lora({PROJ_IN: SHAPES[PROJ_IN]})
    flat = {key: tensor.flatten(1) if tensor.dim() else tensor for key, tensor in tensors.items()}
    for pair in ([tensors, flat], [flat, tensors]):
        found = merged([(one, 1.0, 1.0) for one in pair])
        assert found.layers[PROJ_IN].shape == SHAPES[PROJ_IN]
        assert_equal(deltas_of(tensors_of(found.layers)), {PROJ_IN: 2 * deltas_of(tensors)[PROJ_IN]})


def test_other_families_and_shapes_are_refused_with_the_reason() -> None:
    files = [file_of(make_lora(), "a", "sd1"), file_of(make_lora(), "b", "sd2")]
    both = [{"unet": 1.0, "text_encoder": 1.0}] * 2
    with pytest.raises(UserError, match=r"a.safetensors is for Stable Diffusion 1.x and b.*768 and 1024"):
        merge_files(files, both)
    wider = file_of(make_lora({TO_K: (16, 32)}), "wider")
    with pytest.raises(UserError, match=f"{TO_K} has weights of 16 x 24 in a.safetensors but of 16 x 32 in wider"):
        merge_files([files[0], wider], both)
    with pytest.raises(UserError, match="10 x 8 x 3 x 3"):
        merge_files([files[0], file_of(make_lora({CONV: (10, 8)}))], both)


def test_metadata_hold_what_the_files_agree_on_and_where_they_are_from() -> None:
    one = {"ss_v2": "False", "ss_seed": "1", "modelspec.architecture": "x/lora", "modelspec.title": "A", "other": "x"}
    two = {"ss_v2": "False", "ss_seed": "2", "modelspec.architecture": "x/lora", "sshs_model_hash": "ff"}
    files = [file_of(make_lora(), "a", "sd1", **one), file_of(make_lora(rank=2), "b", "unknown", **two)]
    ratios = [{"unet": 0.8, "text_encoder": 0.5}, {"unet": -1.0, "text_encoder": 1.0}]
    found = metadata(files, ratios, merge_files(files, ratios).layers, title="both", time=0)
    assert json.loads(found.pop(MERGED_KEY)) == [
        {"file": "a.safetensors", "ratios": ratios[0], "sshs_model_hash": None},
        {"file": "b.safetensors", "ratios": ratios[1], "sshs_model_hash": "ff"},
    ]
    assert found == {
        "ss_v2": "False", "ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora",
        "ss_network_dim": "6", "ss_network_alpha": "6.0", "ss_output_name": "both",
        "modelspec.architecture": "x/lora", "modelspec.title": "both", "modelspec.date": "1970-01-01T00:00:00",
        "modelspec.merged_from": "A, b",
    }  # fmt: skip
