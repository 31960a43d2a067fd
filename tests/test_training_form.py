from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sekron_search.kron import families as fam
from sekron_search.kron.conv import KroneckerConv
from sekron_search.kron.linear import KroneckerLinear
from sekron_search.kron.structure import Structure
from sekron_search.training_form import training_form

#: Structures of a 32x16x3x3 weight, and whether they train faster rebuilt.
CASES: dict[str, tuple[Structure, bool]] = {
    "one kernel shared by all channels": (fam.sekron([(1, 1, 3, 3), (32, 16, 1, 1)], [4]), True),
    "spatial SVD": (fam.spatial_svd((32, 16, 3, 3), 8), False),
    "Tucker-2": (fam.tucker2((32, 16, 3, 3), (8, 8)), False),
    "full rank": (fam.spatial_svd((32, 16, 3, 3), 48), True),
}


@pytest.mark.parametrize("name", CASES)
def test_layers_of_little_factors_train_rebuilt_to_the_same(name: str) -> None:
    structure, slow = CASES[name]
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 32, 3, padding=1)
    network = nn.Sequential(KroneckerConv.from_conv(conv, structure), nn.ReLU())
    layer, x = network[0], torch.randn(2, 16, 6, 6)
    assert isinstance(layer, KroneckerConv)
    other = copy.deepcopy(network)
    other(x).square().mean().backward()
    with training_form(network, nn.Flatten()):
        assert (layer.execution == "dense") == slow
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in network.parameters() if p.dim() == 4)
        network(x).square().mean().backward()
    assert layer.execution == "factored"
    assert all(p.is_contiguous() for p in network.parameters())
    for ours, theirs in zip(network.parameters(), other.parameters(), strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_what_runs_rebuilt_anyway_stays_so_and_errors_leave_nothing_behind() -> None:
    conv = nn.Conv2d(16, 32, 3)
    structure = CASES["one kernel shared by all channels"][0]
    rebuilt = KroneckerConv.from_conv(conv, structure, execution="dense")
    factored = KroneckerConv.from_conv(conv, structure)
    with pytest.raises(KeyError), training_form(nn.Sequential(rebuilt, factored)):
        raise KeyError
    assert (rebuilt.execution, factored.execution) == ("dense", "factored")


def test_linear_layers_are_decided_too() -> None:
    linear = KroneckerLinear.from_linear(nn.Linear(64, 64), fam.sekron([(64, 1, 1, 1), (1, 64, 1, 1)], [16]))
    with training_form(linear):
        assert linear.execution == "factored"
