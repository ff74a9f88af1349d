"""Low-rank matrices: held to torch's own decomposition of the whole matrix, and to the definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorasmith.lowrank import (
    RANK_RULES,
    Factors,
    concatenate,
    decompose,
    decompose_product,
    rank_for_energy,
    rank_for_frobenius,
    rank_for_ratio,
)

sizes = st.integers(1, 9)
seeds = st.integers(0, 2**31)


def make_factors(out: int, rank: int, width: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return Factors(draw(out, rank), draw(rank, width))


def product(factors: Factors) -> Tensor:
    return factors.up @ factors.down


@given(sizes, sizes, sizes, seeds)
def test_a_product_decomposes_as_the_whole_matrix_does(out: int, rank: int, width: int, seed: int) -> None:
    factors = make_factors(out, rank, width, seed)
    found, whole = decompose_product(factors), torch.linalg.svdvals(product(factors))
    num = len(found.values)
    assert num == min(out, rank, width)
    torch.testing.assert_close(found.values, whole[:num])
    torch.testing.assert_close(found.left.T @ found.left, torch.eye(num, dtype=torch.float64))
    torch.testing.assert_close(found.right @ found.right.T, torch.eye(num, dtype=torch.float64))
    torch.testing.assert_close(product(found.cut(num)), product(factors))


@given(sizes, sizes, sizes, seeds)
def test_a_cut_is_as_near_as_any_matrix_of_its_rank_can_be(out: int, rank: int, width: int, seed: int) -> None:
    matrix = make_factors(out, 9, width, seed).up @ make_factors(out, 9, width, seed + 1).down
    rank = min(rank, out, width)
    found = decompose(matrix)
    kept = found.cut(rank)
    assert kept.rank == rank and kept.up.shape == (out, rank)
    lost = (matrix - product(kept)).square().sum()
    torch.testing.assert_close(lost, torch.linalg.svdvals(matrix)[rank:].square().sum(), atol=1e-8, rtol=1e-6)
    assert found.energy(rank) == pytest.approx(product(kept).square().sum().item())
    assert found.energy() == pytest.approx(matrix.square().sum().item())


@given(st.lists(st.tuples(sizes, seeds), min_size=1, max_size=4), sizes, sizes)
def test_concatenated_factors_are_the_exact_sum(parts: list[tuple[int, int]], out: int, width: int) -> None:
    factors = [make_factors(out, rank, width, seed) for rank, seed in parts]
    summed = concatenate(factors)
    assert summed.rank == sum(rank for rank, _ in parts)
    torch.testing.assert_close(product(summed), torch.stack([product(one) for one in factors]).sum(0))


@given(seeds, st.floats(-3, 3))
def test_factors_are_scaled_as_a_product_and_evenly(seed: int, factor: float) -> None:
    factors = make_factors(5, 3, 4, seed)
    scaled = factors.scaled(factor)
    torch.testing.assert_close(product(scaled), factor * product(factors))
    torch.testing.assert_close(scaled.up.norm() / factors.up.norm(), scaled.down.norm() / factors.down.norm())


values_of = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12).map(
    lambda found: torch.tensor(sorted(found, reverse=True), dtype=torch.float64)
)


@given(values_of, st.floats(0.01, 1))
def test_the_rank_for_a_share_keeps_it_and_one_less_would_not(values: Tensor, share: float) -> None:
    for rule, norm in (
        (rank_for_energy, lambda v: v.square().sum()),
        (rank_for_frobenius, lambda v: v.square().sum().sqrt()),
    ):
        rank = rule(values, share)
        assert norm(values[:rank]) >= share * norm(values) * (1 - 1e-12)
        assert rank == 1 or norm(values[: rank - 1]) < share * norm(values) * (1 + 1e-12)


@given(values_of, st.floats(1, 1e4))
def test_the_rank_for_a_ratio_keeps_the_values_above_it(values: Tensor, ratio: float) -> None:
    rank = rank_for_ratio(values, ratio)
    assert rank == max(1, sum(value > values[0] / ratio for value in values))


def test_nothing_has_rank_one_by_every_rule() -> None:
    assert [rule(torch.zeros(4), 1.0) for rule in RANK_RULES.values()] == [1, 1, 1]


def test_a_whole_share_keeps_all_that_counts() -> None:
    assert rank_for_energy(torch.tensor([3.0, 2.0, 1.0, 0.0]), 1.0) == 3
