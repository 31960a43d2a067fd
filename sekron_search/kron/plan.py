"""The integer plan: how a structure runs as a sequence of grouped convolutions, and what that costs.

Between the steps the tensor is (N, channels, *size). Its channels are the product of named axes: the c of the factors
to come, the f of the factors done, and the open rank indices. A step contracts the axes that its factor consumes and
keeps all others as convolution groups, so the only thing needed before it is a permutation that puts the kept axes
first. Keeping axes as groups, and not in N, was measured equal or up to 7x faster on CPU for small factors, leaves
N and the memory format alone, and lets the bias ride on the last convolution.

A transposed convolution is the adjoint of a convolution, so its plan is that convolution's, run backwards: what is
produced there is contracted here. In that convolution F and C change places, and its input is the output here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import permutations
from math import gcd, prod

from sekron_search.errors import StructureError
from sekron_search.kron.geometry import ConvGeometry, Pair, Size
from sekron_search.kron.structure import Structure

#: Trying every order costs S! plans; beyond this many factors only a beam of the usual orders would be affordable.
MAX_FACTORS = 6


@dataclass(frozen=True)
class Step:
    """One grouped convolution of a plan; every field is an integer or a tuple of integers.

    Args:
        factor: Position k of the factor in the structure.
        axes: Sizes of the channel axes on entry.
        permutation: Order of those axes that puts the kept ones first; None if it is the present one.
        weight_permutation: Axes of the stored factor (G, rank indices, f, c, *kernel) in the order
            (kept axes that the factor has, produced, contracted, *kernel).
        shared_shape: The stored weight with its groups unfolded: (kept sizes, 1 where the factor lacks the axis, so
            that these groups share it) + (produced, contracted, *kernel).
        kept: Sizes of the kept axes; their product is the number of convolution groups.
        produced, contracted: Channels out and in of one group.
        kernel, stride, dilation, padding: Of this convolution, per axis; padding as (before, after).
    """

    factor: int
    axes: tuple[int, ...]
    permutation: tuple[int, ...] | None
    weight_permutation: tuple[int, ...]
    shared_shape: tuple[int, ...]
    kept: tuple[int, ...]
    produced: int
    contracted: int
    kernel: Size
    stride: Size
    dilation: Size
    padding: tuple[Pair, ...]

    @property
    def groups(self) -> int:
        """Number of groups of the convolution."""
        return prod(self.kept)

    @property
    def in_channels(self) -> int:
        """Channels on entry."""
        return self.groups * self.contracted

    @property
    def out_channels(self) -> int:
        """Channels on exit."""
        return self.groups * self.produced

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the stored weight, that of a convolution: memory formats and other tools for those apply to it."""
        shared = prod(self.shared_shape[: len(self.kept)])
        return shared * self.produced, self.contracted, *self.kernel

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the convolution weight that runs."""
        return self.out_channels, self.contracted, *self.kernel

    @property
    def geometry(self) -> ConvGeometry:
        """The step as a convolution."""
        return ConvGeometry(self.stride, self.dilation, self.padding, self.groups)


@dataclass(frozen=True)
class Cost:
    """What one sample costs: multiply-adds as fvcore counts them, and the largest working set in elements."""

    flops: int
    peak_elements: int


@dataclass(frozen=True)
class Plan:
    """A structure, the order in which its factors run, and the resulting steps; a transposed one runs backwards."""

    structure: Structure
    geometry: ConvGeometry
    order: tuple[int, ...]
    steps: tuple[Step, ...]
    output_axes: tuple[int, ...]
    output_permutation: tuple[int, ...] | None

    @cached_property
    def num_permutes(self) -> int:
        """How many times the channels are reordered in a forward pass."""
        return sum(step.permutation is not None for step in self.steps) + (self.output_permutation is not None)

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
        tensors = [self.steps[0].in_channels * prod(size)]  # elements of every tensor that is made, one from the other
        for step in self.steps:
            if step.permutation is not None:
                tensors.append(tensors[-1])
            size = step.geometry.output_size(size, step.kernel)
            flops += prod(step.weight_shape) * prod(size)
            tensors.append(step.out_channels * prod(size))
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


def make_plan(structure: Structure, geometry: ConvGeometry, order: Sequence[int]) -> Plan:
    """The plan that runs the factors in `order`.

    Args:
        structure: The structure of one group's weight.
        geometry: Stride, dilation, zero padding and groups of the whole layer.
        order: A permutation of the factor positions; a transposed convolution runs it backwards.

    Raises:
        StructureError: If `order` is not a permutation of the factors, or the geometry has other axes than the kernel.
    """
    if not len(geometry.stride) == len(geometry.dilation) == len(geometry.padding) == len(structure.kernel):
        raise StructureError(
            f"structure {structure} has a kernel of {len(structure.kernel)} axes; expected as many strides, dilations "
            f"and paddings, got {geometry}"
        )
    if sorted(order) != list(range(structure.num_factors)):
        raise StructureError(f"expected an order of the {structure.num_factors} factors, got {tuple(order)}")
    return Plan(structure, geometry, tuple(order), *_channel_steps(structure, geometry, tuple(order)))


@lru_cache(maxsize=65536)
def best_plan(structure: Structure, geometry: ConvGeometry, input_size: Size) -> Plan:
    """The plan of fewest flops for that input (see `Plan.cost`); ties go to fewer permutes, then to smaller peaks."""
    if structure.num_factors > MAX_FACTORS:
        raise StructureError(
            f"plans are made for up to {MAX_FACTORS} factors, got {structure.num_factors}: {structure}"
        )

    def price(plan: Plan) -> tuple[int, int, int, tuple[int, ...]]:
        cost = plan.cost(input_size)
        return cost.flops, plan.num_permutes, cost.peak_elements, plan.order

    orders = permutations(range(structure.num_factors))
    return min((make_plan(structure, geometry, order) for order in orders), key=price)


# An axis of the channels: ("g", 0) the layer's groups, ("c", k), ("f", k), ("r", name's position). An axis of a factor
# besides: ("k0", k), ("k1", k), ...
Axis = tuple[str, int]


def _channel_steps(
    structure: Structure, geometry: ConvGeometry, order: tuple[int, ...]
) -> tuple[tuple[Step, ...], tuple[int, ...], tuple[int, ...] | None]:
    sizes: dict[Axis, int] = {("g", 0): geometry.groups}
    for k, (f, c, *_) in enumerate(structure.shapes):
        sizes["f", k], sizes["c", k] = f, c
    spatial_axes = [f"k{axis}" for axis in range(len(structure.kernel))]
    given, wanted = ("f", "c") if geometry.transposed else ("c", "f")  # channels that come in, and that go out
    names = {name: i for i, (name, _) in enumerate(structure.ranks)}
    sizes |= {("r", names[name]): size for name, size in structure.ranks}
    carried = [[("r", names[name]) for name in own] for own in structure.carries]
    last_use = {axis: k for k in order for axis in carried[k]}

    def trim(axes: list[Axis]) -> list[Axis]:
        return [axis for axis in axes if sizes[axis] > 1]

    def contracted_by(k: int, axes: list[Axis]) -> list[Axis]:
        return [a for a in axes if a == (given, k) or (a[0] == "r" and last_use[a] == k)]

    state = trim([("g", 0)] + [(given, k) for k in range(structure.num_factors)])
    steps = []
    for position, (k, spatial) in enumerate(zip(order, _spatial_steps(structure, geometry, order), strict=True)):
        consumed = contracted_by(k, state)
        kept = [a for a in state if a not in consumed]
        produced = trim([a for a in carried[k] if a not in state] + [(wanted, k)])
        if position + 1 < len(order):
            # What the next step contracts is produced last, which spares it a permutation where possible.
            upcoming = contracted_by(order[position + 1], produced)
            produced = [a for a in produced if a not in upcoming] + upcoming
        kernel_axes = [(name, k) for name in spatial_axes]
        own: list[Axis] = [("g", 0)] + carried[k] + [("f", k), ("c", k)]
        order_of_own = [a for a in kept if a in own] + produced + consumed
        # Axes of size 1 are not part of the channels; they go anywhere, as long as the permutation is complete.
        ones = [a for a in own if a not in order_of_own]
        stored = ones + order_of_own + kernel_axes
        own += kernel_axes
        out_channels = prod(sizes[a] for a in produced)
        in_channels = prod(sizes[a] for a in consumed)
        steps.append(
            Step(
                factor=k,
                axes=tuple(sizes[a] for a in state),
                permutation=_permutation(state, kept + consumed),
                weight_permutation=tuple(own.index(a) for a in stored),
                shared_shape=tuple(sizes[a] if a in own else 1 for a in kept)
                + (out_channels, in_channels, *structure.shapes[k][2:]),
                kept=tuple(sizes[a] for a in kept),
                produced=out_channels,
                contracted=in_channels,
                kernel=structure.shapes[k][2:],
                stride=spatial[0],
                dilation=spatial[1],
                padding=spatial[2],
            )
        )
        state = kept + produced
    final = trim([("g", 0)] + [(wanted, k) for k in range(structure.num_factors)])
    return tuple(steps), tuple(sizes[a] for a in state), _permutation(state, final)


def _permutation(present: list[Axis], wanted: list[Axis]) -> tuple[int, ...] | None:
    return None if present == wanted else tuple(present.index(a) for a in wanted)


def _spatial_steps(
    structure: Structure, geometry: ConvGeometry, order: tuple[int, ...]
) -> Iterator[tuple[Size, Size, tuple[Pair, ...]]]:
    """(stride, dilation, padding) of every step, in running order."""
    axes = [_axis_steps(structure, geometry, order, axis) for axis in range(len(structure.kernel))]
    for step in zip(*axes, strict=True):
        stride, dilation, padding = zip(*step, strict=True)
        yield stride, dilation, padding


def _axis_steps(
    structure: Structure, geometry: ConvGeometry, order: tuple[int, ...], axis: int
) -> list[tuple[int, int, Pair]]:
    """(stride, dilation, padding) of every step on one axis.

    The dilation of factor k is the layer's own times the kernel sizes of the factors after it in the structure.
    Once padded, a step may skip positions as soon as the strides and dilations of all later steps are multiples of
    what it skips. Zero padding commutes with steps of kernel 1, so it waits for the first larger kernel.
    """
    kernels = [shape[2 + axis] for shape in structure.shapes]
    dilations = [geometry.dilation[axis] * prod(kernels[k + 1 :]) for k in range(len(kernels))]
    stride, padding = geometry.stride[axis], geometry.padding[axis]
    spatial = [position for position, k in enumerate(order) if kernels[k] > 1]
    pad_at = spatial[0] if spatial else (len(order) - 1 if stride == 1 else 0)
    steps: list[tuple[int, int, Pair]] = []
    skipped = 1
    for position, k in enumerate(order):
        skip = 1
        if position >= pad_at or padding == (0, 0):
            skip = stride
            for later in order[position + 1 :]:
                if kernels[later] > 1:
                    skip = gcd(skip, dilations[later] // skipped)
        own_dilation = dilations[k] // skipped if kernels[k] > 1 else 1
        steps.append((skip, own_dilation, padding if position == pad_at else (0, 0)))
        stride //= skip
        skipped *= skip
    return steps
