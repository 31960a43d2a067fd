"""`torch.compile`: PyTorch with fused operators."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sekron_search.errors import DataError
from sekron_search.model import Inputs, output_tensors
from sekron_search.runtimes.base import Compiled, MemoryFormat, Runtime, laid_out


class CompileRuntime(Runtime):
    """Compiles the module for the shapes of its inputs; some seconds for every new one."""

    name: ClassVar[str] = "torch-compile"
    fuses_elementwise: ClassVar[bool] = True
    device_types: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    memory_formats: ClassVar[tuple[MemoryFormat, ...]] = ("contiguous", "channels_last")

    def compile(self, module: nn.Module, inputs: Inputs) -> Compiled:
        """The module, compiled and run once; see `Runtime.compile`."""
        call = _CompiledCall(*laid_out(module, inputs, self))
        try:
            call()
        except Exception as error:  # torch raises many kinds
            raise DataError(f"torch.compile does not compile {type(module).__name__}: {error}") from error
        return call

    def version(self) -> str:
        """Of torch."""
        return f"torch {torch.__version__}"


class _CompiledCall:
    def __init__(self, module: nn.Module, inputs: Inputs) -> None:
        def forward(*arguments: Any) -> Any:
            return module(*arguments)

        # torch keeps what it compiles per code object, and gives up after some versions of one: this one is new.
        forward.__code__ = forward.__code__.replace()
        self.forward = torch.compile(forward, dynamic=False)
        self.inputs = inputs

    def __call__(self) -> None:
        self._run()

    def outputs(self) -> list[Tensor]:
        return output_tensors(self._run())

    def _run(self) -> Any:
        # Always the same mode, whatever the caller's: torch compiles anew for another one.
        with torch.inference_mode(False), torch.no_grad():
            return self.forward(*self.inputs)
