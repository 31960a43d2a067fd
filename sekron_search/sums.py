"""Where a layer's output is added to something else, as in a residual block, and what that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sekron_search.calibration import output_rows
from sekron_search.errors import DataError
from sekron_search.inspection import is_use
from sekron_search.model import Inputs, LayerInfo

_SUMS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})

#: What may stand between the layer and the sum, if it is one scale and shift per channel.
_PASSED = frozenset({"batch_norm", "dropout"})

#: Channels whose scale is below this, relative to the mean, are left out.
LEAST_SCALE = 1e-2


@dataclass(frozen=True)
class Observed:
    """What passes a layer on one batch.

    Args:
        entered: The layer's input.
        output: The layer's output.
        arrived: What of it enters the sum; the output itself if the run ended before.
        other: What it is added to there; None if the run ended before.
    """

    entered: Tensor
    output: Tensor
    arrived: Tensor
    other: Tensor | None


def observe(model: nn.Module, inputs: Inputs, name: str, *, to_sum: bool) -> Observed:
    """Run a network up to a layer, or on to the sum that its output enters, and no further."""
    return _run(model, inputs, name, _Trace(stop=True), to_sum=to_sum)


def scale_at_sum(model: nn.Module, inputs: Inputs, info: LayerInfo) -> Tensor | None:
    """By how much the layer's output is scaled until it enters a sum: (G, F) in float64, or None if it enters none.

    A sum counts if nothing else sees the layer's output: then a layer that makes up for an error of what it is added
    to does nothing else.
    """
    whole = _Trace(stop=False)
    _run(model, inputs, info.name, whole, to_sum=True)
    if whole.other is None or whole.uses != 1:
        return None
    seen = observe(model, inputs, info.name, to_sum=True)
    before, after = (output_rows(t.double(), info) for t in (seen.output, seen.arrived))
    before = before - before.mean(-1, keepdim=True)
    scale = (before * after).sum(-1) / before.square().sum(-1).clamp_min(torch.finfo(before.dtype).tiny)
    # A channel that hardly reaches the sum cannot make up for anything there: its share is divided away.
    reaches = scale.isfinite() & (scale.abs() > LEAST_SCALE * scale.abs().nan_to_num(0.0, 0.0, 0.0).mean())
    return torch.where(reaches, scale, torch.inf) if bool(reaches.any()) else None


class _Reached(Exception):
    """Ends a forward pass."""


class _Trace(TorchFunctionMode):
    """Follows a layer's output, through what scales its channels, to a sum of two tensors of equal shape.

    Args:
        stop: Whether to end the pass there, before the sum is computed; else uses of the output are counted to the end.
    """

    def __init__(self, *, stop: bool) -> None:
        super().__init__()
        self.stop = stop
        self.tracked: list[Tensor] = []
        self.other: Tensor | None = None
        self.uses = 0
        self._sum: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        is_sum = False
        own = [i for i, a in enumerate(args) if self._follows(a)]
        if self.other is None and len(own) == 1 and name in _SUMS and len(args) == 2 and not kwargs:
            other = args[1 - own[0]]
            if isinstance(other, Tensor) and other.shape == args[own[0]].shape:
                self.other = other
                is_sum = True
                if self.stop:
                    raise _Reached
        result = func(*args, **(kwargs or {}))
        if is_use(result):
            if own == [0] and name in _PASSED:
                self.tracked.append(result)
            else:
                self.uses += any(self._follows(leaf) for leaf in tree_leaves((args, kwargs)))
            if is_sum:
                self._sum = result  # one of those that were followed, if computed in place
        return result

    def _follows(self, value: Any) -> bool:
        return value is not self._sum and any(value is t for t in self.tracked)


def _run(model: nn.Module, inputs: Inputs, name: str, trace: _Trace, *, to_sum: bool) -> Observed:
    entered: list[Tensor] = []

    def follow(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        entered.append(args[0])
        trace.tracked.append(output)
        if not to_sum:
            raise _Reached

    handle = model.get_submodule(name).register_forward_hook(follow)
    try:
        with trace:
            model(*inputs)
    except _Reached:
        pass
    finally:
        handle.remove()
    if not entered:
        raise DataError(f"layer '{name}' was not reached by the network on these inputs, though it was on the example")
    return Observed(entered[0], trace.tracked[0], trace.tracked[-1], trace.other)
