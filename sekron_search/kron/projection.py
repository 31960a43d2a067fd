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
from sekron_search.kron.svd import core_of, mode_bases, orthogonal_iteration, recursive_svd

#: Weight of the factors' squared norms in the objective of least squares, for weights of norm 1.
RIDGE = 1e-5

#: At most so many sweeps follow without it: exact weights are exactly recovered, and terms have no time to grow.
LAST_SWEEPS = 100

#: Size of the terms that a start has beyond the rank of what the recursion splits: small, for the others stay what they
#: are, yet alive. Trees have no use for such terms.
SURPLUS = 1e-2

#: Of the sweeps of a structure with a core the first ones are passes of orthogonal iteration, which gain more each.
CORE_ITERATIONS = 12


@dataclass(frozen=True)
class Fit:
    """Factors of shapes (G, rank indices, f, c, *kernel), and the relative error |W - W^| / |W| of the weight."""

    factors: tuple[Tensor, ...]
    rel_error: float


def project(
    weight: Tensor,
    structure: Structure,
    *,
    sweeps: int = 100,
    starts: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Fit:
    """Factors whose reconstruction is close to the weight in the Frobenius norm.

    Args:
        weight: (G, F, C, *kernel), one weight per group of the layer. F and C may be smaller than the structure's:
            the rest is padded with zeros.
        structure: The structure to fit.
        sweeps, starts, seed, dtype: As for `fit_batch`.

    Raises:
        StructureError: If the weight does not fit into the structure's shape, or holds NaN or infinity.
    """
    factors, errors = fit_batch(weight, structure, sweeps=sweeps, starts=starts, seed=seed, dtype=dtype)
    peak = weight.detach().abs().max().double().clamp_min(torch.finfo(torch.float64).tiny)
    norms = torch.linalg.vector_norm((weight.detach().double() / peak).flatten(1), dim=1)
    total = float(norms.norm())
    return Fit(factors, float((errors * norms).norm()) / total if total > 0 else 0.0)


def fit_batch(
    weights: Tensor,
    structure: Structure,
    *,
    sweeps: int = 100,
    starts: int = 1,
    seed: int = 0,
    tolerance: float = 1e-6,
    dtype: torch.dtype = torch.float64,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Fit weights of one shape side by side, each on its own.

    Two factors: one SVD, optimal. More: alternating least squares from several starts, the best of them kept for
    every weight: the recursion of SVDs (orthogonal iteration where there is a core), the leading singular vectors of
    every mode, then random draws. A ridge keeps terms from growing while they cancel; it is taken away for the last
    sweeps. Computed in float64 whatever the weights' dtype and scale, unless another dtype is asked for.

    Args:
        weights: (B, F, C, *kernel).
        structure: The structure to fit.
        sweeps: Least-squares sweeps for three factors and more; 0 keeps the recursion alone, as in the paper.
        starts: Number of starts of the alternating least squares.
        seed: Of the random starts.
        tolerance: Of the alternating least squares.
        dtype: What is computed in. float32 takes half the time, holds errors to about 1e-3, and is for graphs with a
            ridge, those that are no trees.

    Returns:
        Factors (B, rank indices, f, c, *kernel) in the weights' dtype, and relative errors |W - W^| / |W| (B,) in
        float64, 0 for a weight of zeros.

    Raises:
        StructureError: If the weights do not fit into the structure's shape, or hold NaN or infinity.
    """
    check_weight(weights, structure)
    unit, scale = _unit_norm(weights.detach().double())
    unit = unit.to(dtype)
    modes = structure.unfold(pad_channels(unit, structure))
    if structure.is_dense:
        factors = [modes]
    elif structure.num_factors == 2 or sweeps == 0:
        factors = recursive_svd(structure, modes)
    else:
        factors = _best_of_starts(structure, modes, sweeps, starts, seed, tolerance)
    errors = _cropped_error(structure, modes, factors, weights.shape)
    share = scale ** (1 / structure.num_factors)
    factors = balance(structure, [a * share.reshape(-1, *[1] * (a.dim() - 1)) for a in factors])
    shaped = tuple(a.reshape(-1, *s).to(weights.dtype) for a, s in zip(factors, structure.factor_shapes, strict=True))
    return shaped, errors.double()


def _unit_norm(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weights (B, ...) scaled to norm 1, and their norms (B,); zeros stay zeros, with norm 1."""
    tiny = torch.finfo(weights.dtype).tiny
    peak = weights.flatten(1).abs().amax(1).clamp_min(tiny)  # squares of the raw entries might overflow
    shape = (-1, *[1] * (weights.dim() - 1))
    scaled = weights / peak.reshape(shape)
    norm = torch.linalg.vector_norm(scaled.flatten(1), dim=1)
    alive = norm > 0
    norm = torch.where(alive, norm, 1.0)
    return scaled / norm.reshape(shape), torch.where(alive, peak * norm, 1.0)


def _best_of_starts(
    structure: Structure, modes: Tensor, sweeps: int, starts: int, seed: int, tolerance: float
) -> list[Tensor]:
    """The least-squares fit of every tensor from the start that served it best; all starts run side by side."""
    core = core_of(structure)
    if core is None:
        first = recursive_svd(structure, modes, 0.0 if structure.is_tree else SURPLUS)
    else:
        passes = min(sweeps, CORE_ITERATIONS)
        first, sweeps = orthogonal_iteration(structure, core, modes, passes), sweeps - passes
        if sweeps == 0:
            return first
    found = [first]
    if starts > 1:
        found.append(mode_bases(structure, modes))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(starts - 2):
        found.append([torch.randn(a.shape, generator=generator, dtype=a.dtype).to(a) for a in first])
    factors = [torch.cat(parts) for parts in zip(*found, strict=True)]
    repeated = modes if starts == 1 else modes.repeat(starts, *[1] * (modes.dim() - 1))
    ends = []
    if not structure.is_tree:
        ends.append(
            alternating_least_squares(structure, repeated, factors, max_sweeps=sweeps, tolerance=tolerance, ridge=RIDGE)
        )
        factors, sweeps = ends[0][0], min(1 + sweeps // 10, LAST_SWEEPS)
    ends.append(alternating_least_squares(structure, repeated, factors, max_sweeps=sweeps, tolerance=tolerance))
    # With the ridge and without: where normal matrices are singular the latter may be worse.
    factors = [torch.cat(parts) for parts in zip(*(end for end, _ in ends), strict=True)]
    errors = torch.cat([squared for _, squared in ends]).reshape(-1, len(modes))
    best = errors.argmin(0) * len(modes) + torch.arange(len(modes), device=modes.device)
    return [a[best] for a in factors]


def _cropped_error(structure: Structure, modes: Tensor, factors: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """|W - W^| of weights of norm 1 without the channels that were padded."""
    difference = modes - structure.contract(factors)
    if structure.weight_shape[:2] != tuple(shape[1:3]):
        difference = structure.fold(difference)[:, : shape[1], : shape[2]]
    error: Tensor = torch.linalg.vector_norm(difference.flatten(1), dim=1)
    return error


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
    if (f, c) == tuple(weight.shape[1:3]):
        return weight
    return F.pad(weight, (*[0, 0] * len(kernel), 0, c - weight.shape[2], 0, f - weight.shape[1]))


def reconstruct_batch(structure: Structure, factors: Sequence[Tensor]) -> Tensor:
    """(G, F, C, *kernel) from factors with a leading group axis."""
    structure.check_factors(factors, batched=True)
    return structure.fold(structure.contract(factors))


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
    for _ in range(2):
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
