"""PyTorch as it is: one operator after the other."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sekron_search.model import Inputs, copy_model, output_tensors
from sekron_search.runtimes.base import Compiled, MemoryFormat, Runtime, RuntimeName

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class EagerRuntime(Runtime):
    """Calls the module."""

    name: ClassVar[RuntimeName] = "pytorch-eager"
    fuses_elementwise: ClassVar[bool] = False
    device_types: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    memory_formats: ClassVar[tuple[MemoryFormat, ...]] = ("contiguous", "channels_last")

    def compile(self, module: nn.Module, inputs: Inputs) -> Compiled:
        """The module on the device, in the memory format; see `Runtime.compile`."""
        return _Call(*laid_out(module, inputs, self))

    def version(self) -> str:
        """Of torch."""
        return f"torch {torch.__version__}"


def laid_out(module: nn.Module, inputs: Inputs, runtime: Runtime) -> tuple[nn.Module, Inputs]:
    """Module and inputs on a runtime's device and in its memory format; a copy of the module if it has to change."""
    elsewhere = any(p.device != runtime.device for p in module.parameters())
    if elsewhere or runtime.memory_format == "channels_last":
        module = copy_model(module).to(runtime.device)
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = _formatted(tensor.data, runtime)
    return module, tree_map_only(Tensor, lambda tensor: _formatted(tensor, runtime), inputs)


def _formatted(tensor: Tensor, runtime: Runtime) -> Tensor:
    tensor = tensor.to(runtime.device)
    if runtime.memory_format == "channels_last" and tensor.dim() in _CHANNELS_LAST:
        return tensor.contiguous(memory_format=_CHANNELS_LAST[tensor.dim()])
    return tensor


class _Call:
    def __init__(self, module: nn.Module, inputs: Inputs) -> None:
        self.module, self.inputs = module, inputs

    @torch.inference_mode()
    def __call__(self) -> None:
        self.module(*self.inputs)

    @torch.inference_mode()
    def outputs(self) -> list[Tensor]:
        found: Any = self.module(*self.inputs)
        return output_tensors(found)
