"""ONNX: modules as ONNX models, and ONNX Runtime."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import onnx
import onnxruntime
import onnxscript  # noqa: F401  torch.onnx needs it; whoever lacks it is told here and not by torch
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from sekron_search.errors import DataError
from sekron_search.model import Inputs
from sekron_search.nested import map_tensors, tensors
from sekron_search.runtimes.base import Compiled, NodeTime, Runtime, laid_out
from sekron_search.runtimes.exported import exported_program, quiet


class OnnxRuntime(Runtime):
    """ONNX Runtime on the CPU, with all its graph optimisations."""

    name: ClassVar[str] = "onnxruntime"
    fuses_elementwise: ClassVar[bool] = True
    times_nodes: ClassVar[bool] = True

    def compile(self, module: nn.Module, inputs: Inputs) -> Compiled:
        """A session with inputs and outputs bound to memory; see `Runtime.compile`."""
        module, inputs = laid_out(module, inputs, self)
        return self.bind(to_onnx_quickly(module, inputs), inputs)

    def bind(self, model: bytes, inputs: Inputs) -> Compiled:
        """An ONNX model made ready to run on these inputs; errors as of `compile`."""
        return _Session(make_session(model, self.thread_count), inputs)

    def node_times(self, module: nn.Module, inputs: Inputs, runs: int) -> list[list[NodeTime]]:
        """By ONNX Runtime's profiler; see `Runtime.node_times`."""
        model = to_onnx_quickly(module, inputs)
        with tempfile.TemporaryDirectory() as folder:
            session = _Session(make_session(model, self.thread_count, profile=Path(folder) / "nodes"), inputs)
            for _ in range(runs + 1):  # the session has run once before
                session()
            events = json.loads(Path(session.session.end_profiling()).read_text(encoding="utf-8"))
        suffix = "_kernel_time"
        nodes = [
            NodeTime(event["name"].removesuffix(suffix), event["dur"] / 1e3)
            for event in events
            if event["cat"] == "Node" and event["name"].endswith(suffix)
        ]
        count = len(nodes) // (runs + 2)  # every run executes the same nodes
        return [nodes[count * (run + 2) : count * (run + 3)] for run in range(runs)]

    def version(self) -> str:
        """Of onnxruntime."""
        return f"onnxruntime {onnxruntime.__version__}"


def to_onnx(module: nn.Module, inputs: Inputs, *, dynamic_batch: bool) -> bytes:
    """A module as an ONNX model, exported by `torch.export`.

    Args:
        module: In evaluation mode; it is not changed.
        inputs: Its positional arguments.
        dynamic_batch: As for `exported_program`.

    Raises:
        DataError: If torch cannot export it.
    """
    program = exported_program(module, inputs, dynamic_batch=dynamic_batch)
    with quiet():
        try:
            exported = torch.onnx.export(program, dynamo=True, verbose=False)
        except Exception as error:  # torch raises many kinds
            what = f"{type(error).__name__}: {error}"
            raise DataError(f"{type(module).__name__} cannot be exported to ONNX: {what}") from error
    assert exported is not None
    data: bytes = exported.model_proto.SerializeToString()
    return data


def to_onnx_quickly(module: nn.Module, inputs: Inputs) -> bytes:
    """A module as an ONNX model for these shapes alone.

    The exporter that traces with TorchScript takes some milliseconds for a layer where `torch.export` takes half a
    second, and ONNX Runtime makes the same operators of both. What it cannot export goes the long way, and so does what
    has inputs that it leaves out, for nothing hangs on them.
    """
    buffer: Any = io.BytesIO()
    with quiet():
        try:
            torch.onnx.export(module, inputs, buffer, dynamo=False, opset_version=18)
        except Exception:  # torch raises many kinds
            return to_onnx(module, inputs, dynamic_batch=False)
    data: bytes = buffer.getvalue()
    if len(onnx.load_from_string(data).graph.input) != len(tensors(inputs)):
        return to_onnx(module, inputs, dynamic_batch=False)
    return data


def make_session(model: bytes, num_threads: int, *, profile: Path | None = None) -> onnxruntime.InferenceSession:
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
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # each kind of failure has a class of its own
        raise DataError(f"ONNX Runtime does not accept the model: {type(error).__name__}: {error}") from error


def check_onnx(model: bytes) -> None:
    """Raise a `DataError` unless it is a valid ONNX model whose shapes fit together."""
    try:
        onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    except Exception as error:  # protobuf, checker and shape inference have errors of their own
        raise DataError(f"not a valid ONNX model: {type(error).__name__}: {error}") from error


def to_int8(model: bytes, batches: Sequence[Inputs]) -> bytes:
    """An ONNX model with weights and activations of 8 bits: static quantization, scales of weights per channel.

    Weights use 7 of the bits, as on processors without 8-bit dot products sums of two products would overflow.

    Args:
        model: In float32.
        batches: Inputs from which the ranges of the activations are taken.

    Raises:
        DataError: If ONNX Runtime cannot quantize it.
    """
    with tempfile.TemporaryDirectory(prefix="sekron-int8-") as scratch, quiet():
        plain, prepared, quantized = (Path(scratch) / f"{name}.onnx" for name in ("plain", "prepared", "int8"))
        plain.write_bytes(model)
        try:
            quant_pre_process(plain, prepared, skip_symbolic_shape=True)
            quantize_static(prepared, quantized, _Reader(model, batches), per_channel=True, reduce_range=True)
        except Exception as error:  # each step has errors of its own
            raise DataError(f"ONNX Runtime cannot quantize the model: {type(error).__name__}: {error}") from error
        return quantized.read_bytes()


class OnnxNetwork(nn.Module):
    """An ONNX model that is called like the network that it was made of.

    Args:
        model: The ONNX model.
        output: An output of that network, for the structure.
        num_threads: Of ONNX Runtime; as torch has it if None.

    Raises:
        DataError: If ONNX Runtime does not accept the model.
    """

    def __init__(self, model: bytes, output: Any, *, num_threads: int | None = None) -> None:
        super().__init__()
        self.session = make_session(model, num_threads or torch.get_num_threads())
        self.output = map_tensors(lambda tensor: tensor.new_empty(0), output)

    def forward(self, *inputs: Any) -> Any:
        """Run the model: outputs lie where the first input does; what is no tensor is as it was on the example."""
        device = next((x.device for x in tensors(inputs)), None)
        arrays = self.session.run(None, _named(self.session, inputs))
        found = [torch.from_numpy(array).to(device) for array in arrays]
        if len(found) != len(tensors(self.output)):
            return found
        each = iter(found)
        return map_tensors(lambda _: next(each), self.output)


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hands calibration inputs to the quantizer, one batch after the other."""

    def __init__(self, model: bytes, batches: Sequence[Inputs]) -> None:
        session = make_session(model, 1)
        self.items = iter([_named(session, inputs) for inputs in batches])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.items, None)


def _named(session: onnxruntime.InferenceSession, inputs: Inputs) -> dict[str, Any]:
    """The tensors among a network's inputs as arrays, by the names that they have in the model."""
    found = tensors(inputs)
    names = [entry.name for entry in session.get_inputs()]
    if len(names) != len(found):
        raise DataError(f"the ONNX model takes {len(names)} tensors {names}, the network {len(found)}")
    return {n: t.detach().cpu().contiguous().numpy() for n, t in zip(names, found, strict=True)}


class _Session:
    """Inputs and outputs lie where ONNX Runtime reads and writes them, so that no copies are timed."""

    def __init__(self, session: onnxruntime.InferenceSession, inputs: Inputs) -> None:
        self.session, self.binding = session, session.io_binding()
        for name, array in _named(session, inputs).items():
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
