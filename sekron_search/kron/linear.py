"""A linear layer whose weight is a structure: the drop-in replacement of `nn.Linear`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, Unpack, cast

import torch.nn.functional as F
from torch import Tensor, nn

from sekron_search.kron.dense import as_images
from sekron_search.kron.layer import HowToRun, KroneckerLayer
from sekron_search.kron.structure import Structure


class KroneckerLinear(KroneckerLayer):
    """A linear layer whose weight (F, C), seen as (F, C, 1, 1), is a structure; the semantics of `nn.Linear`.

    Args:
        dense: The linear layer whose place it takes.
        structure: With kernel 1x1; F and C may exceed the layer's features (zero-padded).
        how: See `HowToRun`.

    Raises:
        UnsupportedLayerError, StructureError: As `KroneckerLayer` does.
    """

    replaces = (nn.Linear,)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        structure: Structure,
        *,
        factors: Sequence[Tensor] | None = None,
        **how: Unpack[HowToRun],
    ) -> Self:
        """The replacement of a linear layer, fitted to its weight; see `KroneckerConv.from_conv`."""
        return cls._fitted(linear, structure, factors, **how)

    def to_linear(self) -> nn.Linear:
        """The dense linear layer with the reconstructed weight."""
        return cast(nn.Linear, self.to_dense())

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x of shape (..., C)."""
        if self.execution == "dense":
            (weight,) = self._ready_weights()
            return F.linear(x, weight, self.bias)
        return self._run(as_images(x, self.kind)).reshape(*x.shape[:-1], self.out_channels)
