"""What a module executes, as operations: followed through PyTorch's dispatcher, so nothing is guessed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sekron_search.costs.operations import Convolution, Copy, Elementwise, Linear, Operation, Pool
from sekron_search.model import Inputs

_ATEN = torch.ops.aten

#: Memory formats with the channels last, by the number of axes.
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}

#: Reshape without moving data, though their schemas do not say so; or make a tensor that nobody has to fill.
_FREE = {_ATEN._unsafe_view, _ATEN.as_strided_, _ATEN.empty, _ATEN.empty_strided, _ATEN.new_empty, _ATEN.empty_like}

_COPIES = {_ATEN.clone, _ATEN.copy_, _ATEN._to_copy, _ATEN.contiguous, _ATEN.cat, _ATEN.constant_pad_nd, _ATEN.stack}

#: Element by element at inference, though not tagged so.
_POINTWISE = {_ATEN.native_batch_norm, _ATEN._native_batch_norm_legit_no_training, _ATEN.cudnn_batch_norm}

_PRODUCTS = {_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm}

_POOLS = {_ATEN.max_pool2d_with_indices, _ATEN.avg_pool2d, _ATEN.max_pool3d_with_indices, _ATEN.avg_pool3d}

_MEANS = {_ATEN.mean, _ATEN.sum, _ATEN.amax, _ATEN._adaptive_avg_pool2d, _ATEN._adaptive_avg_pool3d}


@dataclass(frozen=True)
class Traced:
    """What a module executes.

    Args:
        operations: In order.
        unknown: How often each operator ran that has a cost but is no operation of ours, which are in float32.
    """

    operations: tuple[Operation, ...]
    unknown: dict[str, int] = field(default_factory=dict)


def traced_operations(module: nn.Module, inputs: Inputs) -> Traced:
    """Run a module once in evaluation mode, without gradients, and note what it executes.

    On the meta device that costs neither time nor memory. A convolution that gets its input in another memory format
    than its weight's has it converted first: that copy, which no dispatcher shows, is an operation too.

    Args:
        module: With its parameters where the inputs are, in the memory format in which it will run.
        inputs: Its positional arguments.
    """
    follower = _Follower()
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), follower:
            module(*inputs)
    finally:
        module.train(training)
    return Traced(tuple(follower.operations), dict(follower.unknown))


class _Follower(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.unknown: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        first = next((leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)), None)
        if packet in _FREE or first is None or _is_view(func):
            return out
        if packet in (_ATEN.convolution, *_PRODUCTS) and first.dtype != torch.float32:
            self.unknown[f"{func} in {str(first.dtype).removeprefix('torch.')}"] += 1
        elif packet is _ATEN.convolution:
            self.operations += _convolution(*args)
            out = _laid_out(out, *args[:2])
        elif packet in _PRODUCTS:
            a, b = [arg for arg in args if isinstance(arg, Tensor)][-2:]
            batch = a.shape[0] if a.dim() == 3 else 1
            self.operations.append(Linear(a.shape[-2], a.shape[-1], b.shape[-1], batch))
        elif packet in _COPIES:
            source = args[1] if packet is _ATEN.copy_ else args[0]
            self.operations.append(_copy(source, first) if isinstance(source, Tensor) else _plain_copy(first.numel()))
        elif packet in _POOLS:
            self.operations.append(_pool(args[0], first, prod(args[1])))
        elif packet in _MEANS:
            self.operations.append(_pool(args[0], first, -(-args[0].numel() // max(1, first.numel()))))
        elif packet in _POINTWISE or torch.Tag.pointwise in func.tags:
            count = 1 if packet in _POINTWISE else sum(isinstance(arg, Tensor) for arg in args)
            self.operations.append(Elementwise(first.numel(), max(1, count)))
        else:
            self.unknown[str(func)] += 1
        return out


def _is_view(func: Any) -> bool:
    info = func._schema.returns[0].alias_info
    return info is not None and not info.is_write


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> list[Operation]:
    size, kernel = x.shape[2:], weight.shape[2:]
    axes = len(size)

    def per_axis(values: Any, fill: int) -> tuple[int, ...]:
        # A 1-d convolution runs as one with two axes, the first of them of size 1.
        return (fill,) * (2 - axes) + tuple(int(v) for v in tuple(values) * (axes // len(values)))

    made = Convolution(
        batch=x.shape[0],
        in_channels=x.shape[1],
        out_channels=weight.shape[1] * groups if transposed else weight.shape[0],
        size=per_axis(size, 1),
        kernel=per_axis(kernel, 1),
        stride=per_axis(stride, 1),
        dilation=per_axis(dilation, 1),
        padding=per_axis(padding, 0),
        groups=groups,
        output_padding=per_axis(output_padding, 0) if transposed else (),
    )
    wanted = _conv_format(x, weight)
    if not x.is_contiguous(memory_format=wanted):
        return [_copy(x, torch.empty(x.shape, device="meta").to(memory_format=wanted)), made]
    return [made]


def _conv_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The memory format in which a convolution runs: PyTorch takes the other one where input or weight is in it."""
    found = _FORMATS.get(x.dim(), torch.contiguous_format)
    in_it = any(t.is_contiguous(memory_format=found) and not t.is_contiguous() for t in (x, weight))
    return found if in_it else torch.contiguous_format


def _laid_out(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The output of a convolution as it lies in memory on a device: the meta device does not follow formats."""
    return out.contiguous(memory_format=_conv_format(x, weight)) if out.is_meta else out


def _pool(x: Tensor, out: Tensor, window: int) -> Pool:
    batch, channels = out.shape[:2] if out.dim() > 1 else (1, out.numel())
    outputs = max(1, batch * channels)
    return Pool(batch, channels, x.numel() // outputs, out.numel() // outputs, window)


def _plain_copy(elements: int) -> Copy:
    return Copy(1, 1, 1, elements)


def _copy(source: Tensor, target: Tensor) -> Copy:
    """The copy of one tensor into another of the same shape, from how their axes lie in memory."""
    if source.shape != target.shape:  # broadcast, padded or joined: what is written counts
        return _plain_copy(target.numel())
    axes = [axis for axis in range(source.dim()) if source.shape[axis] > 1]
    written = sorted(axes, key=target.stride, reverse=True)
    read = sorted(axes, key=source.stride, reverse=True)
    shape = source.shape
    same_front = next((i for i, (a, b) in enumerate(zip(written, read, strict=True)) if a != b), len(axes))
    if same_front == len(axes):
        return _plain_copy(source.numel())
    same_back = next(i for i, (a, b) in enumerate(zip(written[::-1], read[::-1], strict=True)) if a != b)
    middle = read[same_front : len(axes) - same_back]
    # The axes that are read first and written last are the rows; of more than two, the first block that moves.
    split = middle.index(written[same_front])
    return Copy(
        outer=prod(shape[a] for a in read[:same_front]),
        rows=prod(shape[a] for a in middle[:split]),
        columns=prod(shape[a] for a in middle[split:]),
        run=prod(shape[a] for a in read[len(axes) - same_back :]),
    )
