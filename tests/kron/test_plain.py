"""Layers as modules of torch alone against the layers themselves."""

from __future__ import annotations

import copy
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import nn

from sekron_search.errors import StructureError
from sekron_search.kron.conv import KroneckerConv
from sekron_search.kron.linear import KroneckerLinear
from sekron_search.kron.plain import fold_norm, folds_norm, plain_layer
from sekron_search.kron.steps import Schedule
from sekron_search.kron.structure import Structure
from tests.cases import LAYERS, STRUCTURES, layer_of
from tests.kron.test_layer import CONVS, replacement, structures_for

NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def norm_for(channels: int, axes: int) -> nn.Module:
    norm: nn.Module = NORMS[axes](channels).double()
    with torch.no_grad():
        for tensor in (*norm.parameters(), *norm.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return norm.eval()


def check_same(layer: nn.Module, plain: nn.Module, x: torch.Tensor) -> None:
    assert not any(type(m).__module__.startswith("sekron_search") for m in plain.modules())
    with torch.no_grad():
        torch.testing.assert_close(plain(x), layer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONVS)
def test_every_kind_of_convolution_with_and_without_a_norm(name: str) -> None:
    torch.manual_seed(0)
    kind, arguments = CONVS[name]
    conv: Any = kind(10, 14, **arguments).double().eval()
    axes = len(conv.kernel_size)
    x = torch.randn(2, 10, *(11, 12, 9)[:axes], dtype=torch.float64)
    norm = norm_for(14, axes)
    for structure in structures_for(conv):
        for execution in ("factored", "dense"):
            layer = replacement(conv, structure, execution=execution)
            check_same(layer, plain_layer(layer), x)
            if folds_norm(layer):
                check_same(nn.Sequential(layer, norm).eval(), plain_layer(layer, norm), x)


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_schedule_of_every_family(name: str) -> None:
    torch.manual_seed(0)
    structure = STRUCTURES[name]
    conv = nn.Conv2d(12, 16, 3, stride=(2, 1), padding=1, groups=2).double().eval()
    x, norm = torch.randn(2, 12, 7, 6, dtype=torch.float64), norm_for(16, 2)
    reference = KroneckerConv.from_conv(conv, structure)
    for order in permutations(range(structure.num_factors)):
        for folded in ((), tuple(sorted(order))):
            layer = KroneckerConv.from_conv(
                conv, structure, factors=reference.factors(), schedule=Schedule(order, folded)
            ).eval()
            check_same(layer, plain_layer(layer), x)
            if folds_norm(layer):
                check_same(nn.Sequential(layer, norm), plain_layer(layer, norm), x)


@pytest.mark.parametrize(
    "text",
    [
        "10x1x1x1[a] * 1x12x1x1[a]; a=3",
        "2x3x1x1[a] * 5x4x1x1[a]; a=2",
        "3x4x1x1[a] * 4x4x1x1[a]; a=2",
        "2x3x1x1[a,c] * 5x1x1x1[a,b] * 1x4x1x1[b,c]; a=2, b=3, c=2",
    ],
)
def test_linear_layers_of_any_leading_shape(text: str) -> None:
    torch.manual_seed(0)
    structure = Structure.parse(text)
    linear = nn.Linear(12, 10).double().eval()
    for order in permutations(range(structure.num_factors)):
        for folded in ((), tuple(sorted(order))):
            layer = KroneckerLinear.from_linear(linear, structure, schedule=Schedule(order, folded))
            for shape in ((4, 12), (2, 5, 12), (2, 3, 5, 12)):
                check_same(layer, plain_layer(layer), torch.randn(*shape, dtype=torch.float64))
            if folds_norm(layer):
                norm = norm_for(10, 1)
                x = torch.randn(6, 12, dtype=torch.float64)
                check_same(nn.Sequential(layer, norm), plain_layer(layer, norm), x)


def test_a_chain_is_a_sequential_of_convolutions() -> None:
    conv = nn.Conv2d(6, 8, 3, padding=1)
    plain = plain_layer(KroneckerConv.from_conv(conv, STRUCTURES["spatial SVD"]))
    assert [type(m) for m in plain.modules()] == [nn.Sequential, nn.Conv2d, nn.Conv2d]


def test_nothing_is_shared_with_the_layer() -> None:
    layer = KroneckerConv.from_conv(nn.Conv2d(6, 8, 3), STRUCTURES["CP"])
    x = torch.randn(1, 6, 5, 5)
    plain = plain_layer(layer)
    before = plain(x)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert torch.equal(plain(x), before)


def test_a_norm_is_refused_where_it_cannot_be_folded() -> None:
    layer = KroneckerConv.from_conv(
        nn.Conv2d(16, 16, 3, bias=False),
        Structure.parse("4x4x1x1[a] * 4x4x3x3[a]; a=1"),
        schedule=Schedule((0, 1), (1,)),
    )
    assert not folds_norm(layer)
    with pytest.raises(StructureError, match="runs folded"):
        plain_layer(layer, norm_for(16, 2))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYERS)
def test_norms_are_folded_into_dense_layers(name: str) -> None:
    dense, x = layer_of(name)
    dense, x = dense.double().eval(), x.double()
    if isinstance(dense, nn.Linear):
        x = x.flatten(0, 1)
    channels = dense(x).shape[1]
    norm = norm_for(channels, max(x.dim() - 2, 1))
    before = copy.deepcopy(dense)
    with torch.no_grad():
        folded = fold_norm(dense, norm)
    assert type(folded) is type(dense)
    check_same(nn.Sequential(before, norm), folded, x)
    wrong = norm_for(channels, max(x.dim() - 2, 1))
    with torch.no_grad():
        assert not torch.allclose(wrong(dense(x)), folded(x))
