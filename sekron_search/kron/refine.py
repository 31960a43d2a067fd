"""Data-aware refinement: minimise the error of the layer's output instead of the error of its weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sekron_search.kron.projection import Fit, balance, reconstruct_batch
from sekron_search.kron.structure import Structure

#: Added to the second moment, relative to its mean diagonal: directions the calibration inputs never showed still
#: count a little, so the fit does not run away along them.
DAMPING = 1e-3

#: The same for the curvature at the output, which is estimated from fewer samples.
CURVATURE_DAMPING = 0.1


@dataclass(frozen=True)
class InputMetric:
    """How much each direction of a layer's unfolded input matters, and of its output, per group.

    Args:
        root: (G, P, P) with P = C times the kernel's sizes, a square root L of the second moment M = L L' of the
            unfolded input.
        mean: (G, P), the mean of the unfolded input.
        output_root: (G, F, F), a square root R of the weight H = R R' of errors of the output; all count alike if None.
    """

    root: Tensor
    mean: Tensor
    output_root: Tensor | None = None

    @classmethod
    def from_moments(
        cls, second: Tensor, mean: Tensor, *, centered: bool, damping: float = DAMPING, curvature: Tensor | None = None
    ) -> InputMetric:
        """The metric of a second moment (G, P, P) and a mean (G, P), both in float64.

        Args:
            second: E[x x'] of the unfolded input.
            mean: E[x].
            centered: Whether a constant shift of the output costs nothing, because a batch-norm that is re-estimated
                or a bias that is corrected follows: then the covariance is used.
            damping: Added to the diagonal, relative to its mean.
            curvature: H of the output, (G, F, F) in float64; all errors of the output count alike if None.
        """
        moment = second - mean[:, :, None] * mean[:, None, :] if centered else second
        output_root = None if curvature is None else square_root(curvature, CURVATURE_DAMPING)
        return cls(square_root(moment, damping), mean, output_root)

    def weighted(self, difference: Tensor) -> Tensor:
        """R' D L, (G, F, P), of a (G, F, C, *kernel) weight difference D: its entries count alike."""
        spread = difference.flatten(2) @ self.root.to(difference)
        return spread if self.output_root is None else self.output_root.to(difference).mT @ spread

    def norm(self, difference: Tensor) -> Tensor:
        """Root mean square over the inputs of what a (G, F, C, *kernel) weight difference adds to the output."""
        norm: Tensor = torch.linalg.vector_norm(self.weighted(difference))
        return norm

    def rel_error(self, weight: Tensor, approximation: Tensor) -> float:
        """Relative error of the layer's output, for weights of shape (G, F, C, *kernel)."""
        exact = weight.to(self.root.dtype)
        scale = float(exact.abs().max())
        if scale == 0.0:
            return 0.0
        # Scaled to a largest entry of one: squares of entries below 1e-154 would vanish.
        total = float(self.norm(exact / scale))
        return float(self.norm((exact - approximation.to(exact)) / scale)) / total if total > 0 else 0.0


def damping_share(unknowns: int, samples: int) -> float:
    """The damping of a moment of P unknowns estimated from n samples: its error is about P / n of it."""
    return max(DAMPING, unknowns / samples)


def square_root(moment: Tensor, damping: float) -> Tensor:
    """L of M + damping * mean diagonal * I = L L', for symmetric M of shape (..., P, P)."""
    diagonal = moment.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(moment.dtype).tiny)
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    values, vectors = torch.linalg.eigh(moment + damping * diagonal[..., None, None] * eye)
    root: Tensor = vectors * values.clamp_min(0).sqrt()[..., None, :]
    return root


def refine(structure: Structure, fit: Fit, weight: Tensor, metric: InputMetric, *, steps: int = 60) -> Fit:
    """Lower the output error tr(H (W - W^) M (W - W^)') by L-BFGS on the factors, or solve it where that is known.

    Args:
        structure: The structure that the factors follow.
        fit: The start.
        weight: (G, F, C, *kernel).
        metric: Of the layer's inputs.
        steps: L-BFGS iterations at most.

    Returns:
        The refined factors and their relative *output* error; the start, if no step lowered it.
    """
    start_error = metric.rel_error(weight, _reconstruct(structure, fit.factors, weight))
    # Unit scales for the loss and the factors, whatever the layer's: float32 and the line search rely on it.
    weight_scale = float(weight.double().abs().max())
    if structure.is_dense or steps == 0 or start_error == 0.0 or weight_scale == 0.0:
        return Fit(fit.factors, start_error)
    unit = weight.double() / weight_scale
    share = weight_scale ** (1 / structure.num_factors)
    found = _closed_form(structure, unit, metric) or _descend(structure, fit.factors, unit, metric, share, steps)
    if not all(bool(torch.isfinite(a).all()) for a in found):
        return Fit(fit.factors, start_error)
    balanced = tuple((a * share).to(weight.dtype) for a in balance(structure, found))
    error = metric.rel_error(weight, _reconstruct(structure, balanced, weight))
    return Fit(balanced, error) if error < start_error else Fit(fit.factors, start_error)


def _closed_form(structure: Structure, weight: Tensor, metric: InputMetric) -> list[Tensor] | None:
    """The optimum of a channel SVD, by Eckart-Young on R' W L; None for other structures and singular metrics."""
    groups, f, *inner = weight.shape
    ends = ((f, *[1] * len(inner)), (1, *inner))
    if structure.shapes not in (ends, ends[::-1]) or len(structure.ranks) != 1:
        return None
    rank = structure.ranks[0][1]
    left, values, right = torch.linalg.svd(metric.weighted(weight), full_matrices=False)
    if rank > values.shape[-1]:
        return None
    left, right = left[..., :rank] * values[:, None, :rank], right[:, :rank]
    if metric.output_root is not None:
        left = torch.linalg.solve_ex(metric.output_root.to(left).mT, left).result
    right = torch.linalg.solve_ex(metric.root.to(right), right, left=False).result
    factors = [left.mT.reshape(groups, rank, *ends[0]), right.reshape(groups, rank, *ends[1])]
    if not all(bool(torch.isfinite(a).all()) for a in factors):
        return None
    return factors if structure.shapes == ends else factors[::-1]


def _descend(
    structure: Structure, start: Sequence[Tensor], unit: Tensor, metric: InputMetric, share: float, steps: int
) -> list[Tensor]:
    """L-BFGS towards a weight of largest entry one, from factors `share` times as large; not finite if it fails."""
    scale = float(metric.norm(unit))
    exact = unit.to(torch.float32)
    scaled = replace(metric, root=(metric.root / scale).to(torch.float32))
    factors = [(a.detach().double() / share).float().contiguous().requires_grad_() for a in start]
    optimizer = torch.optim.LBFGS(
        factors,
        max_iter=steps,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = scaled.weighted(_reconstruct(structure, factors, exact) - exact).square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return [a.detach().to(torch.float64) for a in factors]


def _reconstruct(structure: Structure, factors: Sequence[Tensor], weight: Tensor) -> Tensor:
    """The reconstruction cropped to the weight's own channels: padded ones are cut off and cost nothing."""
    return reconstruct_batch(structure, factors)[:, : weight.shape[1], : weight.shape[2]]
