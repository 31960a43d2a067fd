"""Lazy enumeration of the structures of a weight shape: factor shapes, rank graphs, ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import log2, prod
from typing import Literal

from sekron_search.errors import StructureError
from sekron_search.kron.families import (
    GRAPHS,
    Graph,
    GraphName,
    channel_svd,
    depthwise_cp,
    mode_shapes,
    spatial_svd,
    tucker2,
)
from sekron_search.kron.structure import Shape, Structure
from sekron_search.references import import_reference

FamilyName = Literal[
    "sekron",
    "channel_svd",
    "spatial_svd",
    "cp",
    "depthwise_cp",
    "tucker",
    "tucker2",
    "tt",
    "tr",
    "kronecker_cp",
    "kronecker_tt",
    "kronecker_tr",
    "kronecker_tucker",
]


@dataclass(frozen=True)
class Skeleton:
    """A structure without its rank sizes: factor shapes and rank graph."""

    shapes: tuple[Shape, ...]
    graph: Graph

    @property
    def names(self) -> list[str]:
        """The rank indices."""
        return sorted({name for carried in self.graph for name in carried})

    def max_ranks(self) -> tuple[int, ...]:
        """For every rank index, the largest size that can matter.

        An index is the bond between its first carrier and the rest, so it needs no more than the smaller of that
        carrier's own size (times its other indices, bounded by theirs) and the size of everything else; CP, whose
        index is carried by all, needs at most the product of all modes but the largest.
        """
        modes = [prod(shape) for shape in self.shapes]
        total = prod(modes)
        sizes = []
        for name in self.names:
            carriers = [k for k, carried in enumerate(self.graph) if name in carried]
            if len(carriers) == len(modes) > 2:
                sizes.append(total // max(modes))
            else:
                sizes.append(min(modes[carriers[0]], total // modes[carriers[0]]))
        if self.graph == GRAPHS["tt"](len(modes)):
            return tuple(min(prod(modes[: k + 1]), prod(modes[k + 1 :])) for k in range(len(modes) - 1))
        if self.graph == GRAPHS["sekron"](len(modes)):
            return tuple(min(modes[k], prod(modes[k + 1 :])) for k in range(len(modes) - 1))
        return tuple(sizes)

    def with_ranks(self, ranks: Sequence[int]) -> Structure:
        """The structure with these sizes, in the order of `names`."""
        return Structure.build(self.shapes, self.graph, dict(zip(self.names, ranks, strict=True)))


@lru_cache(maxsize=4096)
def ordered_factorizations(number: int, count: int) -> tuple[tuple[int, ...], ...]:
    """All tuples of `count` positive integers whose product is `number`, in lexicographic order."""
    if count == 1:
        return ((number,),)
    return tuple(
        (first, *rest)
        for first in range(1, number + 1)
        if number % first == 0
        for rest in ordered_factorizations(number // first, count - 1)
    )


def factor_shapes(weight_shape: Sequence[int], count: int) -> Iterator[tuple[Shape, ...]]:
    """All sequences of `count` factor shapes with these mode products, none of them a single number."""
    for modes in product(*(ordered_factorizations(size, count) for size in weight_shape)):
        shapes = tuple(zip(*modes, strict=True))
        if all(prod(shape) > 1 for shape in shapes):
            yield shapes


def _by_modes(graph: GraphName) -> Callable[[Shape, int], Iterator[Skeleton]]:
    def build(weight_shape: Shape, max_factors: int) -> Iterator[Skeleton]:
        shapes = mode_shapes(weight_shape)
        if graph == "tucker":
            shapes = [*shapes, (1,) * len(weight_shape)]
        if len(shapes) >= 3:  # with two modes every one of these graphs is a plain matrix factorization
            yield Skeleton(tuple(shapes), GRAPHS[graph](len(shapes)))

    return build


def _by_shapes(graph: GraphName, least: int) -> Callable[[Shape, int], Iterator[Skeleton]]:
    def build(weight_shape: Shape, max_factors: int) -> Iterator[Skeleton]:
        for count in range(least, max_factors + 1):
            for shapes in factor_shapes(weight_shape, count):
                yield Skeleton(shapes, GRAPHS[graph](count))

    return build


def _always(make: Callable[[Shape], Structure]) -> Callable[[Shape, int], Iterator[Skeleton]]:
    """The one skeleton of a family, where none of its factors is a single number."""

    def build(weight_shape: Shape, max_factors: int) -> Iterator[Skeleton]:
        structure = make(weight_shape)
        if all(prod(shape) > 1 for shape in structure.shapes):
            yield Skeleton(structure.shapes, structure.carries)

    return build


def _spatial_svd(weight_shape: Shape, max_factors: int) -> Iterator[Skeleton]:
    if sum(size > 1 for size in weight_shape[2:]) > 1:  # else it is the channel SVD
        yield from _always(lambda shape: spatial_svd(shape, 1))(weight_shape, max_factors)


#: For every family, the skeletons of a weight shape with at most so many factors (families by mode have their own).
FAMILIES: dict[FamilyName, Callable[[Shape, int], Iterator[Skeleton]]] = {
    "sekron": _by_shapes("sekron", 2),
    "cp": _by_modes("cp"),
    "depthwise_cp": _always(lambda shape: depthwise_cp(shape, 1)),
    "tucker": _by_modes("tucker"),
    "tucker2": _always(lambda shape: tucker2(shape, (1, 1))),
    "channel_svd": _always(lambda shape: channel_svd(shape, 1)),
    "spatial_svd": _spatial_svd,
    "tt": _by_modes("tt"),
    "tr": _by_modes("tr"),
    "kronecker_cp": _by_shapes("cp", 3),
    "kronecker_tt": _by_shapes("tt", 3),
    "kronecker_tr": _by_shapes("tr", 3),
    "kronecker_tucker": _by_shapes("tucker", 3),
}

#: Families of free factor shapes: channels that are padded give them more divisors.
FREE_SHAPES: frozenset[FamilyName] = frozenset(
    {"sekron", "kronecker_cp", "kronecker_tt", "kronecker_tr", "kronecker_tucker"}
)

#: Channels are padded to this share of theirs at most: what is padded is computed.
MOST_PADDING = 1.25


def skeletons(family: str, weight_shape: Shape, max_factors: int, channel_multiple: int) -> Iterator[Skeleton]:
    """All skeletons of a family for a weight shape, and for it with padded channels if the family's shapes are free.

    Args:
        family: A key of `FAMILIES`, or `package.module:function` of a function like its values.
        weight_shape: (F, C, *kernel).
        max_factors: Of the families with free factor shapes.
        channel_multiple: Of the channels when they are padded.

    Raises:
        ConfigError: If the function cannot be imported.
        StructureError: If it gives anything but skeletons of the weight shape.
    """
    if family not in FAMILIES:
        yield from _own_skeletons(family, weight_shape, max_factors)
        return
    build = FAMILIES[family]
    yield from build(weight_shape, max_factors)
    for padded in padded_shapes(weight_shape, channel_multiple) if family in FREE_SHAPES else ():
        added = [mode for mode in (0, 1) if padded[mode] != weight_shape[mode]]
        for skeleton in build(padded, max_factors):
            # Channels that one factor holds alone need no divisors: padded they only cost more.
            if all(sum(shape[mode] > 1 for shape in skeleton.shapes) > 1 for mode in added):
                yield skeleton


def _own_skeletons(family: str, weight_shape: Shape, max_factors: int) -> Iterator[Skeleton]:
    """Those of a function of the user's, checked."""
    for skeleton in import_reference(family, "space.families")(weight_shape, max_factors):
        if not isinstance(skeleton, Skeleton):
            raise StructureError(f"family {family!r}: expected it to give Skeletons, got {type(skeleton).__name__}")
        structure = skeleton.with_ranks([1] * len(skeleton.names))
        if structure.weight_shape != tuple(weight_shape):
            raise StructureError(
                f"family {family!r}: expected skeletons of the weight shape {tuple(weight_shape)}, got factor shapes "
                f"{skeleton.shapes}, whose products are {structure.weight_shape}"
            )
        yield skeleton


def padded_shapes(weight_shape: Shape, multiple: int) -> list[Shape]:
    """The weight shape with F, C or both rounded up to a multiple, where that adds a quarter at most."""
    f, c, *kernel = weight_shape
    choices = []
    for size in (f, c):
        rounded = -(-size // multiple) * multiple
        choices.append([size, rounded] if size < rounded <= MOST_PADDING * size else [size])
    return [(*channels, *kernel) for channels in product(*choices)][1:]


def rank_ladder(largest: int, levels: int, multiple: int = 1) -> list[int]:
    """Up to `levels` ranks from 1 to `largest`, evenly spread on a logarithmic scale.

    From `multiple` on they are multiples of it; below it, powers of two, for a small rank of a large Kronecker factor
    makes channels that are multiples all the same.
    """
    if largest < multiple:
        return rank_ladder(largest, levels)
    top = largest - largest % multiple
    if levels == 1:
        return [top]

    def rounded(rank: float) -> int:
        small = 1 << round(log2(rank))
        return small if small < multiple else max(round(rank / multiple), 1) * multiple

    return sorted({top, *(min(rounded(top ** (i / (levels - 1))), top) for i in range(levels - 1))})


def rank_choices(
    skeleton: Skeleton, fits: Callable[[Structure], bool], levels: int, multiple: int = 1
) -> Iterator[Structure]:
    """Structures of a skeleton over a ladder of ranks, as long as `fits` (monotone in every rank) accepts them.

    One rank index: a ladder up to the largest accepted size. Several: every index takes the same share of its largest
    useful size, the shares on a ladder; all combinations of shares within one level of each other are given.

    Args:
        skeleton: Shapes and graph.
        fits: Whether a structure is cheap enough to be an option.
        levels: Number of ladder steps.
        multiple: Rank sizes that are larger are multiples of this.
    """
    largest = skeleton.max_ranks()
    if len(largest) == 1:
        top = largest_where(lambda rank: fits(skeleton.with_ranks((rank,))), largest[0])
        if top:
            yield from (
                s for r in rank_ladder(top, levels, multiple) if r <= top and fits(s := skeleton.with_ranks((r,)))
            )
        return
    grid = 512

    def at(shares: Sequence[int]) -> tuple[int, ...]:
        return tuple(
            min(max(round(size * share / grid / multiple) * multiple, 1), size)
            for size, share in zip(largest, shares, strict=True)
        )

    top = largest_where(lambda share: fits(skeleton.with_ranks(at([share] * len(largest)))), grid)
    if not top:
        return
    ladder = rank_ladder(top, levels)
    seen = set()
    for i, share in enumerate(ladder):
        neighbours = (share, ladder[min(i + 1, len(ladder) - 1)])
        for shares in product(neighbours, repeat=min(len(largest), 3)):
            ranks = at((*shares, *[share] * (len(largest) - len(shares))))
            if ranks not in seen:
                seen.add(ranks)
                if fits(structure := skeleton.with_ranks(ranks)):
                    yield structure


def largest_where(accepts: Callable[[int], bool], upper: int) -> int:
    """The largest integer in [1, upper] that a monotone predicate accepts; 0 if it rejects 1."""
    low, high = 0, upper
    while low < high:
        middle = (low + high + 1) // 2
        if accepts(middle):
            low = middle
        else:
            high = middle - 1
    return low
