"""What layers give out while a network runs, and how far it is from what the layers that they replaced give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from sekron_search.kron.dense import KINDS
from sekron_search.kron.linear import KroneckerLinear

#: So many numbers in float32 are still in the cache when they are read again.
IN_CACHE = 1 << 16


@dataclass(frozen=True)
class Reference:
    """Of a layer of the original, which may have been replaced.

    Args:
        kind: Its class.
        spread: Of its outputs, which errors are relative to.
        is_overwritten: Whether what follows changes them in place.
    """

    kind: type[nn.Module]
    spread: Tensor
    is_overwritten: bool


def references_of(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Reference]:
    """What is to be known of all layers of a network that can be replaced, by name, of a pass over some inputs."""
    layers = {name: layer for name, layer in model.named_modules() if type(layer) in KINDS.values()}
    outputs: dict[str, tuple[Tensor, Tensor, int]] = {}

    def see(name: str, output: Tensor) -> None:
        outputs[name] = channel_spread(output), output, output._version

    with torch.no_grad(), seen(model, list(layers), see):
        model(*inputs)
    return {
        name: Reference(type(layers[name]), spread, output._version != version)
        for name, (spread, output, version) in outputs.items()
    }


@contextmanager
def seen(model: nn.Module, names: Sequence[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While the network runs, `see` gets the outputs of the named layers, (N, channels, ...), with their names."""

    def hooked(name: str) -> RemovableHandle:
        layer = model.get_submodule(name)
        linear = isinstance(layer, nn.Linear | KroneckerLinear)
        return layer.register_forward_hook(
            lambda _, args, output: see(name, output.flatten(0, -2) if linear else output)
        )

    handles = [hooked(name) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def channel_spread(output: Tensor) -> Tensor:
    """Mean variance of a layer's output channels, (N, channels, ...), in float32; above 0."""
    values = output.float().movedim(1, -1).flatten(0, -2)
    return (values - values.mean(0)).square().mean().clamp_min(torch.finfo(torch.float32).tiny)


def layer_error(output: Tensor, reference: Tensor, spread: Tensor) -> Tensor:
    """Mean squared error of a layer's output relative to the spread of the reference's channels, in float32.

    Not differentiable in the reference or the spread, and once in the output.

    Args:
        output: Of the replaced layer.
        reference: Of the layer that it replaced, of the same shape.
        spread: `channel_spread` of the latter.

    Source: hints, Romero et al. 2015 (FitNets); every replaced layer has its counterpart, so no regressor is needed.
    """
    found: Tensor = _LayerError.apply(output, reference, spread)  # type: ignore[no-untyped-call]
    return found


class _LayerError(torch.autograd.Function):
    """In the output's precision, with its layout, in few passes over memory.

    Layers' outputs are most of what a training step moves through memory: `mse_loss`, which under autocast also turns
    them into float32, and their gradients back, took half of a step's time.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, reference: Tensor, spread: Tensor) -> Tensor:
        with torch.autocast(output.device.type, enabled=False):
            error = output - reference.to(output)
            ctx.save_for_backward(error, spread)
            return _square_sum(error) / error.numel() / spread

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        error, spread = ctx.saved_tensors
        factor = 2 / error.numel() * gradient / spread
        # A scaled loss may make the factor more than float16 can hold, in which GPUs would take it.
        wide = error.float() if error.dtype is torch.float16 else error
        return (wide * factor).to(error.dtype), None, None


def _square_sum(values: Tensor) -> Tensor:
    """In float32, or float64; on CPUs in pieces that stay in the cache, for there the sum would make a copy of all."""
    if values.device.type != "cpu":
        total: Tensor = torch.linalg.vector_norm(
            values, dtype=torch.promote_types(values.dtype, torch.float32)
        ).square()
        return total
    flat = (values if values.is_contiguous() else values.movedim(1, -1)).reshape(-1)
    pieces = (piece.float() for piece in flat.split(IN_CACHE))
    return torch.stack([piece @ piece for piece in pieces]).sum()
