"""How much errors of a layer count: a metric of its inputs and outputs, and its nearest form that a structure keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from sekron_search.kron.structure import Structure

#: Added to the second moment, relative to its mean diagonal: directions the calibration inputs never showed still
#: count a little, so the fit does not run away along them.
DAMPING = 1e-3

#: The same for the curvature at the output, which is estimated from fewer samples.
CURVATURE_DAMPING = 0.1

#: Matrices of more rows are kept and factorized in float32: half the memory and time, and relative errors of outputs
#: below 1e-3 are no option's.
DOUBLE_UP_TO = 1024


@dataclass(frozen=True)
class InputMetric:
    """How much each direction of a layer's unfolded input matters, and of its output, per group.

    Args:
        moment: (G, P, P) with P = C times the kernel's sizes, the second moment M of the unfolded input.
        mean: (G, P), the mean of the unfolded input.
        curvature: (G, F, F), the weight H of errors of the output; all count alike if None.
    """

    moment: Tensor
    mean: Tensor
    curvature: Tensor | None = None

    @classmethod
    def damped(
        cls, moment: Tensor, mean: Tensor, *, damping: float = DAMPING, curvature: Tensor | None = None
    ) -> InputMetric:
        """The metric of a moment that is centered or not, with a little added to the diagonals.

        Args:
            moment: E[x x'] of the unfolded input, (G, P, P); the covariance where a constant shift of the output costs
                nothing, because a batch-norm that is re-estimated or a bias that is corrected follows.
            mean: E[x], (G, P).
            damping: Added to the moment's diagonal, relative to its mean.
            curvature: H of the output, (G, F, F); all errors of the output count alike if None.
        """
        damped = None if curvature is None else lifted(curvature, CURVATURE_DAMPING)
        return cls(lifted(moment, damping), mean, damped)

    def weighted(self, difference: Tensor) -> Tensor:
        """H D M, (G, F, P), of a (G, F, C, *kernel) weight difference D: half the gradient of its squared norm."""
        spread = difference.flatten(2) @ self.moment.to(difference)
        return spread if self.curvature is None else self.curvature.to(difference) @ spread

    def norm(self, difference: Tensor) -> Tensor:
        """Root mean square over the inputs of what a (G, F, C, *kernel) weight difference adds to the output."""
        return (difference.flatten(2) * self.weighted(difference)).sum().clamp_min(0).sqrt()

    def rel_error(self, weight: Tensor, approximation: Tensor) -> float:
        """Relative error of the layer's output, for weights of shape (G, F, C, *kernel)."""
        exact = weight.to(self.moment.dtype)
        scale = float(exact.abs().max())
        if scale == 0.0:
            return 0.0
        # Scaled to a largest entry of one: squares of entries below 1e-154 would vanish.
        total = float(self.norm(exact / scale))
        return float(self.norm((exact - approximation.to(exact)) / scale)) / total if total > 0 else 0.0


def damping_share(unknowns: int, samples: int) -> float:
    """The damping of a moment of P unknowns estimated from n samples: its error is about P / n of it."""
    return max(DAMPING, unknowns / samples)


def lifted(moment: Tensor, damping: float) -> Tensor:
    """M + damping * mean diagonal * I, for symmetric M of shape (..., P, P)."""
    tiny = torch.finfo(moment.dtype).tiny
    diagonal = moment.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp_min(tiny)
    result = moment.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(damping * diagonal)
    return result


def square_root(moment: Tensor) -> Tensor:
    """The triangular L of M = L L', for symmetric, positive semidefinite M of shape (..., P, P), by Cholesky.

    Where M is singular to rounding a little is added to its diagonal, as much as it takes.
    """
    root, failed = torch.linalg.cholesky_ex(moment)
    lift = torch.finfo(moment.dtype).eps * moment.shape[-1]
    while bool(failed.any()) or not bool(torch.isfinite(root).all()):
        if lift > 1:
            raise ArithmeticError("a moment holds NaN or infinity")
        root, failed = torch.linalg.cholesky_ex(lifted(moment, lift))
        lift *= 10
    result: Tensor = root
    return result


class Whitening:
    """Coordinates of a structure's factors in which all their entries count about alike.

    The metric H (x) M is replaced by a Kronecker product of one metric per factor, H_1 (x) M_1 (x) H_2 (x) M_2 ...:
    with H_k = R R' and M_k = L L' the factors R' A_k L make up the weight whitened alike, so the structure is kept. M_k
    is the partial trace of M over all other factors: exact, up to its scale, where M is such a product.

    Args:
        structure: The structure; its ranks do not matter.
        metric: Of the layer.
        most: Factors of more entries per out-channel are whitened mode by mode, by the partial traces of M_k in turn:
            the channels' makes up most of it, and is small. Modes that are larger still keep their coordinates.
    """

    def __init__(self, structure: Structure, metric: InputMetric, *, most: int | None = None) -> None:
        self.structure = structure
        f, c, *kernel = structure.weight_shape
        curvature = metric.curvature
        if curvature is None:
            own = metric.moment.shape[0]
            curvature = torch.eye(f, dtype=torch.float64, device=metric.moment.device).expand(own, f, f)
        outer = partial_traces(_padded(curvature, f), [shape[:1] for shape in structure.shapes])
        inner = partial_traces(_padded(metric.moment, c * prod(kernel)), [shape[1:] for shape in structure.shapes])
        #: Per factor, the parts of its mode and their triangular roots; None: the identity.
        self.sizes: list[list[int]] = []
        self.roots: list[list[Tensor | None]] = []
        for shape, own_rows, moment in zip(structure.shapes, outer, inner, strict=True):
            parts = [own_rows, moment]
            if most is not None and moment.shape[-1] > most:
                modes = range(1, len(shape))
                parts = [own_rows, *partial_traces(moment, [[shape[m] if m == k else 1 for m in modes] for k in modes])]
            self.sizes.append([part.shape[-1] for part in parts])
            left_out = [part.shape[-1] == 1 or (most is not None and part.shape[-1] > most) for part in parts]
            self.roots.append([None if out else square_root(p) for out, p in zip(left_out, parts, strict=True)])

    def __call__(self, weight: Tensor) -> Tensor:
        """The (G, F, C, *kernel) weight, of the structure's own shape, in these coordinates."""
        modes = self.structure.unfold(weight)
        for k, (sizes, roots) in enumerate(zip(self.sizes, self.roots, strict=True)):
            moved = modes.movedim(1 + k, -1)
            modes = _times(moved, sizes, roots).movedim(-1, 1 + k)
        return self.structure.fold(modes)

    def apply(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """Factors (G, rank indices, f, c, *kernel), in these coordinates."""
        return [_times(a, sizes, roots) for a, sizes, roots in zip(factors, self.sizes, self.roots, strict=True)]

    def undo(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """Factors that are given in these coordinates, in the weight's."""
        return [_solved(a, sizes, roots) for a, sizes, roots in zip(factors, self.sizes, self.roots, strict=True)]


def _times(x: Tensor, sizes: Sequence[int], roots: Sequence[Tensor | None]) -> Tensor:
    """X of shape (G, ..., parts of the mode) with every part multiplied by its root R: x' R."""
    return _part_by_part(x, sizes, roots, lambda vectors, root: vectors @ root)


def _solved(x: Tensor, sizes: Sequence[int], roots: Sequence[Tensor | None]) -> Tensor:
    """The inverse of `_times`."""
    return _part_by_part(
        x, sizes, roots, lambda vectors, root: torch.linalg.solve_triangular(root, vectors, upper=False, left=False)
    )


def _part_by_part(
    x: Tensor, sizes: Sequence[int], roots: Sequence[Tensor | None], how: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    parts = x.reshape(len(x), -1, *sizes)
    for axis, root in enumerate(roots, start=2):
        if root is not None:
            # At once: a matrix with many vectors, not many matrices with one.
            moved = parts.movedim(axis, -1)
            done = how(moved.reshape(len(x), -1, moved.shape[-1]), root.to(x))
            parts = done.reshape(moved.shape).movedim(-1, axis)
    return parts.reshape(x.shape)


def partial_traces(moment: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """For every factor the trace of M over all others, scaled to a mean diagonal of one.

    Args:
        moment: (G, P, P); P is split into modes and every mode over the factors, the first factor slowest.
        shapes: Of every factor, its size in every mode.

    Returns:
        (G, p_k, p_k) per factor, in float64 up to `DOUBLE_UP_TO` rows.
    """
    count, modes = len(shapes), len(shapes[0])
    sizes = [shape[mode] for mode in range(modes) for shape in shapes]
    split = moment.reshape(len(moment), *sizes, *sizes)
    found = []
    for k, shape in enumerate(shapes):
        own = [mode * count + k for mode in range(modes)]
        rows = range(1, 1 + len(sizes))
        columns = [len(sizes) + i if i - 1 in own else i for i in rows]
        kept = [0, *(1 + i for i in own), *(len(sizes) + 1 + i for i in own)]
        traced = torch.einsum(split, [0, *rows, *columns], kept).reshape(len(moment), prod(shape), -1)
        diagonal = traced.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        found.append(_precise(traced / diagonal.clamp_min(torch.finfo(traced.dtype).tiny)))
    return found


def _precise(matrix: Tensor) -> Tensor:
    return matrix.double() if matrix.shape[-1] <= DOUBLE_UP_TO else matrix


def _padded(moment: Tensor, size: int) -> Tensor:
    """With further rows, as diagonal as they are large: padded channels are cut off, no direction of them counts more.

    Channels are the slowest mode, so that those of the kernel stay where they are.
    """
    missing = size - moment.shape[-1]
    if missing <= 0:
        return moment
    wider = F.pad(moment, (0, missing, 0, missing))
    wider.diagonal(dim1=-2, dim2=-1)[:, -missing:] = moment.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    return wider
