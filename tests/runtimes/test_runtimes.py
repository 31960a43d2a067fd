"""The contract of every runtime: the outputs of eager PyTorch, nothing changed, threads as they were."""

from __future__ import annotations

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sekron_search.errors import ConfigError, DataError
from sekron_search.model import Inputs, copy_model, output_tensors
from sekron_search.runtimes.base import MemoryFormat, Runtime, RuntimeName
from sekron_search.runtimes.registry import RUNTIMES, make_runtime
from tests.cases import LAYERS, ImageToImage, layer_of, small_net

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

_MARKS = {
    "torch-compile": pytest.mark.slow,
    "openvino": pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed"),
}
NAMES = [pytest.param(name, marks=_MARKS.get(name, ())) for name in RUNTIMES]


class Bag(nn.Module):
    """Takes several inputs, gives several outputs, integers among them."""

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"b": x * scale, "a": x + 1, "rank": x.argmax(1)}


def assert_same(runtime: Runtime, module: nn.Module, inputs: Inputs) -> None:
    """Eager PyTorch's outputs, from a copy that the runtime never saw."""
    before, untouched = torch.get_num_threads(), copy_model(module.eval())
    with runtime.active():
        compiled = runtime.compile(module, inputs)
        compiled()
        found = compiled.outputs()
    assert torch.get_num_threads() == before
    with torch.no_grad():
        expected = output_tensors(untouched(*inputs))
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert (a.cpu() - b).abs().max() <= 1e-4 * b.abs().max()
    for after, kept in zip(module.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(after, kept)
        assert after.stride() == kept.stride()


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_pytorch(name: RuntimeName) -> None:
    runtime = make_runtime(name, num_threads=2)
    assert runtime.name == name
    assert runtime.version().split()[0] in ("torch", "onnxruntime", "openvino")
    image = torch.randn(2, 3, 8, 8)
    assert_same(runtime, small_net(), (image,))
    assert_same(runtime, ImageToImage(), (image,))
    assert_same(runtime, nn.Sequential(nn.Conv2d(3, 4, 3), nn.Unflatten(1, (2, 2)), nn.Flatten(1, 2)), (image,))
    assert_same(runtime, Bag(), (torch.randn(2, 5), torch.tensor(3.0)))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", NAMES)
def test_layers_of_every_kind(name: RuntimeName, layer: str) -> None:
    module, x = layer_of(layer)
    assert_same(make_runtime(name), module, (x,))


@pytest.mark.parametrize("name", NAMES)
def test_a_call_runs_without_gradients_on_the_inputs_it_was_given(name: RuntimeName) -> None:
    module = nn.Linear(4, 3).eval()
    runtime = make_runtime(name, num_threads=1)
    first, second = (runtime.compile(module, (torch.full((2, 4), value),)) for value in (1.0, 2.0))
    (a,), (b,) = first.outputs(), second.outputs()
    assert torch.equal(a, first.outputs()[0])
    assert not torch.equal(a, b)
    assert not a.requires_grad


@pytest.mark.parametrize("name", [n for n in NAMES if n.values[0] in ("pytorch-eager", "torch-compile")])
def test_channels_last(name: RuntimeName) -> None:
    runtime = make_runtime(name, memory_format="channels_last")
    seen: list[bool] = []

    class Look(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            seen.append(input.is_contiguous(memory_format=torch.channels_last))
            seen.append(self.weight.is_contiguous(memory_format=torch.channels_last))
            return super().forward(input)

    assert_same(make_runtime("pytorch-eager", memory_format="channels_last"), Look(3, 4, 3), (torch.randn(2, 3, 5, 5),))
    assert all(seen[:4])
    assert_same(runtime, small_net(), (torch.randn(2, 3, 8, 8),))
    assert_same(runtime, nn.Conv3d(2, 3, 2), (torch.randn(2, 2, 4, 4, 4),))


def test_the_threads_of_onnxruntime_are_the_runtimes() -> None:
    from sekron_search.runtimes.onnx import OnnxRuntime

    assert OnnxRuntime(num_threads=3).thread_count == 3
    assert OnnxRuntime().thread_count == torch.get_num_threads()


def test_both_exporters_agree() -> None:
    """What is timed in a profile has the operators of what users export."""
    from sekron_search.runtimes.onnx import make_session, to_onnx, to_onnx_quickly

    class Mixed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = self[0](x).unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2)
            return x + self[2](self[1](y))  # type: ignore[no-any-return]

    module = Mixed(nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1, groups=2), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 4, 6, 6)
    models = to_onnx(module, (x,), dynamic_batch=False), to_onnx_quickly(module, (x,))
    assert _optimized_operators(models[0]) == _optimized_operators(models[1])
    assert make_session(models[1], 1).get_inputs()[0].shape == [2, 4, 6, 6]


def test_inputs_that_nothing_hangs_on_are_inputs_still() -> None:
    from sekron_search.runtimes.onnx import OnnxRuntime, make_session, to_onnx_quickly

    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x * mask if self.training else 2 * x

    inputs = torch.randn(2, 3), torch.ones(2, 3)
    assert len(make_session(to_onnx_quickly(Masked().eval(), inputs), 1).get_inputs()) == 2
    (found,) = OnnxRuntime(num_threads=1).compile(Masked().eval(), inputs).outputs()
    torch.testing.assert_close(found, 2 * inputs[0])


def _optimized_operators(model: bytes) -> list[str]:
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(Path(tempfile.mkdtemp()) / "optimized.onnx")
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return sorted(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def test_dynamic_batch() -> None:
    from sekron_search.runtimes.onnx import make_session, to_onnx

    module = small_net()
    session = make_session(to_onnx(module, (torch.randn(4, 3, 8, 8),), dynamic_batch=True), 1)
    for size in (1, 4, 7):
        x = torch.randn(size, 3, 8, 8)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(found), module(x), atol=1e-4)


def test_control_flow_is_refused_with_what_to_do() -> None:
    from sekron_search.runtimes.onnx import to_onnx

    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(DataError, match=r"Branches cannot be exported: .*replace branches on tensor values"):
        to_onnx(Branches(), (torch.ones(2, 2),), dynamic_batch=False)


@pytest.mark.parametrize(
    ("name", "module"), [("onnxruntime", "onnx"), ("onnxruntime", "onnxruntime"), ("openvino", "openvino")]
)
def test_a_missing_package_is_named(name: RuntimeName, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, f"sekron_search.runtimes.{RUNTIMES[name].partition(':')[0]}", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    extra = "onnx" if name == "onnxruntime" else name
    with pytest.raises(ConfigError, match=rf"'{module}' is not installed: pip install 'sekron-search\[{extra}\]'"):
        make_runtime(name)


@pytest.mark.parametrize(
    ("name", "memory_format", "device", "message"),
    [
        ("onnxruntime", "channels_last", "cpu", "it lays out memory itself"),
        ("openvino", "contiguous", "cuda", "runs on cpu, got device 'cuda'"),
        ("pytorch-eager", "blocked", "cpu", "expected memory format contiguous or channels_last, got 'blocked'"),
        ("tflite", "contiguous", "cpu", "expected one of pytorch-eager, torch-compile, onnxruntime, openvino"),
    ],
)
def test_what_makes_no_sense_is_refused(
    name: RuntimeName, memory_format: MemoryFormat, device: str, message: str
) -> None:
    if name == "openvino":
        pytest.importorskip("openvino")
    with pytest.raises(ConfigError, match=message):
        make_runtime(name, memory_format=memory_format, device=device)


def test_at_least_one_thread() -> None:
    with pytest.raises(ConfigError, match="expected at least one thread, got 0"):
        make_runtime("pytorch-eager", num_threads=0)
