"""Metrics that a structure keeps: partial traces, whitened coordinates, and what they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sekron_search.kron import families as fam
from sekron_search.kron import metric as module
from sekron_search.kron.metric import InputMetric, Whitening, partial_traces, square_root
from sekron_search.kron.projection import pad_channels, reconstruct_batch
from sekron_search.kron.refine import Refiner
from sekron_search.kron.structure import Structure
from tests.cases import SHAPE, STRUCTURES, random_factors


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definite(size: int, seed: int) -> Tensor:
    root = gaussian(1, size, 3 * size, seed=seed) * torch.logspace(0, 1, size, dtype=torch.float64)[:, None]
    return root @ root.mT


def joined(parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> Tensor:
    """The Kronecker product of one matrix per factor, its rows and columns in the order of the weight's entries."""
    product = parts[0][0]
    for part in parts[1:]:
        product = torch.kron(product, part[0])
    padded = [(1,) * (4 - len(shape)) + tuple(shape) for shape in shapes]
    order = fam.sekron(padded, [1] * (len(padded) - 1))
    rows = order.fold(torch.arange(len(product)).reshape([p.shape[-1] for p in parts])).flatten()
    return product[rows][:, rows][None]


def product_metric(structure: Structure) -> InputMetric:
    """A metric that is a product over the structure's factors."""
    columns = [shape[1:] for shape in structure.shapes]
    inner = [definite(int(torch.tensor(c).prod()), seed=k) for k, c in enumerate(columns)]
    outer = [definite(shape[0], seed=10 + k) for k, shape in enumerate(structure.shapes)]
    rows = [(shape[0], 1, 1, 1) for shape in structure.shapes]
    moment = joined(inner, columns)
    return InputMetric(moment, torch.zeros(1, moment.shape[-1]).double(), joined(outer, rows))


PAIRS = {
    "channel SVD": fam.channel_svd(SHAPE, 2),
    "spatial SVD": fam.spatial_svd(SHAPE, 3),
    "Kronecker": fam.sekron([(2, 3, 3, 1), (SHAPE[0] // 2, SHAPE[1] // 3, 1, 3)], [2]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_where_the_metric_is_a_product_the_start_is_the_optimum(name: str) -> None:
    """Eckart-Young in whitened coordinates, against descent from the start and from elsewhere."""
    structure = PAIRS[name]
    metric, weight = product_metric(structure), gaussian(1, *SHAPE, seed=5)
    refiner = Refiner(weight, metric)
    start = refiner.start(structure)
    assert refiner.error(structure, start.factors) == pytest.approx(start.rel_error)
    other = tuple(random_factors(structure, groups=1, seed=3))
    for begin in (start.factors, other):
        found = refiner.descend(structure, replace(start, factors=begin, rel_error=10.0), steps=500, tolerance=1e-9)
        assert start.rel_error <= found.rel_error * (1 + 1e-5)


@pytest.mark.parametrize("name", [n for n, s in STRUCTURES.items() if not s.is_dense])
def test_whitening_keeps_the_structure(name: str) -> None:
    """The whitened factors make up the whitened weight, and their squares are its squared norm in the metric."""
    structure = STRUCTURES[name]
    metric = product_metric(structure)
    factors = [a.double() for a in random_factors(structure, groups=1)]
    whitening = Whitening(structure, metric)
    weight = reconstruct_batch(structure, factors)
    white = whitening(weight)
    torch.testing.assert_close(reconstruct_batch(structure, whitening.apply(factors)), white)
    for a, back in zip(factors, whitening.undo(whitening.apply(factors)), strict=True):
        torch.testing.assert_close(back, a)
    other = gaussian(*weight.shape, seed=8)
    ratio = float(metric.norm(weight) / metric.norm(other))
    assert float(white.norm() / whitening(other).norm()) == pytest.approx(ratio, rel=1e-6)


def test_large_factors_are_whitened_mode_by_mode() -> None:
    """Undone exactly, and where the inputs' moment is a product over the modes their squares are the norm still."""
    structure = fam.sekron([(2, 4, 3, 1), (4, 2, 1, 3)], [3])
    parts = [definite(n, seed=n) for n in (4, 2, 3, 3)]  # channels of both factors, height (first), width (second)
    c1, c2, h, w = (p[0] for p in parts)
    moment = torch.kron(torch.kron(torch.kron(c1, c2), h), w)[None]
    outer = torch.kron(definite(2, seed=7)[0], definite(4, seed=8)[0])[None]
    metric = InputMetric(moment, torch.zeros(1, len(moment[0])).double(), outer)
    whitening = Whitening(structure, metric, most=4)
    assert whitening.sizes == [[2, 4, 3, 1], [4, 2, 1, 3]]
    factors = [a.double() for a in random_factors(structure, groups=1)]
    weight, other = reconstruct_batch(structure, factors), gaussian(1, *structure.weight_shape, seed=8)
    torch.testing.assert_close(reconstruct_batch(structure, whitening.apply(factors)), whitening(weight))
    for a, back in zip(factors, whitening.undo(whitening.apply(factors)), strict=True):
        torch.testing.assert_close(back, a)
    ratio = float(metric.norm(weight) / metric.norm(other))
    assert float(whitening(weight).norm() / whitening(other).norm()) == pytest.approx(ratio, rel=1e-6)
    # Modes that are larger still keep their coordinates.
    assert [[root is None for root in roots[1:]] for roots in Whitening(structure, metric, most=2).roots] == [
        [True, True, True],
        [False, True, True],
    ]


def test_partial_traces_are_those_of_the_definition() -> None:
    shapes = [(2, 1, 3), (2, 3, 1)]
    moment = definite(36, seed=1)
    expected = torch.zeros(6, 6, dtype=torch.float64)
    view = moment.reshape(2, 2, 3, 3, 2, 2, 3, 3)  # channels of both factors, then height (second), width (first)
    for c, h in ((c, h) for c in range(2) for h in range(3)):
        expected += view[:, c, h, :, :, c, h, :].reshape(6, 6)
    found = partial_traces(moment, shapes)[0][0]
    torch.testing.assert_close(found, expected / expected.diagonal().mean())


def test_padded_channels_are_whitened_too() -> None:
    structure = fam.sekron([(2, 2, 3, 1), (4, 4, 1, 3)], [3])
    weight = gaussian(1, 7, 7, 3, 3)
    metric = InputMetric(definite(63, seed=1), torch.zeros(1, 63).double(), definite(7, seed=2))
    refiner = Refiner(weight, metric)
    start = refiner.start(structure)
    assert bool(torch.isfinite(Whitening(structure, metric)(pad_channels(weight, structure))).all())
    plain = Refiner(weight, replace(metric, moment=torch.eye(63).double()[None], curvature=None)).start(structure)
    assert start.rel_error < refiner.error(structure, plain.factors)


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_roots_of_singular_moments(rank: int) -> None:
    factor = gaussian(1, 6, rank, seed=4) if rank else torch.zeros(1, 6, 1, dtype=torch.float64)
    moment = factor @ factor.mT + torch.eye(6).double() * (1.0 if rank == 0 else 0.0)
    root = square_root(moment)
    torch.testing.assert_close(root @ root.mT, moment, atol=1e-6, rtol=0)
    assert torch.equal(root, root.tril())


def test_single_precision_is_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large moments come in float32; the errors of fits are those of float64 ones."""
    weight, structure = gaussian(1, *SHAPE), PAIRS["Kronecker"]
    size = SHAPE[1] * 9
    metric = InputMetric(definite(size, seed=1), torch.zeros(1, size).double(), definite(SHAPE[0], seed=2))
    double = Refiner(weight, metric).fit(structure, steps=40)
    monkeypatch.setattr(module, "DOUBLE_UP_TO", 4)
    single = Refiner(weight, replace(metric, moment=metric.moment.float())).fit(structure, steps=40)
    assert single.rel_error == pytest.approx(double.rel_error, rel=1e-3)
