"""Muon: an optimizer whose steps move a matrix by as much in all directions, however few of them gradients point in."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

#: Coefficients of the quintic whose iterates bring all singular values near 1, and how often it is applied.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5

#: Root mean square of a step's entries, relative to the learning rate: that of Adam's steps in practice.
STEP_RMS = 0.2


class Muon(torch.optim.Optimizer):
    """Matrices by Muon, everything else by AdamW, at learning rates that mean the same.

    A weight (out, ...) of a layer, or of a factor of one, is the matrix (out, all others). `torch.optim.Muon` takes
    nothing but matrices, and no other parameters beside them.

    Args:
        params: Parameters.
        lr: Learning rate.
        weight_decay: Share of the learning rate by which parameters shrink in every step.
        momentum: Of the matrices' gradients, looked ahead as Nesterov's.
        betas: Of the others' gradients and their squares.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; the size of steps: Liu et al. 2025,
    arXiv 2502.16982.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step down the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(step=torch.zeros(()), mean=torch.zeros_like(parameter))
                    if not _is_matrix(parameter):
                        state["square"] = torch.zeros_like(parameter)
                state["step"] += 1
                towards = self._matrix_step if _is_matrix(parameter) else self._other_step
                change = towards(parameter.grad, state, group)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=group["lr"])

    @staticmethod
    def _matrix_step(gradient: Tensor, state: dict[str, Tensor], group: dict[str, float]) -> Tensor:
        mean = state["mean"].lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(mean, group["momentum"]).flatten(1)
        return orthogonalized(ahead).mul_(STEP_RMS * max(ahead.shape) ** 0.5).view_as(gradient)

    @staticmethod
    def _other_step(gradient: Tensor, state: dict[str, Tensor], group: dict[str, tuple[float, float]]) -> Tensor:
        first, second = group["betas"]
        mean = state["mean"].lerp_(gradient, 1 - first)
        square = state["square"].lerp_(gradient.square(), 1 - second)
        step = float(state["step"])
        change: Tensor = mean / (1 - first**step) / (square / (1 - second**step)).sqrt().add_(1e-8)
        return change


def orthogonalized(matrix: Tensor) -> Tensor:
    """A matrix of the same singular vectors, with singular values near 1 (0.7 to 1.2).

    Args:
        matrix: (rows, columns).
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / wide.norm().clamp_min(torch.finfo(matrix.dtype).tiny)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    found: Tensor = x if wide is matrix else x.T
    return found


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.dim() > 1 and min(parameter.shape[0], parameter[0].numel()) > 1
