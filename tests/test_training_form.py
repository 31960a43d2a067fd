from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sekron_search.kron import families as fam
from sekron_search.kron.conv import KroneckerConv
from sekron_search.kron.layer import KroneckerLayer
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


#: Layers whose factors lie in memory the same way in every format, so that only the form changes.
SAME_LAYOUT: dict[str, Callable[[], tuple[KroneckerLayer, Tensor]]] = {
    "linear": lambda: (
        KroneckerLinear.from_linear(nn.Linear(64, 64), fam.sekron([(8, 8, 1, 1), (8, 8, 1, 1)], [16])),
        torch.randn(3, 64),
    ),
    "1x1": lambda: (
        KroneckerConv.from_conv(nn.Conv2d(64, 64, 1), fam.sekron([(8, 8, 1, 1), (8, 8, 1, 1)], [16])),
        torch.randn(2, 64, 5, 5),
    ),
    "one kernel shared by all channels": lambda: (
        KroneckerConv.from_conv(nn.Conv2d(16, 32, 3), fam.sekron([(1, 1, 3, 3), (32, 16, 1, 1)], [4])),
        torch.randn(2, 16, 6, 6),
    ),
    "1-d": lambda: (
        KroneckerConv.from_conv(nn.Conv1d(16, 32, 3), fam.sekron([(1, 1, 3, 1), (32, 16, 1, 1)], [3])),
        torch.randn(2, 16, 7),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", SAME_LAYOUT)
def test_passes_before_within_and_after_agree(name: str) -> None:
    """Weights that are kept ready between passes are those of the form."""
    torch.manual_seed(0)
    layer, x = SAME_LAYOUT[name]()
    before, forms = layer(x), []
    with training_form(layer):
        forms.append(layer.execution)
        within = layer(x)
    forms.append(layer.execution)
    assert forms == ["dense", "factored"]
    torch.testing.assert_close(within, before, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer(x), before)


@torch.no_grad()
def test_kernels_that_are_longer_than_the_nominal_size_are_decided_alike() -> None:
    for kernel in (3, 33, 65):
        structure = fam.sekron([(1, 1, kernel, 1), (32, 16, 1, 1)], [3])
        layer = KroneckerConv.from_conv(nn.Conv1d(16, 32, kernel), structure)
        with training_form(layer):
            assert layer.execution == "dense"
