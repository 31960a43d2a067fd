"""Muon on matrices, AdamW on the rest."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sekron_search.muon import Muon, orthogonalized

SHAPES = [(5, 9), (64, 20), (33, 171), (9, 5), (128, 138), (2, 2), (5, 9)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_singular_values_come_near_one_and_vectors_stay(device: str) -> None:
    """Of many matrices at a time, of equal and of other shapes."""
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) for shape in SHAPES]
    for matrix, moved in zip(matrices, orthogonalized([m.to(device) for m in matrices]), strict=True):
        found = moved.cpu()
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        own = left.T @ found @ right.T
        inside = values > 0.05 * values[0]  # the smallest need more iterations
        assert 0.6 < float(own.diagonal()[inside].min()) <= float(own.diagonal().max()) < 1.3
        torch.testing.assert_close(own, torch.diag(own.diagonal()), atol=1e-4, rtol=0)
        assert found.shape == matrix.shape
        torch.testing.assert_close(found, orthogonalized([matrix])[0], atol=1e-4, rtol=0)


def test_zeros_around_a_matrix_change_nothing() -> None:
    """Which is how matrices of several shapes are computed at once on GPUs."""
    matrix = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    whole = orthogonalized([torch.nn.functional.pad(matrix, (0, 3, 0, 2))])[0]
    torch.testing.assert_close(whole[:5, :9], orthogonalized([matrix])[0], atol=1e-5, rtol=1e-5)
    assert whole[5:].count_nonzero() == whole[:, 9:].count_nonzero() == 0


def test_zero_gradients_change_nothing() -> None:
    weight = nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.zeros(3, 4)
    Muon([weight], 0.1).step()
    assert torch.equal(weight, torch.ones(3, 4))


def trained(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> dict[str, torch.Tensor]:
    """Weights after some steps on the same data."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(32, 6, generator=generator)
        loss = (network(x) - x[:, :4]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in network.state_dict().items()}


def test_matrices_take_the_steps_of_torchs_muon_and_the_rest_those_of_its_adamw() -> None:
    """torch's iterates in bfloat16, so steps agree to some percent of their size."""
    torch.manual_seed(0)
    ours = nn.Linear(6, 4)
    theirs = copy.deepcopy(ours)
    start = ours.weight.detach().clone()
    found = trained(ours, Muon(ours.parameters(), 1e-3, weight_decay=0.1), 5)
    matrices = torch.optim.Muon([theirs.weight], 1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    others = torch.optim.AdamW([theirs.bias], 1e-3, weight_decay=0.1)

    class Both:
        def zero_grad(self) -> None:
            theirs.zero_grad()

        def step(self) -> None:
            matrices.step()
            others.step()

    wanted = trained(theirs, Both(), 5)  # type: ignore[arg-type]
    moved = wanted["weight"] - start
    assert float((found["weight"] - wanted["weight"]).norm() / moved.norm()) < 0.03
    torch.testing.assert_close(found["bias"], wanted["bias"], rtol=1e-3, atol=1e-6)


def test_a_convolutions_weight_is_a_matrix_in_any_memory_format() -> None:
    weight, gradient = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    found = []
    for form in (torch.contiguous_format, torch.channels_last):
        parameter = nn.Parameter(weight.clone(memory_format=form))
        parameter.grad = gradient.contiguous(memory_format=form)
        Muon([parameter], 0.1).step()
        assert parameter.is_contiguous(memory_format=form)
        found.append(parameter.detach())
    torch.testing.assert_close(*found)
    change = (weight - found[0]).flatten(1)
    assert float(change.square().mean().sqrt()) == pytest.approx(0.1 * 0.2, rel=0.2)  # as large as Adam's


def test_a_saved_state_is_gone_on_with() -> None:
    torch.manual_seed(0)
    network = nn.Linear(6, 4)
    optimizer = Muon(network.parameters(), 1e-2)
    trained(network, optimizer, 3)
    other = copy.deepcopy(network)
    again = Muon(other.parameters(), 1.0)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    torch.testing.assert_close(trained(other, again, 3), trained(network, optimizer, 3), rtol=0, atol=0)
