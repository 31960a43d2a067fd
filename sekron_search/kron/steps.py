"""The steps of a plan: one grouped convolution per factor, every field of it an integer.

Between the steps the tensor is (N, channels, *size). Its channels are the product of named axes: the c of the factors
to come, the f of the factors done, and the open rank indices. A step contracts the axes that its factor consumes and
keeps all others, in one of two ways:

- *grouped*: all kept axes are convolution groups. The only thing needed before is a permutation that puts them first;
  N and the memory format stay as they are, and the bias rides on the last convolution. Groups of axes that the factor
  does not carry share its weight, which is repeated for them.
- *folded*: only the axes that the factor carries are groups. Of the others, those in front go into N, and those behind
  into the first spatial axis where the kernel does not move on it: views both, without a permutation or a repeated
  weight. Measured up to 3x faster where factors are large and shared, slower where they are tiny.

A transposed convolution is the adjoint of a convolution, so its plan is that convolution's, run backwards: what is
produced there is contracted here. In that convolution F and C change places, and its input is the output here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import gcd, prod

from sekron_search.errors import StructureError
from sekron_search.kron.geometry import ConvGeometry, Pair, Size
from sekron_search.kron.structure import Structure


@dataclass(frozen=True)
class Schedule:
    """In which order the factors run, and which of them run folded. Text form: `1*,0`, a star where folded."""

    order: tuple[int, ...]
    folded: tuple[int, ...] = ()

    def __str__(self) -> str:
        return ",".join(f"{k}*" if k in self.folded else str(k) for k in self.order)

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Inverse of `str`.

        Raises:
            StructureError: If the text is no such list.
        """
        items = [item.strip() for item in text.split(",")]
        if not all(re.fullmatch(r"[0-9]{1,4}\*?", item) for item in items):
            raise StructureError(f"expected a schedule such as '1*,0', got {text!r}")
        order = tuple(int(item.removesuffix("*")) for item in items)
        if len(set(order)) != len(order):
            raise StructureError(f"expected a schedule with every factor once, such as '1*,0', got {text!r}")
        return cls(order, tuple(sorted(k for k, item in zip(order, items, strict=True) if item.endswith("*"))))


@dataclass(frozen=True)
class Step:
    """One grouped convolution of a plan; every field is an integer or a tuple of integers.

    Args:
        factor: Position k of the factor in the structure.
        axes: Sizes of the channel axes on entry.
        permutation: Order of those axes that makes them (lead, kept, contracted, trail); None if it is the present one.
        weight_permutation: Axes of the stored factor (G, rank indices, f, c, *kernel) in the order
            (kept axes that the factor has, produced, contracted, *kernel).
        shared_shape: The stored weight with its groups unfolded: (kept sizes, 1 where the factor lacks the axis, so
            that these groups share it) + (produced, contracted, *kernel).
        lead, trail: Product of the axes that go into N, and into the first spatial axis.
        kept: Sizes of the axes that are convolution groups.
        produced, contracted: Channels out and in of one group.
        kernel, stride, dilation, padding: Of this convolution, per axis; padding as (before, after).
    """

    factor: int
    axes: tuple[int, ...]
    permutation: tuple[int, ...] | None
    weight_permutation: tuple[int, ...]
    shared_shape: tuple[int, ...]
    lead: int
    trail: int
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
        """Channels that the convolution takes."""
        return self.groups * self.contracted

    @property
    def out_channels(self) -> int:
        """Channels that the convolution gives."""
        return self.groups * self.produced

    @property
    def repeats(self) -> int:
        """How many times the convolution runs on one sample: the axes folded away."""
        return self.lead * self.trail

    @property
    def is_matrix(self) -> bool:
        """Whether the step is a matrix product where the input has size 1 on every axis."""
        return (
            self.groups == self.trail == 1
            and all(n == 1 for n in (*self.kernel, *self.stride))
            and not any(map(any, self.padding))
        )

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


# An axis of the channels: ("g", 0) the layer's groups, ("c", k), ("f", k), ("r", name's position). An axis of a factor
# besides: ("k0", k), ("k1", k), ...
Axis = tuple[str, int]


def channel_steps(
    structure: Structure, geometry: ConvGeometry, schedule: Schedule
) -> tuple[tuple[Step, ...], tuple[int, ...], tuple[int, ...] | None]:
    """The steps of a structure as scheduled, the channel axes at the end, and their order in the output if it differs.

    Args:
        structure: The structure of one group's weight.
        geometry: Of the whole layer.
        schedule: Of its factors.
    """
    order = schedule.order
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
        stride, dilation, padding = spatial
        kernel = structure.shapes[k][2:]
        kernel_axes = [(name, k) for name in spatial_axes]
        own: list[Axis] = [("g", 0)] + carried[k] + [("f", k), ("c", k)]
        consumed = contracted_by(k, state)
        still = kernel[0] == 1 and stride[0] == 1 and padding[0] == (0, 0)
        lead, kept, trail = _kept_axes(state, consumed, own if k in schedule.folded else state, still=still)
        produced = trim([a for a in carried[k] if a not in state] + [(wanted, k)])
        if position + 1 < len(order):
            # What the next step contracts is produced last, which spares it a permutation where possible.
            upcoming = contracted_by(order[position + 1], produced)
            produced = [a for a in produced if a not in upcoming] + upcoming
        order_of_own = [a for a in kept if a in own] + produced + consumed
        # Axes of size 1 are not part of the channels; they go anywhere, as long as the permutation is complete.
        stored = [a for a in own if a not in order_of_own] + order_of_own + kernel_axes
        own += kernel_axes
        out_channels = prod(sizes[a] for a in produced)
        in_channels = prod(sizes[a] for a in consumed)
        steps.append(
            Step(
                factor=k,
                axes=tuple(sizes[a] for a in state),
                permutation=_permutation(state, lead + kept + consumed + trail),
                weight_permutation=tuple(own.index(a) for a in stored),
                shared_shape=tuple(sizes[a] if a in own else 1 for a in kept) + (out_channels, in_channels, *kernel),
                lead=prod(sizes[a] for a in lead),
                trail=prod(sizes[a] for a in trail),
                kept=tuple(sizes[a] for a in kept),
                produced=out_channels,
                contracted=in_channels,
                kernel=kernel,
                stride=stride,
                dilation=dilation,
                padding=padding,
            )
        )
        state = lead + kept + produced + trail
    final = trim([("g", 0)] + [(wanted, k) for k in range(structure.num_factors)])
    return tuple(steps), tuple(sizes[a] for a in state), _permutation(state, final)


def _kept_axes(
    state: list[Axis], consumed: list[Axis], grouped: Collection[Axis], *, still: bool
) -> tuple[list[Axis], list[Axis], list[Axis]]:
    """The axes that a step does not contract, as (those that go into N, groups, into the first spatial axis).

    Args:
        state: All axes on entry.
        consumed: Those that are contracted.
        grouped: Those that have to be groups if they are kept.
        still: Whether the kernel does not move on the first spatial axis; only then anything can go there.
    """
    kept = [a for a in state if a not in consumed and a in grouped]
    last = max((i for i, a in enumerate(state) if a in consumed or a in kept), default=-1)
    trail = [a for a in state[last + 1 :] if still]
    lead = [a for a in state if a not in consumed and a not in kept and a not in trail]
    return lead, kept, trail


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
