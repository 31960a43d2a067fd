from __future__ import annotations

import pytest
import torch

from sekron_search.inspection import inspect_model
from sekron_search.kron import families as fam
from sekron_search.kron.projection import project, reconstruct_batch
from sekron_search.kron.steps import Schedule
from sekron_search.kron.structure import Structure
from sekron_search.model import LayerInfo, layer_weight
from sekron_search.search.options import LayerTable, Option
from sekron_search.tables import FittedLayer
from sekron_search.variants import with_variants
from tests.cases import small_net


def option(structure: Structure, **known: float) -> Option:
    return Option(str(structure), fam.family(structure), "0", "factored", 1, 1, 1, 0.1, 0.1, **known)


def fitted(structure: Structure) -> tuple[FittedLayer, LayerInfo]:
    model = small_net()
    info = inspect_model(model, torch.randn(2, 3, 8, 8)).layers[1]
    weight = layer_weight(model, info)
    table = LayerTable(info.name, (option(fam.dense(info.weight_shape)), option(structure)))
    return FittedLayer(table, ((), tuple(project(weight, structure).factors)), (None, torch.ones(1))), info


def test_variants_are_the_same_weight() -> None:
    structure = fam.cp((12, 12, 3, 3), 4)
    table, info = fitted(structure)
    found = with_variants(table, info, bytes_per_sample=4, schedules=2)
    assert found.table.options[0] == table.table.options[0]
    expected = reconstruct_batch(structure, table.factors[1])
    seen = set()
    for variant, factors in zip(found.table.options[1:], found.factors[1:], strict=True):
        own = Structure.parse(variant.structure)
        torch.testing.assert_close(reconstruct_batch(own, factors), expected, rtol=1e-5, atol=1e-6)
        Schedule.parse(variant.schedule)
        assert variant.error == 0.1
        assert variant.flops < 12 * 12 * 9 * 64
        seen.add(own.num_factors)
    assert seen == {2, 3, 4}


def test_without_a_clock_the_best_plan_alone_is_kept() -> None:
    structure = fam.spatial_svd((12, 12, 3, 3), 4)
    table, info = fitted(structure)
    assert len(with_variants(table, info, bytes_per_sample=4, schedules=1).table.options) == 2


@pytest.mark.parametrize(("latency", "noise", "stays"), [(0.8, 0.05, True), (0.95, 0.02, False), (1.2, 0.0, False)])
def test_options_have_to_be_faster_beyond_the_noise(latency: float, noise: float, stays: bool) -> None:
    dense = option(fam.dense((12, 12, 3, 3)), latency_ms=1.0, latency_noise_ms=0.04)
    other = option(fam.spatial_svd((12, 12, 3, 3), 4), latency_ms=latency, latency_noise_ms=noise)
    table = FittedLayer(LayerTable("conv", (dense, other)), ((), ()), (None, None))
    assert (len(table.faster().table.options) == 2) is stays
