"""The facts of a finished run as one record, `report.json`: verdict, budgets, front, layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sekron_search.candidate import Candidate, Finished
from sekron_search.catalog import REPORT_FORMAT
from sekron_search.config import Config, Settings
from sekron_search.inspection import Inspection
from sekron_search.report.optimality import WORDS, optimality_facts
from sekron_search.search.budget import CostName, meets
from sekron_search.search.options import LayerTable, Network, Option
from sekron_search.search.trial import Trial, pareto_trials


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a finished run knows.

    Args:
        settings: What was asked for; a `Config` where network and data are among it.
        inspection: Of the original network.
        network: Tables and original costs.
        latency: How latency was measured, and how well sums over layers predict it; None where it was not budgeted.
        trials: All trials of the search.
        candidates: The candidates that were fitted and measured, by the name of their folder.
        chosen: The candidate that was saved, its curve and its validation metric.
        learning_rate: Of fine-tuning, and the trials that led to it, where it was found.
        costs: Of "original" and "compressed", measured on the saved and re-loaded network.
        metrics: Of "original", "compressed" and "untrained"; "samples" are those that it is a share of, if it is one.
        batch_size: Samples of the example batch.
        uncounted: Operators of the compressed network that fvcore does not count, and how often they run.
        environment: What it ran on.
    """

    settings: Settings
    inspection: Inspection
    network: Network
    latency: Mapping[str, Any] | None
    trials: Sequence[Trial]
    candidates: Mapping[str, Candidate]
    chosen: Finished
    learning_rate: Mapping[str, Any] | None
    costs: Mapping[str, Mapping[str, float]]
    metrics: Mapping[str, float | None]
    batch_size: int
    uncounted: Mapping[str, int]
    environment: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Everything the report says, as plain data."""
        candidate, budget = self.chosen.candidate, self.settings.bounds
        front = pareto_trials(self.trials, budget.names)
        return {
            "format": REPORT_FORMAT,
            "original": {**self.costs["original"], "metric": self.metrics["original"]},
            "compressed": {**self.costs["compressed"], "metric": self.metrics["compressed"]},
            "metric_without_training": self.metrics["untrained"],
            "metric_name": self.settings.metric_name,
            "metric_samples": self.metrics["samples"],
            "from_config": isinstance(self.settings, Config),
            "divergence_name": self.settings.search.divergence,
            "divergence": candidate.divergence,
            "validation_metric": self.chosen.metric,
            "batch_size": self.batch_size,
            "budgets": self._budgets(),
            "latency": None if self.latency is None else dict(self.latency),
            "front": [_candidate(t, self.network, chosen=t.assignment == candidate.assignment) for t in front],
            "num_trials": len(self.trials),
            "num_distinct_networks": len({t.assignment for t in self.trials}),
            "trials": [
                {
                    "divergence": t.divergence,
                    **t.costs,
                    "feasible": t.feasible,
                    "source": t.source,
                    "pruned": t.pruned,
                }
                for t in self.trials
            ],
            "candidates": [
                {
                    "folder": name,
                    "trial": found.trial,
                    "divergence": found.divergence,
                    "divergence_before_sequential_fit": found.divergence_before_sequential_fit,
                    "costs": {cost: found.costs[cost] for cost in budget.names},
                    "metric": found.metric,
                    "chosen": found.assignment == candidate.assignment,
                }
                for name, found in self.candidates.items()
            ],
            "optimality": optimality_facts(
                self.network,
                budget.resolve(self.network.original),
                self.trials,
                candidate.assignment,
                candidate.divergence,
            ),
            "curve": self.chosen.curve,
            "as_fitted": self.chosen.as_fitted,
            "training": None if self.chosen.as_fitted else dict(self.chosen.training),
            "learning_rate": None if self.learning_rate is None else dict(self.learning_rate),
            "layers": [
                _layer(table, index, list(budget.names))
                for table, index in zip(self.network.tables, candidate.assignment, strict=True)
            ],
            "left_alone": [{"name": s.name, "type": s.type, "reason": s.reason} for s in self.inspection.skipped],
            "uncounted_operators": dict(self.uncounted),
            "environment": dict(self.environment),
        }

    def _budgets(self) -> list[dict[str, Any]]:
        values, bounds = self.costs["compressed"], self.settings.bounds.resolve(self.costs["original"])
        return [
            {
                "name": name,
                "asked": str(asked),
                "bound": bounds[name],
                "value": values[name],
                "met": meets(values, {name: bounds[name]}),
            }
            for name, asked in self.settings.bounds.items()
        ]


def _candidate(trial: Trial, network: Network, *, chosen: bool) -> dict[str, Any]:
    options = {t.name: o for t, o in zip(network.tables, network.chosen(trial.assignment), strict=True)}
    return {
        "trial": trial.index,
        "objectives": {"divergence": trial.divergence, **trial.costs},
        "feasible": trial.feasible,
        "source": trial.source,
        "chosen": chosen,
        "structures": {name: option.structure for name, option in options.items()},
        "rebuilt": [name for name, o in options.items() if o.execution == "dense" and not o.is_original],
    }


def _layer(table: LayerTable, index: int, budgeted: Sequence[CostName]) -> dict[str, Any]:
    option, original = table.options[index], table.options[0]
    runner_up = _runner_up(table, index, budgeted)
    return {
        "name": table.name,
        "structure": option.structure,
        "family": option.family,
        "schedule": option.schedule,
        "execution": option.execution,
        "before": _costs(original),
        "after": _costs(option),
        "error": option.error,
        "weight_error": option.weight_error,
        "num_options": len(table.options),
        "runner_up": None if runner_up is None else _facts(runner_up),
        "reason": _reason(table, index, budgeted),
    }


def _costs(option: Option) -> dict[str, float | None]:
    return {
        "flops": option.flops,
        "params": option.params,
        "latency_ms": option.latency_ms,
        "latency_noise_ms": option.latency_noise_ms,
        "peak_activation_bytes": option.peak_bytes,
    }


def _facts(option: Option) -> dict[str, Any]:
    return {"structure": option.structure, "execution": option.execution, **_costs(option), "error": option.error}


def _burden(option: Option, table: LayerTable, budgeted: Sequence[CostName]) -> float:
    """The mean share of the original's budgeted costs that an option takes."""
    shares = [option.cost(name) / max(table.options[0].cost(name), 1e-12) for name in budgeted]
    return sum(shares) / len(shares)


def _runner_up(table: LayerTable, index: int, budgeted: Sequence[CostName]) -> Option | None:
    """The option nearest in budgeted costs to the chosen one."""
    chosen = _burden(table.options[index], table, budgeted)
    others = [o for i, o in enumerate(table.options) if i != index]
    return min(others, key=lambda o: (abs(_burden(o, table, budgeted) - chosen), o.error), default=None)


def _reason(table: LayerTable, index: int, budgeted: Sequence[CostName]) -> str:
    chosen, original = table.options[index], table.options[0]
    costs, *words = " and ".join(budgeted), *(WORDS[name] for name in budgeted)
    of_costs = f" of its {words[0]}"
    if len(words) > 1:
        of_costs = f" (the mean over its {', '.join(words[:-1])} and {words[-1]})"

    def burden(option: Option) -> float:
        return _burden(option, table, budgeted)

    if len(table.options) == 1:
        return f"left as it is: none of its options is cheaper than the dense layer in {costs}"
    own = burden(chosen)
    dearer = [o for o in table.options if burden(o) > own and o.error < chosen.error]
    cheaper = [o for o in table.options if burden(o) < own and o.error > chosen.error]
    if chosen.is_original:
        gentle = min(table.options[1:], key=lambda o: o.error)
        return (
            f"left as it is: the budget is better met elsewhere; its gentlest option saves {1 - burden(gentle):.0%}"
            f"{of_costs} at an output error of {gentle.error:.3f}"
        )
    shares = " and ".join(
        f"{chosen.cost(name) / max(original.cost(name), 1e-12):.0%} of the layer's {WORDS[name]}" for name in budgeted
    )
    parts = [f"{chosen.family}, {shares} at an output error of {chosen.error:.3f}"]
    if dearer:
        next_up = min(dearer, key=burden)
        parts.append(f"{burden(next_up) - own:.1%} more{of_costs} would lower that to {next_up.error:.3f}")
    if cheaper:
        next_down = max(cheaper, key=burden)
        parts.append(f"{own - burden(next_down):.1%} less would raise it to {next_down.error:.3f}")
    return "; ".join(parts) + f"; the search weighed this against all other layers under the budget of {costs}"
