"""OpenVINO."""

from __future__ import annotations

from typing import Any, ClassVar

import openvino
import torch
from openvino import properties
from openvino.properties import hint
from torch import Tensor, nn

from sekron_search.errors import DataError
from sekron_search.model import Inputs
from sekron_search.nested import tensors
from sekron_search.runtimes.base import Compiled, Runtime, laid_out
from sekron_search.runtimes.onnx import to_onnx_quickly


class OpenVinoRuntime(Runtime):
    """OpenVINO on the CPU, tuned for latency, in float32: what it computes compares with the other runtimes."""

    name: ClassVar[str] = "openvino"
    fuses_elementwise: ClassVar[bool] = True

    def compile(self, module: nn.Module, inputs: Inputs) -> Compiled:
        """An inference request with its inputs set; see `Runtime.compile`."""
        settings = {
            properties.inference_num_threads: self.thread_count,
            hint.performance_mode: hint.PerformanceMode.LATENCY,
            hint.inference_precision: openvino.Type.f32,
        }
        module, inputs = laid_out(module, inputs, self)
        model = to_onnx_quickly(module, inputs)
        try:
            core = openvino.Core()
            compiled = core.compile_model(core.read_model(model), "CPU", settings)
        except Exception as error:  # OpenVINO raises RuntimeError for everything
            raise DataError(f"OpenVINO does not accept {type(module).__name__}: {error}") from error
        return _Request(compiled.create_infer_request(), inputs)

    def version(self) -> str:
        """Of openvino."""
        return f"openvino {openvino.__version__}"


class _Request:
    def __init__(self, request: Any, inputs: Inputs) -> None:
        self.request = request
        # OpenVINO reads the arrays where they are; they have to live as long as the request.
        self.arrays = [tensor.detach().cpu().contiguous().numpy() for tensor in tensors(inputs)]
        for index, array in enumerate(self.arrays):
            request.set_input_tensor(index, openvino.Tensor(array, shared_memory=True))

    def __call__(self) -> None:
        self.request.infer()

    def outputs(self) -> list[Tensor]:
        self()
        count = len(self.request.results)
        found = [torch.from_numpy(self.request.get_output_tensor(i).data.copy()) for i in range(count)]
        return [tensor for tensor in found if tensor.is_floating_point()]
