"""Data-aware refinement: minimise the error of the layer's output instead of the error of its weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sekron_search.kron.projection import Fit, balance, reconstruct_batch
from sekron_search.kron.structure import Structure

#: Added to the second moment, relative to its mean diagonal: directions the calibration inputs never showed still
#: count a little, so the fit does not run away along them.
DAMPING = 1e-3


@dataclass(frozen=True)
class InputMetric:
    """How much each direction of a layer's unfolded input matters, per group.

    Args:
        root: (G, P, P) with P = C Kh Kw, a square root L of the second moment M = L L' of the unfolded input.
        mean: (G, P), the mean of the unfolded input.
    """

    root: Tensor
    mean: Tensor

    @classmethod
    def from_moments(cls, second: Tensor, mean: Tensor, *, centered: bool, damping: float = DAMPING) -> InputMetric:
        """The metric of a second moment (G, P, P) and a mean (G, P), both in float64.

        Args:
            second: E[x x'] of the unfolded input.
            mean: E[x].
            centered: Whether a constant shift of the output costs nothing, because a batch-norm that is re-estimated
                or a bias that is corrected follows: then the covariance is used.
            damping: Added to the diagonal, relative to its mean.
        """
        moment = second - mean[:, :, None] * mean[:, None, :] if centered else second
        diagonal = moment.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(moment.dtype).tiny)
        eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
        values, vectors = torch.linalg.eigh(moment + damping * diagonal[:, None, None] * eye)
        return cls(vectors * values.clamp_min(0).sqrt()[:, None, :], mean)

    def norm(self, difference: Tensor) -> Tensor:
        """Root mean square over the inputs of what a (G, F, C, Kh, Kw) weight difference adds to the output."""
        norm: Tensor = torch.linalg.vector_norm(difference.flatten(2) @ self.root.to(difference))
        return norm

    def rel_error(self, weight: Tensor, approximation: Tensor) -> float:
        """Relative error of the layer's output, for weights of shape (G, F, C, Kh, Kw)."""
        exact = weight.to(self.root.dtype)
        total = float(self.norm(exact))
        return float(self.norm(exact - approximation.to(exact))) / total if total > 0 else 0.0


def refine(structure: Structure, fit: Fit, weight: Tensor, metric: InputMetric, *, steps: int = 60) -> Fit:
    """Lower the output error tr((W - W^) M (W - W^)') by L-BFGS on the factors.

    Args:
        structure: The structure that the factors follow.
        fit: The start.
        weight: (G, F, C, Kh, Kw).
        metric: Of the layer's inputs.
        steps: L-BFGS iterations at most.

    Returns:
        The refined factors and their relative *output* error; the start, if no step lowered it.
    """
    start_error = metric.rel_error(weight, _reconstruct(structure, fit.factors, weight))
    if structure.is_dense or steps == 0 or start_error == 0.0 or float(metric.norm(weight.to(torch.float32))) == 0.0:
        return Fit(fit.factors, start_error)
    root = metric.root.to(torch.float32)
    exact = weight.to(torch.float32)
    scale = float(metric.norm(exact))
    weight_scale = float(exact.abs().max())
    # Unit scales for the loss and the factors, whatever the layer's: float32 and the line search rely on it.
    exact, root = exact / weight_scale, root * (weight_scale / scale)
    share = weight_scale ** (1 / structure.num_factors)
    factors = [(a.detach().to(torch.float32) / share).contiguous().requires_grad_() for a in fit.factors]
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
        loss = ((_reconstruct(structure, factors, exact) - exact).flatten(2) @ root).square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    found = [a.detach().to(torch.float64) * share for a in factors]
    if not all(bool(torch.isfinite(a).all()) for a in found):
        return Fit(fit.factors, start_error)
    balanced = tuple(a.to(weight.dtype) for a in balance(structure, found))
    error = metric.rel_error(weight, _reconstruct(structure, balanced, weight))
    return Fit(balanced, error) if error < start_error else Fit(fit.factors, start_error)


def _reconstruct(structure: Structure, factors: Sequence[Tensor], weight: Tensor) -> Tensor:
    """The reconstruction cropped to the weight's own channels: padded ones are cut off and cost nothing."""
    return reconstruct_batch(structure, factors)[:, : weight.shape[1], : weight.shape[2]]
