"""Latencies of a job: of its layers' options and of whole networks, as they are deployed, in the best memory format."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from sekron_search.costs.measure import Latency, measure_callables
from sekron_search.costs.memory import peak_memory
from sekron_search.costs.profile import DeviceProfile, Measurement, Provenance
from sekron_search.costs.profiling import granularity_of
from sekron_search.costs.traced import traced_flops
from sekron_search.deployment import deploy
from sekron_search.files import read_json, write_json, write_text
from sekron_search.job import Job
from sekron_search.kron.steps import Schedule
from sekron_search.kron.structure import Structure
from sekron_search.model import LayerInfo
from sekron_search.progress import Reporter
from sekron_search.rundir import RunFolder
from sekron_search.runtimes.base import MemoryFormat, Runtime, laid_out
from sekron_search.search.options import LayerTable
from sekron_search.search.space import SearchSpace
from sekron_search.tables import all_options

#: Options per layer by which memory formats are compared.
MODERATE_OPTIONS = 4

#: A network and the memory format in which it runs.
Placed = tuple[nn.Module, MemoryFormat]


@dataclass(frozen=True)
class Layout:
    """How networks are laid out on the device.

    Args:
        memory_format: Of the compressed network.
        granularity: The multiple of channels that the device prefers; 1 where latency is not budgeted.
        original_format: Of the original, which is compared with in the format that serves it best.
        original_ms: Its latency in every format.
    """

    memory_format: MemoryFormat
    granularity: int
    original_format: MemoryFormat
    original_ms: dict[str, float]


def own_threads(job: Job, folder: RunFolder) -> int | None:
    """With how many threads of torch a run measures: as configured, or as its latencies were measured before.

    None is as many as there are: where latencies are not budgeted, or not measured yet. A device profile that was given
    is of a number of threads that the user has to care for.
    """
    latency = job.settings.latency
    if latency.num_threads is not None or latency.profile is not None or not folder.profile.exists():
        return latency.num_threads
    return DeviceProfile.load(folder.profile).provenance.num_threads


def find_layout(job: Job, folder: RunFolder, reporter: Reporter, layers: Sequence[LayerInfo]) -> Layout:
    """How the network is laid out on the device, and the original at its best; decided once per folder.

    Under a latency budget the memory format is the one in which the compressed network can be expected to be fastest:
    the original's time, less its dense layers', plus the mean of moderate options of every layer. Else it is the
    original's best.
    """
    if folder.layout.exists():
        return Layout(**read_json(folder.layout))
    known, formats = job.profile, job.memory_formats
    if known is not None:
        formats = tuple(f for f in formats if f == known.provenance.memory_format) or formats
    reporter.say("choosing the memory format and the granularity of ranks")
    seen = job.memory_formats if job.elsewhere is None else formats
    whole = network_latencies(job, {f: (job.model, f) for f in seen})
    originals: dict[MemoryFormat, float] = {f: whole[f].median_ms for f in seen}
    best = min(originals, key=lambda f: originals[f])
    chosen, granularity = best, 1
    if "latency_ms" in job.settings.bounds.names:
        if known is not None and known.fitted is not None:
            multiples = dict.fromkeys(formats, known.fitted.granularity)
        else:
            multiples = {f: granularity_of(job.runtime(f)) for f in formats}
        expected = dict(originals)
        if len(formats) > 1 and job.elsewhere is None:
            for f in formats:
                space = job.settings.space.with_granularity(multiples[f])
                expected[f] += _expected_gain(job, layers, space, job.runtime(f))
        chosen = min(formats, key=lambda f: expected[f])
        granularity = multiples[chosen]
    layout = Layout(chosen, granularity, best, {str(f): ms for f, ms in originals.items()})
    write_json(folder.layout, dataclasses.asdict(layout))
    return layout


def _expected_gain(job: Job, layers: Sequence[LayerInfo], space: SearchSpace, runtime: Runtime) -> float:
    """Milliseconds that the network gains, negative ones, if every layer has its mean moderate option."""
    pairs = [(info, _moderate(info, space, job.bytes_per_sample)) for info in layers]
    profile = DeviceProfile.empty(runtime)
    profile.measure(profile.missing(_measurements(pairs), job.batch), job.batch, runtime, rounds=5)
    gain = 0.0
    for pair in pairs:
        whole, *options = (latency.median_ms for latency in profile.latencies(_measurements([pair]), job.batch))
        gain += min(float(np.mean(options)) - whole, 0.0) if options else 0.0
    return gain


def _moderate(info: LayerInfo, space: SearchSpace, bytes_per_sample: int) -> LayerTable:
    """The layer as it is, and some options spread over a tenth to a half of its flops."""
    table = LayerTable(info.name, tuple(all_options(info, space, bytes_per_sample)))
    first, *others = table.options
    others = sorted((o for o in others if 0.1 <= o.flops / first.flops <= 0.5), key=lambda o: (o.flops, o.structure))
    chosen = {int(i) for i in np.linspace(0, len(others) - 1, MODERATE_OPTIONS).round()} if others else set()
    return dataclasses.replace(table, options=(first, *(others[i] for i in sorted(chosen))))


def network_costs(job: Job, networks: Mapping[str, Placed]) -> dict[str, dict[str, float]]:
    """Every cost of whole networks: counted, traced and measured, the latencies interleaved."""
    measured = network_latencies(job, networks)
    return {
        name: {
            "flops": traced_flops(network, job.example_inputs).total,
            "params": float(sum(p.numel() for p in network.parameters())),
            "latency_ms": measured[name].median_ms,
            "latency_noise_ms": measured[name].noise_ms,
            "latency_samples": float(measured[name].samples),
            "peak_activation_bytes": float(peak_memory(network, job.example_inputs).peak),
        }
        for name, (network, _) in networks.items()
    }


def network_latencies(job: Job, networks: Mapping[str, Placed]) -> dict[str, Latency]:
    """Latency of whole networks as they are deployed, through the job's runtime, interleaved.

    Predicted, with `samples` of 0, where the job's profile is of another machine.

    Raises:
        ConfigError: If it has to be predicted and the network executes what no latency model knows.
    """
    inputs = job.example_inputs
    # Rounding is of no concern to a clock; `deploy` is checked where a network is exported.
    deployed = {
        name: (deploy(network, inputs, tolerance=math.inf), job.runtime(form))
        for name, (network, form) in networks.items()
    }
    if job.elsewhere is not None:
        return {n: job.elsewhere.network_latency(*laid_out(net, inputs, r)) for n, (net, r) in deployed.items()}
    clock = job.runtime(job.memory_formats[0])
    with clock.active():
        calls = {name: runtime.compile(network, inputs) for name, (network, runtime) in deployed.items()}
        return measure_callables(calls, rounds=job.settings.latency.rounds, device=clock.device)


def with_latencies(
    pairs: Sequence[tuple[LayerInfo, LayerTable]],
    job: Job,
    folder: RunFolder,
    reporter: Reporter,
    memory_format: MemoryFormat,
) -> list[LayerTable]:
    """The tables with their options' latencies, measured where the device profile lacks them."""
    profile = measured_profile(pairs, job, folder, reporter, memory_format)
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


def measured_profile(
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
    elif job.profile is not None:
        profile = job.profile
    else:
        profile = DeviceProfile.empty(runtime)
    profile.check_usable(here, force=latency.any_profile)
    missing = profile.missing(_measurements(pairs), job.batch)
    if job.elsewhere is not None:
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
