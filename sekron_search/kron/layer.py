"""What the layers whose weight is a structure share: factors, plan, bias, and the rebuilt weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sekron_search.errors import StructureError
from sekron_search.kron.execute import convolve, execute, load_factor, store_weight
from sekron_search.kron.plan import ConvGeometry, Pair, best_plan, make_plan
from sekron_search.kron.projection import project, reconstruct_batch
from sekron_search.kron.structure import Structure

Execution = Literal["factored", "dense"]
Dense = TypeVar("Dense", nn.Conv2d, nn.Linear)

#: Input size for which the order of the factors is chosen when the caller gives none; it hardly matters.
NOMINAL_INPUT_SIZE: Pair = (32, 32)


class KroneckerLayer(nn.Module):
    """Holds factors as the ready weights of a plan's steps, and the bias.

    Args:
        structure: The structure of one group's weight.
        geometry: Stride, dilation, zero padding and groups.
        channels: (out-channels, in-channels) of the whole layer.
        bias: Whether there is one.
        order: In which the factors run; by default the one of fewest flops for `input_size`.
        execution: "factored" runs the factors; "dense" rebuilds the weight.
        input_size: (height, width) for which the order is chosen.
    """

    def __init__(
        self,
        structure: Structure,
        geometry: ConvGeometry,
        channels: Pair,
        *,
        bias: bool,
        order: Sequence[int] | None,
        execution: Execution,
        input_size: Pair | None,
    ) -> None:
        super().__init__()
        out_channels, in_channels = channels
        groups = geometry.groups
        f, c, _, _ = structure.weight_shape
        if out_channels % groups or in_channels % groups or f * groups < out_channels or c * groups < in_channels:
            raise StructureError(
                f"structure {structure} has F={f}, C={c} for each of {groups} groups; the layer needs "
                f"{out_channels} out-channels and {in_channels} in-channels in all"
            )
        if execution not in ("factored", "dense"):
            raise StructureError(f"expected execution 'factored' or 'dense', got {execution!r}")
        self.structure = structure
        self.out_channels, self.in_channels = out_channels, in_channels
        self.execution: Execution = execution
        if order is None:
            self.plan = best_plan(structure, geometry, input_size or NOMINAL_INPUT_SIZE)
        else:
            self.plan = make_plan(structure, geometry, order)
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(s.stored_shape)) for s in self.plan.steps])
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self._dense_cache: tuple[tuple[int, ...], Tensor] | None = None

    @property
    def geometry(self) -> ConvGeometry:
        """Stride, dilation, zero padding and groups."""
        return self.plan.geometry

    def factors(self) -> list[Tensor]:
        """The factors, of shapes (G, rank indices, f_k, c_k, h_k, w_k), in the order of the structure."""
        found: dict[int, Tensor] = {}
        for step, stored in zip(self.plan.steps, self.weights, strict=True):
            shape = (self.geometry.groups, *self.structure.factor_shapes[step.factor])
            found[step.factor] = load_factor(stored, step, shape)
        return [found[k] for k in range(self.structure.num_factors)]

    @torch.no_grad()
    def set_factors(self, factors: Sequence[Tensor]) -> None:
        """Overwrite the factors, given in the shapes of `factors()`."""
        self.structure.check_factors(factors, batched=True)
        for step, stored in zip(self.plan.steps, self.weights, strict=True):
            stored.copy_(store_weight(factors[step.factor], step))

    @property
    def weight(self) -> Tensor:
        """The reconstructed weight, (out-channels, in-channels / groups, Kh, Kw) or (out-features, in-features)."""
        return self._reconstructed()

    def _reconstructed(self) -> Tensor:
        groups = self.geometry.groups
        full = reconstruct_batch(self.structure, self.factors())
        return full[:, : self.out_channels // groups, : self.in_channels // groups].flatten(0, 1)

    def extra_repr(self) -> str:
        """The structure and how it runs."""
        return f"{self.structure}, order={self.plan.order}, execution={self.execution!r}, groups={self.geometry.groups}"

    def _run(self, x: Tensor) -> Tensor:
        if self.execution == "dense":
            return convolve(x, self._dense_weight(), self.bias, self.geometry)
        groups = self.geometry.groups
        f, c, _, _ = self.structure.weight_shape
        own_f, own_c = self.out_channels // groups, self.in_channels // groups
        if own_c < c:
            x = F.pad(x.unflatten(1, (groups, own_c)), (0, 0, 0, 0, 0, c - own_c)).flatten(1, 2)
        bias: Tensor | None = self.bias
        if bias is not None and own_f < f:
            bias = F.pad(bias.reshape(groups, own_f), (0, f - own_f)).flatten()
        out = execute(self.plan, list(self.weights), x, bias)
        return out.unflatten(1, (groups, f))[:, :, :own_f].flatten(1, 2) if own_f < f else out

    def _dense_weight(self) -> Tensor:
        """The reconstructed weight; kept between calls without gradients until a factor changes."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return self.weight
        versions = tuple(item for stored in self.weights for item in (id(stored), stored._version, stored.data_ptr()))
        if self._dense_cache is None or self._dense_cache[0] != versions:
            self._dense_cache = (versions, self.weight)
        return self._dense_cache[1]

    def _take(self, dense: nn.Conv2d | nn.Linear, weight: Tensor, factors: Sequence[Tensor] | None) -> Self:
        """Take over the factors (fitted to the (G, F, C, Kh, Kw) weight if None) and the bias of a dense layer."""
        self.set_factors(project(weight, self.structure).factors if factors is None else factors)
        if self.bias is not None and dense.bias is not None:
            with torch.no_grad():
                self.bias.copy_(dense.bias)
        return self

    def _like(self, dense: nn.Conv2d | nn.Linear) -> Self:
        """In the dtype, on the device and in the mode of a dense layer; trained if it was."""
        self.to(dtype=dense.weight.dtype, device=dense.weight.device)
        self.requires_grad_(dense.weight.requires_grad)
        return self.train(dense.training)

    def _give(self, dense: Dense) -> Dense:
        """Write weight and bias into a dense layer."""
        with torch.no_grad():
            dense.weight.copy_(self.weight)
            if dense.bias is not None and self.bias is not None:
                dense.bias.copy_(self.bias)
        return dense.train(self.training)
