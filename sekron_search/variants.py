"""How a fitted option can run: neighbouring factors merged, and schedules that need equally many flops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from sekron_search.costs.analytic import layer_cost
from sekron_search.kron.families import dense, family
from sekron_search.kron.merge import merge_factors, merged_structure, merges
from sekron_search.kron.plan import good_plans
from sekron_search.kron.structure import Structure
from sekron_search.model import LayerInfo
from sekron_search.search.options import Option
from sekron_search.tables import FittedLayer

#: Schedules that are timed may need so many times the fewest flops.
SLACK = 1.1


def with_variants(fitted: FittedLayer, info: LayerInfo, *, bytes_per_sample: int, schedules: int) -> FittedLayer:
    """The table with every option in all its variants; which of them are worth having, their costs decide.

    Args:
        fitted: The options and their factors.
        info: Their layer.
        bytes_per_sample: Bytes of one element times the batch size, for peak memory.
        schedules: At most so many schedules of a structure: the presumably fastest ones.
    """
    options, factors, shifts = [fitted.table.options[0]], [fitted.factors[0]], [fitted.shifts[0]]
    for option, own, shift in zip(fitted.table.options[1:], fitted.factors[1:], fitted.shifts[1:], strict=True):
        for structure, merged in _merged(Structure.parse(option.structure), own):
            for variant in _options(option, structure, info, bytes_per_sample, schedules):
                options.append(variant)
                factors.append(merged)
                shifts.append(shift)
    return FittedLayer(replace(fitted.table, options=tuple(options)), tuple(factors), tuple(shifts))


def _merged(structure: Structure, factors: Sequence[Tensor]) -> Iterator[tuple[Structure, tuple[Tensor, ...]]]:
    """A structure and its factors, as they are and with neighbours merged in every way."""
    yield structure, tuple(factors)
    for positions in merges(structure):
        merged, own = structure, list(factors)
        for first in positions:
            own = merge_factors(merged, own, first)
            merged = merged_structure(merged, first)
        yield merged, tuple(own)


def _options(
    option: Option, structure: Structure, info: LayerInfo, bytes_per_sample: int, schedules: int
) -> list[Option]:
    """An option's structure, or a merged one of the same weight, in its schedules; none if dense is as cheap."""
    text = str(structure)
    if option.execution == "dense":
        return [option] if text == option.structure else []
    cost = layer_cost(structure, info)
    if text != option.structure and cost.flops >= layer_cost(dense(info.weight_shape), info).flops:
        return []
    channels = (info.out_channels, info.in_channels)
    # Where clocks decide, an order of a few more flops may be the faster one.
    slack = 1.0 if schedules == 1 else SLACK
    plans = good_plans(structure, info.geometry, info.input_size, slack=slack)[:schedules]
    costs = [plan.cost(info.input_size, channels) for plan in plans]
    return [
        replace(
            option,
            structure=text,
            family=family(structure),
            schedule=str(plan.schedule),
            flops=round(run.flops * info.positions_per_sample),
            params=cost.params,
            peak_bytes=round(run.peak_elements * info.positions_per_sample) * bytes_per_sample,
        )
        for plan, run in zip(plans, costs, strict=True)
    ]
