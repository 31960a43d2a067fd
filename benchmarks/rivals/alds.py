"""ALDS: per-layer ranks and numbers of subspaces that minimise the largest relative error of all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.rivals.subject import Subject, dense_flops, fitted
from benchmarks.rivals.uniform import svd_factors
from sekron_search.kron.enumeration import largest_where
from sekron_search.kron.families import channel_svd
from sekron_search.model import LayerInfo, replace_layers

#: Numbers of subspaces that the first starts have in all layers, starts altogether, and alternations in each at most:
#: what the authors' code has, but for the alternations (4 there).
FIXED_STARTS, STARTS, ALTERNATIONS = (3, 5, 7, 9), 15, 10


class Subspaces(nn.Sequential):
    """A convolution in k groups to k j channels, then a 1x1 convolution that sums the groups.

    It is no structure of this package: every group of in-channels has a factor of its own.
    """

    @property
    def weight(self) -> Tensor:
        """The weight (F, C, Kh, Kw) of the convolution that it stands for."""
        first, last = self[0], self[1]
        assert isinstance(first, nn.Conv2d)
        assert isinstance(last, nn.Conv2d)
        groups = first.groups
        inner = first.weight.unflatten(0, (groups, -1))
        outer = last.weight.flatten(1).unflatten(1, (groups, -1))
        return torch.einsum("fgj,gjchw->fgchw", outer, inner).flatten(1, 2)


@dataclass(frozen=True)
class Spectra:
    """What the method knows of a layer.

    Args:
        info: The layer.
        dense: Its flops per sample.
        each: For every possible number k of subspaces, the flops per unit of the rank j.
        errors: For every k, by the rank j from 0 to the full one: the bound of the relative error.
    """

    info: LayerInfo
    dense: int
    each: dict[int, int]
    errors: dict[int, NDArray[Any]]

    @classmethod
    def of(cls, subject: Subject, info: LayerInfo) -> Spectra:
        """sigma_{j+1}(W_i) / sigma_1(W), the largest of the k subspaces i, of W unfolded to F x (C Kh Kw)."""
        f, c, height, width = info.weight_shape
        matrix, whole = subject.weight(info).reshape(f, -1), dense_flops(info)
        # A linear layer has one subspace: PyTorch has no linear layer in groups.
        ks = [k for k in range(1, c + 1) if c % k == 0] if info.kind == "conv2d" else [1]
        each = {k: whole * (c * height * width + k * f) // prod(info.weight_shape) for k in ks}
        norm = float(torch.linalg.matrix_norm(matrix, 2)) or 1.0
        errors = {}
        for k in ks:
            values = torch.linalg.svdvals(matrix.reshape(f, k, -1).transpose(0, 1)).amax(0) / norm
            errors[k] = np.append(values.cpu().numpy(), 0.0)
        return cls(info, whole, each, errors)

    def rank(self, k: int, bound: float) -> int:
        """The smallest rank whose error is within the bound, at least one."""
        return max(1, int(np.count_nonzero(self.errors[k] > bound)))

    def flops(self, k: int, rank: int) -> int:
        """Per sample; those of the dense layer where it needs fewer."""
        return min(self.dense, rank * self.each[k])

    def best_subspaces(self, k: int, flops: int) -> int:
        """The number of subspaces of least error for so many flops; `k` where others are no better."""

        def error(other: int) -> float:
            rank = min(flops // self.each[other], len(self.errors[other]) - 1)
            return float(self.errors[other][rank])

        return min(self.each, key=lambda other: (error(other), other != k))


@dataclass(frozen=True)
class Choice:
    """Numbers of subspaces and ranks of all layers, and the largest error they have."""

    error: float
    subspaces: tuple[int, ...]
    ranks: tuple[int, ...]


def alds(network: nn.Module, inputs: Tensor, share: float, *, seed: int = 0) -> nn.Module:
    """Every layer gets a number of subspaces and a rank, so that the largest relative error is as small as can be.

    The global step finds the least error bound whose ranks the flops permit, the local one the best number of
    subspaces of every layer for the flops it was given; they alternate from several starts. All layers take part, the
    first and the last too; what would need no fewer flops than a dense layer stays dense.

    Args:
        network: It is not changed.
        inputs: (N, C, H, W), what flops are counted on.
        share: Of the network's flops that may stay, in (0, 1].
        seed: Of the random starts.

    Returns:
        The network with `KroneckerLayer`s of one subspace and `Subspaces` of several.

    Raises:
        ConfigError: If the share is none.
        InfeasibleBudgetError: If ranks of one need more flops.

    Source: Liebenwein, Maalouf, Gal, Feldman and Rus 2021, Compressing neural networks: towards determining the optimal
    layer-wise decomposition, Algorithm 1; flops in the place of parameters, and the error bound of the authors' code.
    """
    subject = Subject.of(network, inputs, share)
    layers = [Spectra.of(subject, info) for info in subject.layers]
    budget = subject.allowed - (subject.flops - sum(layer.dense for layer in layers))
    best: Choice | None = None
    for start in _starts(layers, seed):
        found = _alternate(layers, start, budget)
        if found is not None and (best is None or found.error < best.error):
            best = found
    if best is None:
        least = sum(min(layer.flops(k, 1) for k in layer.each) for layer in layers)
        raise subject.infeasible(subject.allowed - budget + least)
    return _network(subject, layers, best)


def _starts(layers: Sequence[Spectra], seed: int) -> list[list[int]]:
    # Of two numbers that are as near, the larger one, as the authors have it.
    fixed = [[min(layer.each, key=lambda k: (abs(k - wanted), -k)) for layer in layers] for wanted in FIXED_STARTS]
    generator = np.random.default_rng(seed)
    drawn = [[int(generator.choice(list(layer.each))) for layer in layers] for _ in range(STARTS - len(fixed))]
    return fixed + drawn


def _alternate(layers: Sequence[Spectra], start: Sequence[int], budget: float) -> Choice | None:
    """Global and local steps until nothing changes; None if there is no start that the budget permits."""
    subspaces = list(start)
    found = _global_step(layers, subspaces, budget)
    while found is None and max(subspaces) > 1:
        subspaces = [
            max(other for other in layer.each if other <= max(k // 2, 1))
            for layer, k in zip(layers, subspaces, strict=True)
        ]
        found = _global_step(layers, subspaces, budget)
    for _ in range(ALTERNATIONS if found is not None else 0):
        assert found is not None
        chosen = zip(layers, found.subspaces, found.ranks, strict=True)
        subspaces = [layer.best_subspaces(k, rank * layer.each[k]) for layer, k, rank in chosen]
        changed = _global_step(layers, subspaces, budget)
        if changed is None or changed.error >= found.error:
            break
        found = changed
    return found


def _global_step(layers: Sequence[Spectra], subspaces: Sequence[int], budget: float) -> Choice | None:
    """Ranks of the least error bound that the budget permits; None if ranks of one need more."""
    pairs = list(zip(layers, subspaces, strict=True))
    bounds = np.unique(np.concatenate([layer.errors[k] for layer, k in pairs]))[::-1]

    def ranks(bound: float) -> list[int]:
        return [layer.rank(k, bound) for layer, k in pairs]

    def fits(count: int) -> bool:
        found = ranks(float(bounds[count - 1]))
        return sum(layer.flops(k, rank) for (layer, k), rank in zip(pairs, found, strict=True)) <= budget

    count = largest_where(fits, len(bounds))
    if count == 0:
        return None
    bound = float(bounds[count - 1])
    return Choice(bound, tuple(subspaces), tuple(ranks(bound)))


def _network(subject: Subject, layers: Sequence[Spectra], choice: Choice) -> nn.Module:
    replaced: dict[str, nn.Module] = {}
    for layer, k, rank in zip(layers, choice.subspaces, choice.ranks, strict=True):
        info = layer.info
        if layer.flops(k, rank) == layer.dense:
            continue
        if k == 1:
            replaced[info.name] = fitted(subject, info, channel_svd(info.weight_shape, rank), svd_factors)
        else:
            conv = subject.network.get_submodule(info.name)
            assert isinstance(conv, nn.Conv2d)
            replaced[info.name] = subspace_conv(conv, k, rank)
    return subject.checked(replace_layers(subject.network, replaced))


@torch.no_grad()
def subspace_conv(conv: nn.Conv2d, subspaces: int, rank: int) -> Subspaces:
    """A convolution by truncated SVDs of its subspaces: k parts of the in-channels, each of the same rank.

    Args:
        conv: Without groups; it is not changed.
        subspaces: k, a divisor of the in-channels.
        rank: j of every subspace.
    """
    f, c, *kernel = conv.weight.shape
    parts = conv.weight.double().reshape(f, subspaces, -1).transpose(0, 1)
    left, values, right = torch.linalg.svd(parts, full_matrices=False)
    root = values[:, :rank].sqrt()
    like: dict[str, Any] = {"dtype": conv.weight.dtype, "device": conv.weight.device}
    first = nn.Conv2d(
        c,
        subspaces * rank,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        subspaces,
        bias=False,
        padding_mode=conv.padding_mode,
        **like,
    )
    last = nn.Conv2d(subspaces * rank, f, 1, bias=conv.bias is not None, **like)
    first.weight.copy_((root[:, :, None] * right[:, :rank]).reshape(subspaces * rank, c // subspaces, *kernel))
    last.weight.copy_((left[:, :, :rank] * root[:, None]).transpose(0, 1).reshape(f, subspaces * rank, 1, 1))
    if conv.bias is not None and last.bias is not None:
        last.bias.copy_(conv.bias)
    return Subspaces(first, last)
