"""What every runtime offers: a module compiled for fixed inputs, ready to be timed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sekron_search.model import Inputs, copy_model
from sekron_search.nested import map_tensors

RuntimeName = Literal["pytorch-eager", "torch-compile", "onnxruntime", "openvino"]
MemoryFormat = Literal["contiguous", "channels_last"]

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

CPU = torch.device("cpu")


class NodeTime(NamedTuple):
    """A node of a runtime's graph, named after the operation of the module that it came from, and its time."""

    name: str
    time_ms: float


class Compiled(Protocol):
    """A module bound to its inputs."""

    def __call__(self) -> None:
        """One forward pass without gradients; done when it returns, but on a GPU, which has to be waited for."""

    def outputs(self) -> list[Tensor]:
        """Run, and give the floating-point outputs."""


@dataclass(frozen=True)
class Runtime(ABC):
    """How modules are run.

    Args:
        num_threads: Threads of an operator; as torch has it if None.
        device: Where it runs.
        memory_format: Of inputs and weights with two spatial axes or three; a runtime that lays out memory itself has
            "contiguous" ones.
    """

    num_threads: int | None = None
    device: torch.device = CPU
    memory_format: MemoryFormat = "contiguous"

    #: As profiles and reports name it.
    name: ClassVar[str]
    #: Whether elementwise operations and batch-norms after a convolution cost next to nothing.
    fuses_elementwise: ClassVar[bool]
    #: Whether it has a clock of its own: `node_times`.
    times_nodes: ClassVar[bool] = False
    #: Types of devices that it runs on.
    device_types: ClassVar[tuple[str, ...]] = ("cpu",)
    #: Memory formats that inputs and weights can be given in.
    memory_formats: ClassVar[tuple[MemoryFormat, ...]] = ("contiguous",)

    @abstractmethod
    def compile(self, module: nn.Module, inputs: Inputs) -> Compiled:
        """A module, in evaluation mode, made ready to run on these inputs; call it within `active`.

        Args:
            module: It is not changed, nor may it be afterwards.
            inputs: Its positional arguments.

        Raises:
            DataError: If the runtime cannot run the module.
        """

    def node_times(self, module: nn.Module, inputs: Inputs, runs: int) -> list[list[NodeTime]]:
        """What the runtime itself says of every node that it executed: per run, in order; where `times_nodes`.

        Runs that warm up come before and are not among them.

        Args:
            module, inputs: As of `compile`.
            runs: How many.
        """
        raise NotImplementedError

    @abstractmethod
    def version(self) -> str:
        """Name and version of the third party, e.g. "torch 2.13.0"."""

    @property
    def thread_count(self) -> int:
        """Threads of an operator."""
        return self.num_threads or torch.get_num_threads()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Compile and time within this: torch has the runtime's threads, and its own again afterwards."""
        with threads(self.num_threads):
            yield


def laid_out(module: nn.Module, inputs: Inputs, runtime: Runtime) -> tuple[nn.Module, Inputs]:
    """Module and inputs on a runtime's device and in its memory format; a copy of the module if it has to change."""
    elsewhere = any(p.device != runtime.device for p in module.parameters())
    if elsewhere or runtime.memory_format == "channels_last":
        module = with_memory_format(copy_model(module).to(runtime.device), runtime.memory_format)

    def moved(tensor: Tensor) -> Tensor:
        return formatted(tensor.to(runtime.device), runtime.memory_format)

    return module, map_tensors(moved, inputs)


def with_memory_format(module: nn.Module, memory_format: MemoryFormat) -> nn.Module:
    """The module itself, its weights laid out so; what it computes then has that layout as well."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = formatted(tensor.data, memory_format)
    return module


def formatted(tensor: Tensor, memory_format: MemoryFormat) -> Tensor:
    """A tensor laid out so, if it has two spatial axes or three; else itself."""
    if memory_format == "channels_last" and tensor.dim() in _CHANNELS_LAST:
        # A clone, for strides of axes of size 1 are free otherwise, and choose among the kernels of a convolution.
        return tensor.clone(memory_format=_CHANNELS_LAST[tensor.dim()])
    return tensor


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run with that many intra-operator threads of torch; as many as before if None."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
