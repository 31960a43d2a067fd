"""Costs of one layer's structure, from its plan alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from sekron_search.kron.families import dense
from sekron_search.kron.plan import best_plan, make_plan
from sekron_search.kron.steps import Schedule
from sekron_search.kron.structure import Structure
from sekron_search.model import LayerInfo


@dataclass(frozen=True)
class LayerCost:
    """flops and peak_elements per sample, params of all groups, and the schedule they are for."""

    flops: int
    params: int
    peak_elements: int
    schedule: Schedule


@lru_cache(maxsize=65536)
def layer_cost(
    structure: Structure, info: LayerInfo, execution: Literal["factored", "dense"] = "factored"
) -> LayerCost:
    """What the layer costs with this structure, run by the best plan."""
    plan = best_plan(structure, info.geometry, info.input_size)
    ran = plan if execution == "factored" else make_plan(dense(info.weight_shape), info.geometry, Schedule((0,)))
    cost = ran.cost(info.input_size, (info.out_channels, info.in_channels))
    return LayerCost(
        flops=round(cost.flops * info.positions_per_sample),
        params=structure.num_params * info.geometry.groups,
        peak_elements=round(cost.peak_elements * info.positions_per_sample),
        schedule=plan.schedule,
    )
