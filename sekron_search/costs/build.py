"""Operations as modules of PyTorch, to be measured through any runtime."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sekron_search.costs.operations import Convolution, Copy, Elementwise, Linear, Operation, Pool

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def build(operation: Operation) -> tuple[nn.Module, list[tuple[int, ...]]]:
    """A module that executes the operation and nothing else, with random weights, and the shapes of its inputs."""
    if isinstance(operation, Convolution):
        return _convolution(operation), [(operation.batch, operation.in_channels, *operation.size)]
    if isinstance(operation, Linear):
        shape = (operation.rows, operation.in_features)
        if operation.batch == 1:
            return nn.Linear(operation.in_features, operation.out_features), [shape]
        return _BatchedLinear(operation), [(operation.batch, *shape)]
    if isinstance(operation, Copy):
        return _Permute(operation), [(operation.read,)]
    if isinstance(operation, Elementwise):
        if operation.inputs == 1:
            return nn.ReLU(), [(operation.elements,)]
        return _Sum(), [(operation.elements,)] * operation.inputs
    assert isinstance(operation, Pool)
    return _pool(operation)


def _convolution(op: Convolution) -> nn.Module:
    options: dict[str, Any] = {
        "kernel_size": op.kernel,
        "stride": op.stride,
        "padding": op.padding,
        "dilation": op.dilation,
        "groups": op.groups,
    }
    if op.transposed:
        options["output_padding"] = op.output_padding
    kind = (_TRANSPOSED if op.transposed else _CONV)[len(op.size)]
    return kind(op.in_channels, op.out_channels, **options)


def _pool(op: Pool) -> tuple[nn.Module, list[tuple[int, ...]]]:
    if op.positions == 1 and op.window >= op.inputs:
        return nn.AdaptiveAvgPool2d(1), [(op.batch, op.channels, op.inputs, 1)]
    side, stride = max(1, round(op.window**0.5)), max(1, round((op.inputs / op.positions) ** 0.5))
    width = max(1, round(op.inputs**0.5))
    pool = nn.MaxPool2d(side, stride, padding=min(side // 2, (side - 1) // 2))
    return pool, [(op.batch, op.channels, max(side, -(-op.inputs // width)), max(side, width))]


class _BatchedLinear(nn.Module):
    def __init__(self, op: Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(op.batch, op.in_features, op.out_features) / op.in_features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight)


class _Permute(nn.Module):
    """Takes a flat tensor, which has but one memory format."""

    def __init__(self, op: Copy) -> None:
        super().__init__()
        self.shape = (op.outer, op.rows, op.columns, op.run)

    def forward(self, x: Tensor) -> Tensor:
        return x.view(self.shape).permute(0, 2, 1, 3).clone(memory_format=torch.contiguous_format)


class _Sum(nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        total = inputs[0] + inputs[1]
        for other in inputs[2:]:
            total = total + other
        return total
