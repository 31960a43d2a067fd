"""Weights that a structure represents exactly, and Gaussian ones: what the recursion leaves and refinement gains."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from sekron_search.kron import families as fam
from sekron_search.kron.projection import fit_batch, reconstruct_batch
from sekron_search.kron.structure import Structure

SHAPE = (8, 6, 3, 3)
LARGER = (16, 12, 3, 3)
THREE = [(2, 3, 3, 1), (2, 1, 1, 3), (2, 2, 1, 1)]
FOUR = [(2, 3, 1, 1), (2, 1, 3, 1), (2, 1, 1, 3), (1, 2, 1, 1)]
NESTED = fam.sekron([(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 3, 3)], [4, 2])

#: A structure of every family with up to four factors (Tucker's core of a convolution is a fifth).
STRUCTURES: dict[str, Structure] = {
    "channel SVD": fam.channel_svd(SHAPE, 3),
    "spatial SVD": fam.spatial_svd(SHAPE, 4),
    "spatial basis": fam.sekron([(8, 6, 1, 1), (1, 1, 3, 3)], [2]),
    "Kronecker S=2": fam.sekron([(2, 3, 3, 1), (4, 2, 1, 3)], [3]),
    "SeKron S=3, 8x8x9": NESTED,
    "SeKron S=3": fam.sekron([(2, 3, 1, 1), (2, 1, 3, 1), (2, 2, 1, 3)], [3, 2]),
    "SeKron S=4": fam.sekron(FOUR, [2, 3, 2]),
    "CP": fam.cp(SHAPE, 5),
    "CP, larger": fam.cp(LARGER, 12),
    "Tucker": fam.tucker(SHAPE, [4, 3, 2, 2]),
    "Tucker-2": fam.tucker2(SHAPE, [4, 3]),
    "Tucker-2, larger": fam.tucker2(LARGER, [8, 6]),
    "Tensor-Train": fam.tensor_train(SHAPE, [4, 3, 2]),
    "Tensor-Ring": fam.tensor_ring(SHAPE, [2, 3, 2, 2]),
    "Tensor-Ring, larger": fam.tensor_ring(LARGER, [4, 4, 2, 2]),
    "Kronecker-CP S=3": fam.kronecker(THREE, "cp", [3]),
    "Kronecker-CP S=4": fam.kronecker(FOUR, "cp", [4]),
    "Kronecker-TT S=3": fam.kronecker(THREE, "tt", [3, 2]),
    "Kronecker-TT S=4": fam.kronecker(FOUR, "tt", [2, 3, 2]),
    "Kronecker-TR S=3": fam.kronecker(THREE, "tr", [2, 3, 2]),
    "Kronecker-TR S=4": fam.kronecker(FOUR, "tr", [2, 3, 2, 2]),
    "Kronecker-Tucker S=3": fam.kronecker(THREE, "tucker", [3, 2]),
    "Kronecker-Tucker S=4": fam.kronecker(FOUR, "tucker", [2, 3, 2]),
}


def representable(structure: Structure, seed: int) -> Tensor:
    """(1, F, C, Kh, Kw): the weight of Gaussian factors."""
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.randn(1, *s, generator=generator, dtype=torch.float64) for s in structure.factor_shapes]
    return reconstruct_batch(structure, factors)


def recovery(seeds: int = 20, *, starts: int = 8, sweeps: int = 1000) -> list[dict[str, Any]]:
    """For every family, in how many of the seeds the weight is recovered to 1e-6, and what the recursion leaves."""
    rows = []
    for name, structure in STRUCTURES.items():
        weights = torch.cat([representable(structure, seed) for seed in range(seeds)])
        _, greedy = fit_batch(weights, structure, sweeps=0)
        started = time.perf_counter()
        _, errors = fit_batch(weights, structure, sweeps=sweeps, starts=starts)
        rows.append(
            {
                "family": name,
                "structure": str(structure),
                "recovered": float((errors <= 1e-6).double().mean()),
                "errors": errors.tolist(),
                "recursion_mean_error": float(greedy.mean()),
                "seconds_per_weight": (time.perf_counter() - started) / seeds,
            }
        )
        print(f"{name}: recovered {rows[-1]['recovered']:.0%}, recursion alone {rows[-1]['recursion_mean_error']:.3f}")
    return rows


def refinement(seeds: int = 20) -> dict[str, Any]:
    """Nested S = 3 on Gaussian weights: error of the recursion, and after least squares from several starts."""
    weights = torch.cat(
        [
            torch.randn(1, 8, 8, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for seed in range(seeds)
        ]
    )
    _, greedy = fit_batch(weights, NESTED, sweeps=0)
    _, one = fit_batch(weights, NESTED, sweeps=500)
    _, many = fit_batch(weights, NESTED, sweeps=500, starts=8)
    print(f"nested S=3: {greedy.mean():.4f} -> {one.mean():.4f} (one start) -> {many.mean():.4f} (eight)")
    return {
        "structure": str(NESTED),
        "recursion": greedy.tolist(),
        "one_start": one.tolist(),
        "eight_starts": many.tolist(),
    }
