"""Generalized Kronecker product decomposition: a sum of Kronecker products of two factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, prod
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.rivals.subject import Subject, decomposed, same_everywhere
from benchmarks.rivals.uniform import svd_factors
from sekron_search.errors import InfeasibleBudgetError
from sekron_search.kron.families import sekron
from sekron_search.kron.structure import Structure
from sekron_search.model import LayerInfo

KernelSplit = Literal["first", "second", "both"]


@dataclass(frozen=True)
class Configuration:
    """Factor shapes of all layers: (F/f2, C/c2, h1, w1) and (f2, c2, h2, w2).

    Args:
        out_channels, in_channels: f2 and c2; of a layer whose channels they do not divide, the greatest common
            divisor.
        kernel: Which factor has the kernel; "both" gives its height to the first and its width to the second.
    """

    out_channels: int
    in_channels: int
    kernel: KernelSplit

    def structure(self, info: LayerInfo, fraction: float) -> Structure:
        """Of a layer, with a fraction of its full rank."""
        f, c, height, width = info.weight_shape
        f2, c2 = gcd(f, self.out_channels), gcd(c, self.in_channels)
        splits = {"first": (height, width, 1, 1), "second": (1, 1, height, width), "both": (height, 1, 1, width)}
        h1, w1, h2, w2 = splits[self.kernel]
        shapes = [(f // f2, c // c2, h1, w1), (f2, c2, h2, w2)]
        return sekron(shapes, [max(1, round(fraction * min(map(prod, shapes))))])


#: What is tried. No factor has all the in- or out-channels of every layer: those would be SVDs, rivals of their own.
CONFIGURATIONS = tuple(
    Configuration(f2, c2, kernel)
    for f2, c2 in ((2, 2), (4, 4), (8, 8), (16, 16), (1, 4), (4, 1), (1, 16), (16, 1), (4, 16), (16, 4))
    for kernel in ("first", "second", "both")
)


def gkpd(network: nn.Module, inputs: Tensor, share: float) -> nn.Module:
    """W = sum over r of A_r (x) B_r with the same configuration and the same fraction of the full rank in all layers.

    Of `CONFIGURATIONS` the one is taken whose weights are the nearest, summed over layers, at the allowed flops. The
    first and the last layer, and those that would not need fewer flops, stay dense. The paper has no library: fits
    are this package's SVDs, which are optimal as the paper's are.

    Args:
        network: It is not changed.
        inputs: (N, C, H, W), what flops are counted on.
        share: Of the network's flops that may stay, in (0, 1].

    Raises:
        ConfigError: If the share is none.
        InfeasibleBudgetError: If ranks of one need more flops in every configuration.

    Source: Hameed, Tahaei, Mosleh and Partovi Nia 2022, Convolutional neural network compression through generalized
    Kronecker product decomposition (AAAI).
    """
    subject = Subject.of(network, inputs, share)
    found: list[tuple[float, dict[str, Structure]]] = []
    failed: list[InfeasibleBudgetError] = []
    for configuration in CONFIGURATIONS:
        try:
            structures = same_everywhere(subject, configuration.structure)
        except InfeasibleBudgetError as error:
            failed.append(error)
        else:
            found.append((_summed_error(subject, structures), structures))
    if not found:
        raise min(failed, key=lambda error: error.best["flops"])
    return decomposed(subject, min(found, key=lambda pair: pair[0])[1], svd_factors)


def _summed_error(subject: Subject, structures: Mapping[str, Structure]) -> float:
    """|W - W^| / |W| of all layers together: the tails of their spectra (Eckart and Young 1936)."""
    total = 0.0
    for info in subject.layers:
        if info.name in structures:
            structure = structures[info.name]
            energies = torch.linalg.svdvals(structure.unfold(subject.weight(info))[0]).square()
            (rank,) = structure.rank_sizes.values()
            total += float((energies[rank:].sum() / energies.sum()).sqrt())
    return total
