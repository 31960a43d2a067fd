"""Alternating least squares for any rank graph: each factor in turn is a linear least-squares problem."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from sekron_search.kron.structure import Structure

#: Added to the normal matrix, relative to its mean diagonal. A larger Hessian keeps singular systems solvable and
#: every step monotone, and damps the cancelling rank-one terms into which plain CP iterations drift.
PROXIMAL = 1e-9

#: Least mean diagonal, for factors that vanish; weights come scaled to a largest entry of one.
TINY = 1e-20


def alternating_least_squares(
    structure: Structure, modes: Tensor, factors: Sequence[Tensor], *, max_sweeps: int = 100, tolerance: float = 1e-7
) -> list[Tensor]:
    """Lower the squared error of the factors, one factor at a time, never raising it.

    Factor k minimises |T - contraction|^2; its normal matrix is the contraction of the other factors' Gram matrices.

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
    parts = [_independent_parts(structure, k) for k in range(structure.num_factors)]
    previous = torch.full_like(scale, torch.inf)
    for _ in range(max_sweeps):
        for k, own_parts in enumerate(parts):
            normals = [_normal_matrix(structure, factors, k, part) for part in own_parts]
            target = _project_on_others(structure, modes, factors, k)
            # A Newton step whose Hessian is the normal matrix, made a little larger where it may be singular.
            residual = target - _apply(structure, k, own_parts, normals, factors[k])
            damped = [_damped(normal) for normal in normals]
            factors[k] = factors[k] + _apply(structure, k, own_parts, damped, residual, invert=True)
        # |T - T^|^2 = |T|^2 - 2 <A, target> + <A, normal A>, with the last factor's quantities at hand.
        curvature = (_apply(structure, k, own_parts, normals, factors[k]) * factors[k]).flatten(1).sum(1)
        error = 1 - (2 * (factors[k] * target).flatten(1).sum(1) - curvature) / scale
        if bool(((previous - error) <= tolerance).all()):
            break
        previous = error
    return factors


def _independent_parts(structure: Structure, k: int) -> list[list[str]]:
    """The rank indices of factor k in groups that no chain of other factors connects.

    The normal matrix is the Kronecker product of one matrix per group: small ones for Tucker's core and for
    Tensor-Train, where the whole would be too large to solve with.
    """
    parts: list[set[str]] = []
    for j, carried in enumerate(structure.carries):
        if j != k and carried:
            joined = set(carried).union(*(part for part in parts if part & set(carried)))
            parts = [part for part in parts if not part & joined] + [joined]
    groups = [[n for n in structure.carries[k] if n in part] for part in parts]
    return [group for group in groups if group]


def _damped(normal: Tensor) -> Tensor:
    diagonal = normal.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(TINY)
    eye = torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
    return normal + PROXIMAL * diagonal[:, None, None] * eye


def _apply(
    structure: Structure,
    k: int,
    parts: Sequence[Sequence[str]],
    matrices: Sequence[Tensor],
    factor: Tensor,
    *,
    invert: bool = False,
) -> Tensor:
    """The matrices, one per part, or their inverses, applied to factor k along the rank indices of the parts."""
    carried = structure.carries[k]
    for part, matrix in zip(parts, matrices, strict=True):
        axes = [1 + carried.index(n) for n in part]
        rest = [axis for axis in range(1, factor.dim()) if axis not in axes]
        permutation = [0, *axes, *rest]
        moved = factor.permute(permutation)
        flat = moved.reshape(moved.shape[0], matrix.shape[-1], -1)
        flat = torch.linalg.solve(matrix, flat) if invert else matrix @ flat
        inverse = sorted(range(factor.dim()), key=permutation.__getitem__)
        factor = flat.reshape(moved.shape).permute(inverse)
    return factor


def _normal_matrix(structure: Structure, factors: Sequence[Tensor], k: int, part: Sequence[str]) -> Tensor:
    """(B, R, R): the Gram matrix of what the other factors contract to, over one part of k's rank indices."""
    names = [name for name, _ in structure.ranks]
    sizes = structure.rank_sizes
    count = len(names)
    reached = set(part)
    for _ in range(structure.num_factors):
        for j, carried in enumerate(structure.carries):
            if j != k and reached & set(carried):
                reached |= set(carried)
    operands: list[object] = []
    for j, carried in enumerate(structure.carries):
        if j != k and reached & set(carried):
            own = [names.index(n) for n in carried]
            # Both copies share the batch and the factor's own mode; torch finds the order of contraction. Gram matrices
            # of single factors, over all their indices, would be far too large for a Tucker core.
            operands += [factors[j], [2 * count, *own, 2 * count + 1 + j]]
            operands += [factors[j], [2 * count, *(count + i for i in own), 2 * count + 1 + j]]
    kept = [names.index(n) for n in part]
    result: Tensor = torch.einsum(*operands, [2 * count, *kept, *(count + i for i in kept)])
    size = prod(sizes[n] for n in part)
    return result.reshape(-1, size, size)


def _project_on_others(structure: Structure, modes: Tensor, factors: Sequence[Tensor], k: int) -> Tensor:
    """(B, rank indices of k, m_k): the weight contracted with all factors but k."""
    names = [name for name, _ in structure.ranks]
    batch = len(names)
    first = batch + 1
    operands: list[object] = [modes, [batch, *(first + j for j in range(structure.num_factors))]]
    for j, carried in enumerate(structure.carries):
        if j != k:
            operands += [factors[j], [batch, *(names.index(n) for n in carried), first + j]]
    own = [names.index(n) for n in structure.carries[k]]
    result: Tensor = torch.einsum(*operands, [batch, *own, first + k])
    return result
