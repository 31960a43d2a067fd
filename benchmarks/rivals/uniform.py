"""Decompositions with one number for all layers: Tucker-2 and CP by TensorLy, and the spatial SVD.

The first layer and the last one (the classifier, or an image-to-image network's last convolution), convolutions with
groups, and layers that would not need fewer flops stay dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from tensorly import decomposition
from torch import Tensor, nn

from benchmarks.rivals.subject import Subject, decomposed, dense_flops, same_everywhere
from sekron_search.costs.analytic import layer_cost
from sekron_search.kron import families as fam
from sekron_search.kron.projection import project
from sekron_search.kron.structure import Structure
from sekron_search.model import LayerInfo

#: Sweeps of TensorLy's alternating least squares for CP at most; where they stop gaining they end before.
CP_SWEEPS = 200

#: Its start by SVDs, where a rank exceeds a mode's size, takes the square of all other modes together in memory: beyond
#: so many entries the start is random.
CP_SVD_ENTRIES = 8192


def tucker2(network: nn.Module, inputs: Tensor, share: float) -> nn.Module:
    """Every layer keeps the same fraction of its out-channels and of its in-channels.

    Ranks are (p F, p C), fitted by TensorLy's `partial_tucker` (HOOI). The core of a 1x1 kernel is a matrix: it is
    multiplied into the factor of the out-channels, or it would only cost.

    Args:
        network: It is not changed.
        inputs: (N, C, H, W), what flops are counted on.
        share: Of the network's flops that may stay, in (0, 1].

    Raises:
        ConfigError: If the share is none.
        InfeasibleBudgetError: If ranks of one need more flops.

    Source: Kim et al. 2016, Compression of deep convolutional neural networks for fast and low power mobile
    applications; with one fraction in the place of their rank selection.
    """
    subject = Subject.of(network, inputs, share)
    return decomposed(subject, same_everywhere(subject, _tucker2_rule), _tucker2_factors)


def _tucker2_rule(info: LayerInfo, fraction: float) -> Structure:
    f, c, *kernel = info.weight_shape
    ranks = [max(1, round(fraction * n)) for n in (f, c)]
    if max(kernel) == 1:
        return fam.channel_svd(info.weight_shape, min(ranks))
    return fam.tucker2(info.weight_shape, ranks)


def _tucker2_factors(weight: Tensor, structure: Structure) -> Sequence[Tensor]:
    sizes = list(structure.rank_sizes.values())
    ranks = sizes if len(sizes) == 2 else sizes * 2
    (core, (out, into)), _ = decomposition.partial_tucker(weight[0].cpu().numpy(), rank=ranks, modes=[0, 1])
    core, out, into = (torch.from_numpy(a.copy()).to(weight) for a in (core, out, into))
    if len(sizes) == 1:
        return _shaped(structure, [(out @ core[:, :, 0, 0]).mT, into.mT])
    return _shaped(structure, [out.mT, core, into.mT])


def cp(network: nn.Module, inputs: Tensor, share: float, *, seed: int = 0, sweeps: int = CP_SWEEPS) -> nn.Module:
    """Every layer keeps the same fraction of its flops, as a sum of so many outer products.

    Fitted by TensorLy's `parafac` (alternating least squares), from SVDs filled up at random where that can be
    afforded, else from random factors.

    Args:
        network, inputs, share: As for `tucker2`.
        seed: Of what is random in the start.
        sweeps: At most; one of a 256x256x3x3 kernel at half the flops takes seconds.

    Raises:
        ConfigError, InfeasibleBudgetError: As `tucker2` does.

    Source: Lebedev et al. 2015, Speeding-up convolutional neural networks using fine-tuned CP-decomposition.
    """
    subject = Subject.of(network, inputs, share)
    return decomposed(subject, same_everywhere(subject, _cp_rule), partial(_cp_factors, seed=seed, sweeps=sweeps))


def _cp_rule(info: LayerInfo, fraction: float) -> Structure:
    if fraction == 1:
        return fam.dense(info.weight_shape)
    each = layer_cost(fam.cp(info.weight_shape, 1), info).flops
    return fam.cp(info.weight_shape, max(1, int(fraction * dense_flops(info) / each)))


def _cp_factors(weight: Tensor, structure: Structure, *, seed: int, sweeps: int) -> Sequence[Tensor]:
    if structure.num_factors == 2:
        return project(weight, structure).factors  # a matrix: its SVD is the best there is
    modes: Any = weight[0].reshape([n for n in structure.weight_shape if n > 1]).cpu().numpy()
    (rank,) = structure.rank_sizes.values()
    init = "svd" if modes.size // min(modes.shape) <= CP_SVD_ENTRIES else "random"
    weights, found = decomposition.parafac(modes, rank=rank, init=init, random_state=seed, n_iter_max=sweeps)
    found = [found[0] * weights, *found[1:]]
    return _shaped(structure, [torch.from_numpy(a.copy()).to(weight).mT for a in found])


def spatial_svd(network: nn.Module, inputs: Tensor, share: float) -> nn.Module:
    """A vertical convolution, then a horizontal one, with the same fraction of every layer's full rank between them.

    Factors are (F,1,1,Kw) and (1,C,Kh,1), by one SVD, which is optimal.

    Args:
        network, inputs, share: As for `tucker2`.

    Raises:
        ConfigError, InfeasibleBudgetError: As `tucker2` does.

    Source: Jaderberg, Vedaldi and Zisserman 2014, Speeding up convolutional neural networks with low rank expansions,
    scheme 2.
    """
    subject = Subject.of(network, inputs, share)
    return decomposed(subject, same_everywhere(subject, _spatial_rule), svd_factors)


def _spatial_rule(info: LayerInfo, fraction: float) -> Structure:
    f, c, height, width = info.weight_shape
    return fam.sekron([(f, 1, 1, width), (1, c, height, 1)], [max(1, round(fraction * min(f * width, c * height)))])


def svd_factors(weight: Tensor, structure: Structure) -> Sequence[Tensor]:
    """The best factors of a structure of two, by this package's SVD.

    Args:
        weight: (1, F, C, Kh, Kw).
        structure: Of two factors.
    """
    return project(weight, structure).factors


def _shaped(structure: Structure, factors: Sequence[Tensor]) -> list[Tensor]:
    return [a.reshape(1, *shape) for a, shape in zip(factors, structure.factor_shapes, strict=True)]
