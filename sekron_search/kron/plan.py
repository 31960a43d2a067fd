"""The integer plan: how a structure runs as a sequence of grouped convolutions, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations, permutations
from math import prod

from sekron_search.errors import StructureError
from sekron_search.kron.geometry import ConvGeometry, Pair, Size
from sekron_search.kron.steps import Schedule, Step, channel_steps
from sekron_search.kron.structure import Structure

#: Trying every order costs S! plans; beyond this many factors only a beam of the usual orders would be affordable.
MAX_FACTORS = 6


@dataclass(frozen=True)
class Cost:
    """What one sample costs: multiply-adds as fvcore counts them, and the largest working set in elements."""

    flops: int
    peak_elements: int


@dataclass(frozen=True)
class Plan:
    """A structure, the schedule of its factors, and the resulting steps; a transposed one runs backwards."""

    structure: Structure
    geometry: ConvGeometry
    schedule: Schedule
    steps: tuple[Step, ...]
    output_axes: tuple[int, ...]
    output_permutation: tuple[int, ...] | None

    @cached_property
    def num_permutes(self) -> int:
        """How many times the channels are reordered in a forward pass."""
        return sum(step.permutation is not None for step in self.steps) + (self.output_permutation is not None)

    @property
    def num_repeated_weights(self) -> int:
        """Elements of the weights that run, beyond those that are stored."""
        return sum(prod(step.weight_shape) - prod(step.stored_shape) for step in self.steps)

    @property
    def bias_rides(self) -> bool:
        """Whether the last convolution that runs can add the bias."""
        return (self.steps[0] if self.geometry.transposed else self.steps[-1]).repeats == 1

    def vector_flops(self, input_size: Size, lanes: int) -> int:
        """Multiply-adds of one sample where the channels of every group are filled up to a multiple of some lanes.

        Vectors and matrix units take so many channels at a time: this tells better than flops how long steps of few
        channels take.

        Args:
            input_size: As for `cost`.
            lanes: Channels.
        """
        size, flops = input_size, 0
        for step in self.steps:
            size = step.geometry.output_size(size, step.kernel)
            filled = prod(-(-n // lanes) * lanes for n in (step.produced, step.contracted))
            flops += step.groups * filled * prod(step.kernel) * step.repeats * prod(size)
        return flops

    def output_paddings(self, output_padding: Size) -> tuple[Size, ...]:
        """The output padding of every step of a transposed convolution with that output padding, in plan order.

        Args:
            output_padding: Smaller than the stride on every axis.
        """
        # It is the same for inputs of every size, so that of one element tells it.
        size = self.geometry.transposed_size((1,) * len(output_padding), self.structure.kernel, output_padding)
        paddings = []
        for step in self.steps:
            paddings.append(step.geometry.unread(size, step.kernel))
            size = step.geometry.output_size(size, step.kernel)
        return tuple(paddings)

    def cost(self, input_size: Size, channels: Pair | None = None) -> Cost:
        """Cost of one sample.

        The working set of a step is the layer's input, which its caller keeps, the step's own input and its output;
        of a permutation the tensor twice.

        Args:
            input_size: Of the input, per axis; of the output where the convolution is transposed.
            channels: (out-channels, in-channels) of the layer, all groups, where they may be fewer than the
                structure's: a layer then works on a padded copy of its input and crops its output.
        """
        size = input_size
        flops = 0
        tensors = [prod(self.steps[0].axes) * prod(size)]  # elements of every tensor that is made, one from the other
        for step in self.steps:
            if step.permutation is not None:
                tensors.append(tensors[-1])
            size = step.geometry.output_size(size, step.kernel)
            flops += prod(step.weight_shape) * step.repeats * prod(size)
            tensors.append(step.out_channels * step.repeats * prod(size))
        if self.output_permutation is not None:
            tensors.append(tensors[-1])
        if self.geometry.transposed:
            tensors.reverse()
        f, c = (n * self.geometry.groups for n in self.structure.weight_shape[:2])
        out_channels, in_channels = channels or (f, c)
        if in_channels < c:
            tensors.insert(0, tensors[0] // c * in_channels)
        if out_channels < f and self.geometry.groups > 1:  # of one group the crop is a view
            tensors.append(tensors[-1] // f * out_channels)
        held, *made = tensors
        peaks = [held + (made[i - 1] if i else 0) + entering for i, entering in enumerate(made)]
        return Cost(flops, max(peaks))


def make_plan(structure: Structure, geometry: ConvGeometry, schedule: Schedule) -> Plan:
    """The plan that runs the factors as scheduled.

    Args:
        structure: The structure of one group's weight.
        geometry: Stride, dilation, zero padding and groups of the whole layer.
        schedule: A transposed convolution runs it backwards.

    Raises:
        StructureError: If the schedule is not one of these factors, or the geometry has other axes than the kernel.
    """
    if not len(geometry.stride) == len(geometry.dilation) == len(geometry.padding) == len(structure.kernel):
        raise StructureError(
            f"structure {structure} has a kernel of {len(structure.kernel)} axes; expected as many strides, dilations "
            f"and paddings, got {geometry}"
        )
    if sorted(schedule.order) != list(range(structure.num_factors)) or not set(schedule.folded) <= set(schedule.order):
        raise StructureError(f"expected an order of the {structure.num_factors} factors, got {schedule}")
    return Plan(structure, geometry, schedule, *channel_steps(structure, geometry, schedule))


@lru_cache(maxsize=65536)
def best_plan(structure: Structure, geometry: ConvGeometry, input_size: Size) -> Plan:
    """The first of `good_plans`."""
    return good_plans(structure, geometry, input_size)[0]


def good_plans(structure: Structure, geometry: ConvGeometry, input_size: Size, *, slack: float = 1.0) -> list[Plan]:
    """All plans of about the fewest flops for that input (see `Plan.cost`), the presumably fastest first.

    Fewer permutes come first, then fewer repeated weights, then smaller peaks.

    Args:
        structure, geometry, input_size: As for `best_plan`.
        slack: How many times the fewest flops a plan may need.
    """
    if structure.num_factors > MAX_FACTORS:
        raise StructureError(
            f"plans are made for up to {MAX_FACTORS} factors, got {structure.num_factors}: {structure}"
        )
    grouped = [make_plan(structure, geometry, Schedule(o)) for o in permutations(range(structure.num_factors))]
    flops = [plan.cost(input_size).flops for plan in grouped]
    found = [
        plan
        for whole, count in zip(grouped, flops, strict=True)
        if count <= slack * min(flops)
        for plan in (whole, *_folded(whole))
    ]

    def price(plan: Plan) -> tuple[int, int, int, tuple[int, ...], tuple[int, ...]]:
        peak = plan.cost(input_size).peak_elements
        return plan.num_permutes, plan.num_repeated_weights, peak, plan.schedule.order, plan.schedule.folded

    return sorted(found, key=price)


def _folded(grouped: Plan) -> Iterator[Plan]:
    """The plan with every choice of the factors folded that share their weights among groups."""
    shared = [step.factor for step in grouped.steps if step.stored_shape != step.weight_shape]
    for count in range(1, len(shared) + 1):
        for chosen in combinations(sorted(shared), count):
            yield make_plan(grouped.structure, grouped.geometry, Schedule(grouped.schedule.order, chosen))
