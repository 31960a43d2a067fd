"""The same network with fewer channels, trained from scratch: what every compression has to beat."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.rivals.subject import Subject
from sekron_search.costs.traced import traced_flops
from sekron_search.kron.enumeration import largest_where

#: Makes a network whose channels are multiplied by a width in (0, 1].
Factory = Callable[[float], nn.Module]

#: Widths are multiples of one over this.
WIDTHS = 1024


def narrower(network: nn.Module, inputs: Tensor, share: float, *, factory: Factory, seed: int = 0) -> nn.Module:
    """The widest network that the allowed flops permit, with fresh weights.

    Args:
        network: It is not changed; its flops are what the share is of.
        inputs: (N, C, H, W), what flops are counted on.
        share: Of the network's flops, in (0, 1].
        factory: Makes the network for a width; flops must not fall as the width grows.
        seed: Of the weights.

    Raises:
        ConfigError: If the share is none.
        InfeasibleBudgetError: If the narrowest network needs more flops.
    """
    subject = Subject.of(network, inputs, share)

    def at(width: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return factory(width / WIDTHS).to(inputs).eval()

    width = largest_where(lambda width: traced_flops(at(width), inputs).total <= subject.allowed, WIDTHS)
    return subject.checked(at(max(width, 1)))
