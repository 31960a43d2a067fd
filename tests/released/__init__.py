"""Files that every version has written, and what they hold: later versions open them."""

from __future__ import annotations

from typing import Any

import torch

from sekron_search import DeviceProfile
from sekron_search.costs.layers import Measurement
from sekron_search.inspection import inspect_model
from sekron_search.kron.families import dense
from sekron_search.kron.steps import Schedule
from sekron_search.kron.structure import Structure
from tests.cases import small_net

#: Budgets that a finished run is asked for.
BUDGETS: tuple[dict[str, float | str], ...] = ({"flops": "0.7x"}, {"params": "0.6x", "flops": "0.9x"})

#: Text forms: dense, channel SVD, spatial SVD, Kronecker, CP, Tucker-2, a chain, a ring.
STRUCTURES = (
    "32x16x3x3",
    "32x1x1x1[a] * 1x16x3x3[a]; a=8",
    "32x1x3x1[a] * 1x16x1x3[a]; a=6",
    "8x4x3x1[a] * 4x4x1x3[a]; a=3",
    "32x1x1x1[a] * 1x16x1x1[a] * 1x1x3x1[a] * 1x1x1x3[a]; a=12",
    "32x1x1x1[a] * 1x1x3x3[a,b] * 1x16x1x1[b]; a=8, b=6",
    "4x2x1x1[a] * 4x2x3x1[a,b] * 2x4x1x3[b]; a=4, b=5",
    "32x1x1x1[a,c] * 1x16x1x1[a,b] * 1x1x3x3[b,c]; a=3, b=4, c=2",
)


def predicted_ms(profile: DeviceProfile) -> dict[str, float]:
    """What a profile that holds operations predicts for the layers of a small network."""
    layers = inspect_model(small_net().eval(), torch.zeros(4, 3, 8, 8)).layers
    jobs: list[Measurement] = [(i, dense(i.weight_shape), Schedule.parse("0"), "factored") for i in layers]
    found = profile.latencies(jobs, samples_per_batch=4)
    assert all(latency.samples == 0 for latency in found)
    return {info.name: latency.median_ms for info, latency in zip(layers, found, strict=True)}


def described(texts: tuple[str, ...]) -> list[dict[str, Any]]:
    """What text forms mean."""
    found = [Structure.parse(text) for text in texts]
    return [{"text": str(s), "params": s.num_params, "weight_shape": list(s.weight_shape)} for s in found]
