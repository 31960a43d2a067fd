"""A linear layer whose weight is a structure: the drop-in replacement of `nn.Linear`."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from sekron_search.errors import StructureError, UnsupportedLayerError
from sekron_search.kron.layer import Execution, KroneckerLayer
from sekron_search.kron.plan import ConvGeometry
from sekron_search.kron.projection import check_weight
from sekron_search.kron.structure import Structure


class KroneckerLinear(KroneckerLayer):
    """A linear layer whose weight (F, C), seen as (F, C, 1, 1), is a structure; the semantics of `nn.Linear`.

    Args:
        structure: With kernel 1x1; F and C may exceed the layer's features (zero-padded).
        in_features, out_features, bias: As for `nn.Linear`.
        order, execution: As for `KroneckerConv`.
    """

    def __init__(
        self,
        structure: Structure,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        order: Sequence[int] | None = None,
        execution: Execution = "factored",
    ) -> None:
        if structure.weight_shape[2:] != (1, 1):
            raise StructureError(f"a linear layer needs a structure with a 1x1 kernel, got {structure}")
        super().__init__(
            structure,
            ConvGeometry(),
            (out_features, in_features),
            bias=bias,
            order=order,
            execution=execution,
            input_size=(1, 1),
        )
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def like(
        cls,
        linear: nn.Linear,
        structure: Structure,
        *,
        order: Sequence[int] | None = None,
        execution: Execution = "factored",
    ) -> KroneckerLinear:
        """A layer that can stand in a linear layer's place, all zeros; see `KroneckerConv.like`."""
        if type(linear) is not nn.Linear:
            raise UnsupportedLayerError(f"expected an nn.Linear with its weight, got {type(linear).__name__}")
        check_weight(linear_weight(linear), structure)
        layer = cls(
            structure,
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            order=order,
            execution=execution,
        )
        return layer._like(linear)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        structure: Structure,
        *,
        factors: Sequence[Tensor] | None = None,
        order: Sequence[int] | None = None,
        execution: Execution = "factored",
    ) -> KroneckerLinear:
        """The replacement of a linear layer, fitted to its weight; see `KroneckerConv.from_conv`."""
        layer = cls.like(linear, structure, order=order, execution=execution)
        return layer._take(linear, linear_weight(linear), factors)

    def to_linear(self) -> nn.Linear:
        """The dense linear layer with the reconstructed weight."""
        linear = nn.Linear(
            self.in_channels,
            self.out_channels,
            self.bias is not None,
            device=self.weights[0].device,
            dtype=self.weights[0].dtype,
        )
        return self._give(linear)

    def _reconstructed(self) -> Tensor:
        return super()._reconstructed().flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x of shape (..., C)."""
        if self.execution == "dense":
            return F.linear(x, self._dense_weight(), self.bias)
        flat = x.reshape(-1, self.in_channels, 1, 1)
        return self._run(flat).reshape(*x.shape[:-1], self.out_channels)


def linear_weight(linear: nn.Linear) -> Tensor:
    """The weight in the form of a convolution's: (1, F, C, 1, 1)."""
    return linear.weight[None, :, :, None, None]
