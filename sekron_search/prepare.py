"""Before the search: the original's facts, what each layer can become, and what that costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import nn

from sekron_search.calibration import collect_metrics
from sekron_search.costs.measure import measure_networks
from sekron_search.costs.memory import PeakMemory, peak_memory
from sekron_search.costs.profile import DeviceProfile, Provenance, layer_key
from sekron_search.costs.traced import traced_flops
from sekron_search.errors import DataError
from sekron_search.files import digest, read_json, write_json, write_text
from sekron_search.inspection import Inspection, inspect_model
from sekron_search.job import Job
from sekron_search.kron.refine import InputMetric
from sekron_search.kron.steps import Schedule
from sekron_search.kron.structure import Structure
from sekron_search.model import LayerInfo, layer_weight
from sekron_search.progress import Reporter
from sekron_search.proxies import check_divergence, reference_outputs
from sekron_search.rundir import RunFolder
from sekron_search.runtimes.base import threads
from sekron_search.search.budget import CostName
from sekron_search.search.knapsack import best_reachable, infeasible, solve_knapsack
from sekron_search.search.options import LayerTable, Network, Option
from sekron_search.selection import worthwhile
from sekron_search.tables import FittedLayer, build_layer_table, build_tables, cheapest_table, table_key

#: A latency budget is refused before the long work if even the fastest options tried miss it by this factor: few are
#: tried then, and clocks are noisy.
LATENCY_DOUBT = 1.25

#: Options per layer that are timed for that.
EARLY_OPTIONS = 4


@dataclass(frozen=True)
class Tables:
    """The original's facts, and what every layer can become."""

    inspection: Inspection
    layers: tuple[LayerInfo, ...]
    original: dict[str, float]
    memory: PeakMemory
    fitted: tuple[FittedLayer, ...]

    @cached_property
    def network(self) -> Network:
        """The tables as the search sees them."""
        tables = (dataclasses.replace(f.table, outside_bytes=self.memory.outside[f.table.name]) for f in self.fitted)
        return Network(tuple(tables), self.original, float(self.memory.floor))


def prepare(job: Job, folder: RunFolder, reporter: Reporter) -> Tables:
    """The tables, with the latencies of their options where latency is budgeted, less what the budget never picks."""
    tables = fit_tables(job, folder, reporter)
    fitted = tables.fitted
    if "latency_ms" in job.settings.bounds.names:
        jobs = zip(tables.layers, [f.table for f in fitted], strict=True)
        measured = _with_latencies(jobs, job, folder, reporter)
        fitted = tuple(dataclasses.replace(f, table=t) for f, t in zip(fitted, measured, strict=True))
    fitted = tuple(f.pruned(job.settings.bounds.names) for f in fitted)
    return dataclasses.replace(tables, fitted=fitted)


def measure_profile(job: Job, folder: RunFolder, reporter: Reporter) -> DeviceProfile:
    """A device profile of every option of the job's network, measured here."""
    with threads(job.settings.latency.num_threads):
        tables = fit_tables(job, folder, reporter)
        return _measure(list(zip(tables.layers, [f.table for f in tables.fitted], strict=True)), job, folder, reporter)


def fit_tables(job: Job, folder: RunFolder, reporter: Reporter) -> Tables:
    """Inspect the network, check that the budget can be met, and fit every layer's options.

    Raises:
        DataError: If nothing can be replaced, or network, data and settings do not fit together.
        InfeasibleBudgetError: If nothing that the search space holds meets the budget.
    """
    settings = job.settings
    inspection = worthwhile(inspect_model(job.model, job.example_inputs), settings.space)
    layers = inspection.layers
    if not layers:
        skipped = "; ".join(f"'{s.name}': {s.reason}" for s in inspection.skipped[:5])
        raise DataError(f"no layer can be replaced ({skipped or 'there is none'}); see `sekron-search inspect`")
    reference_outputs(job.model, job.calibration[:1])
    check_divergence(settings.search.divergence, job.references[0])
    if job.distillation is not None:
        job.distillation.check()
    original = _original_costs(job, folder, reporter)
    memory = peak_memory(job.model, job.example_inputs, tuple(info.name for info in layers))
    _check_reachable(job, folder, reporter, layers, original, memory)
    metrics = _Metrics(job, layers, reporter)
    weighting = [settings.calibration.curvature, settings.search.divergence]
    context = digest([job.model_digest, list(job.calibration), settings.seed, weighting])
    sizes = {"bytes_per_sample": job.bytes_per_sample, "steps": settings.calibration.refine_steps}

    def fit(info: LayerInfo) -> FittedLayer:
        return build_layer_table(info, layer_weight(job.model, info), metrics[info.name], settings.space, **sizes)

    def key(info: LayerInfo) -> str:
        return table_key(info, settings.space, context, **sizes)

    fitted: list[FittedLayer] = []
    with reporter.task("fitting options", len(layers)) as task:
        for table in build_tables(layers, fit, key, settings.tables or folder.tables):
            fitted.append(table)
            task.update(len(fitted), f"{table.table.name}: {len(table.table.options)} options")
    return Tables(inspection, layers, original, memory, tuple(fitted))


class _Metrics:
    """The input metric of every layer, collected when the first one is asked for: cached tables need none."""

    def __init__(self, job: Job, layers: Sequence[LayerInfo], reporter: Reporter) -> None:
        self.job, self.layers, self.reporter = job, layers, reporter

    @cached_property
    def found(self) -> dict[str, InputMetric]:
        job = self.job
        with self.reporter.task("calibrating", len(job.calibration)) as task:
            return collect_metrics(
                job.model,
                self.layers,
                job.calibration,
                curvature=job.curvature,
                seed=job.settings.seed,
                progress=task.update,
            )

    def __getitem__(self, name: str) -> InputMetric:
        return self.found[name]


def _original_costs(job: Job, folder: RunFolder, reporter: Reporter) -> dict[str, float]:
    """Costs of the original, measured once per run folder so that budgets mean the same after a resume."""
    if not folder.original.exists():
        reporter.say("measuring the original network")
        costs = network_costs(job, {"original": job.model})["original"]
        # The metric is asked for now, not only at the end: a metric that fails would waste everything in between.
        metric = job.validate(job.model) if job.validate is not None else None
        write_json(folder.original, {"costs": costs, "validation_metric": metric})
    costs = read_json(folder.original)["costs"]
    return {name: float(value) for name, value in costs.items()}


def network_costs(job: Job, networks: Mapping[str, nn.Module]) -> dict[str, dict[str, float]]:
    """Every cost of whole networks: counted, traced and measured, the latencies interleaved."""
    latency = job.settings.latency
    measured = measure_networks(networks, job.example_inputs, rounds=latency.rounds, num_threads=latency.num_threads)
    return {
        name: {
            "flops": traced_flops(network, job.example_inputs).total,
            "params": float(sum(p.numel() for p in network.parameters())),
            "latency_ms": measured[name].median_ms,
            "latency_noise_ms": measured[name].noise_ms,
            "peak_activation_bytes": float(peak_memory(network, job.example_inputs).peak),
        }
        for name, network in networks.items()
    }


def _check_reachable(
    job: Job,
    folder: RunFolder,
    reporter: Reporter,
    layers: Sequence[LayerInfo],
    original: Mapping[str, float],
    memory: PeakMemory,
) -> None:
    """Refuse a budget that no choice of structures can meet, before anything is fitted."""
    bounds = job.settings.bounds.resolve(original)
    tables = [
        dataclasses.replace(
            cheapest_table(i, job.settings.space, job.bytes_per_sample), outside_bytes=memory.outside[i.name]
        )
        for i in layers
    ]
    counted: dict[CostName, float] = {name: bound for name, bound in bounds.items() if name != "latency_ms"}
    network = Network(tuple(tables), original, float(memory.floor))
    if counted:
        solve_knapsack(network, counted, network.values("flops"), relative_gap=1.0)
    if "latency_ms" in bounds:
        few = [dataclasses.replace(t, options=_few(t)) for t in tables]
        timed = _with_latencies(zip(layers, few, strict=True), job, folder, reporter)
        network = dataclasses.replace(network, tables=tuple(timed))
        if best_reachable(network, ["latency_ms"])["latency_ms"] > LATENCY_DOUBT * bounds["latency_ms"]:
            raise infeasible(network, {"latency_ms": bounds["latency_ms"]})


def _few(table: LayerTable) -> tuple[Option, ...]:
    """The layer as it is, and some options spread over their flops, the cheapest among them."""
    first, *others = table.options
    others.sort(key=lambda o: o.flops)
    chosen = {int(i) for i in np.linspace(0, len(others) - 1, EARLY_OPTIONS).round()} if others else set()
    return (first, *(others[i] for i in sorted(chosen)))


def _with_latencies(
    tables: Iterable[tuple[LayerInfo, LayerTable]], job: Job, folder: RunFolder, reporter: Reporter
) -> list[LayerTable]:
    """The tables with their options' latencies, measured where the device profile lacks them."""
    pairs = list(tables)
    profile = _measure(pairs, job, folder, reporter)
    timed = []
    for info, table in pairs:
        options = []
        for o in table.options:
            structure, schedule = Structure.parse(o.structure), Schedule.parse(o.schedule)
            found = profile.latencies[layer_key(info, structure, schedule, o.execution, job.batch)]
            options.append(dataclasses.replace(o, latency_ms=found.median_ms, latency_noise_ms=found.noise_ms))
        timed.append(dataclasses.replace(table, options=tuple(options)))
    return timed


def _measure(
    tables: Sequence[tuple[LayerInfo, LayerTable]], job: Job, folder: RunFolder, reporter: Reporter
) -> DeviceProfile:
    """The device profile with the latency of every option; kept in the run folder."""
    latency = job.settings.latency
    here = Provenance.here(job.device, latency.num_threads)
    if folder.profile.exists():
        profile = DeviceProfile.load(folder.profile)
    elif latency.profile is not None:
        profile = DeviceProfile.load(latency.profile)
    else:
        profile = DeviceProfile(here)
    profile.check_usable(here)
    jobs = [
        (info, Structure.parse(o.structure), Schedule.parse(o.schedule), o.execution)
        for info, table in tables
        for o in table.options
    ]
    missing = profile.missing(jobs, job.batch)
    if missing:
        profile.check_same_machine(here, len(missing))
    with reporter.task("measuring options", len(missing)) as task:
        profile.measure(
            missing,
            job.batch,
            progress=lambda done, total: task.update(done),
            after_group=lambda: write_text(folder.profile, profile.to_yaml()),
        )
    write_text(folder.profile, profile.to_yaml())
    # What is on disk counts, rounded as it is: a resumed run reads it from there.
    return DeviceProfile.load(folder.profile)
