"""Errors of structures without fitting them: exact from spectra for nested ranks, bounds for every rank graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from math import prod

import torch
from torch import Tensor

from sekron_search.kron.structure import Shape, Structure

Sizes = tuple[int, ...]

#: Spectra of larger Gram matrices are computed in float32, and what is traced from them: twice as fast, but relative
#: errors below 1e-3 are rounding.
DOUBLE_UP_TO = 256

#: What that rounding adds to a squared relative error at most, per row of the largest such matrix; bounds are lowered
#: by it.
SINGLE_SLACK = 1e-8


def tail_sums(gram: Tensor) -> Tensor:
    """Squared errors of the best approximations of every rank, from symmetric Gram matrices.

    Args:
        gram: (..., n, n), of the smaller side of an unfolding.

    Returns:
        (..., n + 1): entry r is the sum of all eigenvalues but the r largest, the squared error of rank r.

    Source: Eckart and Young 1936; Van Loan and Pitsianis 1993.
    """
    return _tails_of(torch.linalg.eigvalsh(gram))


class PairSpectra:
    """The squared error of every two-factor structure of a weight, at every rank; every spectrum is computed once.

    Unfoldings whose first factors nest (their sizes divide mode by mode) have Gram matrices that are partial traces
    of one another: only the largest ones are multiplied out.

    Args:
        weight: (G, F, C, *kernel); the groups' errors are added up, each group having the same rank.
    """

    def __init__(self, weight: Tensor) -> None:
        self._shape = tuple(weight.shape[1:])
        peak = float(weight.abs().max()) if weight.numel() else 0.0
        unit = weight.detach().double() / peak if peak > 0 else weight.detach().double()
        norm = float(unit.norm())
        #: The weight scaled to norm 1, or zero, in float64.
        self.unit = unit / norm if norm > 0 else unit
        self._grams: dict[tuple[bool, Sizes], Tensor] = {}
        self._tails: dict[Sizes, Tensor] = {}
        #: Rows of the matrix in float32 that a Gram matrix is, or is traced from: what it may have rounded.
        self._rounded: dict[tuple[bool, Sizes], int] = {}
        self._slack: dict[Sizes, float] = {}

    def tails(self, first: Sequence[int]) -> Tensor:
        """(n + 1,): the squared error at ranks 0 to n, relative to the squared norm of the weight.

        Args:
            first: (f_1, c_1, *kernel_1) of the first factor; it divides the weight's shape.
        """
        key = self._key(first)
        if key not in self._tails:
            self._tails[key] = self._from_gram(self._gram(key))
        return self._tails[key]

    def error(self, first: Sequence[int], rank: int) -> float:
        """Relative error of the best two-factor structure of that rank."""
        tails = self.tails(first)
        return float(tails[rank]) ** 0.5 if rank < len(tails) else 0.0

    def safe_error(self, first: Sequence[int], rank: int) -> float:
        """The same, less what rounding may have added."""
        tails = self.tails(first)
        return _safe_error(tails, rank, self._slack[self._key(first)])

    def bound_from_nested(self, first: Sequence[int], rank: int) -> float:
        """A relative error below which no two-factor structure of that rank comes, from spectra known already.

        Of a first factor that is d times as large as another one whose sizes divide its own, every term unfolds into
        d terms of the smaller one at most: rank r is no better than rank d r there.
        """
        bound = 0.0
        for other, tails in self._tails.items():
            if all(n % m == 0 for n, m in zip(first, other, strict=True)):
                bound = max(bound, _safe_error(tails, rank * (prod(first) // prod(other)), self._slack[other]))
        return bound

    def compute(self, firsts: Iterable[Sequence[int]], *, workers: int | None = None) -> None:
        """Compute many spectra: Gram matrices first, the largest first, then eigenvalues side by side on threads.

        Args:
            firsts: Shapes of first factors.
            workers: Threads; as many as torch uses if None. Eigenvalue solvers hardly profit from inner threads.
        """
        missing = sorted({self._key(f) for f in firsts} - self._tails.keys(), key=self._side, reverse=True)
        workers = workers or torch.get_num_threads()
        if workers == 1 or self.unit.is_cuda:
            for first in missing:
                self.tails(first)
        else:
            own = torch.get_num_threads()
            try:
                with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                    jobs = {first: pool.submit(self._from_gram, self._gram(first)) for first in missing}
                    self._tails |= {first: job.result() for first, job in jobs.items()}
            finally:
                torch.set_num_threads(own)
        self._grams.clear()

    def _key(self, first: Sequence[int]) -> Sizes:
        """The first factor's shape, or the second's where the factors share no mode: then they may change places."""
        first = tuple(first)
        if all(size in (1, whole) for size, whole in zip(first, self._shape, strict=True)):
            return min(first, tuple(whole // size for size, whole in zip(first, self._shape, strict=True)))
        return first

    def _side(self, first: Sizes) -> int:
        size = prod(first)
        return min(size, prod(self._shape) // size)

    def _from_gram(self, gram: Tensor) -> Tensor:
        if gram.shape[-1] > DOUBLE_UP_TO:
            gram = gram.float()
        return tail_sums(gram).sum(0).cpu()

    def _gram(self, first: Sizes) -> Tensor:
        """(G, n, n): the Gram matrix of the smaller side, from a larger one that contains it or from the weight."""
        leading = prod(first) * prod(first) <= prod(self._shape)
        inner = first if leading else tuple(n // f for n, f in zip(self._shape, first, strict=True))
        key = (leading, inner)
        if key not in self._grams:
            parent = self._parent(leading, inner)
            if parent is None:
                self._grams[key], self._rounded[key] = self._multiplied(leading, inner), 0
            else:
                self._grams[key] = self._traced(key, parent)
                self._rounded[key] = self._rounded[leading, parent]
            if self._grams[key].dtype == torch.float32:
                self._rounded[key] = max(self._rounded[key], prod(inner))
        self._slack[first] = SINGLE_SLACK * self._rounded[key]
        return self._grams[key]

    def _parent(self, leading: bool, inner: Sizes) -> Sizes | None:
        """The smallest matrix at hand whose partial trace is the wanted one."""
        found = [
            sizes
            for side, sizes in self._grams
            if side == leading and all(n % m == 0 for n, m in zip(sizes, inner, strict=True))
        ]
        return min(found, key=prod, default=None)

    def _multiplied(self, leading: bool, inner: Sizes) -> Tensor:
        """From the weight: a mode's index splits into a leading and a trailing part, one of them the factor's."""
        sizes, kept, summed = _split(leading, self._shape, inner)
        matrix = self.unit.reshape(-1, *sizes).permute(0, *kept, *summed).reshape(len(self.unit), prod(inner), -1)
        if matrix.shape[1] > DOUBLE_UP_TO:
            matrix = matrix.float()
        return matrix @ matrix.mT

    def _traced(self, key: tuple[bool, Sizes], parent: Sizes) -> Tensor:
        leading, inner = key
        sizes, kept, summed = _split(leading, parent, inner)
        second = len(sizes)
        gram = self._grams[leading, parent].reshape(-1, *sizes, *sizes)
        gram = gram.permute(0, *kept, *(second + k for k in kept), *summed, *(second + s for s in summed))
        size, traced = prod(inner), prod(parent) // prod(inner)
        blocks = gram.reshape(len(gram), size, size, traced, traced)
        return blocks.diagonal(dim1=-2, dim2=-1).sum(-1)


def _split(leading: bool, whole: Sizes, inner: Sizes) -> tuple[list[int], list[int], list[int]]:
    """Every mode's index split into a leading and a trailing part, one of them `inner`'s.

    Returns:
        The sizes of all parts in order; the axes of `inner`'s parts, and those of the others, behind a batch axis.
    """
    sizes = []
    for n, m in zip(whole, inner, strict=True):
        sizes += [m, n // m] if leading else [n // m, m]
    kept = list(range(1 if leading else 2, len(sizes) + 1, 2))
    return sizes, kept, [axis for axis in range(1, len(sizes) + 1) if axis not in kept]


def nested_tails(
    weights: Tensor, sequences: Mapping[tuple[Shape, ...], Sequence[int]]
) -> dict[tuple[Shape, ...], Tensor]:
    """Squared errors of SeKron's recursion at every combination of ranks, from one tree of spectra.

    The left factors of a truncated SVD are orthonormal, so what is cut off at every node of the tree adds up: at ranks
    (r_1, ..., r_{S-1}) the squared error is the tail past r_1, and for each of the r_1 remainders that are kept its
    own error at (r_2, ..., r_{S-1}). Sequences that begin alike share the beginning of the tree.

    Args:
        weights: (B, F, C, *kernel).
        sequences: For every sequence of factor shapes the largest rank per index, one fewer than shapes.

    Returns:
        For every sequence (B, limit of r_1, limit of r_2, ...): entry (r_1 - 1, r_2 - 1, ...) is the squared error at
        those ranks.

    Source: SeKron, Hameed et al. 2022, Algorithm 1.
    """
    groups: dict[Shape, dict[tuple[Shape, ...], tuple[int, ...]]] = {}
    for shapes, limits in sequences.items():
        groups.setdefault(shapes[0], {})[tuple(shapes)] = tuple(limits)
    found: dict[tuple[Shape, ...], Tensor] = {}
    for first, group in groups.items():
        rests = _without(weights, first)
        matrix = rests.flatten(2)
        longer = {shapes[1:]: limits[1:] for shapes, limits in group.items() if len(shapes) > 2}
        if longer:
            kept = min(max(limits[0] for limits in group.values()), *matrix.shape[1:])
            tails, remainders = _split_off(matrix, kept)
            below = nested_tails(remainders.reshape(-1, *rests.shape[2:]), longer)
        else:
            tails = tail_sums(matrix @ matrix.mT if matrix.shape[1] <= matrix.shape[2] else matrix.mT @ matrix)
        for shapes, limits in group.items():
            own = _at_ranks(tails, limits[0])
            if len(shapes) > 2:
                parts = below[shapes[1:]]
                total = parts.reshape(len(weights), -1, *parts.shape[1:])[:, : limits[0]].cumsum(1)
                if total.shape[1] < limits[0]:  # ranks that the matrix cannot have add nothing
                    missing = limits[0] - total.shape[1]
                    total = torch.cat([total, total[:, -1:].expand(-1, missing, *total.shape[2:])], 1)
                own = total + own.reshape(*own.shape, *[1] * (total.dim() - 2))
            found[shapes] = own
    return found


def core_tails(structure: Structure, weights: Tensor, core: int) -> Tensor:
    """Squared errors of a structure with a core at all ranks, its leaves the leading singular vectors of their modes.

    In the bases of all singular vectors the core of every rank is a corner of one tensor: what is outside is lost.

    Args:
        structure: With the core that `core_of` found; its ranks do not matter.
        weights: (B, F, C, *kernel), of the structure's own shape.
        core: The core's position.

    Returns:
        (B, n_1 + 1, n_2 + 1, ...): entry (r_1, r_2, ...) is the error at those sizes of the leaves' rank indices, in
        the order of the factors.

    Source: De Lathauwer et al. 2000, A multilinear singular value decomposition (truncated HOSVD).
    """
    rotated = structure.unfold(weights)
    leaves = [k for k in range(structure.num_factors) if k != core]
    for k in leaves:
        unfolded = rotated.movedim(1 + k, 1)
        flat = unfolded.flatten(2)
        vectors = torch.linalg.eigh(flat @ flat.mT).eigenvectors.flip(-1)
        rotated = (vectors.mT @ flat).reshape(unfolded.shape).movedim(1, 1 + k)
    kept = rotated.square().sum(1 + core)
    for axis in range(1, kept.dim()):
        kept = kept.cumsum(axis)
    whole = kept.flatten(1)[:, -1].reshape(-1, *[1] * (kept.dim() - 1))
    padded = torch.nn.functional.pad(kept, [1, 0] * (kept.dim() - 1))
    result: Tensor = (whole - padded).clamp_min(0)
    return result


def _split_off(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Tails (B, n + 1) of matrices (B, rows, columns), and S V, (B, count, columns), of their leading terms.

    Always from the smaller Gram matrix: of the larger one there may be a hundred gigabytes.
    """
    if matrix.shape[1] <= matrix.shape[2]:
        values, vectors = torch.linalg.eigh(matrix @ matrix.mT)
        return _tails_of(values), vectors.flip(-1)[..., :count].mT @ matrix
    values, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    leading = (values.flip(-1)[..., :count].clamp_min(0).sqrt()[..., None]) * vectors.flip(-1)[..., :count].mT
    return _tails_of(values), leading


def _without(weights: Tensor, first: Shape) -> Tensor:
    """(B, m_1, F / f_1, C / c_1, ...): the first factor's positions in front of what is left for the others."""
    count = len(first)
    rest = tuple(n // f for n, f in zip(weights.shape[1:], first, strict=True))
    split = weights.reshape(-1, *(n for pair in zip(first, rest, strict=True) for n in pair))
    axes = [0, *range(1, 2 * count, 2), *range(2, 2 * count + 1, 2)]
    return split.permute(axes).reshape(len(weights), prod(first), *rest)


def _tails_of(eigenvalues: Tensor) -> Tensor:
    """(..., n + 1) sums of all but the r largest, from ascending eigenvalues: the smallest are added first."""
    return torch.nn.functional.pad(eigenvalues.clamp_min(0).double().cumsum(-1), (1, 0)).flip(-1)


def _at_ranks(tails: Tensor, limit: int) -> Tensor:
    """Tails at ranks 1 to `limit`; ranks that the matrix cannot have cost no error."""
    tails = tails[..., 1 : limit + 1]
    return torch.nn.functional.pad(tails, (0, limit - tails.shape[-1]))


def error_bound(structure: Structure, spectra: PairSpectra) -> float:
    """A relative error below which no factors of this structure come, whatever the fit.

    Split the factors into two sets: the weight, unfolded between them, is approximated by a matrix whose rank is at
    most the product of the rank indices that both sets carry. So the tail of that unfolding bounds the error; the
    largest bound over all splits that are two-factor unfoldings counts. For Tucker and Tensor-Train these are the
    tails of the HOSVD and of the TT-SVD.

    Args:
        structure: Of the shape of the spectra's weight. A weight that was padded has no such bound: errors in the
            padded channels are cut off.
        spectra: Of the weight.

    Source: De Lathauwer et al. 2000; Oseledets 2011; for any rank graph by Eckart and Young 1936.
    """
    count = structure.num_factors
    sizes = structure.rank_sizes
    bound = 0.0
    for number in range(1, count):
        for inside in combinations(range(count), number):
            first = _leading_shape(structure, inside)
            if first is None:
                continue
            within = {name for k in inside for name in structure.carries[k]}
            without = {name for k in range(count) if k not in inside for name in structure.carries[k]}
            bound = max(bound, spectra.safe_error(first, prod(sizes[name] for name in within & without)))
    return bound


def _safe_error(tails: Tensor, rank: int, slack: float) -> float:
    """The error at a rank, less what rounding in float32 may have added to its square."""
    return max(float(tails[rank]) - slack, 0.0) ** 0.5 if rank < len(tails) else 0.0


def _leading_shape(structure: Structure, inside: Sequence[int]) -> Sizes | None:
    """The shape of these factors together if they lead the others in every mode; else they are no first factor."""
    shape = []
    for mode in range(len(structure.weight_shape)):
        order = [k in inside for k, own in enumerate(structure.shapes) if own[mode] > 1]
        if order != sorted(order, reverse=True):
            return None
        shape.append(prod(structure.shapes[k][mode] for k in inside))
    return tuple(shape) if 1 < prod(shape) < prod(structure.weight_shape) else None
