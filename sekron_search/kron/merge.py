"""Neighbouring factors multiplied into one: fewer operators, a coarser structure, the same weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sekron_search.errors import StructureError
from sekron_search.kron.structure import Structure


def merged_structure(structure: Structure, first: int) -> Structure:
    """The structure with factors `first` and `first + 1` as one, of shape (f f', c c', ...).

    It carries the rank indices of both, but for those that nothing else carries: their sum is done.

    Raises:
        StructureError: If there is no such pair.
    """
    if not 0 <= first < structure.num_factors - 1:
        raise StructureError(
            f"expected the first of two neighbouring factors, 0 to {structure.num_factors - 2}, got {first}: "
            f"{structure}"
        )
    second = first + 1
    shape = tuple(a * b for a, b in zip(structure.shapes[first], structure.shapes[second], strict=True))
    kept = _kept(structure, first)
    carries = [*structure.carries[:first], kept, *structure.carries[second + 1 :]]
    shapes = [*structure.shapes[:first], shape, *structure.shapes[second + 1 :]]
    used = {name for carried in carries for name in carried}
    return Structure.build(shapes, carries, {name: size for name, size in structure.ranks if name in used})


def merge_factors(structure: Structure, factors: Sequence[Tensor], first: int) -> list[Tensor]:
    """The factors of `merged_structure`: the two multiplied, A (x) A', summed over the rank indices that close.

    Args:
        structure: As it is.
        factors: Of shapes (G, rank indices, f, c, *kernel).
        first: Position of the first of the two.
    """
    second, kept = first + 1, _kept(structure, first)
    modes = len(structure.shapes[0])
    axis = {name: 1 + i for i, (name, _) in enumerate(structure.ranks)}  # 0 is the groups' axis
    outer = [len(axis) + 1 + 2 * mode for mode in range(modes)]
    inner = [len(axis) + 2 + 2 * mode for mode in range(modes)]
    interleaved = [index for pair in zip(outer, inner, strict=True) for index in pair]
    product = torch.einsum(
        factors[first],
        [0, *(axis[name] for name in structure.carries[first]), *outer],
        factors[second],
        [0, *(axis[name] for name in structure.carries[second]), *inner],
        [0, *(axis[name] for name in kept), *interleaved],
    )
    shape = merged_structure(structure, first).factor_shapes[first]
    return [*factors[:first], product.reshape(product.shape[0], *shape), *factors[second + 1 :]]


def merges(structure: Structure) -> Iterator[tuple[int, ...]]:
    """All ways to merge neighbours, at least one pair and not all: positions for `merged_structure`, in turn.

    Every partition of the sequence into runs is given once; a run becomes one factor.
    """
    gaps = structure.num_factors - 1
    for chosen in range(1, 2**gaps - 1):
        # From the back, so that what comes before keeps its position.
        yield tuple(gap for gap in reversed(range(gaps)) if chosen >> gap & 1)


def _kept(structure: Structure, first: int) -> list[str]:
    """The rank indices of the merged factor, in the order of the structure's."""
    pair = {*structure.carries[first], *structure.carries[first + 1]}
    others = {n for k, own in enumerate(structure.carries) if k not in (first, first + 1) for n in own}
    return [name for name, _ in structure.ranks if name in pair and name in others]
