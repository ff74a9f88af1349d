"""Low-rank matrices, up @ down: the nearest one to a matrix, sums of several, and which rank is enough.

Cutting the singular value decomposition leaves the nearest matrix of a rank, by the Frobenius norm (Eckart and Young
1936, https://doi.org/10.1007/BF02288367). A convolution's weight (out, in, kh, kw) is the matrix (out, in * kh * kw).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The matrix up (out, rank) @ down (rank, in)."""

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def scaled(self, factor: float) -> "Factors":
        """Return factors of `factor` times the matrix, the change shared so that neither outgrows the other."""
        root = abs(factor) ** 0.5
        return Factors(self.up * (root if factor >= 0 else -root), self.down * root)


@dataclass(frozen=True)
class Decomposition:
    """The matrix left (out, k) @ diag(values) @ right (k, in); both have unit vectors, and the values (k,) fall."""

    left: Tensor
    values: Tensor
    right: Tensor

    def cut(self, rank: int) -> Factors:
        """Return the nearest matrix of that rank; the values' roots go into both factors."""
        roots = self.values[:rank].sqrt()
        return Factors(self.left[:, :rank] * roots, roots[:, None] * self.right[:rank])

    def energy(self, rank: int | None = None) -> float:
        """Return the sum of the first squared values: the squared Frobenius norm of what `cut` keeps; None: of all."""
        return self.values[:rank].double().square().sum().item()


def decompose(matrix: Tensor) -> Decomposition:
    """Return the decomposition of a matrix (out, in), in its own precision."""
    if matrix.shape[0] < matrix.shape[1]:  # LAPACK takes several times as long for a wide matrix as for its transpose
        turned = decompose(matrix.T)
        return Decomposition(turned.right.T, turned.values, turned.left.T)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return Decomposition(left, values, right)


def decompose_product(factors: Factors) -> Decomposition:
    """Return the decomposition of up @ down in fp64, without building it.

    With up = Q R and down^T = P S, up @ down = Q (R S^T) P^T, and the middle is only as large as the rank.
    """
    left, middle_left = torch.linalg.qr(factors.up.double())
    right, middle_right = torch.linalg.qr(factors.down.double().T)
    middle = decompose(middle_left @ middle_right.T)
    return Decomposition(left @ middle.left, middle.values, middle.right @ right.T)


def concatenate(parts: Sequence[Factors]) -> Factors:
    """Return the exact sum of the matrices: its rank is the sum of the ranks."""
    return Factors(torch.cat([part.up for part in parts], dim=1), torch.cat([part.down for part in parts]))


def rank_for_energy(values: Tensor, share: float) -> int:
    """Return the smallest rank that keeps this share of the squared Frobenius norm, at least 1."""
    energies = values.double().square().cumsum(0)
    return min(int((energies < share * energies[-1]).sum()) + 1, len(values))


def rank_for_frobenius(values: Tensor, share: float) -> int:
    """Return the smallest rank that keeps this share of the Frobenius norm, at least 1."""
    return rank_for_energy(values, share**2)


def rank_for_ratio(values: Tensor, ratio: float) -> int:
    """Return how many values are above the largest divided by `ratio`, at least 1."""
    return max(int((values.double() > values[0].double() / ratio).sum()), 1)


RANK_RULES: dict[str, Callable[[Tensor, float], int]] = {
    "energy": rank_for_energy,
    "ratio": rank_for_ratio,
    "frobenius": rank_for_frobenius,
}
