from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from sekron_search.ranking import kendall, rank_correlation


def by_pairs(x: np.ndarray, y: np.ndarray) -> float:
    """Tau-b from its definition."""
    agreed = tied_x = tied_y = pairs = 0
    for i, j in combinations(range(len(x)), 2):
        a, b = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
        agreed, tied_x, tied_y, pairs = agreed + a * b, tied_x + (a == 0), tied_y + (b == 0), pairs + 1
    return float(agreed / np.sqrt((pairs - tied_x) * (pairs - tied_y)))


@pytest.mark.parametrize("seed", range(3))
def test_tau_is_the_share_of_pairs_that_agree(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 9, 20).astype(float)
    y = x + rng.integers(-3, 4, 20).astype(float)
    assert kendall(x, y) == pytest.approx(by_pairs(x, y))
    assert kendall(x, x**3) == pytest.approx(1)
    assert kendall(x, -x) == pytest.approx(-1)


def test_what_is_the_same_for_all_ranks_nothing() -> None:
    assert kendall([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == 0
    assert kendall([1.0], [2.0]) == 0


def test_groups_that_are_easily_told_apart_are_not_taken_for_skill() -> None:
    """Random within its group, but ranked right between the groups."""
    rng = np.random.default_rng(0)
    level = np.repeat([0.0, 10.0, 20.0], 12)
    x, y = level + rng.normal(size=36), level + rng.normal(size=36)
    found = rank_correlation(x, y, [str(group) for group in level])
    assert found.tau > 0.6
    assert list(found.within) == ["0.0", "10.0", "20.0"]
    assert abs(found.mean_within) < 0.25
    assert found.within["10.0"] == pytest.approx(by_pairs(x[12:24], y[12:24]))


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Tau of a normal pair of correlation r is 2 / pi asin(r)."""
    truth = 2 / np.pi * np.arcsin(0.8)
    covered = []
    for seed in range(20):
        x, noise = np.random.default_rng(seed).normal(size=(2, 40))
        found = rank_correlation(x, 0.8 * x + 0.6 * noise, ["all"] * 40)
        assert found.low < found.tau < found.high
        covered.append(found.low <= truth <= found.high)
    assert sum(covered) >= 17
    assert rank_correlation(x, noise, ["all"] * 40).low < 0 < rank_correlation(x, noise, ["all"] * 40).high


def test_resamples_are_the_same_for_a_seed() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 12))
    groups = ["a", "b"] * 6
    assert rank_correlation(x, y, groups) == rank_correlation(x, y, groups)
    assert rank_correlation(x, y, groups, seed=1) != rank_correlation(x, y, groups)
