from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sekron_search.calibration import collect_metrics
from sekron_search.curvature import output_curvature
from sekron_search.inspection import inspect_model
from sekron_search.model import layer_weight
from sekron_search.search.space import SearchSpace
from sekron_search.tables import FittedLayer, build_layer_table, load_table, save_table
from tests.cases import blobs, small_net

SPACE = SearchSpace(families=("sekron",), max_factors=2, rank_levels=2, max_options=3)


def tables(*, curvature: bool) -> dict[str, FittedLayer]:
    model, (images, _) = small_net(), blobs(64).tensors
    layers = inspect_model(model, images).layers
    batches = [(images,)]
    weights = output_curvature(model, layers, batches, classes=True) if curvature else None
    metrics = collect_metrics(model, layers, batches, curvature=weights)
    return {
        i.name: build_layer_table(i, layer_weight(model, i), metrics[i.name], SPACE, bytes_per_sample=4, steps=2)
        for i in layers
    }


def test_layers_count_alike_without_curvature_and_survive_the_cache(tmp_path: Path) -> None:
    plain, weighted = tables(curvature=False), tables(curvature=True)
    assert {t.table.sensitivity for t in plain.values()} == {None}
    found = [float(t.table.sensitivity or 0.0) for t in weighted.values()]
    assert len(set(found)) == len(found)
    assert min(found) > 0
    for name, table in weighted.items():
        save_table(tmp_path, name, table)
        loaded = load_table(tmp_path, name, name)
        assert loaded is not None
        assert replace(loaded.table, outside_bytes=0) == table.table


def test_sensitivity_is_the_root_of_what_vanishing_would_cost() -> None:
    """A linear network: the divergence without its last layer, to second order, from the definition."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False)).eval()
    x = torch.randn(1024, 6, generator=torch.Generator().manual_seed(0))
    layers = inspect_model(model, x).layers
    curvature = output_curvature(model, layers, [(x,)], classes=False)
    metric = collect_metrics(model, layers, [(x,)], curvature=curvature)["0"]
    table = build_layer_table(layers[0], layer_weight(model, layers[0]), metric, SPACE, bytes_per_sample=4, steps=1)
    with torch.no_grad():
        expected = float(model(x).square().sum(1).mean())
    # The curvature is the identity here, and a little is added to it.
    assert float(table.table.sensitivity or 0.0) ** 2 == pytest.approx(1.1 * expected, rel=0.05)
