"""Spectra of all two-factor structures of an ImageNet ResNet-18."""

from __future__ import annotations

import resource
import time
from math import prod
from typing import Any

import torch

from sekron_search.kron.enumeration import factor_shapes
from sekron_search.kron.spectra import PairSpectra

#: Weights of ResNet-18 (He et al. 2015): 20 convolutions and the linear layer.
RESNET18: list[tuple[int, ...]] = [
    (64, 3, 7, 7),
    *[(64, 64, 3, 3)] * 4,
    (128, 64, 3, 3),
    (128, 64, 1, 1),
    *[(128, 128, 3, 3)] * 3,
    (256, 128, 3, 3),
    (256, 128, 1, 1),
    *[(256, 256, 3, 3)] * 3,
    (512, 256, 3, 3),
    (512, 256, 1, 1),
    *[(512, 512, 3, 3)] * 3,
    (1000, 512, 1, 1),
]


def score_all(workers: int) -> dict[str, Any]:
    """Seconds, memory and structures per second, for random weights; every rank that saves parameters counts."""
    generator = torch.Generator().manual_seed(0)
    layers: list[dict[str, Any]] = []
    for shape in RESNET18:
        weight = torch.randn(1, *shape, generator=generator)
        pairs = list(factor_shapes(shape, 2))
        started = time.perf_counter()
        spectra = PairSpectra(weight)
        spectra.compute([first for first, _ in pairs], workers=workers)
        seconds = time.perf_counter() - started
        counted = 0
        for first, second in pairs:
            ranks = min((prod(shape) - 1) // (prod(first) + prod(second)), prod(first), prod(second))
            counted += ranks
            best, worst = (spectra.error(first, rank) for rank in (max(ranks, 1), 1))
            assert 0 <= best <= worst <= 1 + 1e-6, (first, second, best, worst)
        layers.append({"shape": shape, "shape_pairs": len(pairs), "structures": counted, "seconds": seconds})
        print(f"{shape}: {counted} structures of {len(pairs)} shape pairs in {seconds:.2f} s")
    total = sum(float(layer["seconds"]) for layer in layers)
    structures = sum(int(layer["structures"]) for layer in layers)
    return {
        "workers": workers,
        "layers": layers,
        "seconds": total,
        "structures": structures,
        "structures_per_second": structures / total,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
