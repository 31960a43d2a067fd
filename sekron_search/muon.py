"""Muon: an optimizer whose steps move a matrix by as much in all directions, however few of them gradients point in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Coefficients of the quintic whose iterates bring all singular values near 1, and how often it is applied.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5

#: To multiples of this many rows and columns matrices are brought on GPUs.
GPU_MULTIPLE = 64

#: Root mean square of a step's entries, relative to the learning rate: that of Adam's steps in practice.
STEP_RMS = 0.2


class Muon(torch.optim.Optimizer):
    """Matrices by Muon, everything else by AdamW, at learning rates that mean the same.

    A weight (out, ...) of a layer, or of a factor of one, is the matrix (out, all others). `torch.optim.Muon` takes
    nothing but matrices, and no other parameters beside them.

    Args:
        params: Parameters.
        lr: Learning rate; a tensor where the parameters are, if steps are recorded as CUDA graphs.
        weight_decay: Share of the learning rate by which parameters shrink in every step.
        momentum: Of the matrices' gradients, looked ahead as Nesterov's.
        betas: Of the others' gradients and their squares.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; the size of steps: Liu et al. 2025,
    arXiv 2502.16982.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float | Tensor,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        settings = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas}
        # Torch's word for it that counts of steps lie where the parameters do.
        super().__init__(params, {**settings, "capturable": True})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step down the gradients."""
        for group in self.param_groups:
            own = [p for p in group["params"] if p.grad is not None]
            for parameter in own:
                state = self.state[parameter]
                if not state:
                    state.update(step=torch.zeros((), device=parameter.device), mean=torch.zeros_like(parameter))
                    if not _is_matrix(parameter):
                        state["square"] = torch.zeros_like(parameter)
                state["step"] += 1
            for how, parameters in (
                (self._matrix_steps, [p for p in own if _is_matrix(p)]),
                (self._other_steps, [p for p in own if not _is_matrix(p)]),
            ):
                if parameters:
                    changes = how(parameters, group)
                    torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                    torch._foreach_mul_(changes, group["lr"])
                    torch._foreach_sub_(parameters, changes)

    def _matrix_steps(self, parameters: Sequence[Tensor], group: dict[str, float]) -> list[Tensor]:
        gradients = [p.grad for p in parameters if p.grad is not None]
        means = [self.state[p]["mean"] for p in parameters]
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
        ahead = [m.flatten(1) for m in torch._foreach_lerp(gradients, means, group["momentum"])]
        sizes = [STEP_RMS * max(m.shape) ** 0.5 for m in ahead]
        return [
            found.mul(size).reshape(p.shape)
            for p, found, size in zip(parameters, orthogonalized(ahead), sizes, strict=True)
        ]

    def _other_steps(self, parameters: Sequence[Tensor], group: dict[str, tuple[float, float]]) -> list[Tensor]:
        gradients = [p.grad for p in parameters if p.grad is not None]
        means, squares, steps = ([self.state[p][name] for p in parameters] for name in ("mean", "square", "step"))
        first, second = group["betas"]
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 1 - second)
        return [
            mean / (1 - first**step) / (square / (1 - second**step)).sqrt().add_(1e-8)
            for mean, square, step in zip(means, squares, steps, strict=True)
        ]


def orthogonalized(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Matrices of the same singular vectors, with singular values near 1 (0.7 to 1.2).

    Those of a shape are computed together; on GPUs, where many small products take as long as a large one, also those
    that some rows and columns of zeros bring to a shape, which change nothing.

    Args:
        matrices: (rows, columns) each.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    wide = [m if m.shape[0] <= m.shape[1] else m.T for m in matrices]
    for index, matrix in enumerate(wide):
        multiple = GPU_MULTIPLE if matrix.is_cuda else 1
        size = tuple(-(-length // multiple) * multiple for length in matrix.shape)
        alike.setdefault((size, matrix.dtype, matrix.device), []).append(index)
    found = list(matrices)
    for (size, *_), own in alike.items():
        together = _iterated(torch.stack([_padded(wide[index], size) for index in own]))
        for index, matrix in zip(own, together, strict=True):
            part = matrix[: wide[index].shape[0], : wide[index].shape[1]]
            found[index] = part if wide[index] is matrices[index] else part.T
    return found


def _iterated(x: Tensor) -> Tensor:
    """Newton-Schulz iterates of matrices, (count, rows, columns), of no more rows than columns."""
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _padded(matrix: Tensor, size: tuple[int, int]) -> Tensor:
    missing = [whole - length for whole, length in zip(size, matrix.shape, strict=True)]
    return F.pad(matrix, (0, missing[1], 0, missing[0])) if any(missing) else matrix


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.dim() > 1 and min(parameter.shape[0], parameter[0].numel()) > 1
