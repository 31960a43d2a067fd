"""Forward and backward of factorized layers against the dense layer: what an epoch of fine-tuning costs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.layers.structures import Family, Shape, choices
from sekron_search.costs.measure import measure_callables
from sekron_search.kron.conv import KroneckerConv
from sekron_search.runtimes.base import threads as with_threads

BATCH = 16

FAMILIES: dict[str, Family] = {
    "channel_svd": ("channel_svd", None),
    "spatial_svd": ("spatial_svd", None),
    "tucker2": ("tucker2", None),
    "cp": ("cp", None),
    "tt": ("tt", None),
    "sekron, S = 2": ("sekron", 2),
}


def compare(shape: Shape, threads: int) -> dict[str, Any]:
    """A training step of the layer alone, batch 16: dense, and options at a quarter of the flops."""
    layers: dict[str, nn.Module] = {"dense": shape.conv()}
    for family, kind in FAMILIES.items():
        for i, choice in enumerate(choices(kind, shape, 0.25, most=2)):
            layer = KroneckerConv.like(shape.conv(), choice.structure, schedule=choice.schedule)
            layer.set_factors([torch.randn_like(a) / shape.in_channels**0.5 for a in layer.factors()])
            layers[f"{family}|{i}"] = layer
    x = torch.randn(BATCH, shape.in_channels, shape.size, shape.size)
    calls = {}
    for name, dense_or_not in layers.items():
        calls[f"{name}|contiguous"] = _step(dense_or_not, x.clone())
        other: Any = copy.deepcopy(dense_or_not)
        other = other.to(memory_format=torch.channels_last)
        calls[f"{name}|channels_last"] = _step(other, x.contiguous(memory_format=torch.channels_last))
    with with_threads(threads):
        timed = measure_callables(calls, rounds=5)

    def best(prefix: str) -> float:
        return min(latency.median_ms for name, latency in timed.items() if name.startswith(prefix))

    row = {
        "shape": shape.name,
        "threads": threads,
        "batch": BATCH,
        "dense_ms": best("dense|"),
        "speedup": {
            family: best("dense|") / best(f"{family}|")
            for family in FAMILIES
            if any(name.startswith(f"{family}|") for name in timed)
        },
    }
    print(row, flush=True)
    return row


def _step(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    x.requires_grad_(True)

    def step() -> None:
        with torch.inference_mode(False), torch.enable_grad():
            layer(x).sum().backward()
        x.grad = None
        layer.zero_grad()

    return step
