"""What the report says about optimality, candidates and layers."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from sekron_search.costs.predict import Hyperparameters, Validation
from sekron_search.costs.profile import DeviceProfile, Fitted
from sekron_search.report.facts import _candidate, _layer
from sekron_search.report.latency import profile_facts
from sekron_search.report.layers import runner_up_of
from sekron_search.report.optimality import optimality_facts, optimality_section
from sekron_search.search.budget import CostName
from sekron_search.search.knapsack import additive_errors
from sekron_search.search.trial import Trial
from tests.pages import SAMPLE
from tests.search.test_search import BOUNDS, NETWORK


def trial(index: int, assignment: tuple[int, ...], divergence: float, *, pruned: bool = False) -> Trial:
    costs = {str(n): float(v) for n, v in NETWORK.costs(assignment).items()}
    return Trial(index, assignment, divergence, costs, True, "search", pruned=pruned)


def facts(chosen: tuple[int, ...] = (1, 2, 1), **changed: Any) -> dict[str, Any]:
    trials = [trial(0, (1, 2, 1), 0.2), trial(1, (3, 3, 3), 0.5), trial(2, (3, 3, 2), 9.0, pruned=True)]
    found = optimality_facts(NETWORK, changed.get("bounds", BOUNDS), trials, chosen, 0.3)
    assert found is not None
    return found


def test_the_gap_is_that_to_the_proven_bound() -> None:
    errors = additive_errors(NETWORK)
    fitting = [
        a for a in itertools.product(range(4), repeat=3) if all(NETWORK.cost(a, n) <= b for n, b in BOUNDS.items())
    ]
    best = min(sum(float(e[i]) for e, i in zip(errors, a, strict=True)) for a in fitting)
    for chosen in fitting[::8]:
        found = facts(chosen)
        own = sum(float(e[i]) for e, i in zip(errors, chosen, strict=True))
        assert found["error"] == pytest.approx(own)
        assert found["best_error"] == pytest.approx(best)
        assert found["lower_bound"] <= best * (1 + 1e-12)
        assert found["gap"] == pytest.approx(1 - best / own, abs=1e-4)
        assert found["within_bounds"]
    assert not facts((0, 0, 0))["within_bounds"]


def test_gains_are_in_the_divergence_of_the_chosen_network() -> None:
    found = facts()
    for gain in found["gains"]:
        assert gain["divergence"] == pytest.approx(gain["error"] * 0.3 / found["error"])
        assert gain["step"] == 0.01
    assert [gain["name"] for gain in found["gains"]] == list(BOUNDS)


def test_hypervolume_counts_trials_that_were_measured_to_the_end() -> None:
    found = facts()["hypervolume"]
    assert found["trials"] == [0, 1]
    assert found["reference"]["divergence"] == 0.5
    flops, params = (NETWORK.cost((1, 2, 1), n) / NETWORK.original[n] for n in ("flops", "params"))
    assert found["shares"] == pytest.approx([0.6 * (1 - flops) * (1 - params)] * 2)


def written(found: dict[str, Any] | None, **changed: Any) -> str:
    budgets = [{"name": name, "bound": bound} for name, bound in changed.get("bounds", BOUNDS).items()]
    return optimality_section({"optimality": found, "budgets": budgets, "divergence": 0.3}).markdown()


def test_hypervolume_leaves_out_costs_that_no_trial_lowers() -> None:
    peak: dict[CostName, float] = {"peak_activation_bytes": NETWORK.unchanged("peak_activation_bytes")}
    trials = [trial(0, (1, 2, 1), 0.2), trial(1, (3, 3, 3), 0.5)]
    trials = [replace(t, costs={**t.costs, **{str(name): value for name, value in peak.items()}}) for t in trials]
    volumes = []
    for bounds in (BOUNDS, BOUNDS | peak):
        found = optimality_facts(NETWORK, bounds, trials, (1, 2, 1), 0.3)
        assert found is not None
        volumes.append(found["hypervolume"])
    assert volumes[0] == volumes[1]
    assert volumes[0]["shares"][-1] > 0


def test_the_section_says_what_was_proven_and_what_cannot_be_compared() -> None:
    text = written(facts())
    assert "that is proven" in text
    assert "| flops |" in text
    assert "plots/optimality.png" in text
    assert "millisecond" not in text
    assert optimality_facts(NETWORK, {"flops": 1.0}, [], (3, 3, 3), 0.1) is None
    assert "nothing" not in text
    assert "no best to compare with" in written(None)
    empty = optimality_facts(NETWORK, BOUNDS, [], (1, 2, 1), 0.1)
    assert "No trial was measured" in written(empty)


@pytest.mark.parametrize(
    ("bound_ms", "gain", "says"),
    [
        (20.0, 0.001, "One more millisecond of time would, at this rate, lower the divergence by 0.005 of 0.3"),
        (2.0, 0.001, "0.1 ms more of time would, at this rate, lower the divergence by 0.005 of 0.3"),
        (20.0, 0.2, "lower the divergence by 0.3 of 0.3"),  # never by more than there is
        (20.0, 0.0, "One more millisecond of time would buy nothing"),
    ],
)
def test_what_time_would_buy(bound_ms: float, gain: float, says: str) -> None:
    gains = [{"name": "latency_ms", "step": 0.01, "error": gain, "share": gain, "divergence": gain}]
    assert says in written({**facts(), "gains": gains}, bounds={"latency_ms": bound_ms})


@pytest.mark.parametrize(("budgeted", "word"), [("latency_ms", "time"), ("params", "parameters"), ("flops", "flops")])
def test_layers_are_explained_in_the_costs_that_were_budgeted(budgeted: CostName, word: str) -> None:
    table = NETWORK.tables[0]
    reason = _layer(table, 1, [budgeted])["reason"]
    assert f"of the layer's {word}" in reason
    assert f"more of its {word}" in reason
    others = {"time", "parameters", "flops"} - {word}
    assert not any(f"layer's {other}" in reason for other in others)
    assert f"of its {word}" in _layer(table, 0, [budgeted])["reason"]


def test_what_less_would_cost_is_an_error_that_is_higher() -> None:
    """Of several costs, an option may be cheaper in their mean and better."""
    options = [replace(NETWORK.tables[0].options[0], flops=1000, params=1000, error=0.0)]
    for flops, params, error in ((600, 300, 0.2), (200, 600, 0.1), (100, 100, 0.5)):
        options.append(replace(NETWORK.tables[0].options[1], flops=flops, params=params, error=error))
    reason = _layer(replace(NETWORK.tables[0], options=tuple(options)), 1, ["flops", "params"])["reason"]
    assert "35.0% less would raise it to 0.500" in reason


def test_shares_of_several_costs_are_said_to_be_a_mean() -> None:
    table = NETWORK.tables[0]
    three: list[CostName] = ["flops", "params", "latency_ms"]
    assert (
        "more (the mean over its flops, parameters and time) would lower that to" in _layer(table, 1, three)["reason"]
    )
    assert "(the mean over its flops and time) at an output" in _layer(table, 0, ["flops", "latency_ms"])["reason"]


def test_what_is_rebuilt_at_load_is_said_of_every_network() -> None:
    options = list(NETWORK.tables[1].options)
    options[2] = replace(options[2], execution="dense")
    first, second, third = NETWORK.tables
    network = replace(NETWORK, tables=(first, replace(second, options=tuple(options)), third))
    assert _candidate(trial(0, (1, 2, 2), 0.1), network, chosen=False)["rebuilt"] == ["layer1"]
    assert _candidate(trial(0, (2, 1, 2), 0.1), network, chosen=False)["rebuilt"] == []
    layer = _layer(network.tables[1], 1, ["flops"])
    assert runner_up_of(layer) == "70x1x1x1, rebuilt at load"
    assert runner_up_of(_layer(network.tables[1], 3, ["flops"])) == "70x1x1x1, rebuilt at load"
    assert runner_up_of(_layer(network.tables[1], 0, ["flops"])) == "120x1x1x1"


def test_a_profile_is_summed_up() -> None:
    profile = DeviceProfile.load(SAMPLE.with_name("profile.yaml"))
    found = profile_facts(profile)
    noises = sorted(latency.noise_ms / latency.median_ms for latency in profile.layers.values())
    assert (found["options"], found["operations"], found["errors"]) == (len(noises), 0, None)
    assert found["rel_noise"] == pytest.approx((noises[len(noises) // 2] + noises[(len(noises) - 1) // 2]) / 2)
    error = Validation(0.05, 0.06, 0.2, 0.99, 900)
    profile.fitted = Fitted(1, 0.0, Hyperparameters({}, {}), {"all": error, "pointwise": replace(error, median=1.0)})
    assert profile_facts(profile)["errors"]["median"] == 0.05
    assert profile_facts(replace(profile, layers={}))["rel_noise"] is None


def test_the_runner_up_is_nearest_in_the_budgeted_cost() -> None:
    table = NETWORK.tables[0]
    options = list(table.options)
    options[3] = replace(options[3], latency_ms=5.9)
    table = replace(table, options=tuple(options))
    assert _layer(table, 1, ["latency_ms"])["runner_up"]["structure"] == options[3].structure
    assert _layer(table, 1, ["flops"])["runner_up"]["structure"] == options[2].structure
