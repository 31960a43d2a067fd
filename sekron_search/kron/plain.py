"""A layer whose weight is a structure as modules of torch alone: convolutions, matrix products, reshapes, permutes.

What can be done once is done here: weights are repeated for the groups that share them, a batch-norm that follows is
folded into the last convolution, a rebuilt weight becomes an ordinary layer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sekron_search.errors import StructureError
from sekron_search.kron.dense import AXES, dense_weight, layer_kind, native_weight, options
from sekron_search.kron.execute import inverse, permute, ready_weights, unpermute
from sekron_search.kron.geometry import Size
from sekron_search.kron.layer import KroneckerLayer
from sekron_search.kron.steps import Step


def folds_norm(layer: KroneckerLayer) -> bool:
    """Whether a batch-norm after the layer can be folded into its last convolution, exactly.

    Not where that one runs folded: its weight serves several channels of the output, which a batch-norm scales apart.
    """
    return layer.execution == "dense" or layer.plan.bias_rides


def plain_layer(layer: KroneckerLayer, norm: nn.Module | None = None, output_padding: Size | None = None) -> nn.Module:
    """The layer without this package: an `nn.Sequential` where it is a chain, else an `fx.GraphModule`.

    Args:
        layer: The layer; it is not changed, nothing is shared.
        norm: A batch-norm in evaluation mode whose only input is the layer's output; to be folded in.
        output_padding: Of a transposed convolution, where it is not the layer's own: its network may ask for an output
            size, which a plain module cannot decide by.

    Raises:
        StructureError: If the batch-norm cannot be folded in.
    """
    if norm is not None and not folds_norm(layer):
        raise StructureError(
            f"the last factor of {layer.structure} runs folded ({layer.plan.schedule}): no batch-norm can be folded "
            "into it; keep the batch-norm, or use another schedule"
        )
    with torch.no_grad():
        if layer.execution == "dense":
            dense = layer.to_dense()
            return dense if norm is None else fold_norm(dense, norm)
        if layer.kind == "linear":
            return _linear(layer, norm)
        if layer.geometry.transposed:
            return _transposed(layer, norm, output_padding)
        return _conv(layer, norm)


def norm_affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift per channel, in float64, that a batch-norm applies in evaluation mode.

    s = gamma / sqrt(variance + eps), t = beta - s mean.

    Args:
        norm: Normalises by its running statistics.
    """
    scale = (norm.running_var.detach().double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    shift = -norm.running_mean.detach() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach()


def fold_norm(dense: Any, norm: nn.Module) -> nn.Module:
    """A dense layer that does what it and a batch-norm after it do: W' = s W, b' = s b + t per out-channel.

    Args:
        dense: A linear layer, convolution or transposed convolution; it is not changed.
        norm: See `norm_affine`.
    """
    scale, shift = norm_affine(norm)
    grouped = dense_weight(dense).detach()
    per_channel = scale.reshape(*grouped.shape[:2], *[1] * (grouped.dim() - 2))
    bias = shift if dense.bias is None else shift + scale * dense.bias.detach()
    folded: Any = type(dense)(**options(dense), bias=True, device=grouped.device, dtype=grouped.dtype)
    folded.weight.copy_(native_weight((grouped * per_channel).to(grouped), layer_kind(dense)))
    folded.bias.copy_(bias)
    module: nn.Module = folded.train(dense.training)
    return module


class _Graph:
    """Builds a module operation by operation."""

    def __init__(self, *optional: str) -> None:
        self.graph, self.root = fx.Graph(), nn.Module()
        self.x = self.graph.placeholder("x")
        for name in optional:
            self.graph.placeholder(name, default_value=None)
        self.is_chain = not optional

    def module(self, module: nn.Module) -> None:
        name = f"step{len(self.root._modules)}"
        self.root.add_module(name, module)
        self.x = self.graph.call_module(name, (self.x,))

    def method(self, name: str, *args: Any) -> None:
        self.is_chain = False
        self.x = self.graph.call_method(name, (self.x, *args))

    def function(self, function: Callable[..., Any], *args: Any) -> None:
        self.is_chain = False
        self.x = self.graph.call_function(function, (self.x, *args))

    def add(self, bias: Tensor) -> None:
        self.is_chain = False
        self.root.register_parameter("bias", nn.Parameter(bias))
        self.x = self.graph.call_function(torch.add, (self.x, self.graph.get_attr("bias")))

    def permute(self, axes: Size, permutation: tuple[int, ...] | None, axes_behind: int) -> None:
        if permutation is None:
            return
        count = len(axes)
        behind = range(1 + count, 1 + count + axes_behind)
        self.method("unflatten", 1, axes)
        self.method("permute", 0, *(1 + i for i in permutation), *behind)
        self.method("flatten", 1, count)

    def unpermute(self, axes: Size, permutation: tuple[int, ...] | None, axes_behind: int) -> None:
        if permutation is not None:
            self.permute(tuple(axes[i] for i in permutation), inverse(permutation), axes_behind)

    def fold(self, step: Step, channels: int) -> None:
        """(N, lead channels trail, *size) as (N lead, channels, trail size[0], ...)."""
        if step.trail > 1:
            self.method("unflatten", 1, (step.lead, channels, step.trail))
            self.method("flatten", 0, 1)
            self.method("flatten", 2, 3)
        elif step.lead > 1:
            self.method("unflatten", 1, (step.lead, channels))
            self.method("flatten", 0, 1)

    def unfold(self, step: Step) -> None:
        if step.trail > 1:
            self.method("unflatten", 2, (step.trail, -1))
            self.method("unflatten", 0, (-1, step.lead))
            self.method("flatten", 1, 3)
        elif step.lead > 1:
            self.method("unflatten", 0, (-1, step.lead))
            self.method("flatten", 1, 2)

    def finish(self, like: nn.Module) -> nn.Module:
        if self.is_chain:
            modules = list(self.root.children())
            return (modules[0] if len(modules) == 1 else nn.Sequential(*modules)).train(like.training)
        self.graph.output(self.x)
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph, class_name="Factorized").train(like.training)


def _conv(layer: KroneckerLayer, norm: nn.Module | None) -> nn.Module:
    plan, kind = layer.plan, layer.kind
    axes = len(layer.geometry.stride)
    weights, bias = _weights_and_bias(layer, norm)
    built = _Graph()
    if any(padding := getattr(layer, "_mode_padding", [])):
        built.function(F.pad, padding, layer.options["padding_mode"])
    if AXES[kind] == 1:
        built.method("unsqueeze", -1)
    _pad_channels(built, layer, axes)
    for step, weight in zip(plan.steps, weights, strict=True):
        built.permute(step.axes, step.permutation, axes)
        built.fold(step, step.in_channels)
        padding = tuple(before for before, _ in step.padding)
        if any(before != after for before, after in step.padding):
            built.function(F.pad, [n for ends in reversed(step.padding) for n in ends])
            padding = (0,) * axes
        kind_of_conv: Any = nn.Conv2d if axes == 2 else nn.Conv3d
        conv = kind_of_conv(
            step.in_channels,
            step.out_channels,
            step.kernel,
            step.stride,
            padding,
            step.dilation,
            step.groups,
            bias=False,
        )
        built.module(_filled(conv, weight, bias if step is plan.steps[-1] and plan.bias_rides else None))
        built.unfold(step)
    if bias is not None and not plan.bias_rides:
        built.add(bias.reshape(-1, *[1] * axes))
    built.permute(plan.output_axes, plan.output_permutation, axes)
    _crop_channels(built, layer)
    if AXES[kind] == 1:
        built.method("squeeze", -1)
    return built.finish(layer)


def _transposed(layer: KroneckerLayer, norm: nn.Module | None, output_padding: Size | None) -> nn.Module:
    plan, kind = layer.plan, layer.kind
    axes = len(layer.geometry.stride)
    weights, bias = _weights_and_bias(layer, norm)
    own = layer.options["output_padding"] if output_padding is None else output_padding
    extras = plan.output_paddings((*own, *[0] * (axes - len(own))))
    built = _Graph("output_size")
    if AXES[kind] == 1:
        built.method("unsqueeze", -1)
    _pad_channels(built, layer, axes)
    built.unpermute(plan.output_axes, plan.output_permutation, axes)
    for step, weight, extra in reversed(list(zip(plan.steps, weights, extras, strict=True))):
        built.fold(step, step.out_channels)
        uneven = any(before != after for before, after in step.padding)
        padding = (0,) * axes if uneven else tuple(before for before, _ in step.padding)
        kind_of_conv: Any = nn.ConvTranspose2d if axes == 2 else nn.ConvTranspose3d
        conv = kind_of_conv(
            step.out_channels,
            step.in_channels,
            step.kernel,
            step.stride,
            padding,
            extra,
            step.groups,
            False,
            step.dilation,
        )
        built.module(_filled(conv, weight, bias if step is plan.steps[0] and plan.bias_rides else None))
        if uneven:
            built.function(F.pad, [-n for ends in reversed(step.padding) for n in ends])
        built.unfold(step)
        if bias is not None and step is plan.steps[0] and not plan.bias_rides:
            built.add(bias.reshape(-1, *[1] * axes))
        built.unpermute(step.axes, step.permutation, axes)
    _crop_channels(built, layer)
    if AXES[kind] == 1:
        built.method("squeeze", -1)
    return built.finish(layer)


def _linear(layer: KroneckerLayer, norm: nn.Module | None) -> nn.Module:
    """Matrix products on (..., features) where there is nothing else, else on (rows, features)."""
    plan = layer.plan
    weights, bias = _weights_and_bias(layer, norm)
    f, c = layer.structure.weight_shape[:2]
    built = _Graph()
    shape = None
    if (layer.out_channels, layer.in_channels) != (f, c) or plan.num_permutes or any(s.repeats > 1 for s in plan.steps):
        size = built.graph.call_method("size", (built.x,))
        leading = built.graph.call_function(operator.getitem, (size, slice(None, -1)))
        shape = built.graph.call_function(operator.add, (leading, (layer.out_channels,)))
        built.method("flatten", 0, -2)
        if layer.in_channels < c:
            built.function(F.pad, [0, c - layer.in_channels])
    for step, weight in zip(plan.steps, weights, strict=True):
        built.permute(step.axes, step.permutation, 0)
        rides = bias if step is plan.steps[-1] and plan.bias_rides else None
        if step.is_matrix:
            if step.lead > 1:
                built.method("unflatten", 1, (step.lead, step.in_channels))
            built.module(_filled(nn.Linear(step.in_channels, step.out_channels, bias=False), weight.flatten(1), rides))
            if step.lead > 1:
                built.method("flatten", 1, 2)
            continue
        built.method("unflatten", 1, (step.lead, step.in_channels, step.trail))
        built.method("flatten", 0, 1)
        conv = nn.Conv1d(step.in_channels, step.out_channels, 1, groups=step.groups, bias=False)
        built.module(_filled(conv, weight.flatten(2), rides))
        built.method("unflatten", 0, (-1, step.lead))
        built.method("flatten", 1, 3)
    if bias is not None and not plan.bias_rides:
        built.add(bias)
    built.permute(plan.output_axes, plan.output_permutation, 0)
    if layer.out_channels < f:
        built.method("narrow", 1, 0, layer.out_channels)
    if shape is not None:
        built.x = built.graph.call_method("reshape", (built.x, shape))
    return built.finish(layer)


def _weights_and_bias(layer: KroneckerLayer, norm: nn.Module | None) -> tuple[list[Tensor], Tensor | None]:
    """The ready weights, and the bias in the order of the channels that it is added to; a batch-norm folded in."""
    plan = layer.plan
    groups, (f, _) = layer.geometry.groups, layer.structure.weight_shape[:2]
    weights = [w.detach().clone() for w in ready_weights(plan, list(layer.weights))]
    bias = None if layer.bias is None else layer.bias.detach()
    last, first = plan.steps[-1], plan.steps[0]

    def arranged(values: Tensor, fill: float) -> Tensor:
        own = values.reshape(groups, -1)
        padded = F.pad(own, (0, f - own.shape[1]), value=fill).flatten()
        if plan.geometry.transposed:
            return permute(padded, first.axes, first.permutation, axis=0)
        return unpermute(padded, plan.output_axes, plan.output_permutation, axis=0)

    if norm is None:
        return weights, None if bias is None else arranged(bias, 0.0).clone()
    scale, shift = norm_affine(norm)
    total = shift if bias is None else shift + scale * bias
    factors = arranged(scale, 1.0)
    if plan.geometry.transposed:
        # The first factor runs last: its weight is (groups, in, out, *kernel) seen from here.
        scaled = weights[0].reshape(first.groups, first.produced, first.contracted, *first.kernel)
        factors = factors.reshape(first.groups, 1, first.contracted, *[1] * len(first.kernel))
        weights[0] = (scaled * factors).to(weights[0]).reshape(weights[0].shape)
    else:
        weights[-1] = (weights[-1] * factors.reshape(-1, *[1] * (1 + len(last.kernel)))).to(weights[-1])
    return weights, arranged(total, 0.0).to(weights[0])


def _filled(module: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    module.weight = nn.Parameter(weight)
    module.bias = None if bias is None else nn.Parameter(bias)
    filled: nn.Module = module
    return filled


def _pad_channels(built: _Graph, layer: KroneckerLayer, axes: int) -> None:
    groups, c = layer.geometry.groups, layer.structure.weight_shape[1]
    own = layer.in_channels // groups
    if own < c:
        built.method("unflatten", 1, (groups, own))
        built.function(F.pad, [*[0, 0] * axes, 0, c - own])
        built.method("flatten", 1, 2)


def _crop_channels(built: _Graph, layer: KroneckerLayer) -> None:
    groups, f = layer.geometry.groups, layer.structure.weight_shape[0]
    own = layer.out_channels // groups
    if own < f:
        built.method("unflatten", 1, (groups, f))
        built.method("narrow", 2, 0, own)
        built.method("flatten", 1, 2)
