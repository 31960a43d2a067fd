"""How close a run came to the best: as facts of its report, and as its section."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sekron_search.errors import InfeasibleBudgetError
from sekron_search.report.document import Column, Picture, Section, Table
from sekron_search.search.budget import CostName, meets
from sekron_search.search.frontier import STEP, additive_front, marginal_gains
from sekron_search.search.knapsack import additive_error, additive_errors, gap
from sekron_search.search.options import Assignment, Network
from sekron_search.search.pareto import hypervolumes
from sekron_search.search.trial import Trial

#: How costs are called in sentences.
WORDS: dict[CostName, str] = {
    "flops": "flops",
    "params": "parameters",
    "latency_ms": "time",
    "peak_activation_bytes": "working set",
}


def optimality_facts(
    network: Network,
    bounds: Mapping[CostName, float],
    trials: Sequence[Trial],
    chosen: Assignment,
    divergence: float,
) -> dict[str, Any] | None:
    """The bound of the additive problem, the gap, the front, the hypervolume, and what more of each budget would buy.

    Args:
        network: Tables and original costs.
        bounds: Absolute bounds, in the tables' costs.
        trials: All of the search.
        chosen: The assignment that was chosen.
        divergence: Of its network, as measured.

    Returns:
        None if no assignment meets the bounds: the run missed them, and there is nothing to compare with.
    """
    errors = additive_errors(network)
    try:
        best, gains = marginal_gains(network, errors, bounds)
    except InfeasibleBudgetError:
        return None
    error = additive_error(errors, chosen)
    ratio = divergence / error if error > 0 else 0.0
    return {
        "error": error,
        "best_error": best.error,
        "lower_bound": best.lower_bound,
        "gap": gap(error, best.lower_bound),
        "within_bounds": meets(network.costs(chosen), bounds),
        "gains": [
            {
                "name": name,
                "step": STEP,
                "error": gain,
                "share": gain / best.error if best.error > 0 else 0.0,
                "divergence": gain * ratio,
            }
            for name, gain in gains.items()
        ],
        "front": [
            {
                "tightened": list(point.tightened),
                "level": point.level,
                "error": point.solution.error,
                "lower_bound": point.solution.lower_bound,
                "costs": dict(point.costs),
            }
            for point in additive_front(network, errors, list(bounds))
        ],
        "hypervolume": _hypervolume(network, list(bounds), trials),
    }


def _hypervolume(network: Network, names: Sequence[CostName], trials: Sequence[Trial]) -> dict[str, Any]:
    """The share of the box between nothing and the reference that the first one, two, ... trials dominate.

    Costs that no trial lowers are no sides of it.
    """
    whole = [t for t in trials if not t.pruned]
    names = [name for name in names if any(t.costs[name] < network.unchanged(name) for t in whole)]
    reference = {"divergence": max((t.divergence for t in whole), default=0.0)}
    reference |= {str(name): network.unchanged(name) for name in names}
    scale = [value or 1.0 for value in reference.values()]
    points = [[t.divergence, *(t.costs[name] for name in names)] for t in whole]
    relative = [[value / unit for value, unit in zip(point, scale, strict=True)] for point in points]
    shares = hypervolumes(relative, [1.0] * len(scale)).tolist()
    return {"reference": reference, "trials": [t.index for t in whole], "shares": shares}


def optimality_section(report: Mapping[str, Any]) -> Section:
    """How close the run came to the best, and what more of each budget would buy."""
    title, facts = "How close to the best", report["optimality"]
    if facts is None:
        return Section(
            title,
            ("No choice of structures meets the budget by the tables' costs, so there is no best to compare with.",),
        )
    text = (
        f"The search starts from an additive error: what each layer's error does to the network's outputs, added up. "
        f"No choice of the options fitted has one below {facts['lower_bound']:.6g} within the budget: that is "
        f"proven. The chosen network's is {facts['error']:.6g}, {facts['gap']:.2%} of it above that"
        + ("." if facts["within_bounds"] else "; by the tables its costs are not quite within the budget.")
        + " Trials measure divergences, which an additive error only comes near, and may well prefer a network that "
        "adds up to more."
    )
    picture = Picture("optimality", "How close to the best")
    return Section(title, (text, _gains(facts), *_millisecond(report), _volume(facts["hypervolume"]), picture))


def _gains(facts: Mapping[str, Any]) -> Table:
    rows = tuple(
        (gain["name"], f"{gain['error']:.3g} ({gain['share']:.2%})", f"{gain['divergence']:.3g}")
        for gain in facts["gains"]
    )
    columns = Column("1 % more of", "text"), Column("lowers the least additive error by")
    return Table((*columns, Column("and the divergence, in proportion, by")), rows)


def _millisecond(report: Mapping[str, Any]) -> tuple[str, ...]:
    """What a millisecond would buy at the rate of the first hundredth; nothing where time is not budgeted."""
    bounds = {budget["name"]: budget["bound"] for budget in report["budgets"]}
    gains = {gain["name"]: gain for gain in report["optimality"]["gains"]}
    if "latency_ms" not in gains:
        return ()
    gain = gains["latency_ms"]
    step_ms = gain["step"] * bounds["latency_ms"]
    # The rate holds near the budget only: of a budget of few milliseconds, a tenth or less of one.
    unit_ms = min(1.0, 10.0 ** math.floor(math.log10(bounds["latency_ms"] / 10)))
    amount = "One more millisecond" if unit_ms == 1.0 else f"{unit_ms:g} ms more"
    if gain["divergence"] == 0:
        return (f"{amount} of time would buy nothing at this rate: what binds is something else.",)
    lowered = min(gain["divergence"] * unit_ms / step_ms, report["divergence"])
    return (
        f"{amount} of time would, at this rate, lower the divergence by {lowered:.3g} of {report['divergence']:.3g}.",
    )


def _volume(facts: Mapping[str, Any]) -> str:
    if not facts["shares"]:
        return "No trial was measured to its end."
    reference = ", ".join(f"{name} {value:.4g}" for name, value in facts["reference"].items())
    half = facts["shares"][(len(facts["shares"]) - 1) // 2]
    return (
        f"Hypervolume: the trials dominate {facts['shares'][-1]:.2%} of the box from zero to the reference point "
        f"({reference}: the largest divergence of a trial, and the costs with no layer replaced); the first half of "
        f"them {half:.2%}."
    )
