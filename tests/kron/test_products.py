from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sekron_search.kron import families as fam
from sekron_search.kron import refine
from sekron_search.kron.metric import InputMetric
from sekron_search.kron.products import MetricProduct
from sekron_search.kron.projection import Fit, project, reconstruct_batch
from sekron_search.kron.structure import Structure

SHAPE = (8, 6, 3, 3)

STRUCTURES = [
    fam.channel_svd(SHAPE, 2),
    fam.spatial_svd(SHAPE, 3),
    fam.tucker2(SHAPE, (3, 2)),
    fam.cp(SHAPE, 4),
    Structure.parse("2x3x1x3[a] * 4x2x3x1[a]; a=5"),
    Structure.parse("2x1x3x1[a] * 2x3x1x1[a,b] * 2x2x1x3[b]; a=2, b=3"),
]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def metric_of(groups: int, *, curvature: bool) -> InputMetric:
    f, unknowns = SHAPE[0], 6 * 9
    x, g = gaussian(groups, 100, unknowns, seed=1), gaussian(groups, 20, f, seed=2)
    metric = InputMetric(x.mT @ x / 100, gaussian(groups, unknowns, seed=3))
    return replace(metric, curvature=g.mT @ g / 20) if curvature else metric


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("curvature", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_product_is_that_of_the_rebuilt_weight(structure: Structure, curvature: bool, groups: int) -> None:
    metric = metric_of(groups, curvature=curvature)
    factors = [gaussian(groups, *shape, seed=5 + k) for k, shape in enumerate(structure.factor_shapes)]
    expected = metric.weighted(reconstruct_batch(structure, factors))
    assert torch.allclose(MetricProduct(metric)(structure, factors), expected, rtol=1e-10, atol=1e-10)


def test_structures_of_all_layouts_share_one_product() -> None:
    """The copy of the moment that is kept for the last structure serves no other layout."""
    metric = metric_of(1, curvature=True)
    product = MetricProduct(metric)
    for structure in [*STRUCTURES, *STRUCTURES[::-1]]:
        factors = [gaussian(1, *shape, seed=5 + k) for k, shape in enumerate(structure.factor_shapes)]
        expected = metric.weighted(reconstruct_batch(structure, factors))
        assert torch.allclose(product(structure, factors), expected, rtol=1e-10, atol=1e-10), structure


def test_small_ranks_cost_less_than_the_weight() -> None:
    f, c = 64, 64
    product = MetricProduct(InputMetric(torch.zeros(1, c * 9, c * 9), torch.zeros(1, c * 9)))
    costs = [product.cost(fam.spatial_svd((f, c, 3, 3), rank)) for rank in (2, 16)]
    assert costs[0] < costs[1] < 2 * f * (c * 9) ** 2


@pytest.mark.parametrize("structure", STRUCTURES[1:], ids=str)
def test_fits_of_large_layers_are_those_of_small_ones(structure: Structure, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of large layers on a small one: the same error, which is that of the factors that come back."""
    weight, metric = gaussian(1, *SHAPE, seed=4), metric_of(1, curvature=True)
    small = refine.Refiner(weight, metric).fit(structure, steps=40)
    monkeypatch.setattr(refine, "DOUBLE_UP_TO", 16)
    monkeypatch.setattr(refine, "CHEAP_PRODUCTS", 0)
    large = refine.Refiner(weight, metric).fit(structure, steps=40)
    assert large.rel_error == pytest.approx(metric.rel_error(weight, reconstruct_batch(structure, large.factors)), 1e-4)
    assert large.rel_error == pytest.approx(small.rel_error, rel=0.02)


def test_the_largest_layers_get_the_first_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, metric, structure = gaussian(1, *SHAPE, seed=4), metric_of(1, curvature=False), STRUCTURES[4]
    monkeypatch.setattr(refine, "DOUBLE_UP_TO", 16)
    monkeypatch.setattr(refine, "CHEAP_PRODUCTS", 0)
    long = refine.Refiner(weight, metric).fit(structure, steps=40).rel_error
    monkeypatch.setattr(refine, "PRODUCTS", 0.0)
    short = refine.Refiner(weight, metric)
    error = short.fit(structure, steps=40).rel_error
    assert long < error < short.start(structure).rel_error


def test_ranks_beyond_a_mode_are_fitted_where_evaluations_are_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns beyond a basis are none: such structures, which hold any weight, lose nothing."""
    structure = fam.tucker2(SHAPE, (SHAPE[0] + 3, SHAPE[1] + 2))
    monkeypatch.setattr(refine, "CHEAP_PRODUCTS", 0)
    found = refine.Refiner(gaussian(1, *SHAPE, seed=4), metric_of(1, curvature=True)).fit(structure, steps=10)
    assert found.rel_error < 1e-3


def test_cp_of_many_terms_is_fitted_where_evaluations_are_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """From its one start there, too, terms beyond the rows of the first factor are of use."""
    shape = (8, 16, 3, 3)
    weight, inputs = gaussian(1, *shape, seed=4), gaussian(1, 400, 16 * 9, seed=1)
    metric = InputMetric(inputs.mT @ inputs / 400, torch.zeros(1, 16 * 9))
    monkeypatch.setattr(refine, "CHEAP_PRODUCTS", 0)
    refiner = refine.Refiner(weight, metric)
    errors = [refiner.fit(fam.depthwise_cp(shape, rank), steps=0).rel_error for rank in (8, 10, 16)]
    assert errors[2] < 0.85 * errors[1] < 0.85 * 0.98 * errors[0]


@pytest.mark.parametrize("dear", [False, True])
def test_sweeps_are_as_many_and_numbers_as_long_as_a_layer_can_afford(
    dear: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, metric = gaussian(1, *SHAPE, seed=4), metric_of(1, curvature=False)
    seen: list[tuple[int, torch.dtype]] = []

    def noted(weight: Tensor, structure: Structure, *, sweeps: int, dtype: torch.dtype) -> Fit:
        seen.append((sweeps, dtype))
        return project(weight, structure, sweeps=1)

    monkeypatch.setattr(refine, "project", noted)
    monkeypatch.setattr(refine, "CHEAP_PRODUCTS", 0 if dear else 10**12)
    monkeypatch.setattr(refine, "SWEEP_PRODUCTS", weight.numel() * 6 * 50)
    for structure in (fam.cp(SHAPE, 6), fam.cp(SHAPE, 1), fam.cp(SHAPE, 60), fam.tensor_train(SHAPE, [6, 6, 3])):
        refine.Refiner(weight, metric).start(structure)
    single = torch.float32 if dear else torch.float64
    assert seen == [(50, single), (refine.MOST_SWEEPS, single), (refine.LEAST_SWEEPS, single), (50, torch.float64)]


def test_dear_fits_bear_more_terms_than_the_weight_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (16, 16, 3, 3)
    weight, inputs = gaussian(1, *shape, seed=4), gaussian(1, 400, 16 * 9, seed=1)
    weight[:, 4:] = 0
    metric = InputMetric(inputs.mT @ inputs / 400, torch.zeros(1, 16 * 9))
    monkeypatch.setattr(refine, "CHEAP_PRODUCTS", 0)
    assert refine.Refiner(weight, metric).fit(fam.depthwise_cp(shape, 60), steps=40).rel_error < 1e-2


def test_a_refinement_takes_all_the_steps_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only options of tables have few steps at large layers; a layer of a chosen network is worth them all."""
    weight, metric, structure = gaussian(1, *SHAPE, seed=4), metric_of(1, curvature=True), STRUCTURES[4]
    start = project(weight, structure)
    free = refine.refine(structure, start, weight, metric, steps=30).rel_error
    monkeypatch.setattr(refine, "CHEAP_PRODUCTS", 0)
    monkeypatch.setattr(refine, "PRODUCTS", 0.0)
    assert refine.refine(structure, start, weight, metric, steps=30).rel_error == free
