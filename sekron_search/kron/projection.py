"""From a weight to factors: pads, picks the method, balances the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sekron_search.errors import StructureError
from sekron_search.kron.als import alternating_least_squares
from sekron_search.kron.structure import Structure
from sekron_search.kron.svd import recursive_svd


@dataclass(frozen=True)
class Fit:
    """Factors of shapes (G, rank indices, f, c, *kernel), and the relative error |W - W^| / |W| of the weight."""

    factors: tuple[Tensor, ...]
    rel_error: float


def project(weight: Tensor, structure: Structure, *, sweeps: int = 100, starts: int = 1, seed: int = 0) -> Fit:
    """Factors whose reconstruction is close to the weight in the Frobenius norm.

    Two factors: one SVD, optimal. More: the recursion of SVDs, then alternating least squares from it and from
    `starts` - 1 random draws; the best is kept. Computed in float64 whatever the weight's dtype.

    Args:
        weight: (G, F, C, *kernel), one weight per group of the layer. F and C may be smaller than the structure's:
            the rest is padded with zeros.
        structure: The structure to fit.
        sweeps: Least-squares sweeps for three factors and more; 0 keeps the recursion alone, as in the paper.
        starts: Number of starts of the alternating least squares.
        seed: Of the random starts.

    Raises:
        StructureError: If the weight does not fit into the structure's shape, or holds NaN or infinity.
    """
    check_weight(weight, structure)
    exact = weight.detach().to(torch.float64)
    scale = float(exact.abs().max()) or 1.0
    exact = exact / scale
    modes = unfold_batch(pad_channels(exact, structure), structure)
    if structure.is_dense:
        factors = [modes]
    else:
        factors = recursive_svd(structure, modes)
        if structure.num_factors > 2 and sweeps > 0:
            factors = _best_start(structure, modes, factors, sweeps, starts, seed)
    factors = balance(structure, factors)
    factors[0] = factors[0] * scale
    factors = balance(structure, factors)
    shaped = tuple(a.reshape(-1, *s) for a, s in zip(factors, structure.factor_shapes, strict=True))
    rebuilt = reconstruct_batch(structure, shaped)[:, : weight.shape[1], : weight.shape[2]] / scale
    norm = float(exact.norm())
    error = float((rebuilt - exact).norm()) / norm if norm > 0 else 0.0
    return Fit(tuple(a.to(weight.dtype) for a in shaped), error)


def check_weight(weight: Tensor, structure: Structure) -> None:
    """Raise a `StructureError` unless the (G, F, C, *kernel) weight is finite and fits into the structure."""
    check_shape(weight.shape[1:], structure)
    if not bool(torch.isfinite(weight).all()):
        raise StructureError(f"the weight of shape {tuple(weight.shape)} holds NaN or infinity; it cannot be fitted")


def check_shape(weight_shape: Sequence[int], structure: Structure) -> None:
    """Raise a `StructureError` unless a group's weight of shape (F, C, *kernel) fits into the structure."""
    f, c, *kernel = structure.weight_shape
    own_f, own_c, *own_kernel = weight_shape
    if kernel != own_kernel or own_f > f or own_c > c:
        raise StructureError(
            f"structure {structure} reconstructs (F, C, *kernel) = {structure.weight_shape}; the weight of a group is "
            f"{tuple(weight_shape)}: kernels must be equal, channels at most the structure's"
        )


def pad_channels(weight: Tensor, structure: Structure) -> Tensor:
    """The (G, F, C, *kernel) weight with zero channels added up to the structure's F and C."""
    f, c, *kernel = structure.weight_shape
    return F.pad(weight, (*[0, 0] * len(kernel), 0, c - weight.shape[2], 0, f - weight.shape[1]))


def unfold_batch(weight: Tensor, structure: Structure) -> Tensor:
    """From (G, F, C, *kernel) to (G, m_1, ..., m_S)."""
    return torch.stack([structure.unfold(w) for w in weight])


def reconstruct_batch(structure: Structure, factors: Sequence[Tensor]) -> Tensor:
    """(G, F, C, *kernel) from factors with a leading group axis."""
    structure.check_factors(factors, batched=True)
    return torch.stack([structure.fold(structure.contract(group)) for group in zip(*factors, strict=True)])


def balance(structure: Structure, factors: Sequence[Tensor]) -> list[Tensor]:
    """The same product with the scale shared out: slices of every rank index get equal norms in all their carriers.

    Gradients of factors of very different scale are badly conditioned; the product does not see the change.

    Args:
        structure: The structure that the factors follow.
        factors: Of shapes (B, rank indices, m_k) or (B, rank indices, f, c, *kernel).
    """
    factors = list(factors)
    if structure.is_dense:
        return factors
    for _ in range(4):
        for name, _ in structure.ranks:
            carriers = [k for k, carried in enumerate(structure.carries) if name in carried]
            norms = []
            for k in carriers:
                axis = 1 + structure.carries[k].index(name)
                others = [i for i in range(1, factors[k].dim()) if i != axis]
                norms.append(torch.linalg.vector_norm(factors[k], dim=others))
            # A slice that vanishes in one carrier contributes nothing: leave it to what it is.
            alive = torch.stack(norms).amin(0) > 0
            mean = torch.stack([n.clamp_min(torch.finfo(n.dtype).tiny).log() for n in norms]).mean(0).exp()
            for k, norm in zip(carriers, norms, strict=True):
                axis = 1 + structure.carries[k].index(name)
                ratio = torch.where(alive, mean / norm.clamp_min(torch.finfo(norm.dtype).tiny), torch.ones_like(mean))
                shape = [factors[k].shape[0]] + [1] * (factors[k].dim() - 1)
                shape[axis] = -1
                factors[k] = factors[k] * ratio.reshape(shape)
    return _balance_without_shared_ranks(factors)


def _balance_without_shared_ranks(factors: list[Tensor]) -> list[Tensor]:
    """One more factor of scale per tensor, for factors that share no rank index with the others."""
    norms = torch.stack([torch.linalg.vector_norm(a.flatten(1), dim=1) for a in factors])
    alive = norms.amin(0) > 0
    safe = norms.clamp_min(torch.finfo(norms.dtype).tiny)
    ratios = torch.where(alive, safe.log().mean(0).exp() / safe, torch.ones_like(safe))
    return [a * ratio.reshape(-1, *[1] * (a.dim() - 1)) for a, ratio in zip(factors, ratios, strict=True)]


def _best_start(
    structure: Structure, modes: Tensor, recursive: list[Tensor], sweeps: int, starts: int, seed: int
) -> list[Tensor]:
    candidates = [recursive]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(starts - 1):
        draws = [torch.randn(a.shape, generator=generator, dtype=torch.float64).to(a.device) for a in recursive]
        candidates.append(draws)
    fitted = [alternating_least_squares(structure, modes, start, max_sweeps=sweeps) for start in candidates]
    errors = [_squared_error(structure, modes, factors) for factors in fitted]
    return fitted[min(range(len(errors)), key=errors.__getitem__)]


def _squared_error(structure: Structure, modes: Tensor, factors: Sequence[Tensor]) -> float:
    rebuilt = torch.stack([structure.contract(group) for group in zip(*factors, strict=True)])
    return float((rebuilt - modes).square().sum())
