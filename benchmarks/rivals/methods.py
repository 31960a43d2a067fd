"""The rivals by name.

Each is a function of a network, inputs (N, C, H, W) and a share in (0, 1], and returns a new network in evaluation
mode: its flops, as fvcore counts them on the inputs, are at most that share of the network's, and as near to it as the
method's one number permits. Batch-norm statistics stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import Tensor, nn

from benchmarks.rivals.alds import alds
from benchmarks.rivals.gkpd import gkpd
from benchmarks.rivals.narrower import narrower
from benchmarks.rivals.pruning import prune
from benchmarks.rivals.uniform import cp, spatial_svd, tucker2


@dataclass(frozen=True)
class Rival:
    """A way to compress.

    Args:
        compress: `compress(network, inputs, share)`; with the keyword `factory` where it starts afresh, and `seed`
            where something is random.
        description: In a line, with its source.
    """

    compress: Callable[..., nn.Module]
    description: str

    @property
    def afresh(self) -> bool:
        """Whether it makes a network with random weights, for which it takes the network's factory."""
        return "factory" in signature(self.compress).parameters

    def network(
        self, network: nn.Module, inputs: Tensor, share: float, *, factory: Callable[[float], nn.Module], seed: int
    ) -> nn.Module:
        """What it makes of a network.

        Args:
            network: It is not changed.
            inputs: (N, C, H, W), what flops are counted on.
            share: Of the network's flops.
            factory: Makes the network for a width.
            seed: Of what is random.
        """
        taken, given = signature(self.compress).parameters, {"factory": factory, "seed": seed}
        options: dict[str, Any] = {name: value for name, value in given.items() if name in taken}
        return self.compress(network, inputs, share, **options)


RIVALS: dict[str, Rival] = {
    "uniform Tucker-2": Rival(
        tucker2, "the same fraction of channels in all layers, HOOI by TensorLy (Kim et al. 2016)"
    ),
    "uniform CP": Rival(
        cp, "the same fraction of flops in all layers, least squares by TensorLy (Lebedev et al. 2015)"
    ),
    "channel SVD, ALDS": Rival(
        alds, "ranks and subspaces of least largest relative error (Liebenwein et al. 2021, Algorithm 1)"
    ),
    "uniform spatial SVD": Rival(
        spatial_svd, "the same fraction of the full rank in all layers (Jaderberg et al. 2014, scheme 2)"
    ),
    "GKPD": Rival(
        gkpd, "sums of Kronecker products of two factors, one configuration for all layers (Hameed et al. 2022)"
    ),
    "structured pruning": Rival(
        prune, "channels of least group magnitude over all layers, by Torch-Pruning (Fang et al. 2023)"
    ),
    "narrower, from scratch": Rival(narrower, "the same network with fewer channels and random weights"),
}
