"""The same families at the same ranks on the same weights, fitted by this package and by TensorLy, interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorly
import torch
from numpy.typing import NDArray
from tensorly import decomposition
from torch import Tensor

from benchmarks.cifar10.config import resnet20_weights
from sekron_search.kron import families as fam
from sekron_search.kron.projection import fit_batch
from sekron_search.kron.structure import Structure

Array = NDArray[Any]

#: Of our least squares, for every family.
TOLERANCE = 1e-5

#: No further rounds once TensorLy has taken so long.
ENOUGH_S = 20.0


@dataclass(frozen=True)
class Contest:
    """A family at given ranks: our structure and its settings, and TensorLy's call.

    Args:
        name: Of the family, and of TensorLy's method where there are two.
        structure: Ours.
        sweeps: Of least squares at most; few against one-shot methods.
        rival: From a weight (F, C, Kh, Kw) to its approximation.
        starts: Of our least squares.
    """

    name: str
    structure: Structure
    sweeps: int
    rival: Callable[[Array], Array]
    starts: int = 1


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

    def tt(x: Array) -> Array:
        found: Array = tensorly.tt_to_tensor(decomposition.tensor_train(x, rank=[1, *train, 1]))
        return found

    def tr_svd(x: Array) -> Array:
        found: Array = tensorly.tr_to_tensor(decomposition.tensor_ring(x, rank=closed))
        return found

    def tr_als(x: Array) -> Array:
        found: Array = tensorly.tr_to_tensor(decomposition.tensor_ring_als(x, rank=closed, random_state=0))
        return found

    # TensorLy's default start by SVDs fills up ranks beyond a mode's size with a full basis of the other side: of the
    # largest weight that takes 288 GiB, so there it starts from random factors.
    init = "svd" if f < 256 else "random"

    def cp(x: Array) -> Array:
        found: Array = tensorly.cp_to_tensor(decomposition.parafac(x, rank=rank, init=init, random_state=0))
        return found

    starts = 3 if f < 256 else 2  # more of the large weight would take more than a tenth of the time
    return [
        Contest("CP", fam.cp(shape, rank), 200 if f < 256 else 100, cp, starts),
        Contest("Tucker-2", fam.tucker2(shape, half), 8, two),
        Contest("Tucker", fam.tucker(shape, [*half, 2, 2]), 8, full),
        Contest("Tensor-Train, recursion alone", fam.tensor_train(shape, train), 0, tt),
        Contest("Tensor-Train, one sweep", fam.tensor_train(shape, train), 1, tt),
        Contest("Tensor-Ring, two sweeps against TR-SVD", fam.tensor_ring(shape, ring), 2, tr_svd),
        # On the largest weight TensorLy's TR-ALS takes minutes per round and says nothing new.
        *(
            [Contest("Tensor-Ring against TR-ALS", fam.tensor_ring(shape, ring), 100, tr_als, starts)]
            if f < 256
            else []
        ),
    ]


def weight_sets(data: Path) -> dict[str, list[Tensor]]:
    """The 18 3x3 kernels of ResNet-20 between its stages' channels, equal shapes together, and Gaussian ones."""
    state = torch.load(resnet20_weights(data), weights_only=True)
    kernels: dict[tuple[int, ...], list[Tensor]] = {}
    for weight in state.values():
        if weight.dim() == 4 and weight.shape[1] > 3:
            kernels.setdefault(tuple(weight.shape), []).append(weight.double())
    assert sum(map(len, kernels.values())) == 18
    generator = torch.Generator().manual_seed(0)
    return {
        "the 18 kernels of ResNet-20": [torch.stack(own) for own in kernels.values()],
        **{
            f"Gaussian {n}x{n}x3x3": [torch.randn(1, n, n, 3, 3, generator=generator, dtype=torch.float64)]
            for n in (64, 256)
        },
    }


def compete_all(data: Path) -> list[dict[str, Any]]:
    """Every family on every set of weights; times are of the whole set."""
    rows = []
    for name, batches in weight_sets(data).items():
        small = "256" not in name
        rounds = 5 if small else 1
        all_contests = [contests(_shape(batch)) for batch in batches]
        for number, first in enumerate(all_contests[0]):
            own = [found[number] for found in all_contests]
            if small:
                for batch, contest in zip(batches, own, strict=True):  # plans are made once, as in a search
                    fit_batch(batch, contest.structure, sweeps=1)
            row = {"family": first.name, "set": name, **_compete(batches, own, rounds)}
            rows.append(row)
            print(
                f"{row['family']} on {name}: error {row['error_ratio_mean']:.4f} (worst {row['error_ratio_worst']:.4f})"
                f", time {row['time_ratio']:.3f} of TensorLy's {statistics.median(row['tensorly_seconds']):.3g} s",
                flush=True,
            )
    return rows


def _shape(batch: Tensor) -> tuple[int, int, int, int]:
    f, c, h, w = batch.shape[1:]
    return f, c, h, w


def _compete(batches: Sequence[Tensor], own: Sequence[Contest], rounds: int) -> dict[str, Any]:
    """Errors and seconds of both on weights of several shapes, interleaved; ours fits equal shapes side by side."""
    ours_s: list[float] = []
    theirs_s: list[float] = []
    for _ in range(rounds):
        ours, theirs, spent = [], [], [0.0, 0.0]
        for batch, contest in zip(batches, own, strict=True):
            started = time.perf_counter()
            _, errors = fit_batch(
                batch, contest.structure, sweeps=contest.sweeps, starts=contest.starts, tolerance=TOLERANCE
            )
            spent[0] += time.perf_counter() - started
            ours += errors.tolist()
            for weight in batch.numpy():
                started = time.perf_counter()
                approximation = contest.rival(weight)
                spent[1] += time.perf_counter() - started
                theirs.append(float(np.linalg.norm(weight - approximation) / np.linalg.norm(weight)))
        ours_s.append(spent[0])
        theirs_s.append(spent[1])
        if sum(theirs_s) > ENOUGH_S:
            break
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "structures": [str(contest.structure) for contest in own],
        "sweeps": own[0].sweeps,
        "starts": own[0].starts,
        "errors": ours,
        "tensorly_errors": theirs,
        "seconds": ours_s,
        "tensorly_seconds": theirs_s,
        "error_ratio_worst": max(ratios),
        "error_ratio_mean": statistics.mean(ratios),
        "time_ratio": statistics.median(ours_s) / statistics.median(theirs_s),
    }
