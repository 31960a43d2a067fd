"""Pareto sets of small point clouds; everything is minimised."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def non_dominated(values: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other point dominates.

    A point is dominated if another is at most as large in every coordinate and smaller in one. Of equal points the
    first is kept. Points with NaN are dominated.

    Args:
        values: (points, coordinates).

    Returns:
        (points,) mask.
    """
    points = np.asarray(values, dtype=float)
    valid = ~np.isnan(points).any(axis=1)
    order = np.lexsort(points.T[::-1])  # by the first coordinate, then the next: only earlier points can dominate
    kept = np.empty_like(points)
    mask = np.zeros(len(points), dtype=bool)
    count = 0
    for i in order:
        if valid[i] and not (kept[:count] <= points[i]).all(axis=1).any():
            kept[count] = points[i]
            mask[i] = True
            count += 1
    return mask


def front(values: ArrayLike) -> list[int]:
    """Indices of the non-dominated points, by the first coordinate."""
    points = np.asarray(values, dtype=float)
    indices = np.flatnonzero(non_dominated(points)) if len(points) else np.array([], dtype=int)
    return [int(i) for i in sorted(indices, key=lambda i: (*points[i], i))]


def hypervolume(values: ArrayLike, reference: ArrayLike) -> float:
    """The volume that points dominate, up to a reference point.

    Args:
        values: (points, coordinates); what is not below the reference in every coordinate counts nothing.
        reference: (coordinates,).

    Source: While, Bradstreet, Barone 2012, A Fast Way of Calculating Exact Hypervolumes.
    """
    return float(hypervolumes(values, reference)[-1]) if len(np.asarray(values)) else 0.0


def hypervolumes(values: ArrayLike, reference: ArrayLike) -> NDArray[np.float64]:
    """The volume that the first one, two, ... points dominate, as `hypervolume`: (points,)."""
    limit = np.asarray(reference, dtype=float)
    points = np.asarray(values, dtype=float).reshape(-1, len(limit))
    kept = np.empty((0, len(limit)))
    total, found = 0.0, []
    for point in points:
        if (point < limit).all():  # false for NaN
            total += _alone(point, kept, limit)
            kept = np.vstack([kept, point])
            kept = kept[non_dominated(kept)]
        found.append(total)
    return np.array(found)


def _alone(point: NDArray[np.float64], others: NDArray[np.float64], limit: NDArray[np.float64]) -> float:
    """The volume that a point dominates and no other does."""
    box = float(np.prod(limit - point))
    if not len(others):
        return box
    shared = np.maximum(others, point)
    shared = shared[non_dominated(shared)]
    return box - sum(_alone(p, shared[i + 1 :], limit) for i, p in enumerate(shared))
