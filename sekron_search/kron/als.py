"""Alternating least squares for any rank graph: each factor in turn is a linear least-squares problem."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sekron_search.kron.structure import Structure

#: Proximal weight relative to the mean diagonal of the Gram matrix. It keeps singular systems solvable and every
#: step monotone, and damps the cancelling rank-one terms into which plain CP iterations drift.
PROXIMAL = 1e-9


def alternating_least_squares(
    structure: Structure, modes: Tensor, factors: Sequence[Tensor], *, max_sweeps: int = 100, tolerance: float = 1e-7
) -> list[Tensor]:
    """Lower the squared error of the factors, one factor at a time, never raising it.

    Factor k minimises |T - contraction|^2 + mu |A_k - A_k_before|^2: its normal matrix is the contraction of the other
    factors' Gram matrices, of the size of the rank indices that k carries.

    Args:
        structure: The structure that the factors follow.
        modes: (B, m_1, ..., m_S), a batch of unfolded weights; computed in this dtype, float64 is meant.
        factors: Start, of shapes (B, rank indices, m_k).
        max_sweeps: At most so many passes over all factors.
        tolerance: Stop when a sweep lowers the relative squared error of no batch entry by more than this.

    Returns:
        Factors of the same shapes.

    Source: Kolda and Bader 2009, Sec. 3.4, generalised from CP to tensor networks with hyperedges.
    """
    factors = list(factors)
    scale = modes.flatten(1).square().sum(1).clamp_min(torch.finfo(modes.dtype).tiny)
    grams = [_gram(factor) for factor in factors]
    previous = torch.full_like(scale, torch.inf)
    for _ in range(max_sweeps):
        for k in range(structure.num_factors):
            normal = _normal_matrix(structure, grams, k)
            target = _project_on_others(structure, modes, factors, k)
            size = normal.shape[-1]
            proximal = PROXIMAL * normal.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(modes.dtype).tiny)
            before = factors[k].reshape(target.shape)
            system = normal + proximal[:, None, None] * torch.eye(size, dtype=normal.dtype, device=normal.device)
            solved = torch.linalg.solve(system, target + proximal[:, None, None] * before)
            factors[k] = solved.reshape(factors[k].shape)
            grams[k] = _gram(factors[k])
        # |T - T^|^2 = |T|^2 - 2 <A, target> + <A A', normal>, with the last factor's quantities at hand.
        fitted = 2 * (solved * target).sum((1, 2)) - ((normal @ solved) * solved).sum((1, 2))
        error = 1 - fitted / scale
        if bool(((previous - error) <= tolerance).all()):
            break
        previous = error
    return factors


def _gram(factor: Tensor) -> Tensor:
    """(B, r, r') with r all rank indices of the factor together: A A' over its own mode."""
    flat = factor.flatten(1, -2) if factor.dim() > 2 else factor[:, None]
    return flat @ flat.mT


def _normal_matrix(structure: Structure, grams: Sequence[Tensor], k: int) -> Tensor:
    """(B, R_k, R_k): the Gram matrix of what the other factors contract to, over the indices that k carries."""
    names = [name for name, _ in structure.ranks]
    sizes = structure.rank_sizes
    count = len(names)
    operands: list[object] = []
    for j, carried in enumerate(structure.carries):
        if j != k:
            own = [names.index(n) for n in carried]
            shape = [sizes[n] for n in carried]
            gram = grams[j].reshape(-1, *shape, *shape)
            operands += [gram, [2 * count, *own, *(count + i for i in own)]]
    own = [names.index(n) for n in structure.carries[k]]
    result: Tensor = torch.einsum(*operands, [2 * count, *own, *(count + i for i in own)])
    size = int(torch.tensor([sizes[n] for n in structure.carries[k]]).prod()) if own else 1
    return result.reshape(-1, size, size)


def _project_on_others(structure: Structure, modes: Tensor, factors: Sequence[Tensor], k: int) -> Tensor:
    """(B, R_k, m_k): the weight contracted with all factors but k."""
    names = [name for name, _ in structure.ranks]
    batch = len(names)
    first = batch + 1
    operands: list[object] = [modes, [batch, *(first + j for j in range(structure.num_factors))]]
    for j, carried in enumerate(structure.carries):
        if j != k:
            operands += [factors[j], [batch, *(names.index(n) for n in carried), first + j]]
    own = [names.index(n) for n in structure.carries[k]]
    result: Tensor = torch.einsum(*operands, [batch, *own, first + k])
    return result.reshape(modes.shape[0], -1, modes.shape[1 + k])
