"""The same families at the same ranks on the same weights, fitted by this package and by TensorLy, interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorly
from numpy.typing import NDArray
from tensorly import decomposition
from torch import Tensor

from sekron_search.kron import families as fam
from sekron_search.kron.projection import fit_batch
from sekron_search.kron.structure import Structure

Array = NDArray[Any]


@dataclass(frozen=True)
class Contest:
    """A family at given ranks: our structure and its settings, and TensorLy's call.

    Args:
        name: Of the family, and of TensorLy's method where there are two.
        structure: Ours.
        sweeps: Of least squares at most; few against one-shot methods.
        rival: From a weight (F, C, Kh, Kw) to its approximation.
        tolerance: Of our least squares.
    """

    name: str
    structure: Structure
    sweeps: int
    rival: Callable[[Array], Array]
    tolerance: float = 1e-5


def contests(shape: tuple[int, int, int, int]) -> list[Contest]:
    """CP at a quarter of the parameters, the others at half of the channels; TensorLy's own defaults throughout."""
    f, c, h, w = shape
    rank = f * c * h * w // 4 // (f + c + h + w)
    if shape == (256, 256, 3, 3):
        rank = 283
    half = [f // 2, c // 2]
    train = [f // 2, 6, 3]
    ring = [f // 4, 6, 3, 2]
    closed = [ring[-1], *ring]

    def two(x: Array) -> Array:
        (core, factors), _ = decomposition.partial_tucker(x, rank=half, modes=[0, 1])
        found: Array = tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
        return found

    def full(x: Array) -> Array:
        found: Array = tensorly.tucker_to_tensor(decomposition.tucker(x, rank=[*half, 2, 2]))
        return found

    return [
        Contest("CP", fam.cp(shape, rank), 100, lambda x: tensorly.cp_to_tensor(decomposition.parafac(x, rank=rank))),
        Contest("Tucker-2", fam.tucker2(shape, half), 30, two),
        Contest("Tucker", fam.tucker(shape, [*half, 2, 2]), 30, full),
        Contest(
            "Tensor-Train",
            fam.tensor_train(shape, train),
            1,
            lambda x: tensorly.tt_to_tensor(decomposition.tensor_train(x, rank=[1, *train, 1])),
        ),
        Contest(
            "Tensor-Ring (against TR-SVD)",
            fam.tensor_ring(shape, ring),
            1,
            lambda x: tensorly.tr_to_tensor(decomposition.tensor_ring(x, rank=closed)),
        ),
        Contest(
            "Tensor-Ring (against TR-ALS)",
            fam.tensor_ring(shape, ring),
            100,
            lambda x: tensorly.tr_to_tensor(decomposition.tensor_ring_als(x, rank=closed, random_state=0)),
        ),
    ]


def compete(weights: Tensor, contest: Contest, rounds: int) -> dict[str, Any]:
    """Errors and seconds of both on weights (B, F, C, Kh, Kw), float64; ours fits them side by side."""
    ours_s, theirs_s = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        _, errors = fit_batch(weights, contest.structure, sweeps=contest.sweeps, tolerance=contest.tolerance)
        ours_s.append(time.perf_counter() - started)
        started = time.perf_counter()
        approximations = [contest.rival(x) for x in weights.numpy()]
        theirs_s.append(time.perf_counter() - started)
    theirs = [
        float(np.linalg.norm(x - a) / np.linalg.norm(x)) for x, a in zip(weights.numpy(), approximations, strict=True)
    ]
    return {
        "family": contest.name,
        "structure": str(contest.structure),
        "weights": len(weights),
        "errors": errors.tolist(),
        "tensorly_errors": theirs,
        "seconds": ours_s,
        "tensorly_seconds": theirs_s,
        "error_ratio_worst": max(a / b for a, b in zip(errors.tolist(), theirs, strict=True)),
        "error_ratio_mean": statistics.mean(a / b for a, b in zip(errors.tolist(), theirs, strict=True)),
        "time_ratio": statistics.median(ours_s) / statistics.median(theirs_s),
    }
