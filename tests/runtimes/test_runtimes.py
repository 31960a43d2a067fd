"""The contract of every runtime: the outputs of eager PyTorch, nothing changed, threads as they were."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from sekron_search.runtimes.base import Runtime, RuntimeName
from sekron_search.runtimes.registry import make_runtime
from tests.cases import LAYERS, ImageToImage, layer_of, small_net

NAMES = [
    pytest.param(name, marks=marks)
    for name, marks in (
        ("pytorch-eager", ()),
        ("torch-compile", pytest.mark.slow),
        ("onnxruntime", ()),
        ("openvino", pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")),
    )
]


def assert_same(runtime: Runtime, module: nn.Module, *inputs: Tensor) -> None:
    before = torch.get_num_threads()
    with runtime.active():
        compiled = runtime.compile(module.eval(), inputs)
        compiled()
        (found,) = compiled.outputs()
    assert torch.get_num_threads() == before
    with torch.no_grad():
        expected = module(*inputs)
    assert (found.cpu() - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_pytorch(name: RuntimeName) -> None:
    runtime = make_runtime(name, num_threads=1)
    assert runtime.name == name
    assert runtime.version()
    assert_same(runtime, small_net(), torch.randn(2, 3, 8, 8))
    assert_same(
        runtime, nn.Sequential(nn.Conv2d(3, 4, 3), nn.Unflatten(1, (2, 2)), nn.Flatten()), torch.rand(2, 3, 5, 5)
    )
    assert_same(runtime, ImageToImage(), torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_every_kind(name: RuntimeName, layer: str) -> None:
    module, x = layer_of(layer)
    assert_same(make_runtime(name), module, x)
