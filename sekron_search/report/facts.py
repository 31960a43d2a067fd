"""The facts of a finished run as one record, `report.json`: verdict, budgets, front, layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sekron_search.model import Inspection
from sekron_search.search.budget import Budget, CostName
from sekron_search.search.options import LayerTable, Network, Option
from sekron_search.search.study import Trial, pareto_trials

FORMAT = 1


def build_report(
    *,
    network: Network,
    inspection: Inspection,
    bounds: Mapping[CostName, float],
    budget: Budget,
    trials: Sequence[Trial],
    best: Mapping[str, Any],
    costs: Mapping[str, Mapping[str, float]],
    metrics: Mapping[str, float | None],
    batch: int,
    metric_name: str,
    divergence_name: str,
    uncounted: Mapping[str, int],
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything the report says, as plain data.

    Args:
        network: Tables and original costs.
        inspection: Of the original network.
        bounds, budget: Absolute bounds, and the budget as it was asked for.
        trials: All trials of the search.
        best: Record of the chosen candidate.
        costs: Of "original" and "compressed", measured on the saved and re-loaded network.
        metrics: Of "original", "compressed" and "untrained".
        batch: Samples of the example batch.
        metric_name, divergence_name: As configured.
        uncounted: Operators that fvcore does not count.
        environment: Of the run.
    """
    assignment = tuple(best["assignment"])
    front = pareto_trials(trials, budget.names)
    asked = dict(budget.items())
    return {
        "format": FORMAT,
        "original": {**costs["original"], "metric": metrics["original"]},
        "compressed": {**costs["compressed"], "metric": metrics["compressed"]},
        "metric_without_training": metrics["untrained"],
        "metric_name": metric_name,
        "divergence_name": divergence_name,
        "divergence": best["divergence"],
        "validation_metric": best["validation_metric"],
        "batch_size": batch,
        "budgets": [
            {
                "name": name,
                "asked": str(asked[name]),
                "bound": bound,
                "value": costs["compressed"][name],
                "met": bool(costs["compressed"][name] <= bound),
            }
            for name, bound in bounds.items()
        ],
        "front": [_candidate(trial, network, chosen=trial.assignment == assignment) for trial in front],
        "num_trials": len(trials),
        "num_distinct_networks": len({t.assignment for t in trials}),
        "trials": [{"divergence": t.divergence, **t.costs, "feasible": t.feasible, "source": t.source} for t in trials],
        "curve": best["curve"],
        "layers": [
            _layer(table, index, list(budget.names)) for table, index in zip(network.tables, assignment, strict=True)
        ],
        "left_alone": [{"name": s.name, "type": s.type, "reason": s.reason} for s in inspection.skipped],
        "uncounted_operators": dict(uncounted),
        "environment": dict(environment),
    }


def _candidate(trial: Trial, network: Network, *, chosen: bool) -> dict[str, Any]:
    return {
        "trial": trial.index,
        "objectives": {"divergence": trial.divergence, **trial.costs},
        "feasible": trial.feasible,
        "source": trial.source,
        "chosen": chosen,
        "structures": {
            table.name: option.structure
            for table, option in zip(network.tables, network.chosen(trial.assignment), strict=True)
        },
    }


def _layer(table: LayerTable, index: int, budgeted: Sequence[CostName]) -> dict[str, Any]:
    option, original = table.options[index], table.options[0]
    runner_up = _runner_up(table, index)
    return {
        "name": table.name,
        "structure": option.structure,
        "family": option.family,
        "order": list(option.order),
        "execution": option.execution,
        "before": _costs(original),
        "after": _costs(option),
        "error": option.error,
        "weight_error": option.weight_error,
        "num_options": len(table.options),
        "runner_up": None if runner_up is None else {"structure": runner_up.structure, **_facts(runner_up)},
        "reason": _reason(table, index, budgeted),
    }


def _costs(option: Option) -> dict[str, float | None]:
    return {
        "flops": option.flops,
        "params": option.params,
        "latency_ms": option.latency_ms,
        "peak_activation_bytes": option.peak_bytes,
    }


def _facts(option: Option) -> dict[str, Any]:
    return {**_costs(option), "error": option.error}


def _runner_up(table: LayerTable, index: int) -> Option | None:
    """The option nearest in flops to the chosen one."""
    chosen = table.options[index]
    others = [o for i, o in enumerate(table.options) if i != index]
    return min(others, key=lambda o: (abs(o.flops - chosen.flops), o.error), default=None)


def _reason(table: LayerTable, index: int, budgeted: Sequence[CostName]) -> str:
    chosen, original = table.options[index], table.options[0]
    costs = " and ".join(budgeted)

    def share(flops: int) -> float:
        return flops / original.flops

    if len(table.options) == 1:
        return "left as it is: no structure of the search space is cheaper than the dense layer"
    dearer = [o for o in table.options if o.flops > chosen.flops and o.error < chosen.error]
    cheaper = [o for o in table.options if o.flops < chosen.flops]
    if chosen.is_original:
        gentle = min(table.options[1:], key=lambda o: o.error)
        saved = 1 - gentle.flops / original.flops
        return (
            f"left as it is: the budget is better met elsewhere; its gentlest option saves {saved:.0%} of its flops "
            f"at an output error of {gentle.error:.3f}"
        )
    parts = [
        f"{chosen.family}, {share(chosen.flops):.0%} of the layer's flops at an output error of {chosen.error:.3f}"
    ]
    if dearer:
        next_up = min(dearer, key=lambda o: o.flops)
        parts.append(
            f"{share(next_up.flops - chosen.flops):.1%} more of its flops would lower that to {next_up.error:.3f}"
        )
    if cheaper:
        next_down = max(cheaper, key=lambda o: o.flops)
        parts.append(f"{share(chosen.flops - next_down.flops):.1%} fewer would raise it to {next_down.error:.3f}")
    return "; ".join(parts) + f"; the search weighed this against all other layers under the budget of {costs}"
