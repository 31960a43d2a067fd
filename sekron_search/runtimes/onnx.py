"""ONNX: modules as ONNX models, and ONNX Runtime."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import onnxruntime
import onnxscript  # noqa: F401  torch.onnx needs it; whoever lacks it is told here and not by torch
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sekron_search.errors import DataError
from sekron_search.model import Inputs
from sekron_search.runtimes.base import Compiled, Runtime, RuntimeName


class OnnxRuntime(Runtime):
    """ONNX Runtime on the CPU, with all its graph optimisations."""

    name: ClassVar[RuntimeName] = "onnxruntime"
    fuses_elementwise: ClassVar[bool] = True

    def compile(self, module: nn.Module, inputs: Inputs) -> Compiled:
        """A session with inputs and outputs bound to memory; see `Runtime.compile`."""
        return _Session(make_session(to_onnx_quickly(module, inputs), self.thread_count), inputs)

    def version(self) -> str:
        """Of onnxruntime."""
        return f"onnxruntime {onnxruntime.__version__}"


def to_onnx(module: nn.Module, inputs: Inputs, *, dynamic_batch: bool) -> bytes:
    """A module as an ONNX model, exported by `torch.export`.

    Args:
        module: In evaluation mode; it is not changed.
        inputs: Its positional arguments.
        dynamic_batch: Whether the first axis of the inputs may have another size when the model is run.

    Raises:
        DataError: If torch cannot export it.
    """
    shapes: Any = None
    if dynamic_batch:
        shapes = tuple({0: torch.export.Dim("batch")} if isinstance(x, Tensor) else None for x in inputs)
    with _quiet():
        try:
            program = torch.onnx.export(module, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
        except Exception as error:  # torch raises many kinds
            raise export_error(module, error) from error
    assert program is not None
    data: bytes = program.model_proto.SerializeToString()
    return data


def to_onnx_quickly(module: nn.Module, inputs: Inputs) -> bytes:
    """A module as an ONNX model for these shapes alone.

    The exporter that traces with TorchScript takes some milliseconds for a layer where `torch.export` takes half a
    second, and ONNX Runtime makes the same operators of both. What it cannot export goes the long way.
    """
    buffer: Any = io.BytesIO()
    with _quiet():
        try:
            torch.onnx.export(module, inputs, buffer, dynamo=False, opset_version=18)
        except Exception:  # torch raises many kinds
            return to_onnx(module, inputs, dynamic_batch=False)
    data: bytes = buffer.getvalue()
    return data


def make_session(model: bytes, num_threads: int) -> onnxruntime.InferenceSession:
    """A session on the CPU, one operator after the other.

    Raises:
        DataError: If ONNX Runtime does not accept the model.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # each kind of failure has a class of its own
        raise DataError(f"ONNX Runtime does not accept the model: {type(error).__name__}: {error}") from error


def export_error(module: nn.Module, error: Exception) -> DataError:
    """What to tell where torch cannot export a network."""
    reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
    return DataError(
        f"{type(module).__name__} cannot be exported: {reason[0]}. An exported network must do the same operations for "
        "every input: replace branches on tensor values, `.item()` and loops over data by tensor operations"
    )


class _Session:
    """Inputs and outputs lie where ONNX Runtime reads and writes them, so that no copies are timed."""

    def __init__(self, session: onnxruntime.InferenceSession, inputs: Inputs) -> None:
        self.session, self.binding = session, session.io_binding()
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        names = [entry.name for entry in session.get_inputs()]
        if len(names) != len(tensors):
            raise DataError(f"the exported model takes {len(names)} tensors {names}, the network {len(tensors)}")
        for name, tensor in zip(names, tensors, strict=True):
            array = tensor.detach().cpu().contiguous().numpy()
            self.binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        for entry in session.get_outputs():
            self.binding.bind_output(entry.name, "cpu")
        session.run_with_iobinding(self.binding)
        # Their shapes are known now: from here on they are written to the same memory.
        for entry, value in zip(session.get_outputs(), self.binding.get_outputs(), strict=True):
            self.binding.bind_ortvalue_output(entry.name, value)

    def __call__(self) -> None:
        self.session.run_with_iobinding(self.binding)

    def outputs(self) -> list[Tensor]:
        self()
        found = [torch.from_numpy(array) for array in self.binding.copy_outputs_to_cpu()]
        return [tensor.clone() for tensor in found if tensor.is_floating_point()]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say of themselves: deprecations, and that torchvision is not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
