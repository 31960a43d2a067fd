"""PyTorch as it is: one operator after the other."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sekron_search.model import Inputs, output_tensors
from sekron_search.runtimes.base import Compiled, MemoryFormat, Runtime, laid_out


class EagerRuntime(Runtime):
    """Calls the module."""

    name: ClassVar[str] = "pytorch-eager"
    fuses_elementwise: ClassVar[bool] = False
    device_types: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    memory_formats: ClassVar[tuple[MemoryFormat, ...]] = ("contiguous", "channels_last")

    def compile(self, module: nn.Module, inputs: Inputs) -> Compiled:
        """The module on the device, in the memory format; see `Runtime.compile`."""
        return _Call(*laid_out(module, inputs, self))

    def version(self) -> str:
        """Of torch."""
        return f"torch {torch.__version__}"


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
