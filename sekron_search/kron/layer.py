"""Layers whose weight is a structure: drop-in replacements of `nn.Conv2d` and `nn.Linear`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sekron_search.errors import StructureError, UnsupportedLayerError
from sekron_search.kron.execute import convolve, execute, load_factor, store_weight
from sekron_search.kron.plan import ConvGeometry, Pair, best_plan, make_plan
from sekron_search.kron.projection import check_weight, project, reconstruct_batch
from sekron_search.kron.structure import Structure

Execution = Literal["factored", "dense"]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
Layer = TypeVar("Layer", bound="_KroneckerLayer")
Dense = TypeVar("Dense", nn.Conv2d, nn.Linear)

#: Input size for which the order of the factors is chosen when the caller gives none; it hardly matters.
NOMINAL_INPUT_SIZE: Pair = (32, 32)


class _KroneckerLayer(nn.Module):
    """Holds factors as the ready weights of a plan's steps, and the bias."""

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

    def weight(self) -> Tensor:
        """The reconstructed weight, (out-channels, in-channels / groups, Kh, Kw)."""
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
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.compiler.is_exporting()
            or torch._C._get_tracing_state() is not None
        ):
            return self.weight()
        versions = tuple(item for stored in self.weights for item in (id(stored), stored._version, stored.data_ptr()))
        if self._dense_cache is None or self._dense_cache[0] != versions:
            self._dense_cache = (versions, self.weight())
        return self._dense_cache[1]


class KroneckerConv(_KroneckerLayer):
    """A 2-d convolution whose weight (of every group) is a structure; the semantics of `nn.Conv2d`.

    Args:
        structure: The structure of one group's weight; F and C may exceed the group's channels (zero-padded).
        in_channels, out_channels: Of the whole layer.
        stride, padding, dilation, groups, bias, padding_mode: As for `nn.Conv2d`; the kernel is the structure's.
        order: In which the factors run; by default the one of fewest flops for `input_size`.
        execution: "factored" runs the factors; "dense" rebuilds the weight: small on disk, dense in speed.
        input_size: (height, width) for which the order is chosen.
    """

    def __init__(
        self,
        structure: Structure,
        in_channels: int,
        out_channels: int,
        *,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        order: Sequence[int] | None = None,
        execution: Execution = "factored",
        input_size: Pair | None = None,
    ) -> None:
        kernel = structure.weight_shape[2:]
        conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, padding, dilation, groups, bias, padding_mode, device="meta"
        )
        super().__init__(
            structure,
            conv_geometry(conv),
            (out_channels, in_channels),
            bias=bias,
            order=order,
            execution=execution,
            input_size=input_size,
        )
        self._like = _ConvSettings(conv)

    @property
    def padding_mode(self) -> str:
        """As in `nn.Conv2d`."""
        return self._like.padding_mode

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        structure: Structure,
        *,
        factors: Sequence[Tensor] | None = None,
        order: Sequence[int] | None = None,
        execution: Execution = "factored",
        input_size: Pair | None = None,
    ) -> KroneckerConv:
        """The replacement of a convolution, fitted to its weight.

        Args:
            conv: The dense convolution; it is not changed, and nothing is shared with it.
            structure: The structure of one group's weight.
            factors: Factors of shapes (G, rank indices, f, c, h, w); fitted by `project` if None.
            order, execution, input_size: As for the class.

        Raises:
            UnsupportedLayerError: If `conv` is not a plain `nn.Conv2d`.
            StructureError: If the structure does not reconstruct the convolution's weight.
        """
        if type(conv) is not nn.Conv2d:
            raise UnsupportedLayerError(f"expected an nn.Conv2d with its weight, got {type(conv).__name__}")
        weight = conv_weight(conv)
        check_weight(weight, structure)
        layer = cls(
            structure,
            conv.in_channels,
            conv.out_channels,
            stride=_pair(conv.stride),
            padding=conv.padding if isinstance(conv.padding, str) else _pair(conv.padding),
            dilation=_pair(conv.dilation),
            groups=conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            order=order,
            execution=execution,
            input_size=input_size,
        )
        return _initialise(layer, conv, weight, factors)

    def to_conv(self) -> nn.Conv2d:
        """The dense convolution with the reconstructed weight."""
        weight = self.weight().detach()
        like = self._like
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.structure.weight_shape[2:],
            like.stride,
            like.padding,
            like.dilation,
            self.geometry.groups,
            self.bias is not None,
            like.padding_mode,
            device=weight.device,
            dtype=weight.dtype,
        )
        return _write_dense(conv, weight, self)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x of shape (N, C, H, W) or (C, H, W)."""
        if x.dim() == 3:
            return self.forward(x[None])[0]
        if self._like.mode_padding is not None:
            x = F.pad(x, self._like.mode_padding, mode=self._like.padding_mode)
        return self._run(x)


class KroneckerLinear(_KroneckerLayer):
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
        if type(linear) is not nn.Linear:
            raise UnsupportedLayerError(f"expected an nn.Linear with its weight, got {type(linear).__name__}")
        weight = linear.weight[None, :, :, None, None]
        check_weight(weight, structure)
        layer = cls(
            structure,
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            order=order,
            execution=execution,
        )
        return _initialise(layer, linear, weight, factors)

    def to_linear(self) -> nn.Linear:
        """The dense linear layer with the reconstructed weight."""
        weight = self.weight().detach().flatten(1)
        linear = nn.Linear(
            self.in_channels, self.out_channels, self.bias is not None, device=weight.device, dtype=weight.dtype
        )
        return _write_dense(linear, weight, self)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x of shape (..., C)."""
        if self.execution == "dense":
            return F.linear(x, self._dense_weight().flatten(1), self.bias)
        flat = x.reshape(-1, self.in_channels, 1, 1)
        return self._run(flat).reshape(*x.shape[:-1], self.out_channels)


class _ConvSettings:
    """The settings of a convolution as the user wrote them, for `to_conv` and for padding modes other than zeros."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self.stride, self.dilation = _pair(conv.stride), _pair(conv.dilation)
        self.padding: str | Pair = conv.padding if isinstance(conv.padding, str) else _pair(conv.padding)
        self.padding_mode = conv.padding_mode
        (top, bottom), (left, right) = _padding(conv)
        needed = conv.padding_mode != "zeros" and any((top, bottom, left, right))
        self.mode_padding = [left, right, top, bottom] if needed else None


def conv_geometry(conv: nn.Conv2d) -> ConvGeometry:
    """Stride, dilation, groups and zero padding of a convolution; other padding modes are applied before it."""
    padding = _padding(conv) if conv.padding_mode == "zeros" else ((0, 0), (0, 0))
    return ConvGeometry(_pair(conv.stride), _pair(conv.dilation), padding, conv.groups)


def conv_weight(conv: nn.Conv2d) -> Tensor:
    """The weight with its groups as a leading axis: (G, F, C, Kh, Kw)."""
    weight: Tensor = conv.weight.unflatten(0, (conv.groups, -1))
    return weight


def _padding(conv: nn.Conv2d) -> tuple[Pair, Pair]:
    """(before, after) of both axes; 'same' puts the odd pixel after, as `nn.Conv2d` does."""
    if conv.padding == "valid":
        return (0, 0), (0, 0)
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        (top, left), (bottom, right) = [t // 2 for t in totals], [t - t // 2 for t in totals]
        return (top, bottom), (left, right)
    height, width = _pair(conv.padding)  # type: ignore[arg-type]
    return (height, height), (width, width)


def _pair(value: int | tuple[int, ...]) -> Pair:
    if isinstance(value, int):
        return value, value
    height, width = value
    return height, width


def _initialise(layer: Layer, dense: nn.Conv2d | nn.Linear, weight: Tensor, factors: Sequence[Tensor] | None) -> Layer:
    """Put the factors (fitted if None) and the bias of the dense layer into the new one, in its dtype and device."""
    layer.to(dtype=weight.dtype, device=weight.device)
    layer.set_factors(project(weight, layer.structure).factors if factors is None else factors)
    if layer.bias is not None and dense.bias is not None:
        with torch.no_grad():
            layer.bias.copy_(dense.bias)
    for parameter in layer.parameters():
        parameter.requires_grad_(dense.weight.requires_grad)
    return layer.train(dense.training)


def _write_dense(dense: Dense, weight: Tensor, layer: _KroneckerLayer) -> Dense:
    with torch.no_grad():
        dense.weight.copy_(weight)
        if dense.bias is not None and layer.bias is not None:
            dense.bias.copy_(layer.bias)
    return dense.train(layer.training)
