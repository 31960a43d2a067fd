"""Alternating least squares for any rank graph: sweeps over the factors, extrapolated between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sekron_search.kron.structure import Structure
from sekron_search.kron.sweep import sweep_of

#: The extrapolation's first step, its growth with every sweep that lowers the error, and its largest.
FIRST_STEP, GROWTH, LARGEST_STEP = 0.5, 1.3, 1.5

#: Sweeps between two looks at whether the fit still improves.
CHECK_EVERY = 5


def alternating_least_squares(
    structure: Structure,
    modes: Tensor,
    factors: Sequence[Tensor],
    *,
    max_sweeps: int = 100,
    tolerance: float = 1e-7,
    ridge: float = 0.0,
) -> tuple[list[Tensor], Tensor]:
    """Lower the squared error of the factors, one factor at a time, never raising it.

    Factor k minimises |T - contraction|^2; its normal matrix is the contraction of the other factors' Gram matrices.
    Between sweeps all factors are extrapolated along their last change; a sweep from there that does not lower the
    objective is dropped and the next one starts where the last good one ended.

    Args:
        structure: The structure that the factors follow.
        modes: (B, m_1, ..., m_S), a batch of unfolded weights of norm 1 (or 0); computed in this dtype; without a ridge
            float64 is meant.
        factors: Start, of shapes (B, rank indices, m_k).
        max_sweeps: At most so many passes over all factors.
        tolerance: Stop when five sweeps lowered the objective of no batch entry by more than this part of it.
        ridge: Weight of the factors' squared norms in the objective: it keeps CP from drifting towards ever larger
            terms that cancel.

    Returns:
        Factors of the same shapes, and the squared error (B,).

    Source: Kolda and Bader 2009, Sec. 3.4, generalised from CP to tensor networks with hyperedges; extrapolation with
    restarts as in Mitchell, Ye and De Sterck 2020.
    """
    sweep = sweep_of(structure, modes.shape[0])
    weight = modes.new_full((modes.shape[0],), ridge)
    tensors, norm = sweep.lay_out(modes), torch.linalg.vector_norm(modes.flatten(1), dim=1).square()
    best = previous = _pack(factors)
    objective = modes.new_full((modes.shape[0],), torch.inf)
    error, checkpoint = objective, objective
    step = torch.zeros_like(objective)
    for number in range(1, max_sweeps + 1):
        found, gain = sweep(tensors, _unpack(best + step[:, None] * (best - previous), factors), weight)
        new, squared = _pack(found), (norm + gain).clamp_min(0)
        value = squared + ridge * new.square().sum(1) if ridge > 0 else squared
        better = value < objective
        previous = torch.where(better[:, None], best, previous)
        best = torch.where(better[:, None], new, best)
        error, objective = torch.where(better, squared, error), torch.where(better, value, objective)
        step = torch.where(better, (step * GROWTH).clamp(FIRST_STEP, LARGEST_STEP), torch.zeros_like(step))
        if number % CHECK_EVERY == 0:
            if bool((checkpoint - objective <= tolerance * objective).all()):
                break
            checkpoint = objective
    return _unpack(best, factors), error


def _pack(factors: Sequence[Tensor]) -> Tensor:
    """All factors of a batch entry in one row: (B, parameters)."""
    return torch.cat([a.flatten(1) for a in factors], 1)


def _unpack(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The factors in the rows of `packed`, in the shapes of others."""
    pieces = packed.split([a[0].numel() for a in like], 1)
    return [piece.reshape(a.shape) for piece, a in zip(pieces, like, strict=True)]
