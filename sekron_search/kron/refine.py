"""Data-aware fits: minimise the error of the layer's output instead of the error of its weight."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from sekron_search.kron.descent import minimise
from sekron_search.kron.metric import DOUBLE_UP_TO, InputMetric, Whitening, square_root
from sekron_search.kron.products import MetricProduct
from sekron_search.kron.projection import Fit, balance, pad_channels, project, reconstruct_batch
from sekron_search.kron.structure import Structure
from sekron_search.kron.svd import core_of, left_basis, mode_basis, orthogonal_iteration
from sekron_search.kron.sweep import scaled_by_others

#: Factors of more entries per channel are whitened mode by mode while they are refined: whole roots would cost as much
#: as the error.
WHITENED_UP_TO = 512

#: Sweeps of a fit that has no closed form in whitened coordinates, as many as may be had for so many products, entries
#: of the weight times rank; one start and many sweeps gain CP and rings more than three starts.
LEAST_SWEEPS, MOST_SWEEPS, SWEEP_PRODUCTS = 10, 200, 4e9

#: Some steps that lower the squared error by less than this part of it are the last.
TOLERANCE = 1e-6

#: Products that may be spent on the descent of an option that is dear: at the largest layers the first few steps have
#: to do. They gain most.
PRODUCTS, LEAST_STEPS = 5e9, 2

#: An evaluation of more products is dear: then the passes of a start with a core, and the decrease that ends a descent.
CHEAP_PRODUCTS = 10**8
DEAR_PASSES, DEAR_TOLERANCE = 1, 2e-3

#: Added to the curvature that the other factors give a factor, relative to its mean: they will change.
LIFT = 1e-2


class _Shared:
    """What structures of equal shapes share: coordinates, and decompositions of the weight in them."""

    def __init__(self, structure: Structure, metric: InputMetric, weight: Tensor) -> None:
        self.shapes = structure.shapes
        self._structure, self._metric, self._weight = structure, metric, weight
        self._bases: dict[int, Tensor] = {}

    @cached_property
    def whitening(self) -> Whitening:
        """Of starts."""
        return Whitening(self._structure, self._metric)

    @cached_property
    def descent(self) -> Whitening:
        """Of descents, which go to and fro at every step."""
        return Whitening(self._structure, self._metric, most=WHITENED_UP_TO)

    @cached_property
    def white(self) -> Tensor:
        """The whitened weight, (G, F, C, *kernel)."""
        return self.whitening(pad_channels(self._weight, self._structure))

    @cached_property
    def modes(self) -> Tensor:
        """The same unfolded, (G, m_1, ..., m_S)."""
        return self._structure.unfold(self.white)

    @cached_property
    def pair(self) -> tuple[Tensor, Tensor]:
        """Two factors of all ranks at once: (G, m_1, n) and (G, n, m_2)."""
        left = left_basis(self.modes, min(self.modes.shape[1:]))
        return left, left.mT @ self.modes

    def basis(self, k: int) -> Tensor:
        """All singular vectors of a mode."""
        if k not in self._bases:
            self._bases[k] = mode_basis(self.modes, k, self.modes.shape[1 + k])
        return self._bases[k]


class Refiner:
    """Fits of one weight under one metric; what structures share is computed once.

    Args:
        weight: (G, F, C, *kernel).
        metric: Of the layer.
    """

    def __init__(self, weight: Tensor, metric: InputMetric) -> None:
        self.weight, self.metric = weight, metric
        self.scale = float(weight.double().abs().max())
        dtype = metric.moment.dtype
        #: Of largest entry one: float32 and the line search rely on it.
        self.unit = (weight.double() / self.scale if self.scale > 0 else weight.double()).to(dtype)
        self.norm = float(metric.norm(self.unit))
        #: For moments so large that products with them take all the time.
        self._product = MetricProduct(metric) if metric.moment.shape[-1] > DOUBLE_UP_TO else None
        groups, f, p = self.unit.flatten(2).shape
        self._products = groups * f * p * (p if metric.curvature is None else f + p)
        self._is_dear = self._products > CHEAP_PRODUCTS
        self._shared: _Shared | None = None

    def error(self, structure: Structure, factors: Sequence[Tensor]) -> float:
        """The relative error of the output, of factors for the weight of largest entry one."""
        if self.norm == 0:
            return 0.0
        factors = [a.to(self.unit) for a in factors]
        difference = _cropped(structure, factors, self.unit) - self.unit
        spread = self._spread(structure, factors, difference)
        return float((difference.flatten(2) * spread).sum().clamp_min(0).sqrt())

    @cached_property
    def _single(self) -> InputMetric:
        """The metric in float32, of which the weight has norm one."""
        return InputMetric((self.metric.moment / self.norm**2).float(), self.metric.mean, self.metric.curvature)

    @cached_property
    def _exact(self) -> Tensor:
        """H W M."""
        return self.metric.weighted(self.unit)

    def _spread(self, structure: Structure, factors: Sequence[Tensor], difference: Tensor) -> Tensor:
        """H (W^ - W) M / |W|^2, (G, F, P), from the factors of W^ or the difference itself."""
        if self._product is not None and structure.weight_shape == tuple(self.unit.shape[1:]):
            return (self._product(structure, factors) - self._exact).div_(self.norm**2)
        metric = self._single if difference.dtype == torch.float32 else self.metric
        return metric.weighted(difference) / (1.0 if metric is self._single else self.norm**2)

    def _affordable(self, structure: Structure, steps: int) -> int:
        """Steps of a dear descent at most."""
        rebuilding = 6 * self.unit.numel() * structure.largest_rank
        product = self._products if self._product is None else self._product.cost(structure)
        return min(steps, max(LEAST_STEPS, int(PRODUCTS / (product + rebuilding))))

    def fit(self, structure: Structure, *, steps: int, tolerance: float = TOLERANCE) -> Fit:
        """Factors of the weight from `start` and `descend`; where evaluations are dear, from fewer and longer steps."""
        closed = self.is_closed(structure)
        if not self._is_dear or closed or self.norm == 0:
            found = self.start(structure)
            if not closed:
                found = self.descend(structure, found, steps=steps, tolerance=tolerance)
            return self.scaled(structure, found)
        # The descent knows the errors of its ends, and they are dear.
        start = self._whitened_fit(structure)
        tolerance = max(tolerance, DEAR_TOLERANCE)
        factors, error = self._descended(structure, start, self._affordable(structure, steps), tolerance)
        return self.scaled(structure, Fit(tuple(factors), error))

    def start(self, structure: Structure) -> Fit:
        """The best factors where the metric is a Kronecker product of one per factor; else a start.

        Structures of equal shapes should follow one another: then they share what is whitened, and two factors the
        decomposition of all ranks.
        """
        found = self._closed_form(structure) or self._whitened_fit(structure)
        return Fit(tuple(found), self.error(structure, found))

    def descend(self, structure: Structure, start: Fit, *, steps: int, tolerance: float = TOLERANCE) -> Fit:
        """L-BFGS from factors of the weight of largest entry one; the start, if no step lowered the error."""
        if structure.is_dense or steps == 0 or self.norm == 0 or start.rel_error == 0:
            return start
        found, _ = self._descended(structure, start.factors, steps, tolerance)
        if not all(bool(torch.isfinite(a).all()) for a in found):
            return start
        error = self.error(structure, found)
        return Fit(tuple(found), error) if error < start.rel_error else start

    def scaled(self, structure: Structure, fit: Fit) -> Fit:
        """The factors balanced, and scaled for the weight itself."""
        share = self.scale ** (1 / structure.num_factors)
        return Fit(
            tuple((a.double() * share).to(self.weight.dtype) for a in balance(structure, fit.factors)), fit.rel_error
        )

    def is_closed(self, structure: Structure) -> bool:
        """Whether `start` gives the optimum: all inputs are in one factor and all outputs in the other."""
        f, *inner = self.weight.shape[1:]
        ends = ((f, *[1] * len(inner)), (1, *inner))
        return structure.shapes in (ends, ends[::-1]) and len(structure.ranks) == 1

    @cached_property
    def _bases(self) -> tuple[Tensor, Tensor]:
        """Of all ranks at once, the factors of a channel SVD that is optimal: (G, F, n) and (G, n, P).

        By Eckart-Young on R' W L with H = R R' and M = L L', from the eigenvectors U of the smaller Gram matrix: those
        of R' W M W' R give R'^-1 U and U' R' W, without a root of M.
        """
        matrix, moment = self.unit.flatten(2).double(), self.metric.moment
        groups, f, _ = matrix.shape
        curvature = self.metric.curvature
        if curvature is None:
            curvature = torch.eye(f, dtype=matrix.dtype, device=matrix.device).expand(groups, f, f)
        if f <= matrix.shape[2]:
            root = square_root(curvature).to(matrix)
            spread = root.mT @ matrix
            inner = (spread.to(moment) @ moment).double()
            vectors = torch.linalg.eigh(_symmetric(inner @ spread.mT)).eigenvectors.flip(-1)
            return torch.linalg.solve_triangular(root.mT, vectors, upper=True), vectors.mT @ spread
        root = square_root(moment).to(matrix)
        spread = matrix @ root
        vectors = torch.linalg.eigh(_symmetric(spread.mT @ (curvature.to(matrix) @ spread))).eigenvectors.flip(-1)
        return spread @ vectors, torch.linalg.solve_triangular(root, vectors.mT, upper=False, left=False)

    def _closed_form(self, structure: Structure) -> list[Tensor] | None:
        if not self.is_closed(structure):
            return None
        left, right = self._bases
        rank = structure.ranks[0][1]
        if rank > right.shape[1] or not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
            return None
        factors = [left[..., :rank].mT, right[:, :rank]]
        if structure.shapes[0][0] == 1:
            factors.reverse()
        return _shaped(structure, factors)

    def _whitened_fit(self, structure: Structure) -> list[Tensor]:
        shared, core = self._shared_by(structure), core_of(structure)
        if structure.num_factors == 2 and len(structure.ranks) == 1:
            rank = structure.ranks[0][1]
            left, right = shared.pair
            if rank <= left.shape[-1]:
                return shared.whitening.undo(_shaped(structure, [left[..., :rank].mT, right[:, :rank]]))
        if self._is_dear and core is not None:
            bases = {k: shared.basis(k) for k in range(structure.num_factors) if k != core}
            found = orthogonal_iteration(structure, core, shared.modes, DEAR_PASSES, bases)
            return shared.whitening.undo(_shaped(structure, found))
        products = self.unit.numel() * structure.largest_rank
        sweeps = int(min(max(SWEEP_PRODUCTS / products, LEAST_SWEEPS), MOST_SWEEPS))
        # The descent is in single precision anyway; a tree's sweeps, which have no ridge, need more.
        dtype = torch.float32 if self._is_dear and not structure.is_tree else torch.float64
        return shared.whitening.undo(project(shared.white, structure, sweeps=sweeps, dtype=dtype).factors)

    def _shared_by(self, structure: Structure) -> _Shared:
        if self._shared is None or self._shared.shapes != structure.shapes:
            self._shared = _Shared(structure, self.metric, self.unit)
        return self._shared

    def _descended(
        self, structure: Structure, start: Sequence[Tensor], steps: int, tolerance: float
    ) -> tuple[list[Tensor], float]:
        """The factors where a descent ends, and their error as it was computed, in float32.

        Factors are A + undo(scale(X)) in variables X of which the curvature is about one.
        """
        whitening = self._shared_by(structure).descent
        fixed = [a.detach().double() for a in start]
        whitened = [a.flatten(1 + len(c)) for a, c in zip(whitening.apply(fixed), structure.carries, strict=True)]
        scalings = scaled_by_others(structure, whitened, LIFT)
        moment, curvature = self.metric.moment, self.metric.curvature
        mean = 1.0 if curvature is None else float(curvature.diagonal(dim1=-2, dim2=-1).mean())
        unit = 2 * mean * float(moment.diagonal(dim1=-2, dim2=-1).mean()) / self.norm**2
        exact, base = self.unit.float(), [a.float() for a in fixed]

        def factors(variables: Sequence[Tensor]) -> list[Tensor]:
            scaled = [how(x) / unit**0.5 for how, x in zip(scalings, variables, strict=True)]
            shaped = [x.reshape(a.shape) for x, a in zip(scaled, fixed, strict=True)]
            return [a.to(x) + x for a, x in zip(base, whitening.undo(shaped), strict=True)]

        def value_and_gradient(variables: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
            leaves = [x.detach().requires_grad_() for x in variables]
            with torch.enable_grad():
                shaped = factors(leaves)
                rebuilt = _cropped(structure, shaped, exact)
            difference = rebuilt.detach() - exact
            gradient = self._spread(structure, [a.detach() for a in shaped], difference).reshape(difference.shape)
            value = float((difference * gradient).sum())
            return value, list(torch.autograd.grad(rebuilt, leaves, 2 * gradient))

        zeros = [torch.zeros_like(a, dtype=torch.float32) for a in whitened]
        found = minimise(value_and_gradient, zeros, evaluations=1 + steps, tolerance=tolerance)
        base = fixed
        # Errors below 1e-4 are rounding: an option must not look free for it.
        return factors([x.double() for x in found.point]), max(found.value, 1e-8) ** 0.5


def refine(
    structure: Structure,
    fit: Fit,
    weight: Tensor,
    metric: InputMetric,
    *,
    steps: int = 60,
    tolerance: float = TOLERANCE,
) -> Fit:
    """Lower the output error tr(H (W - W^) M (W - W^)') by L-BFGS on the factors, or solve it where that is known.

    Args:
        structure: The structure that the factors follow.
        fit: The start.
        weight: (G, F, C, *kernel).
        metric: Of the layer's inputs.
        steps: L-BFGS iterations at most.
        tolerance: The last steps are those that lower the squared error by less than this part of it.

    Returns:
        The refined factors and their relative *output* error; the start, if no step lowered it.
    """
    refiner = Refiner(weight, metric)
    start_error = metric.rel_error(weight, _cropped(structure, fit.factors, weight))
    if structure.is_dense or steps == 0 or start_error == 0.0 or refiner.scale == 0.0:
        return Fit(fit.factors, start_error)
    share = refiner.scale ** (1 / structure.num_factors)
    start = Fit(tuple(a.double() / share for a in fit.factors), start_error)
    found = refiner.start(structure) if refiner.is_closed(structure) else start
    if found.rel_error >= start_error:
        found = refiner.descend(structure, start, steps=steps, tolerance=tolerance)
    result = refiner.scaled(structure, found)
    error = metric.rel_error(weight, _cropped(structure, result.factors, weight))
    return Fit(result.factors, error) if error < start_error else Fit(fit.factors, start_error)


def _shaped(structure: Structure, factors: Sequence[Tensor]) -> list[Tensor]:
    """Factors (G, rank indices, m_k) as (G, rank indices, f, c, *kernel)."""
    return [a.reshape(-1, *shape) for a, shape in zip(factors, structure.factor_shapes, strict=True)]


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _cropped(structure: Structure, factors: Sequence[Tensor], weight: Tensor) -> Tensor:
    """The reconstruction cropped to the weight's own channels: padded ones are cut off and cost nothing."""
    return reconstruct_batch(structure, factors)[:, : weight.shape[1], : weight.shape[2]]
