"""Peak activation memory of a forward pass, by following every storage that an operator creates."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sekron_search.model import as_inputs, run_model
from sekron_search.nested import tensors


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of activations alive at once, on the example batch, the inputs included, parameters not.

    Args:
        peak: Over the whole forward pass.
        outside: For every layer asked for, what is alive besides its input when it starts.
        floor: The peak outside of those layers.
    """

    peak: int
    outside: dict[str, int] = field(default_factory=dict)
    floor: int = 0


class _Tracker(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        state = [*model.parameters(), *model.buffers()]
        self.seen = {t.untyped_storage().data_ptr() for t in state if t.numel()}
        self.live: dict[int, int] = {}
        self.current = self.peak = self.floor = 0
        self.inside = 0

    def watch(self, value: Any) -> None:
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key in self.live or storage.data_ptr() in self.seen:
                    continue
                size = storage.nbytes()
                self.live[key] = size
                self.current += size
                weakref.finalize(storage, self._forget, key, size)
        self.peak = max(self.peak, self.current)
        if not self.inside:
            self.floor = max(self.floor, self.current)

    def _forget(self, key: int, size: int) -> None:
        if self.live.pop(key, None) is not None:
            self.current -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.watch(out)
        return out


def peak_memory(model: nn.Module, example_inputs: object, layers: tuple[str, ...] = ()) -> PeakMemory:
    """Run the network once in evaluation mode without gradients and follow what is alive.

    Args:
        model: The network.
        example_inputs: Its inputs.
        layers: Names of layers whose surroundings are wanted.
    """
    inputs = as_inputs(example_inputs)
    tracker = _Tracker(model)
    outside: dict[str, int] = {}
    handles = []

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            tracker.inside += 1
            outside[name] = max(outside.get(name, 0), tracker.current - args[0].untyped_storage().nbytes())

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        tracker.inside -= 1

    training = model.training
    model.eval()
    try:
        for name in layers:
            handles.append(model.get_submodule(name).register_forward_pre_hook(enter(name)))
            handles.append(model.get_submodule(name).register_forward_hook(leave))
        with torch.no_grad(), tracker:
            tracker.watch(tensors(inputs))
            run_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return PeakMemory(tracker.peak, outside, tracker.floor)
