"""Tensor contractions whose order is found once and run many times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import opt_einsum
import torch
from torch import Tensor

#: Above this many operands the order is found greedily instead of optimally.
MOST_FOR_OPTIMAL = 8

#: From so many on, products of matrices with vectors run elementwise: a batched matrix product calls BLAS for each.
MANY_VECTORS = 16


@dataclass(frozen=True, eq=False)
class _Layout:
    """How an operand is laid out for a product: split into its indices, permuted, reshaped; steps not needed are None.

    Every step spared counts: for small factors the calls, not the arithmetic, take the time.
    """

    split: tuple[int, ...] | None
    permutation: tuple[int, ...] | None
    shape: tuple[int, ...] | None

    @classmethod
    def of(
        cls, present: str, wanted: str, shape: Sequence[int], sizes: Mapping[str, int], *, held: Sequence[int]
    ) -> _Layout:
        """From an operand of these indices, held in some shape with these elements in order, to a wanted shape."""
        order = tuple(present.index(i) for i in wanted)
        if order == tuple(range(len(order))):
            return cls(None, None, None if tuple(held) == tuple(shape) else tuple(shape))
        full = tuple(sizes[i] for i in present)
        permuted = tuple(sizes[i] for i in wanted)
        return cls(None if tuple(held) == full else full, order, None if permuted == tuple(shape) else tuple(shape))

    def __call__(self, x: Tensor) -> Tensor:
        if self.split is not None:
            x = x.reshape(self.split)
        if self.permutation is not None:
            x = x.permute(self.permutation)
        return x if self.shape is None else x.reshape(self.shape)


@dataclass(frozen=True)
class _Pair:
    """One pairwise contraction: a batched matrix product, or an elementwise one.

    Args:
        positions: Of the operands.
        left, right: How they are laid out.
        sum_axes: None for the matrix product; else the axes that the elementwise product is summed over, maybe none.
    """

    positions: tuple[int, int]
    left: _Layout
    right: _Layout
    sum_axes: tuple[int, ...] | None

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        """The product of two operands that are laid out."""
        if self.sum_axes is None:
            return torch.bmm(left, right)
        product = left * right
        return product.sum(self.sum_axes) if self.sum_axes else product


@dataclass(frozen=True, eq=False)
class _Operand:
    """Indices of an operand, and the shape that holds its elements in their order."""

    indices: str
    held: tuple[int, ...]


class Contraction:
    """A product of tensors, summed over the indices that the output lacks, in the cheapest pairwise order.

    What `torch.einsum` does, less the search for an order in every call: least-squares sweeps run the same small
    contractions thousands of times.

    Args:
        inputs: The indices of every operand, one letter each; no index twice in one operand.
        output: The indices of the result.
        sizes: The size of every index.
    """

    def __init__(self, inputs: Sequence[str], output: str, sizes: Mapping[str, int]) -> None:
        shapes = [tuple(sizes[i] for i in indices) for indices in inputs]
        search = "optimal" if len(inputs) <= MOST_FOR_OPTIMAL else "greedy"
        path, info = opt_einsum.contract_path(
            ",".join(inputs) + "->" + output, *shapes, shapes=True, optimize=search, einsum_call=False
        )
        #: Multiply-adds of the whole contraction, about.
        self.cost = float(info.opt_cost) / 2  # it counts multiplications and additions
        self._pairs: list[_Pair] = []
        left = [_Operand(indices, shape) for indices, shape in zip(inputs, shapes, strict=True)]
        first = left[0]
        self._first: tuple[int, _Layout] | None = None
        for positions in path:
            if len(positions) == 2:
                i, j = sorted(positions)
                b, a = left.pop(j), left.pop(i)
                needed = set(output).union(*(operand.indices for operand in left))
                pair, result = _pair(a, b, (i, j), needed, sizes)
                if first in (a, b):
                    self._first = (len(self._pairs), pair.left if a is first else pair.right)
                self._pairs.append(pair)
                left.append(result)
        last = left[0]
        lone = "".join(i for i in last.indices if i not in output)
        full = tuple(sizes[i] for i in last.indices)
        self._split = full if lone and last.held != full else None
        self._sum_axes = tuple(last.indices.index(i) for i in lone)
        kept = "".join(i for i in last.indices if i in output)
        held = [sizes[i] for i in kept] if lone else last.held
        self._final = _Layout.of(kept, output, [sizes[i] for i in output], sizes, held=held)

    @property
    def first_layout(self) -> tuple[tuple[int, ...] | None, ...]:
        """What `lay_out` does to the first operand: contractions in which it is equal can share the result."""
        if self._first is None:
            return ()
        layout = self._first[1]
        return layout.split, layout.permutation, layout.shape

    def lay_out(self, first: Tensor) -> Tensor:
        """The first operand as its product needs it, for calls with `laid_out`: a large one is then copied once."""
        return first if self._first is None else self._first[1](first).contiguous()

    def __call__(self, operands: Sequence[Tensor], *, laid_out: bool = False) -> Tensor:
        """The result, of the sizes of the output's indices; `laid_out` tells that the first operand is that already."""
        stack = list(operands)
        skipped = self._first if laid_out else None
        for number, pair in enumerate(self._pairs):
            i, j = pair.positions
            b, a = stack.pop(j), stack.pop(i)
            layout = skipped[1] if skipped is not None and skipped[0] == number else None
            left = a if layout is pair.left else pair.left(a)
            stack.append(pair(left, b if layout is pair.right else pair.right(b)))
        result = stack[0] if self._split is None else stack[0].reshape(self._split)
        return self._final(result.sum(self._sum_axes) if self._sum_axes else result)


@lru_cache(maxsize=4096)
def contraction(inputs: tuple[str, ...], output: str, sizes: tuple[tuple[str, int], ...]) -> Contraction:
    """The `Contraction` of these arguments, made once."""
    return Contraction(inputs, output, dict(sizes))


def _pair(
    a: _Operand, b: _Operand, positions: tuple[int, int], needed: set[str], sizes: Mapping[str, int]
) -> tuple[_Pair, _Operand]:
    """The contraction of two operands, and what results."""

    def size(indices: str) -> int:
        return prod(sizes[i] for i in indices)

    def each(indices: str) -> tuple[int, ...]:
        return tuple(sizes[i] for i in indices)

    # An index of one operand alone that nobody needs is summed in the end: rare, and correct.
    batch = "".join(i for i in a.indices if i in b.indices and i in needed)
    summed = "".join(i for i in a.indices if i in b.indices and i not in needed)
    only_a = "".join(i for i in a.indices if i not in b.indices)
    only_b = "".join(i for i in b.indices if i not in a.indices)
    matrix = bool(summed) and not (size(batch) >= MANY_VECTORS and 1 in (size(only_a), size(only_b)))
    if matrix:
        as_left: tuple[str, tuple[int, ...]] = (batch + only_a + summed, (size(batch), size(only_a), size(summed)))
        as_right: tuple[str, tuple[int, ...]] = (batch + summed + only_b, (size(batch), size(summed), size(only_b)))
        held: tuple[int, ...] = (size(batch), size(only_a), size(only_b))
    else:
        as_left = (batch + only_a + summed, each(batch + only_a) + (1,) * len(only_b) + each(summed))
        as_right = (batch + only_b + summed, each(batch) + (1,) * len(only_a) + each(only_b + summed))
        held = each(batch + only_a + only_b)
    left = _Layout.of(a.indices, *as_left, sizes, held=a.held)
    right = _Layout.of(b.indices, *as_right, sizes, held=b.held)
    sum_axes = None if matrix else tuple(range(len(held), len(held) + len(summed)))
    return _Pair(positions, left, right, sum_axes), _Operand(batch + only_a + only_b, held)
