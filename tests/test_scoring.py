from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sekron_search import scoring
from sekron_search.inspection import inspect_model
from sekron_search.kron.conv import KroneckerConv
from sekron_search.kron.families import depthwise_cp, family
from sekron_search.kron.projection import Fit, project
from sekron_search.kron.structure import Structure
from sekron_search.search.space import SearchSpace


def _weight() -> torch.Tensor:
    return torch.randn(1, 24, 16, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _pool(families: tuple[str, ...]) -> tuple[scoring.CandidateStructure, ...]:
    conv = nn.Conv2d(16, 24, 3, padding=1)
    [info] = inspect_model(nn.Sequential(conv), (torch.randn(2, 16, 8, 8),)).layers
    return scoring.candidates(info, SearchSpace(families=families, rank_levels=6))


def test_the_default_space_has_a_pointwise_a_depthwise_and_a_pointwise_convolution() -> None:
    pool = _pool(SearchSpace().families)
    own = [c for c in pool if family(c.structure) == "depthwise CP"]
    assert len(own) > 3
    ranks = [c.structure.rank_sizes["a"] for c in own]
    assert [c.cost.params for c in own] == [rank * (24 + 16 + 9) for rank in ranks]
    assert [c.cost.flops for c in own] == [rank * (24 + 16 + 9) * 64 for rank in ranks]


def test_depthwise_cp_runs_as_two_pointwise_convolutions_around_a_depthwise_one() -> None:
    conv = nn.Conv2d(16, 24, 3, padding=1)
    layer = KroneckerConv.from_conv(conv, depthwise_cp((24, 16, 3, 3), 10))
    out, kernel, into = (a[0] for a in layer.factors())
    x = torch.randn(2, 16, 8, 8)
    hidden = nn.functional.conv2d(x, into.reshape(10, 16, 1, 1))
    hidden = nn.functional.conv2d(hidden, kernel.reshape(10, 1, 3, 3), padding=1, groups=10)
    expected = nn.functional.conv2d(hidden, out.reshape(10, 24).T[:, :, None, None], conv.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_ranks_that_would_take_too_long_are_left_out_but_not_the_cheapest(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, weight = _pool(("depthwise_cp",)), _weight()
    every = scoring.scores(pool, weight, max_fits=64)
    assert np.isfinite(every).all()
    ranks = [c.structure.rank_sizes["a"] for c in pool]
    limit = sorted(ranks)[len(ranks) // 2]
    monkeypatch.setattr(scoring, "MOST_PRODUCTS", weight.numel() * limit)
    some = scoring.scores(pool, weight, max_fits=64)
    assert [np.isfinite(e) for e in some] == [rank <= limit for rank in ranks]
    monkeypatch.setattr(scoring, "MOST_PRODUCTS", 0)
    least = scoring.scores(pool, weight, max_fits=64)
    assert [np.isfinite(e) for e in least] == [rank == min(ranks) for rank in ranks]


def test_dear_fits_are_scored_by_fewer_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, weight = _pool(("depthwise_cp",)), _weight()
    seen: dict[Structure, int] = {}

    def noted(weight: torch.Tensor, structure: Structure, *, sweeps: int) -> Fit:
        seen[structure] = sweeps
        return project(weight, structure, sweeps=sweeps)

    monkeypatch.setattr(scoring, "project", noted)
    ranks = {c.structure: c.structure.rank_sizes["a"] for c in pool}
    limit = sorted(ranks.values())[len(ranks) // 2]
    monkeypatch.setattr(scoring, "DEAR_PRODUCTS", weight.numel() * limit)
    scoring.scores(pool, weight, max_fits=64)
    few, many = scoring.DEAR_SCORING_SWEEPS, scoring.SCORING_SWEEPS
    assert seen == {structure: many if rank <= limit else few for structure, rank in ranks.items()}
