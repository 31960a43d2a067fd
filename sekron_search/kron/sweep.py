"""Sweeps of least squares for any rank graph: each factor in turn is a linear problem with a normal matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from itertools import count as count_up
from math import prod

import opt_einsum
import torch
from torch import Tensor

from sekron_search.kron.contraction import Contraction, contraction
from sekron_search.kron.structure import Structure

#: Added to the normal matrix, relative to its mean diagonal. A larger Hessian keeps singular systems solvable and
#: every step monotone. In single precision it is larger: so many times the resolution of numbers.
PROXIMAL, PROXIMAL_EPS = 1e-9, 10.0

#: Least mean diagonal, for factors that vanish; weights come scaled to unit norm.
TINY = 1e-20

#: The Gram matrix of a factor is kept if its rank indices together are at most so many times its own mode.
GRAM_SHARE = 4


@dataclass(frozen=True)
class _Part:
    """Rank indices of a factor whose normal matrix stands alone, and how that matrix comes about.

    Args:
        axes: Of the factor, the batch axis counted.
        size: Of the matrix.
        contraction: What gives it.
        operands: (factor, whether its Gram matrix enters and not two copies of the factor itself).
    """

    axes: tuple[int, ...]
    size: int
    contraction: Contraction
    operands: tuple[tuple[int, bool], ...]


@dataclass(frozen=True)
class _Update:
    """How one factor's least-squares problem is set up: its target and its normal matrices."""

    factor: int
    target: Contraction
    others: tuple[int, ...]
    parts: tuple[_Part, ...]


@dataclass(frozen=True)
class _Half:
    """Factors that are updated one after the other from the tensor contracted with all factors outside of them."""

    shared: Contraction | None
    outside: tuple[int, ...]
    updates: tuple[_Update, ...]


class Sweep:
    """One pass of least-squares updates over all factors of a structure, its contractions planned once.

    The factors are split into two halves. The tensor is contracted with one half, once for all updates of the other:
    for CP of a convolution this halves the work on the large tensor; where it does not pay there is no split.

    Args:
        structure: The structure.
        batch: Number of tensors that are fitted side by side.

    Source: Phan, Tichavsky and Cichocki 2013 (sharing partial contractions), for any rank graph.
    """

    def __init__(self, structure: Structure, batch: int) -> None:
        count = structure.num_factors
        symbols: Iterator[str] = map(opt_einsum.get_symbol, count_up())
        self._batch = next(symbols)
        self._modes = [next(symbols) for _ in range(count)]
        names = {name: next(symbols) for name, _ in structure.ranks}
        copies = {name: next(symbols) for name, _ in structure.ranks}
        self._carried = ["".join(names[n] for n in carried) for carried in structure.carries]
        self._copied = ["".join(copies[n] for n in carried) for carried in structure.carries]
        self._sizes = {self._batch: batch}
        self._sizes |= {mode: prod(shape) for mode, shape in zip(self._modes, structure.shapes, strict=True)}
        for name, size in structure.ranks:
            self._sizes[names[name]] = self._sizes[copies[name]] = size
        self.grams = [self._gram(k) for k in range(count)]
        parts = [self._parts(k) for k in range(count)]
        self.halves = min(self._schedules(parts), key=lambda found: found[0])[1]

    def _contraction(self, inputs: Sequence[str], output: str) -> Contraction:
        used = sorted(set("".join(inputs) + output))
        return contraction(tuple(inputs), output, tuple((i, self._sizes[i]) for i in used))

    def _indices(self, k: int) -> str:
        return self._batch + self._carried[k] + self._modes[k]

    def _gram(self, k: int) -> Contraction | None:
        ranks = prod(self._sizes[i] for i in self._carried[k])
        if ranks > GRAM_SHARE * self._sizes[self._modes[k]]:
            return None
        copy = self._batch + self._copied[k] + self._modes[k]
        return self._contraction([self._indices(k), copy], self._batch + self._carried[k] + self._copied[k])

    def _parts(self, k: int) -> tuple[_Part, ...]:
        """The rank indices of factor k in groups that no chain of other factors connects.

        The normal matrix is the Kronecker product of one matrix per group: small ones for Tucker's core and for
        Tensor-Train, where the whole would be too large to solve with. Factors that share nothing with k, not even
        through others, make a group without indices, whose matrix is a number.
        """
        groups: list[tuple[set[str], list[int]]] = []
        for j, carried in enumerate(self._carried):
            if j != k:
                joined, members = set(carried), [j]
                for group in [g for g in groups if g[0] & joined]:
                    joined, members = joined | group[0], members + group[1]
                    groups.remove(group)
                groups.append((joined, members))
        parts = []
        for reached, members in groups:
            own = [i for i, index in enumerate(self._carried[k]) if index in reached]
            parts.append(self._part(k, own, sorted(members)))
        return tuple(parts)

    def _part(self, k: int, own: Sequence[int], members: Sequence[int]) -> _Part:
        inputs, operands = [], []
        for j in members:
            if self.grams[j] is not None:
                inputs.append(self._batch + self._carried[j] + self._copied[j])
                operands.append((j, True))
            else:
                inputs += [self._indices(j), self._batch + self._copied[j] + self._modes[j]]
                operands.append((j, False))
        kept = "".join(self._carried[k][i] for i in own)
        copied = "".join(self._copied[k][i] for i in own)
        made = self._contraction(inputs, self._batch + kept + copied)
        return _Part(tuple(1 + i for i in own), prod(self._sizes[i] for i in kept), made, tuple(operands))

    def _schedules(self, parts: Sequence[tuple[_Part, ...]]) -> list[tuple[float, tuple[_Half, ...]]]:
        """Every way to share partial contractions, with its cost: none, or two halves."""
        factors = range(len(self._carried))
        tensor = self._batch + "".join(self._modes)
        alone = self._half(tuple(factors), (), tensor, parts)
        found: list[tuple[float, tuple[_Half, ...]]] = [(alone[0], (alone[1],))]
        for size in range(1, len(self._carried) // 2 + 1):
            for first in combinations(factors, size):
                second = tuple(k for k in factors if k not in first)
                pair = [self._half(*sides, tensor, parts) for sides in ((first, second), (second, first))]
                found.append((sum(cost for cost, _ in pair), tuple(half for _, half in pair)))
        return found

    def _half(
        self, inside: tuple[int, ...], outside: tuple[int, ...], tensor: str, parts: Sequence[tuple[_Part, ...]]
    ) -> tuple[float, _Half]:
        cost, shared, start = 0.0, None, tensor
        if outside:
            open_ranks = {i for k in inside for i in self._carried[k]}
            ranks = "".join(sorted({i for k in outside for i in self._carried[k]} & open_ranks))
            start = self._batch + ranks + "".join(self._modes[k] for k in inside)
            shared = self._contraction([tensor, *(self._indices(k) for k in outside)], start)
            cost += shared.cost
        updates = []
        for k in inside:
            others = tuple(j for j in inside if j != k)
            target = self._contraction([start, *(self._indices(j) for j in others)], self._indices(k))
            cost += target.cost
            updates.append(_Update(k, target, others, parts[k]))
        return cost, _Half(shared, outside, tuple(updates))

    def lay_out(self, tensor: Tensor) -> list[list[Tensor]]:
        """The tensor (B, m_1, ..., m_S) as the first contractions need it, for every half."""
        return [
            [half.shared.lay_out(tensor)] if half.shared else [u.target.lay_out(tensor) for u in half.updates]
            for half in self.halves
        ]

    def __call__(
        self, tensors: Sequence[Sequence[Tensor]], factors: Sequence[Tensor], ridge: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """The factors after one pass, and their squared error less the squared norm of the tensor.

        Args:
            tensors: From `lay_out`; of norm 1 each, or 0.
            factors: Of shapes (B, rank indices, m_k).
            ridge: (B,), the weight of the factors' squared norms in the objective.
        """
        factors = list(factors)
        grams = [None if g is None else g([a, a]) for g, a in zip(self.grams, factors, strict=True)]
        for half, laid_out in zip(self.halves, tensors, strict=True):
            starts = laid_out
            if half.shared is not None:
                contracted = half.shared([*laid_out, *(factors[k] for k in half.outside)], laid_out=True)
                starts = [contracted] * len(half.updates)
            for update, start in zip(half.updates, starts, strict=True):
                k = update.factor
                others = [factors[j] for j in update.others]
                target = update.target([start, *others], laid_out=half.shared is None)
                normals = [_normal(part, factors, grams) for part in update.parts]
                factors[k], bent = _solve(update.parts, normals, target, factors[k], ridge)
                gram = self.grams[k]
                if gram is not None:
                    grams[k] = gram([factors[k], factors[k]])
        # |T - T^|^2 = |T|^2 - 2 <A, target> + <A, normal A>, with the last factor's quantities at hand.
        return factors, (factors[k] * (bent() - 2 * target)).flatten(1).sum(1)


@lru_cache(maxsize=512)
def sweep_of(structure: Structure, batch: int) -> Sweep:
    """The `Sweep` of a structure, planned once."""
    return Sweep(structure, batch)


def _broadcast(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape(-1, *[1] * (like.dim() - 1))


def _normal(part: _Part, factors: Sequence[Tensor], grams: Sequence[Tensor | None]) -> Tensor:
    """(B, R, R): the Gram matrix of what the other factors contract to, over one part's rank indices."""
    operands: list[Tensor] = []
    for j, by_gram in part.operands:
        gram = grams[j]
        operands += [gram] if by_gram and gram is not None else [factors[j], factors[j]]
    return part.contraction(operands).reshape(-1, part.size, part.size)


def scaled_by_others(structure: Structure, factors: Sequence[Tensor], lift: float) -> list[Callable[[Tensor], Tensor]]:
    """Per factor, what multiplies it by N^-1/2, N its normal matrix: the curvature of the squared error is then one.

    Args:
        structure: The structure that the factors follow.
        factors: Of shapes (B, rank indices, m_k).
        lift: Added to N's parts, relative to their mean diagonals.
    """
    sweep = sweep_of(structure, len(factors[0]))
    grams = [None if g is None else g([a, a]) for g, a in zip(sweep.grams, factors, strict=True)]
    parts = {u.factor: u.parts for half in sweep.halves for u in half.updates}

    def scaling(k: int) -> Callable[[Tensor], Tensor]:
        roots = []
        for part in parts[k]:
            normal = _normal(part, factors, grams)
            diagonal = normal.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(TINY)
            values, vectors = torch.linalg.eigh(normal)
            values = values.clamp_min(0) + (lift * diagonal)[:, None]
            roots.append((part, (vectors / values.sqrt()[:, None]) @ vectors.mT))

        def apply(factor: Tensor) -> Tensor:
            for part, root in roots:
                factor = _along(part, factor, root.to(factor))
            return factor

        return apply

    return [scaling(k) for k in range(structure.num_factors)]


def _solve(
    parts: Sequence[_Part], normals: Sequence[Tensor], target: Tensor, factor: Tensor, ridge: Tensor
) -> tuple[Tensor, Callable[[], Tensor]]:
    """The factor that minimises its quadratic, or is on the way, and what gives the normal matrix times it.

    One part: the least-squares solution, held back a little by its predecessor where the matrix may be singular.
    Several: a Newton step whose Hessian, the Kronecker product of the parts' matrices, is a little too large.
    """
    proximal = max(PROXIMAL, PROXIMAL_EPS * torch.finfo(target.dtype).eps)
    lifts = [proximal * n.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(TINY) for n in normals]
    if len(parts) == 1:
        lift, old = _broadcast(lifts[0], factor), factor
        root = _lifted_root(normals[0], lifts[0] + ridge)
        flat = (target + lift * old).reshape(len(target), parts[0].size, -1)
        new = torch.cholesky_solve(flat, root).reshape(factor.shape)
        return new, lambda: target + lift * (old - new) - _broadcast(ridge, new) * new
    step = target - _curved(parts, normals, factor)
    for part, normal, lift in zip(parts, normals, lifts, strict=True):
        root = _lifted_root(normal, lift + ridge.sqrt())
        step = _along(part, step, root, inverse=True)
    return factor + step, lambda: _curved(parts, normals, factor + step)


def _lifted_root(matrix: Tensor, lift: Tensor) -> Tensor:
    """Cholesky root of symmetric matrices (B, R, R) with lift (B,) added to their diagonals."""
    lifted = matrix.clone()
    lifted.diagonal(dim1=-2, dim2=-1).add_(lift[:, None])
    root: Tensor = torch.linalg.cholesky_ex(lifted).L
    return root


def _curved(parts: Sequence[_Part], normals: Sequence[Tensor], factor: Tensor) -> Tensor:
    for part, normal in zip(parts, normals, strict=True):
        factor = _along(part, factor, normal)
    return factor


def _along(part: _Part, factor: Tensor, matrix: Tensor, *, inverse: bool = False) -> Tensor:
    """A matrix (B, R, R), or the inverse of what it is the Cholesky root of, along the part's rank indices together."""
    rest = [axis for axis in range(1, factor.dim()) if axis not in part.axes]
    permutation = [0, *part.axes, *rest]
    moved = factor.permute(permutation)
    flat = moved.reshape(moved.shape[0], part.size, -1)
    flat = torch.cholesky_solve(flat, matrix) if inverse else torch.bmm(matrix, flat)
    back = sorted(range(factor.dim()), key=permutation.__getitem__)
    return flat.reshape(moved.shape).permute(back)
