from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sekron_search import scoring
from sekron_search.inspection import inspect_model
from sekron_search.kron.conv import KroneckerConv
from sekron_search.kron.families import depthwise_cp, family
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
    out, into, kernel = (a[0] for a in layer.factors())
    x = torch.randn(2, 16, 8, 8)
    hidden = nn.functional.conv2d(x, into.reshape(10, 16, 1, 1))
    hidden = nn.functional.conv2d(hidden, kernel.reshape(10, 1, 3, 3), padding=1, groups=10)
    expected = nn.functional.conv2d(hidden, out.reshape(10, 24).T[:, :, None, None], conv.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_every_rank_of_depthwise_cp_is_refined_unscored() -> None:
    pool, weight = _pool(SearchSpace().families), _weight()
    errors = scoring.scores(pool, weight, max_fits=64)
    own = [i for i, c in enumerate(pool) if family(c.structure) == "depthwise CP"]
    assert [i for i, error in enumerate(errors) if np.isnan(error)] == own
    assert set(own) <= set(scoring.shortlist(pool, errors, most=64))


def test_ranks_that_would_take_too_long_are_left_out_but_not_the_cheapest(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, weight = _pool(("depthwise_cp",)), _weight()
    assert scoring.shortlist(pool, scoring.scores(pool, weight, max_fits=64), most=64) == list(range(len(pool)))
    ranks = [c.structure.rank_sizes["a"] for c in pool]
    limit = sorted(ranks)[len(ranks) // 2]
    monkeypatch.setattr(scoring, "MOST_PRODUCTS", weight.numel() * limit)
    some = scoring.scores(pool, weight, max_fits=64)
    assert [np.isinf(e) for e in some] == [rank > limit for rank in ranks]
    monkeypatch.setattr(scoring, "MOST_PRODUCTS", 0)
    least = scoring.scores(pool, weight, max_fits=64)
    assert [np.isinf(e) for e in least] == [rank > min(ranks) for rank in ranks]
    chosen = scoring.shortlist(pool, least, most=64)
    assert [ranks[i] for i in chosen] == [min(ranks)]


def test_rank_graphs_do_not_compete_and_the_largest_gives_up_options() -> None:
    pool, weight = _pool(SearchSpace().families), _weight()
    errors = scoring.scores(pool, weight, max_fits=64)
    together = set(scoring.shortlist(pool, errors, most=1000))
    graphs = {c.structure.carries for c in pool}
    assert len(graphs) == 3
    sizes = {}
    for graph in graphs:
        own = [i for i, c in enumerate(pool) if c.structure.carries == graph]
        chosen = scoring.shortlist([pool[i] for i in own], [errors[i] for i in own], most=1000)
        cheapest = scoring._cheapest([pool[i] for i in own])
        assert {own[j] for j in chosen if j not in cheapest} <= together
        sizes[graph] = len([i for i in together if pool[i].structure.carries == graph])
    few = scoring.shortlist(pool, errors, most=3 * min(sizes.values()))
    kept = {graph: len([i for i in few if pool[i].structure.carries == graph]) for graph in graphs}
    assert all(count >= min(sizes.values()) for count in kept.values())
    assert 3 * min(sizes.values()) <= sum(kept.values()) <= 3 * min(sizes.values()) + 3


@pytest.mark.parametrize("most", [1, 2, 3, 4, 8, 10, 20])
def test_short_shortlists_reach_from_the_cheapest_to_the_dearest(most: int) -> None:
    pool, weight = _pool(SearchSpace().families), _weight()
    errors = scoring.scores(pool, weight, max_fits=64)
    every, few = (scoring.shortlist(pool, errors, number) for number in (1000, most))
    assert most <= len(few) <= most + 3
    flops = [pool[i].cost.flops for i in few]
    assert min(flops) == min(c.cost.flops for c in pool)
    if most > 1:
        assert max(flops) > 0.8 * max(pool[i].cost.flops for i in every)


def test_no_fit_takes_minutes_whatever_the_family(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, weight = _pool(("depthwise_cp", "kronecker_cp")), _weight()
    monkeypatch.setattr(scoring, "MOST_PRODUCTS", weight.numel() * 5)
    errors = scoring.scores(pool, weight, max_fits=64)
    least = min(c.cost.flops for c in pool), min(c.cost.params for c in pool)
    for candidate, error in zip(pool, errors, strict=True):
        if candidate.structure.num_factors > 2 and np.isfinite(error):
            cheapest = candidate.cost.flops == least[0] or candidate.cost.params == least[1]
            assert cheapest or candidate.structure.rank_sizes["a"] <= 5


def test_names_of_rank_indices_make_no_rank_graph() -> None:
    pool = _pool(("depthwise_cp",))
    renamed = [
        scoring.CandidateStructure(
            Structure.build(c.structure.shapes, [("r",)] * 3, {"r": c.structure.rank_sizes["a"]}), c.cost
        )
        for c in pool
    ]
    both = [*pool, *renamed]
    assert len(scoring._ladders(both, range(len(both)))) == len(both)
    assert len({c.structure.graph for c in both}) == 1
