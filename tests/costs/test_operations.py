from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sekron_search.costs.build import build
from sekron_search.costs.design import QUOTAS, design, fits, granularity_sweep
from sekron_search.costs.features import regime
from sekron_search.costs.operations import Convolution, Copy, Elementwise, Linear, Operation, Pool
from sekron_search.costs.trace import traced_operations
from sekron_search.errors import ConfigError
from sekron_search.kron.conv import KroneckerConv
from sekron_search.kron.plain import plain_layer
from tests.cases import SHAPE, STRUCTURES, small_net

CONV = Convolution(2, 6, 8, (9, 7), (3, 1), (2, 1), (1, 1), (1, 0), 2)


@pytest.mark.parametrize("operation", [CONV, Linear(3, 4, 5), Copy(1, 2, 3, 4), Elementwise(7, 2), Pool(1, 2, 9, 1, 9)])
def test_operations_round_trip_through_their_text(operation: Operation) -> None:
    assert Operation.parse(str(operation)) == operation


def test_costs_of_operations_by_hand() -> None:
    assert CONV.output_size == (5, 7)
    assert (CONV.weights, CONV.flops) == (8 * 3 * 3, 8 * 3 * 3 * 2 * 35)
    assert CONV.moved_bytes == 4 * (2 * 6 * 63 + 8 * 3 * 3 + 2 * 8 * 35)
    assert Linear(3, 4, 5, 2).flops == 2 * 3 * 4 * 5
    assert Copy(2, 3, 4, 5).moved_bytes == 2 * 4 * 120


@pytest.mark.parametrize("text", ["", "conf batch=1", "linear rows=1", "linear rows=a in_features=2 out_features=3"])
def test_bad_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^operation .* expected one of conv, linear"):
        Operation.parse(text)


def test_design_is_deterministic_and_within_bounds() -> None:
    found = design(0)
    assert found == design(0)
    assert found != design(1)
    assert len(set(found)) == len(found) == sum(QUOTAS.values())
    assert all(fits(operation) for operation in found)
    assert len(design(0, quick=True)) < len(found) / 3
    kinds = {regime(operation) for operation in found}
    assert kinds >= {"pointwise", "spatial", "depthwise", "grouped", "volume", "transposed", "linear", "copy", "pool"}


@pytest.mark.parametrize("kind", ["conv", "linear", "copy", "elementwise", "pool"])
def test_what_is_built_executes_the_operation(kind: str) -> None:
    """Traced, every module of a design gives the operation that it was built for."""
    for operation in [o for o in (*design(0, quick=True), *granularity_sweep()) if o.kind == kind][:60]:
        with torch.device("meta"):
            module, shapes = build(operation)
            inputs = tuple(torch.empty(shape) for shape in shapes)
        traced = traced_operations(module, inputs)
        assert not traced.unknown
        if isinstance(operation, Copy) and min(operation.rows, operation.columns) == 1:
            assert sum(o.moved_bytes for o in traced.operations) == operation.moved_bytes
        elif isinstance(operation, Pool):
            assert [regime(o) for o in traced.operations] == ["pool"]
        else:
            assert traced.operations == (operation,)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_plain_layers_execute_the_steps_of_their_plan(name: str, memory_format: torch.memory_format) -> None:
    conv = nn.Conv2d(SHAPE[1], SHAPE[0], 3, stride=2, padding=1, bias=False)
    layer = KroneckerConv.from_conv(conv, STRUCTURES[name], input_size=(12, 10))
    module = plain_layer(layer).to("meta")
    module.to(memory_format=memory_format)  # type: ignore[call-overload]
    x = torch.empty(3, SHAPE[1], 12, 10, device="meta").contiguous(memory_format=memory_format)
    traced = traced_operations(module, (x,))
    assert not traced.unknown
    convolutions = [o for o in traced.operations if isinstance(o, Convolution)]
    assert len(convolutions) == len(layer.plan.steps)
    assert sum(o.flops for o in convolutions) == 3 * layer.plan.cost((12, 10)).flops


def test_a_network_by_hand() -> None:
    traced = traced_operations(small_net(), (torch.randn(4, 3, 8, 8),))
    assert not traced.unknown
    assert sum(isinstance(o, Convolution) for o in traced.operations) == 3
    assert [o for o in traced.operations if isinstance(o, Linear)] == [Linear(4, 16, 4)]
    assert sum(isinstance(o, Pool) for o in traced.operations) == 1


def test_conversions_of_memory_formats_are_operations() -> None:
    conv = nn.Conv2d(16, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(2, 16, 5, 6)
    copy, made = traced_operations(conv, (x,)).operations
    assert copy == Copy(2, 16, 30, 1)
    assert traced_operations(conv, (x.contiguous(memory_format=torch.channels_last),)).operations == (made,)


def test_permutes_are_copies_and_views_are_free() -> None:
    class Shuffle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            moved: Tensor = x.unflatten(1, (2, 3)).transpose(1, 2).reshape(x.shape)
            return moved.flatten(2)

    assert traced_operations(Shuffle(), (torch.randn(4, 6, 5, 7),)).operations == (Copy(4, 2, 3, 35),)


def test_unknown_operators_are_reported() -> None:
    class Sort(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            values: Tensor = x.sort()[0]
            return values

    traced = traced_operations(Sort(), (torch.randn(4),))
    assert traced.unknown == {"aten.sort.default": 1}
