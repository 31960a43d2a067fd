"""The one executor: runs a plan's steps on a tensor. Convolutions, reshapes and permutes, nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sekron_search.kron.geometry import ConvGeometry, Size
from sekron_search.kron.plan import Plan
from sekron_search.kron.steps import Step

_CONVOLUTIONS = {2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {2: F.conv_transpose2d, 3: F.conv_transpose3d}


def store_weight(factor: Tensor, step: Step) -> Tensor:
    """The convolution weight of a step, before expansion to the groups that share it.

    Args:
        factor: A_k of shape (G, rank indices, f, c, *kernel).
        step: The step that runs it.

    Returns:
        Tensor of shape `step.stored_shape`, contiguous.
    """
    return factor.permute(step.weight_permutation).reshape(step.stored_shape).contiguous()


def load_factor(stored: Tensor, step: Step, shape: Sequence[int]) -> Tensor:
    """Inverse of `store_weight`: the factor of shape (G, rank indices, f, c, *kernel) of a stored weight."""
    permuted = stored.reshape([shape[axis] for axis in step.weight_permutation])
    return permuted.permute(inverse(step.weight_permutation))


def ready_weights(plan: Plan, stored: Sequence[Tensor]) -> list[Tensor]:
    """The convolution weights that run: the stored ones, repeated for the groups that share them."""
    return [_expand(weight, step) for weight, step in zip(stored, plan.steps, strict=True)]


def execute(
    plan: Plan, weights: Sequence[Tensor], x: Tensor, bias: Tensor | None = None, *, pointwise: bool = False
) -> Tensor:
    """The convolution of x with the weight that the factors reconstruct, without forming that weight.

    Args:
        plan: The plan to run, of a geometry that is not transposed.
        weights: Ready weights, one per step in plan order, from `ready_weights`.
        x: Input of shape (N, G C, *size), already padded where the padding is not with zeros.
        bias: Of shape (G F), or None.
        pointwise: Whether every axis of x has size 1, as for a linear layer: what has no groups is then a matrix
            product, which is faster than a convolution.

    Returns:
        Tensor of shape (N, G F, *output size).

    Source: SeKron, Hameed et al. 2022, Sec. 3.3, generalised to any rank graph and any order of the factors.
    """
    last = plan.steps[-1]
    if bias is not None:
        bias = unpermute(bias, plan.output_axes, plan.output_permutation, axis=0)
    for step, weight in zip(plan.steps, weights, strict=True):
        x = permute(x, step.axes, step.permutation)
        samples, height = x.shape[0], x.shape[2]
        rides = bias if step is last and plan.bias_rides else None
        run = _multiply if pointwise and step.is_matrix else convolve
        x = run(_folded(x, step, step.in_channels), weight, rides, step.geometry)
        x = _unfolded(x, step, step.out_channels, samples, height)
    if bias is not None and not plan.bias_rides:
        x.add_(_over_channels(bias, x))
    return permute(x, plan.output_axes, plan.output_permutation)


def execute_transposed(
    plan: Plan, weights: Sequence[Tensor], x: Tensor, bias: Tensor | None, output_padding: Size
) -> Tensor:
    """The transposed convolution of x with the weight that the factors reconstruct: the plan's steps, backwards.

    The adjoint of a sequence of convolutions and permutations is the sequence of their adjoints in reverse order.

    Args:
        plan: The plan, of a transposed geometry.
        weights: Ready weights, one per step in plan order, from `ready_weights`.
        x: Input of shape (N, G C, *size).
        bias: Of shape (G F), or None.
        output_padding: Positions added to the end of every axis of the output, fewer than the stride.

    Returns:
        Tensor of shape (N, G F, *output size).
    """
    first = plan.steps[0]
    if bias is not None:
        bias = permute(bias, first.axes, first.permutation, axis=0)
    x = unpermute(x, plan.output_axes, plan.output_permutation)
    backwards = zip(plan.steps, weights, plan.output_paddings(output_padding), strict=True)
    for step, weight, extra in reversed(list(backwards)):
        rides = bias if step is first and plan.bias_rides else None
        samples, height = x.shape[0], x.shape[2]
        x = convolve_transposed(_folded(x, step, step.out_channels), weight, rides, step.geometry, extra)
        x = _unfolded(x, step, step.in_channels, samples, height)
        if bias is not None and step is first and not plan.bias_rides:
            x.add_(_over_channels(bias, x))
        x = unpermute(x, step.axes, step.permutation)
    return x


def _folded(x: Tensor, step: Step, channels: int) -> Tensor:
    """(N, lead channels trail, *size) as (N lead, channels, trail size[0], ...): views, if x is contiguous."""
    if step.repeats == 1:
        return x
    return x.reshape(x.shape[0], step.lead, channels, step.trail, *x.shape[2:]).flatten(0, 1).flatten(2, 3)


def _unfolded(x: Tensor, step: Step, channels: int, samples: int, height: int) -> Tensor:
    """Inverse of `_folded`; `height` is the first axis as it was, which a step that folds into it does not change."""
    if step.repeats == 1:
        return x
    height = height if step.trail > 1 else x.shape[2]
    return x.reshape(samples, step.lead, channels, step.trail, height, *x.shape[3:]).flatten(1, 3)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """`convolve` where input and kernel are of size 1 on every axis, without groups, strides and padding."""
    out = F.linear(x.flatten(1), weight.flatten(1), bias)
    return out[(..., *[None] * (x.dim() - 2))]


def _over_channels(bias: Tensor, x: Tensor) -> Tensor:
    return bias.reshape(-1, *[1] * (x.dim() - 2))


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """`conv2d` or `conv3d` with zero padding that may differ between the two ends of an axis."""
    padding = tuple(before for before, _ in geometry.padding)
    if any(before != after for before, after in geometry.padding):
        x = F.pad(x, [n for ends in reversed(geometry.padding) for n in ends])
        padding = (0,) * len(padding)
    run = _CONVOLUTIONS[len(padding)]
    return run(x, weight, bias, geometry.stride, padding, geometry.dilation, geometry.groups)


def convolve_transposed(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, output_padding: Size
) -> Tensor:
    """The adjoint of `convolve`: `conv_transpose2d` or `conv_transpose3d`, padding removed from the output."""
    padding = tuple(before for before, _ in geometry.padding)
    uneven = any(before != after for before, after in geometry.padding)
    run = _TRANSPOSED[len(padding)]
    out: Tensor = run(
        x,
        weight,
        bias,
        geometry.stride,
        (0,) * len(padding) if uneven else padding,
        output_padding,
        geometry.groups,
        geometry.dilation,
    )
    return F.pad(out, [-n for ends in reversed(geometry.padding) for n in ends]) if uneven else out


def _expand(stored: Tensor, step: Step) -> Tensor:
    """The weight that runs: the stored one, repeated for the groups that share it."""
    if step.stored_shape == step.weight_shape:
        return stored
    one_group = step.shared_shape[len(step.kept) :]
    repeated = stored.reshape(step.shared_shape).expand(*step.kept, *one_group).reshape(step.weight_shape)
    if stored.dim() == 4 and not stored.is_contiguous() and stored.is_contiguous(memory_format=torch.channels_last):
        return repeated.contiguous(memory_format=torch.channels_last)
    return repeated


def permute(x: Tensor, axes: Size, permutation: tuple[int, ...] | None, *, axis: int = 1) -> Tensor:
    """The channels, on one axis of x, unfolded to `axes`, put into another order, and folded again."""
    if permutation is None:
        return x
    split = x.reshape(*x.shape[:axis], *axes, *x.shape[axis + 1 :])
    behind = range(axis + len(axes), split.dim())
    return split.permute(*range(axis), *(axis + i for i in permutation), *behind).reshape(x.shape)


def unpermute(x: Tensor, axes: Size, permutation: tuple[int, ...] | None, *, axis: int = 1) -> Tensor:
    """Inverse of `permute`."""
    if permutation is None:
        return x
    return permute(x, tuple(axes[i] for i in permutation), inverse(permutation), axis=axis)


def inverse(permutation: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes another one."""
    return tuple(sorted(range(len(permutation)), key=permutation.__getitem__))
