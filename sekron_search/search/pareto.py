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
