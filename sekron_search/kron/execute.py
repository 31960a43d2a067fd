"""The one executor: runs a plan's steps on a tensor. Convolutions, reshapes and permutes, nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from sekron_search.kron.plan import ConvGeometry, Plan, Step


def store_weight(factor: Tensor, step: Step) -> Tensor:
    """The convolution weight of a step, before expansion to the groups that share it.

    Args:
        factor: A_k of shape (G, rank indices, f, c, h, w).
        step: The step that runs it.

    Returns:
        Tensor of shape `step.stored_shape`, contiguous.
    """
    return factor.permute(step.weight_permutation).reshape(step.stored_shape).contiguous()


def load_factor(stored: Tensor, step: Step, shape: Sequence[int]) -> Tensor:
    """Inverse of `store_weight`: the factor of shape (G, rank indices, f, c, h, w) of a stored weight."""
    permuted = stored.reshape([shape[axis] for axis in step.weight_permutation])
    inverse = sorted(range(len(shape)), key=step.weight_permutation.__getitem__)
    return permuted.permute(inverse)


def execute(plan: Plan, weights: Sequence[Tensor], x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution of x with the weight that the factors reconstruct, without forming that weight.

    Args:
        plan: The plan to run.
        weights: Stored weights, one per step in running order, from `store_weight`.
        x: Input of shape (N, G C, H, W), already padded where the padding is not with zeros.
        bias: Of shape (G F), or None.

    Returns:
        Tensor of shape (N, G F, H', W').

    Source: SeKron, Hameed et al. 2022, Sec. 3.3, generalised to any rank graph and any order of the factors.
    """
    last = len(plan.steps) - 1
    if bias is not None and plan.output_permutation is not None:
        bias = _permute_back(bias, plan)
    for position, (step, stored) in enumerate(zip(plan.steps, weights, strict=True)):
        if step.permutation is not None:
            x = _permute(x, step.axes, step.permutation)
        x = convolve(x, _expand(stored, step), bias if position == last else None, step.geometry)
    if plan.output_permutation is not None:
        x = _permute(x, plan.output_axes, plan.output_permutation)
    return x


def _expand(stored: Tensor, step: Step) -> Tensor:
    """The weight that runs: the stored one, repeated for the groups that share it."""
    if step.stored_shape == step.weight_shape:
        return stored
    return stored.reshape(step.shared_shape).expand(*step.kept, *step.shared_shape[-4:]).reshape(step.weight_shape)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """`conv2d` with zero padding that may differ between the two ends of an axis."""
    (top, bottom), (left, right) = geometry.padding
    padding = (top, left)
    if top != bottom or left != right:
        x = F.pad(x, (left, right, top, bottom))
        padding = (0, 0)
    return F.conv2d(x, weight, bias, geometry.stride, padding, geometry.dilation, geometry.groups)


def _permute(x: Tensor, axes: tuple[int, ...], permutation: tuple[int, ...]) -> Tensor:
    samples, channels, height, width = x.shape
    count = len(axes)
    split = x.reshape(samples, *axes, height, width)
    moved = split.permute(0, *(1 + axis for axis in permutation), count + 1, count + 2)
    return moved.reshape(samples, channels, height, width)


def _permute_back(bias: Tensor, plan: Plan) -> Tensor:
    """The bias in the channel order in which the last step produces it."""
    permutation = plan.output_permutation or ()
    sizes = [plan.output_axes[axis] for axis in permutation]
    inverse = sorted(range(len(permutation)), key=permutation.__getitem__)
    return bias.reshape(sizes).permute(inverse).reshape(-1)
