"""Independent, slow truths: nothing here uses the package's own contraction, plan or folding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from sekron_search.kron.structure import Structure


def kronecker_weight(structure: Structure, factors: Sequence[Tensor]) -> Tensor:
    """W as the literal sum over all rank indices of `np.kron` of the factors."""
    names = [name for name, _ in structure.ranks]
    total = np.zeros(structure.weight_shape)
    for values in product(*(range(size) for _, size in structure.ranks)):
        chosen = dict(zip(names, values, strict=True))
        term = np.ones((1,) * len(structure.weight_shape))
        for factor, carried in zip(factors, structure.carries, strict=True):
            term = np.kron(term, factor.numpy()[tuple(chosen[name] for name in carried)])
        total += term
    return torch.from_numpy(total)


def knapsack_by_enumeration(
    errors: Sequence[Sequence[float]], costs: Sequence[Sequence[Sequence[float]]], bounds: Sequence[float]
) -> float | None:
    """Least total error over all assignments; costs[j][layer][option]. None if none fits."""
    best = None
    for assignment in product(*(range(len(e)) for e in errors)):
        fits = all(
            sum(cost[layer][option] for layer, option in enumerate(assignment)) <= bound + 1e-9
            for cost, bound in zip(costs, bounds, strict=True)
        )
        total = sum(errors[layer][option] for layer, option in enumerate(assignment))
        if fits and (best is None or total < best):
            best = total
    return best


def dominated(points: Sequence[Sequence[float]], i: int) -> bool:
    """Whether another point is nowhere larger and somewhere smaller, or is the same and stands earlier."""
    for j, other in enumerate(points):
        if j != i and all(a <= b for a, b in zip(other, points[i], strict=True)) and (other != points[i] or j < i):
            return True
    return False
