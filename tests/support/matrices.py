"""Matrices that are hard for factorisations, and measures of a basis."""

from __future__ import annotations

import torch
from torch import Tensor

F64 = torch.float64


def orthogonal(n: int, seed: int) -> Tensor:
    """A random orthogonal matrix in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=generator)).Q


def with_eigenvalues(values: Tensor, seed: int) -> Tensor:
    """A float32 Gram matrix with these eigenvalues and random eigenvectors."""
    q = orthogonal(len(values), seed)
    return (q * values.to(F64) @ q.mT).float()


def hard_grams(n: int, seed: int = 0) -> dict[str, Tensor]:
    """[n, n] matrices: condition 1e12, rank one, zero, repeated eigenvalues, the identity, tiny and huge numbers."""
    spread = torch.logspace(0, -12, n, dtype=F64)
    first, pairs = torch.zeros(n), torch.ones(n)
    first[0], pairs[n // 2 :] = 1, 0.25
    return {
        "condition": with_eigenvalues(spread, seed),
        "rank one": with_eigenvalues(first, seed + 1),
        "zero": torch.zeros(n, n),
        "repeated": with_eigenvalues(pairs, seed + 2),
        "identity": torch.eye(n),
        "tiny": with_eigenvalues(spread, seed + 3) * 1e-30,
        "huge": with_eigenvalues(spread, seed + 4) * 1e30,
    }


def orthogonality(basis: Tensor) -> float:
    """The largest spectral norm of QᵀQ − I of all matrices, in float64."""
    basis = basis.to(F64)
    error = basis.mT @ basis - torch.eye(basis.shape[-1], dtype=F64)
    return float(torch.linalg.matrix_norm(error, 2).max())


def apart(first: Tensor, second: Tensor) -> float:
    """The largest distance of two bases' columns as unit vectors, whatever their signs, in float64."""
    a, b = (torch.nn.functional.normalize(x.to(F64), dim=-2) for x in (first, second))
    return float(torch.minimum((a - b).norm(dim=-2), (a + b).norm(dim=-2)).max())
