"""Before the search: the original's facts, what each layer can become, and what that costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from sekron_search.calibration import collect_metrics, memory_groups
from sekron_search.config import Config, Settings
from sekron_search.costs.memory import peak_memory
from sekron_search.costs.profile import DeviceProfile
from sekron_search.data import SplitMetric
from sekron_search.divergence import check_divergence, reference_outputs
from sekron_search.errors import ConfigError, DataError, InfeasibleBudgetError
from sekron_search.files import read_json, write_json
from sekron_search.fitting import FitJob, Fitter
from sekron_search.inspection import Inspection, inspect_model
from sekron_search.job import Job
from sekron_search.kron.metric import InputMetric
from sekron_search.model import LayerInfo, layer_weight
from sekron_search.network_tables import Tables
from sekron_search.progress import Reporter
from sekron_search.repeatable import check_repeatable
from sekron_search.rundir import RunFolder
from sekron_search.runtimes.base import threads
from sekron_search.search.budget import CostName
from sekron_search.search.knapsack import best_reachable, infeasible, solve_knapsack
from sekron_search.search.options import LayerTable, Network
from sekron_search.search.space import SearchSpace
from sekron_search.selection import worthwhile
from sekron_search.table_responses import with_responses
from sekron_search.tables import FittedLayer, cheapest_table, load_table, table_files, table_key
from sekron_search.tensor_files import digest
from sekron_search.timing import Layout, find_layout, measured_profile, network_costs, own_threads, with_latencies
from sekron_search.variants import with_variants

#: A latency budget is refused before the long work if even the fastest options tried miss it by this factor: few are
#: tried then, and clocks are noisy.
LATENCY_DOUBT = 1.25

#: Options per layer that are timed for that.
EARLY_OPTIONS = 4

#: An original that is right less often than this is more likely to be fed wrongly than to be worth compressing.
DOUBTFUL_ACCURACY = 0.5

#: Schedules of an option that are timed where latency is budgeted.
TIMED_SCHEDULES = 3


def prepare(job: Job, folder: RunFolder, reporter: Reporter) -> Tables:
    """The tables for a search: less what the budget never picks, with responses, and latencies where they are budgeted.

    Raises:
        InfeasibleBudgetError: If nothing that the search space holds meets the budget.
    """
    whole = prepare_whole(job, folder, reporter)
    fitted = tuple(f.pruned(job.settings.bounds.names) for f in whole.fitted)
    tables = dataclasses.replace(whole, fitted=fitted, whole=whole.network)
    return with_responses(job, tables, tables_folder(job, folder), reporter)


def prepare_whole(job: Job, folder: RunFolder, reporter: Reporter) -> Tables:
    """The tables with all their options.

    Raises:
        InfeasibleBudgetError: If nothing that the search space holds meets the budget.
    """
    tables = fit_tables(job, folder, reporter)
    bounds = job.settings.bounds
    timed = "latency_ms" in bounds.names
    fitted = [
        with_variants(f, info, bytes_per_sample=job.bytes_per_sample, schedules=TIMED_SCHEDULES if timed else 1)
        for info, f in zip(tables.layers, tables.fitted, strict=True)
    ]
    if timed:
        pairs = list(zip(tables.layers, [f.table for f in fitted], strict=True))
        measured = with_latencies(pairs, job, folder, reporter, tables.layout.memory_format)
        fitted = [dataclasses.replace(f, table=t) for f, t in zip(fitted, measured, strict=True)]
        if bounds.resolve(tables.original)["latency_ms"] <= tables.original["latency_ms"]:
            fitted = _faster(fitted, tables, bounds.resolve(tables.original), reporter)
    return dataclasses.replace(tables, fitted=tuple(fitted))


def _faster(
    fitted: list[FittedLayer], tables: Tables, bounds: Mapping[CostName, float], reporter: Reporter
) -> list[FittedLayer]:
    """The options that are faster than the original's layers, beyond the noise, if they can meet the budgets.

    What is slower does not make a network faster, whatever its flops; only a budget that lets the network become slower
    leaves it in. Where clocks are too noisy to tell, what may be faster stays too: the latency of the whole network
    decides then.
    """

    def reaches(options: list[FittedLayer]) -> bool:
        try:
            _check_feasible(dataclasses.replace(tables, fitted=tuple(options)).network, bounds)
        except InfeasibleBudgetError:
            return False
        return True

    faster = [f.faster() for f in fitted]
    if reaches(faster):
        return faster
    perhaps = [f.not_slower() for f in fitted]
    if reaches(perhaps):
        reporter.say(
            "options that are surely faster than their layers cannot meet the budgets alone: those that may be, within "
            "the noise of the clock, are options too"
        )
    return perhaps  # the search says what is in reach


def measure_profile(job: Job, folder: RunFolder, reporter: Reporter) -> DeviceProfile:
    """A device profile of every option of the job's network, measured here."""
    with threads(own_threads(job, folder)):
        tables = fit_tables(job, folder, reporter)
        fitted = (
            with_variants(f, info, bytes_per_sample=job.bytes_per_sample, schedules=TIMED_SCHEDULES)
            for info, f in zip(tables.layers, tables.fitted, strict=True)
        )
        pairs = list(zip(tables.layers, [f.table for f in fitted], strict=True))
        return measured_profile(pairs, job, folder, reporter, tables.layout.memory_format)


def fit_tables(job: Job, folder: RunFolder, reporter: Reporter) -> Tables:
    """Inspect the network, check that the budget can be met, and fit every layer's options.

    Raises:
        DataError: If nothing can be replaced, or network, data and settings do not fit together.
        InfeasibleBudgetError: If nothing that the search space holds meets the budget.
    """
    inspection = checked_layers(job)
    layers = inspection.layers
    layout = find_layout(job, folder, reporter, layers)
    space = job.settings.space.with_granularity(layout.granularity)
    original = _original_costs(job, folder, reporter, layout)
    memory = peak_memory(job.model, job.example_inputs, tuple(info.name for info in layers))
    known = Tables(inspection, layers, original, memory, layout, ())
    _check_reachable(job, folder, reporter, known, space)
    cache = tables_folder(job, folder)
    keys = table_keys(job, layers, space)
    fitted = _fitted(job, layers, space, keys, Fitter(cache, torch.get_num_threads()), reporter)
    files = dict.fromkeys(path for key in keys.values() for path in table_files(cache, key))
    return dataclasses.replace(known, fitted=fitted, files=tuple(files))


def checked_layers(job: Job) -> Inspection:
    """The layers that can be replaced, after everything that can be told of network, data and settings at once.

    Raises:
        DataError: If nothing can be replaced, or network, data and settings do not fit together.
        ConfigError: If networks are to be chosen by what is not known of the validation data, or outputs are compared
            as logits by the search and as values by the metric.
    """
    inspection = worthwhile(inspect_model(job.model, job.example_inputs), job.settings.space)
    if not inspection.layers:
        skipped = "; ".join(f"'{s.name}': {s.reason}" for s in inspection.skipped[:5])
        raise DataError(f"no layer can be replaced ({skipped or 'there is none'}); see `sekron-search inspect`")
    reference_outputs(job.model, job.calibration[:1])
    check_repeatable(job.model, job.calibration[0])
    search = job.settings.search
    check_divergence(search.divergence, job.references[0], asked_for="divergence" in search.model_fields_set)
    metric = job.validate.name if isinstance(job.validate, SplitMetric) else None
    if metric in ("neg_mse", "psnr") and search.divergence == "kl":
        raise ConfigError(
            f"config key 'metric': {metric!r} compares values, not logits of classes: set search.divergence to 'mse'"
        )
    if job.settings.finetune.choice == "divergence" and not isinstance(job.validate, SplitMetric):
        came = "no data" if job.validate is None else "a function of yours"
        raise ConfigError(
            "config key 'finetune.choice': 'divergence' compares outputs on the validation samples; expected data and "
            f"a metric by name for them, got {came}; give both, or set the key to 'metric'"
        )
    if job.trains or job.settings.audit.candidates:
        job.distillation_by(job.settings.finetune).check()
    return inspection


def tables_folder(job: Job, folder: RunFolder) -> Path:
    """Where tables are kept."""
    return job.settings.tables or folder.tables


def table_keys(job: Job, layers: Sequence[LayerInfo], space: SearchSpace) -> dict[str, str]:
    """Under which key the table of every layer is kept, by the layer's name."""
    settings = job.settings
    weighting = [settings.calibration.curvature, settings.search.divergence]
    context = digest([job.model_digest, list(job.calibration), settings.seed, weighting])
    return {i.name: table_key(i, space, context, **_sizes(job)) for i in layers}


def _sizes(job: Job) -> dict[str, int]:
    return {"bytes_per_sample": job.bytes_per_sample, "steps": job.settings.calibration.refine_steps}


def _fitted(
    job: Job,
    layers: Sequence[LayerInfo],
    space: SearchSpace,
    keys: Mapping[str, str],
    fitter: Fitter,
    reporter: Reporter,
) -> tuple[FittedLayer, ...]:
    """The tables of all layers, from the cache where it has them; the others in groups whose moments fit in memory."""
    known = {i.name: load_table(fitter.cache, keys[i.name], i.name) for i in layers}
    found = {name: table for name, table in known.items() if table is not None}
    with fitter:
        for group in memory_groups([i for i in layers if i.name not in found]):
            with reporter.task("calibrating", len(job.calibration)) as task:
                metrics = collect_metrics(
                    job.model,
                    group,
                    job.calibration,
                    curvature=job.curvature,
                    seed=job.settings.seed,
                    progress=task.update,
                )
            with reporter.task("fitting options", len(layers)) as task:
                for fitted in fitter.fit([_fit_job(job, i, space, keys[i.name], metrics.pop(i.name)) for i in group]):
                    found[fitted.table.name] = fitted
                    task.update(len(found), f"{fitted.table.name}: {len(fitted.table.options)} options")
    return tuple(found[i.name] for i in layers)


def _fit_job(job: Job, info: LayerInfo, space: SearchSpace, key: str, metric: InputMetric) -> FitJob:
    return FitJob(key, info, layer_weight(job.model, info), metric, space, **_sizes(job))


def _original_costs(job: Job, folder: RunFolder, reporter: Reporter, layout: Layout) -> dict[str, float]:
    """Costs of the original, measured once per run folder so that budgets mean the same after a resume."""
    if not folder.original.exists():
        reporter.say("measuring the original network")
        costs = network_costs(job, {"original": (job.model, layout.original_format)})["original"]
        # The metric is asked for now, not only at the end: a metric that fails would waste everything in between.
        metric = job.validate(job.model) if job.validate is not None else None
        write_json(folder.original, {"costs": costs, "validation_metric": metric})
        if metric is not None and job.settings.metric == "accuracy" and metric < DOUBTFUL_ACCURACY:
            reporter.say(doubtful(metric, job.settings))
    costs = read_json(folder.original)["costs"]
    return {name: float(value) for name, value in costs.items()}


def doubtful(accuracy: float, settings: Settings) -> str:
    """What to look at where the original is right less often than its user expects."""
    causes = ["its weights", "the order of its classes"]
    if isinstance(settings, Config) and settings.data.source == "folder":
        data = settings.data
        colours = "in grey" if len(data.mean) == 1 else "as RGB"
        causes[0] += " (model.weights)" if settings.model.weights is not None else " (model.weights is not given)"
        causes[1] += " (folders count in alphabetical order)"
        causes.append(
            f"how images are fed (read {colours} in [0, 1], data.mean {list(data.mean)}, data.std {list(data.std)}; "
            "one number in each reads them in grey)"
        )
    return (
        f"WARNING: the original network's accuracy on the validation split is {accuracy:.1%}; if it should be higher, "
        f"look at {', '.join(causes)}"
    )


def cheapest_network(job: Job, known: Tables, space: SearchSpace) -> Network:
    """The network's cheapest options; nothing is fitted or timed.

    Raises:
        InfeasibleBudgetError: If no choice of structures meets the budgets of what is counted.
    """
    tables = [
        dataclasses.replace(cheapest_table(i, space, job.bytes_per_sample), outside_bytes=known.memory.outside[i.name])
        for i in known.layers
    ]
    bounds = job.settings.bounds.resolve(known.original)
    counted: dict[CostName, float] = {name: bound for name, bound in bounds.items() if name != "latency_ms"}
    network = dataclasses.replace(known.network, tables=tuple(tables))
    if counted:
        _check_feasible(network, counted)
    return network


def _check_feasible(network: Network, bounds: Mapping[CostName, float]) -> None:
    """Raise an `InfeasibleBudgetError` unless some choice of options meets the bounds together, whatever its error."""
    solve_knapsack(network, bounds, network.values("flops"), relative_gap=1.0)


def _check_reachable(job: Job, folder: RunFolder, reporter: Reporter, known: Tables, space: SearchSpace) -> None:
    """Refuse a budget that no choice of structures can meet, before anything is fitted."""
    network, bounds = cheapest_network(job, known, space), job.settings.bounds.resolve(known.original)
    if "latency_ms" in bounds:
        pairs = [(info, _few(table)) for info, table in zip(known.layers, network.tables, strict=True)]
        timed = with_latencies(pairs, job, folder, reporter, known.layout.memory_format)
        network = dataclasses.replace(network, tables=tuple(timed))
        if best_reachable(network, ["latency_ms"])["latency_ms"] > LATENCY_DOUBT * bounds["latency_ms"]:
            raise infeasible(network, {"latency_ms": bounds["latency_ms"]})


def _few(table: LayerTable) -> LayerTable:
    """The layer as it is, and some options spread over their flops, the cheapest among them."""
    first, *others = table.options
    others.sort(key=lambda o: o.flops)
    chosen = {int(i) for i in np.linspace(0, len(others) - 1, EARLY_OPTIONS).round()} if others else set()
    return dataclasses.replace(table, options=(first, *(others[i] for i in sorted(chosen))))
