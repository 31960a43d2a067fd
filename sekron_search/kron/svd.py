"""Fits by singular value decompositions: optimal for two factors, a greedy recursion beyond."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from sekron_search.kron.structure import Structure

#: Terms of less than this part of the size of surplus ones count as none.
DEAD_SHARE = 0.1


def recursive_svd(structure: Structure, modes: Tensor, surplus: float = 0.0) -> list[Tensor]:
    """Factors by truncated SVDs that split off one factor after the other.

    For two factors this is optimal. For the nested graph it is the recursion of SeKron, for the Tensor-Train graph
    TT-SVD, for the Tucker graph the sequentially truncated HOSVD, for a ring TR-SVD, for CP the split of each rank-one
    term; beyond two factors none of them is optimal. A factor's rows are its own mode and the indices it closes;
    indices that it carries and leaves open are batched over; all others stay with the remainder.

    Args:
        structure: The structure to fit.
        modes: (B, m_1, ..., m_S), a batch of unfolded weights.
        surplus: Size, relative to the weight, of random terms where a rank exceeds that of what is split (CP and rings
            can use more terms than their first factor has rows that are not zero). With 0 these terms vanish and the
            fit is the best of the recursion, but sweeps of least squares would leave them where they are: a factor that
            is zero keeps the others from moving.

    Returns:
        Factors of shapes (B, rank indices, m_k). The remainder holds the scale; those before it are orthonormal.

    Source: SeKron, Hameed et al. 2022, Algorithm 1; Oseledets 2011; Vannieuwenhoven et al. 2012; Zhao et al. 2016.
    """
    count = structure.num_factors
    sizes = structure.rank_sizes
    last_use = {name: k for k, carried in enumerate(structure.carries) for name in carried}
    factors: list[Tensor] = []
    rest, opened = modes, list[str]()  # axes of rest: B, the open indices, m_k ... m_S
    for k in range(count - 1):
        carried = structure.carries[k]
        shared = [n for n in opened if n in carried and last_use[n] > k]
        closed = [n for n in opened if n in carried and last_use[n] == k]
        passed = [n for n in opened if n not in carried]
        new = [n for n in carried if n not in opened]
        mode_axis = 1 + len(opened)
        position = {n: 1 + i for i, n in enumerate(opened)}
        axes = [0, *(position[n] for n in shared + closed), mode_axis, *(position[n] for n in passed)]
        arranged = rest.permute(axes + list(range(mode_axis + 1, rest.dim())))
        batch = [rest.shape[0], *(sizes[n] for n in shared)]
        row_sizes = [sizes[n] for n in closed] + [rest.shape[mode_axis]]
        column_sizes = list(arranged.shape[len(batch) + len(row_sizes) :])
        rank = prod(sizes[n] for n in new)
        left, right = _truncated_svd(arranged.reshape(*batch, prod(row_sizes), prod(column_sizes)), rank, surplus)
        left = left.reshape(*batch, *row_sizes, *(sizes[n] for n in new))
        names = ["", *shared, *closed, "m", *new]
        factors.append(left.permute([names.index(n) for n in ("", *carried, "m")]))
        rest = right.reshape(*batch, *(sizes[n] for n in new), *column_sizes)
        opened = shared + new + passed
    order = [1 + opened.index(n) for n in structure.carries[-1]]
    factors.append(rest.permute([0, *order, rest.dim() - 1]))
    return [factor.contiguous() for factor in factors]


def _truncated_svd(matrix: Tensor, rank: int, surplus: float) -> tuple[Tensor, Tensor]:
    """Orthonormal U (..., rows, rank) and S V (..., rank, columns) of the best approximation of that rank.

    From the eigenvectors of the smaller Gram matrix: several times faster than an SVD, and the product is a true
    projection of the matrix, so that its error is the best one to about the square of the eigenvectors' error.
    Where the rank exceeds that of the matrix, U is filled with a deterministic orthonormal-scale pattern and S V with
    another one of norm `surplus` per row, relative to the matrix.
    """
    left = left_basis(matrix, rank)
    right = left.mT @ matrix
    missing = rank - left.shape[-1]
    if missing > 0:
        right = torch.cat([right, right.new_zeros(*right.shape[:-2], missing, right.shape[-1])], -2)
    if surplus > 0:
        least = surplus * torch.linalg.matrix_norm(matrix)[..., None, None]
        dead = torch.linalg.vector_norm(right, dim=-1, keepdim=True) < DEAD_SHARE * least
        if bool(dead.any()):
            right = torch.where(dead, _pattern(rank, right.shape[-1]).to(right) * least, right)
    return filled(left, rank), right


def filled(basis: Tensor, count: int) -> Tensor:
    """(..., rows, count): orthonormal columns, a deterministic pattern beside them where there are too few."""
    rows, missing = basis.shape[-2], count - basis.shape[-1]
    if missing <= 0:
        return basis
    fill = _pattern(missing, rows).mT
    return torch.cat([basis, fill.to(basis).expand(*basis.shape[:-2], rows, missing)], -1)


def _pattern(count: int, size: int) -> Tensor:
    """(count, size): random rows of norm about one, always the same."""
    generator = torch.Generator().manual_seed(size * 1009 + count)
    rows: Tensor = torch.randn(count, size, generator=generator, dtype=torch.float64) / size**0.5
    return rows


def left_basis(matrix: Tensor, count: int) -> Tensor:
    """Orthonormal (..., rows, at most count): the leading left singular vectors, the largest first."""
    rows, columns = matrix.shape[-2:]
    if rows <= columns:
        vectors: Tensor = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors
        return vectors.flip(-1)[..., :count]
    vectors = torch.linalg.eigh(matrix.mT @ matrix).eigenvectors
    left: Tensor = torch.linalg.qr(matrix @ vectors.flip(-1)[..., :count]).Q
    return left


def mode_bases(structure: Structure, modes: Tensor) -> list[Tensor]:
    """Factors made of the leading singular vectors of every mode's own unfolding, as the HOSVD has them.

    Args:
        structure: The structure to start from.
        modes: (B, m_1, ..., m_S), a batch of unfolded weights.

    Returns:
        Factors of shapes (B, rank indices, m_k), of orthonormal columns as far as there are enough; their product is
        no approximation yet, but one pass of least squares makes it one.

    Source: De Lathauwer et al. 2000.
    """
    return [_mode_basis(structure, modes, k) for k in range(structure.num_factors)]


def _mode_basis(structure: Structure, modes: Tensor, k: int) -> Tensor:
    ranks = structure.factor_shapes[k][: -len(structure.shapes[k])]
    basis = filled(mode_basis(modes, k, prod(ranks)), prod(ranks))
    return basis.mT.reshape(modes.shape[0], *ranks, -1)


def mode_basis(modes: Tensor, k: int, count: int) -> Tensor:
    """(B, m_k, at most count): the leading singular vectors of an unfolded weight's own mode k."""
    return left_basis(modes.movedim(1 + k, 1).flatten(2), count)


def core_of(structure: Structure) -> int | None:
    """The factor that shares one rank index with every other one, which share none among themselves (Tucker's core)."""
    for core, carried in enumerate(structure.carries):
        leaves = [own for k, own in enumerate(structure.carries) if k != core]
        if structure.is_tree and len(carried) == len(leaves) and all(len(own) == 1 for own in leaves):
            return core
    return None


def orthogonal_iteration(
    structure: Structure, core: int, modes: Tensor, iterations: int, bases: Mapping[int, Tensor] | None = None
) -> list[Tensor]:
    """Factors of a structure with a core: every leaf in turn is the best basis for what the other leaves leave.

    Leaf and core are optimal together, given the other leaves, so this needs far fewer passes than updates of one
    factor at a time.

    Args:
        structure: With the core that `core_of` found.
        core: Its position.
        modes: (B, m_1, ..., m_S), a batch of unfolded weights.
        iterations: Passes over all leaves.
        bases: Of every leaf, from `mode_basis`, with as many vectors as there are; computed if not given.

    Returns:
        Factors of shapes (B, rank indices, m_k); the leaves are orthonormal, but for columns
        beyond a mode's size, which are zero.

    Source: De Lathauwer, De Moor and Vandewalle 2000, On the best rank-1 and rank-(R1, ..., RN) approximation.
    """
    sizes = {k: structure.factor_shapes[k][0] for k in range(structure.num_factors) if k != core}
    known = bases or {k: mode_basis(modes, k, size) for k, size in sizes.items()}
    # Where there are fewer vectors than columns the others stay zero, or the core would be no projection.
    leaves = {k: F.pad(known[k], (0, max(size - known[k].shape[-1], 0)))[..., :size].mT for k, size in sizes.items()}

    def projected(skipped: int | None) -> Tensor:
        rest = modes
        # The mode that shrinks most goes first: what is left for the others is then small.
        for k in sorted((k for k in leaves if k != skipped), key=lambda k: leaves[k].shape[1] / leaves[k].shape[2]):
            rest = (
                torch.bmm(leaves[k], rest.movedim(1 + k, 1).flatten(2))
                .reshape(len(rest), -1, *(n for axis, n in enumerate(rest.shape[1:], 1) if axis != 1 + k))
                .movedim(1, 1 + k)
            )
        return rest

    for _ in range(iterations):
        for k, leaf in leaves.items():
            basis = left_basis(projected(k).movedim(1 + k, 1).flatten(2), leaf.shape[1])
            if basis.shape[-1] == leaf.shape[1]:  # else there is nothing to choose
                leaves[k] = basis.mT
    order = list(leaves)
    rest = projected(None).movedim([1 + k for k in order], list(range(1, 1 + len(order))))
    names = [structure.carries[k][0] for k in order]
    factors = dict(leaves)
    factors[core] = rest.permute(0, *(1 + names.index(name) for name in structure.carries[core]), rest.dim() - 1)
    return [factors[k].contiguous() for k in range(structure.num_factors)]
