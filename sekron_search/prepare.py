"""Before the search: the original's facts, what each layer can become, and what that costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import nn

from sekron_search.calibration import collect_metrics
from sekron_search.costs.measure import Latency, measure_networks
from sekron_search.costs.memory import PeakMemory, peak_memory
from sekron_search.costs.profile import DeviceProfile, Measurement, Provenance
from sekron_search.costs.profiling import granularity_of
from sekron_search.costs.traced import traced_flops
from sekron_search.deployment import deploy
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
from sekron_search.runtimes.base import MemoryFormat, Runtime, threads
from sekron_search.search.budget import CostName
from sekron_search.search.knapsack import best_reachable, infeasible, solve_knapsack
from sekron_search.search.options import LayerTable, Network
from sekron_search.search.space import SearchSpace
from sekron_search.selection import worthwhile
from sekron_search.tables import FittedLayer, build_layer_table, build_tables, cheapest_table, table_key
from sekron_search.variants import with_variants

#: A latency budget is refused before the long work if even the fastest options tried miss it by this factor: few are
#: tried then, and clocks are noisy.
LATENCY_DOUBT = 1.25

#: Options per layer that are timed for that.
EARLY_OPTIONS = 4

#: How far the outputs of a network that is only timed may be from the original's: deep networks in float32 round.
DEPLOYED_TOLERANCE = 1e-3


#: Schedules of an option that are timed where latency is budgeted.
TIMED_SCHEDULES = 3


@dataclass(frozen=True)
class Layout:
    """Memory format of the network, and the multiple of channels that the device prefers (1 where nothing is timed)."""

    memory_format: MemoryFormat
    granularity: int


@dataclass(frozen=True)
class Tables:
    """The original's facts, and what every layer can become."""

    inspection: Inspection
    layers: tuple[LayerInfo, ...]
    original: dict[str, float]
    memory: PeakMemory
    memory_format: MemoryFormat
    fitted: tuple[FittedLayer, ...]

    @cached_property
    def network(self) -> Network:
        """The tables as the search sees them."""
        tables = (dataclasses.replace(f.table, outside_bytes=self.memory.outside[f.table.name]) for f in self.fitted)
        return Network(tuple(tables), self.original, float(self.memory.floor))


def prepare(job: Job, folder: RunFolder, reporter: Reporter) -> Tables:
    """The tables, with the latencies of their options where latency is budgeted, less what the budget never picks.

    Raises:
        InfeasibleBudgetError: If a latency budget cannot be met with the options that are faster than the original.
    """
    tables = fit_tables(job, folder, reporter)
    bounds = job.settings.bounds
    timed = "latency_ms" in bounds.names
    schedules = TIMED_SCHEDULES if timed else 1
    fitted = [
        with_variants(f, info, bytes_per_sample=job.bytes_per_sample, schedules=schedules)
        for info, f in zip(tables.layers, tables.fitted, strict=True)
    ]
    if timed:
        pairs = list(zip(tables.layers, [f.table for f in fitted], strict=True))
        measured = _with_latencies(pairs, job, folder, reporter, tables.memory_format)
        # What is slower than the original helps no latency budget, whatever its flops.
        fitted = [dataclasses.replace(f, table=t).faster() for f, t in zip(fitted, measured, strict=True)]
    fitted = [f.pruned(bounds.names) for f in fitted]
    return dataclasses.replace(tables, fitted=tuple(fitted))


def measure_profile(job: Job, folder: RunFolder, reporter: Reporter) -> DeviceProfile:
    """A device profile of every option of the job's network, measured here."""
    with threads(job.settings.latency.num_threads):
        tables = fit_tables(job, folder, reporter)
        fitted = (
            with_variants(f, info, bytes_per_sample=job.bytes_per_sample, schedules=TIMED_SCHEDULES)
            for info, f in zip(tables.layers, tables.fitted, strict=True)
        )
        pairs = list(zip(tables.layers, [f.table for f in fitted], strict=True))
        return _measure(pairs, job, folder, reporter, tables.memory_format)


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
    layout = _layout(job, folder, reporter, layers)
    space = settings.space.with_granularity(layout.granularity)
    original = _original_costs(job, folder, reporter, layout.memory_format)
    memory = peak_memory(job.model, job.example_inputs, tuple(info.name for info in layers))
    known = Tables(inspection, layers, original, memory, layout.memory_format, ())
    _check_reachable(job, folder, reporter, known, space)
    metrics = _Metrics(job, layers, reporter)
    weighting = [settings.calibration.curvature, settings.search.divergence]
    context = digest([job.model_digest, list(job.calibration), settings.seed, weighting])
    sizes = {"bytes_per_sample": job.bytes_per_sample, "steps": settings.calibration.refine_steps}

    def fit(info: LayerInfo) -> FittedLayer:
        return build_layer_table(info, layer_weight(job.model, info), metrics[info.name], space, **sizes)

    def key(info: LayerInfo) -> str:
        return table_key(info, space, context, **sizes)

    fitted: list[FittedLayer] = []
    with reporter.task("fitting options", len(layers)) as task:
        for table in build_tables(layers, fit, key, settings.tables or folder.tables):
            fitted.append(table)
            task.update(len(fitted), f"{table.table.name}: {len(table.table.options)} options")
    return dataclasses.replace(known, fitted=tuple(fitted))


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


def _layout(job: Job, folder: RunFolder, reporter: Reporter, layers: Sequence[LayerInfo]) -> Layout:
    """How the network is laid out on the device; decided once per folder."""
    if not folder.layout.exists():
        given = job.settings.latency.profile
        known = DeviceProfile.load(given) if given is not None else None
        memory_format = _memory_format(job, reporter, layers, known)
        multiple = 1
        if "latency_ms" in job.settings.bounds.names:
            reporter.say("measuring at which multiples of channels time steps")
            multiple = (
                known.fitted.granularity if known and known.fitted else granularity_of(job.runtime(memory_format))
            )
        write_json(folder.layout, {"memory_format": memory_format, "granularity": multiple})
    return Layout(**read_json(folder.layout))


def _memory_format(
    job: Job, reporter: Reporter, layers: Sequence[LayerInfo], known: DeviceProfile | None
) -> MemoryFormat:
    """As asked, as the given profile has it, or the fastest.

    Where latency is budgeted the fastest is that in which the network becomes fastest, by some options of every layer;
    else that which is best for the original.
    """
    formats = job.memory_formats
    if known is not None:
        formats = tuple(f for f in formats if f == known.provenance.memory_format) or formats
    if len(formats) == 1:
        return formats[0]
    reporter.say("choosing the memory format")
    if "latency_ms" in job.settings.bounds.names:
        few = [_few(cheapest_table(i, job.settings.space, job.bytes_per_sample)) for i in layers]
        found = {f: _fastest_sum(list(zip(layers, few, strict=True)), job, job.runtime(f)) for f in formats}
    else:
        found = {f: network_latencies(job, {"original": job.model}, f)["original"].median_ms for f in formats}
    return min(found, key=lambda f: found[f])


def _fastest_sum(pairs: Sequence[tuple[LayerInfo, LayerTable]], job: Job, runtime: Runtime) -> float:
    """Milliseconds of the fastest option of every layer together, the layers as they are among them."""
    profile = DeviceProfile.empty(runtime)
    profile.measure(profile.missing(_measurements(pairs), job.batch), job.batch, runtime, rounds=5)
    found = (profile.latencies(_measurements([pair]), job.batch) for pair in pairs)
    return sum(min(latency.median_ms for latency in own) for own in found)


def _original_costs(job: Job, folder: RunFolder, reporter: Reporter, memory_format: MemoryFormat) -> dict[str, float]:
    """Costs of the original, measured once per run folder so that budgets mean the same after a resume."""
    if not folder.original.exists():
        reporter.say("measuring the original network")
        costs = network_costs(job, {"original": job.model}, memory_format)["original"]
        # The metric is asked for now, not only at the end: a metric that fails would waste everything in between.
        metric = job.validate(job.model) if job.validate is not None else None
        write_json(folder.original, {"costs": costs, "validation_metric": metric})
    costs = read_json(folder.original)["costs"]
    return {name: float(value) for name, value in costs.items()}


def network_costs(
    job: Job, networks: Mapping[str, nn.Module], memory_format: MemoryFormat
) -> dict[str, dict[str, float]]:
    """Every cost of whole networks: counted, traced and measured, the latencies interleaved."""
    measured = network_latencies(job, networks, memory_format)
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


def network_latencies(job: Job, networks: Mapping[str, nn.Module], memory_format: MemoryFormat) -> dict[str, Latency]:
    """Latency of whole networks as they are deployed, through the job's runtime, interleaved."""
    runtime, inputs = job.runtime(memory_format), job.example_inputs
    # Rounding is of no concern to a clock; `deploy` itself is checked where a network is exported.
    deployed = {name: deploy(network, inputs, tolerance=DEPLOYED_TOLERANCE) for name, network in networks.items()}
    return measure_networks(deployed, inputs, runtime, rounds=job.settings.latency.rounds)


def _check_reachable(job: Job, folder: RunFolder, reporter: Reporter, known: Tables, space: SearchSpace) -> None:
    """Refuse a budget that no choice of structures can meet, before anything is fitted."""
    original, memory, layers = known.original, known.memory, known.layers
    bounds = job.settings.bounds.resolve(original)
    tables = [
        dataclasses.replace(cheapest_table(i, space, job.bytes_per_sample), outside_bytes=memory.outside[i.name])
        for i in layers
    ]
    counted: dict[CostName, float] = {name: bound for name, bound in bounds.items() if name != "latency_ms"}
    network = Network(tuple(tables), original, float(memory.floor))
    if counted:
        solve_knapsack(network, counted, network.values("flops"), relative_gap=1.0)
    if "latency_ms" in bounds:
        pairs = [(info, _few(table)) for info, table in zip(layers, tables, strict=True)]
        timed = _with_latencies(pairs, job, folder, reporter, known.memory_format)
        network = dataclasses.replace(network, tables=tuple(timed))
        if best_reachable(network, ["latency_ms"])["latency_ms"] > LATENCY_DOUBT * bounds["latency_ms"]:
            raise infeasible(network, {"latency_ms": bounds["latency_ms"]})


def _few(table: LayerTable) -> LayerTable:
    """The layer as it is, and some options spread over their flops, the cheapest among them."""
    first, *others = table.options
    others.sort(key=lambda o: o.flops)
    chosen = {int(i) for i in np.linspace(0, len(others) - 1, EARLY_OPTIONS).round()} if others else set()
    return dataclasses.replace(table, options=(first, *(others[i] for i in sorted(chosen))))


def _with_latencies(
    pairs: Sequence[tuple[LayerInfo, LayerTable]],
    job: Job,
    folder: RunFolder,
    reporter: Reporter,
    memory_format: MemoryFormat,
) -> list[LayerTable]:
    """The tables with their options' latencies, measured where the device profile lacks them."""
    profile = _measure(pairs, job, folder, reporter, memory_format)
    timed = []
    for info, table in pairs:
        found = profile.latencies(_measurements([(info, table)]), job.batch)
        options = tuple(
            dataclasses.replace(o, latency_ms=latency.median_ms, latency_noise_ms=latency.noise_ms)
            for o, latency in zip(table.options, found, strict=True)
        )
        timed.append(dataclasses.replace(table, options=options))
    return timed


def _measurements(pairs: Sequence[tuple[LayerInfo, LayerTable]]) -> list[Measurement]:
    return [
        (info, Structure.parse(o.structure), Schedule.parse(o.schedule), o.execution)
        for info, table in pairs
        for o in table.options
    ]


def _measure(
    pairs: Sequence[tuple[LayerInfo, LayerTable]],
    job: Job,
    folder: RunFolder,
    reporter: Reporter,
    memory_format: MemoryFormat,
) -> DeviceProfile:
    """The device profile with the latency of every option, but for those that it predicts; kept in the run folder.

    What a profile of this machine lacks is measured. One of another machine predicts it, which it was made for.
    """
    latency, runtime = job.settings.latency, job.runtime(memory_format)
    here = Provenance.here(runtime)
    if folder.profile.exists():
        profile = DeviceProfile.load(folder.profile)
    elif latency.profile is not None:
        profile = DeviceProfile.load(latency.profile)
    else:
        profile = DeviceProfile.empty(runtime)
    profile.check_usable(here, force=latency.any_profile)
    missing = profile.missing(_measurements(pairs), job.batch)
    if profile.fitted is not None and not profile.is_of(here):
        missing = []
    elif missing:
        profile.check_same_machine(here, len(missing))
    with reporter.task("measuring options", len(missing)) as task:
        profile.measure(
            missing,
            job.batch,
            runtime,
            progress=lambda done, total: task.update(done),
            after_group=lambda: write_text(folder.profile, profile.to_yaml()),
        )
    write_text(folder.profile, profile.to_yaml())
    # What is on disk counts, rounded as it is: a resumed run reads it from there.
    return DeviceProfile.load(folder.profile)
