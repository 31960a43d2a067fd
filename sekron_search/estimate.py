"""What a run will do, and about how long it takes, from short measurements of its parts: nothing is written.

Every part of a run that takes long is timed once or a few times as the run itself does it: a pass of the network, a
step of the training, the fits of a few structures of every kind of layer. The rest is counting.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from sekron_search.audit import check_audit
from sekron_search.calibration import collect_metrics, memory_groups
from sekron_search.costs.measure import Stopwatch
from sekron_search.costs.memory import peak_memory
from sekron_search.costs.profile import DeviceProfile
from sekron_search.curvature import output_curvature
from sekron_search.files import read_json
from sekron_search.fitting import LEAST_SECONDS
from sekron_search.job import Job
from sekron_search.kron.metric import InputMetric
from sekron_search.kron.refine import Refiner
from sekron_search.kron.steps import Schedule
from sekron_search.model import LayerInfo, batch_size, copy_model, first_batches, layer_weight, run_model
from sekron_search.network_tables import Tables
from sekron_search.prepare import TIMED_SCHEDULES, cheapest_network, checked_layers, table_keys, tables_folder
from sekron_search.progress import Reporter
from sekron_search.rundir import RunFolder
from sekron_search.runtimes.base import threads
from sekron_search.scoring import CandidateStructure, candidates, scores, shortlist
from sekron_search.table_responses import LEAST_OPTIONS, SAMPLES
from sekron_search.tables import table_files
from sekron_search.timing import Layout, Placed, network_costs
from sekron_search.training_estimate import Stage, audit_stages, training_stages

#: Structures of a kind of layer that are fitted for the estimate: so many, or as many as take so many seconds, but for
#: the fewest. Options that are timed.
FITTED, FIT_S, FEWEST_FITTED, TIMED = 12, 1.0, 2, 4

#: Multiples of it modulo 1 are spread evenly, however many there are.
GOLDEN = (5**0.5 - 1) / 2

#: Seconds of importing matplotlib and drawing the plots.
PLOTS_S = 3.0

#: Bytes of an option in JSON files, of a parameter, and of plots and reports.
OPTION_BYTES, PARAM_BYTES, REPORT_BYTES = 1500, 4, 2 * 2**20

#: What a run takes at its largest, in multiples of what its parts take here: records, plots, fragments of memory.
HELD = 1.25

#: What a checkpoint of the training holds per parameter: the weight and two moments of the optimizer.
CHECKPOINT = 3


@dataclass(frozen=True)
class LayerPlan:
    """What is to be done for a layer.

    Args:
        name: The layer.
        structures: Structures of the search space.
        options: Those of them that are fitted on calibration data.
    """

    name: str
    structures: int
    options: int


@dataclass(frozen=True)
class Estimate:
    """What a run will do. All numbers but counts are estimates.

    Args:
        layers: Of the network that can be replaced.
        stages: Of the run, in their order.
        memory_bytes: Of the run's process at its largest, and of the processes that fit tables beside it.
        device_memory_bytes: Of the GPU; None without one.
        disk_bytes: Of the run folder.
    """

    layers: tuple[LayerPlan, ...]
    stages: tuple[Stage, ...]
    memory_bytes: int
    device_memory_bytes: int | None
    disk_bytes: int

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"estimate": True, "seconds": self.seconds, **asdict(self)}


@dataclass(frozen=True)
class _Kind:
    """Layers of equal shape and geometry, of which one was measured.

    Args:
        structures: Of the search space.
        shortlist: That are fitted.
        score_s, fit_s: Seconds of the scoring, and of fitting one of the shortlist.
    """

    structures: int
    shortlist: tuple[CandidateStructure, ...]
    score_s: float
    fit_s: float

    @property
    def params(self) -> float:
        """Of an option, on average."""
        return sum(c.cost.params for c in self.shortlist) / max(len(self.shortlist), 1)


def estimate(job: Job, reporter: Reporter, folder: RunFolder) -> Estimate:
    """Measure the parts of a run, and count how often it does each.

    Args:
        job: The run.
        reporter: Told of the progress.
        folder: Where the run would be made; it need not be there.

    Raises:
        SekronError: As the run would before any long work, but for a latency budget, which takes long to be found
            out of reach.
    """
    base_bytes = _peak_bytes()
    job.model.eval()
    check_audit(job)
    with threads(job.settings.latency.num_threads):
        inspection = checked_layers(job)
        layers = inspection.layers
        reporter.say("measuring the original network")
        form = job.memory_formats[0]
        original: dict[str, Placed] = {"original": (job.model, form)}
        pass_s = _pass_seconds(job)
        metric = job.validate
        metric_s = 0.0 if metric is None else _once(lambda: metric(job.model), job)
        watch = Stopwatch(job.device)
        costs = network_costs(job, original)["original"]
        first_s = watch.seconds()
        memory = peak_memory(job.model, job.example_inputs, tuple(info.name for info in layers))
        known = Tables(inspection, layers, costs, memory, Layout(form, 1, form, {form: costs["latency_ms"]}), ())
        cheapest_network(job, known, job.settings.space)
        costs_s = _once(lambda: network_costs(job, original), job)
        moments_s, metrics = _calibrated(job, layers)
        kinds = _kinds(job, layers, metrics, reporter)
        count, fit_s = _fitted(job), _sequential_seconds(job, layers, kinds, pass_s)
        stages = [
            Stage("original", "its costs and metric", first_s + len(job.memory_formats) * costs_s + metric_s),
            _tables(job, layers, kinds, moments_s, folder),
            *_latencies(job, layers, kinds, reporter),
            *_search(job, layers, kinds, pass_s),
            Stage("candidates", f"{count} networks, layer after layer", count * (fit_s + metric_s + 3 * costs_s)),
            *training_stages(job, metric_s, reporter),
            Stage("report", "costs of two networks, metrics of three, plots", 2 * costs_s + 3 * metric_s + PLOTS_S),
            *audit_stages(job, fit_s, metric_s, reporter),
        ]
    workers = _workers(job, layers, _fit_seconds(layers, kinds))
    peak = int(HELD * _peak_bytes()) + (workers * base_bytes if workers > 1 else 0)
    return Estimate(
        tuple(LayerPlan(i.name, kinds[_key(i)].structures, len(kinds[_key(i)].shortlist)) for i in layers),
        tuple(stages),
        peak,
        _gpu_bytes(),
        _disk_bytes(job, layers, kinds),
    )


def _gpu_bytes() -> int | None:
    """What was taken of the GPU that is used most; None where none is."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    return max(torch.cuda.max_memory_reserved(index) for index in range(torch.cuda.device_count()))


def _key(info: LayerInfo) -> LayerInfo:
    """What layers of a kind have in common."""
    return replace(info, name="", output_shift="kept")


def _once(call: Callable[[], object], job: Job) -> float:
    watch = Stopwatch(job.device)
    call()
    return watch.seconds()


@torch.no_grad()
def _pass_seconds(job: Job) -> float:
    """Of a pass of the original, per sample: the median of three, after one that is not counted."""
    inputs = job.calibration[0]
    times = [_once(lambda: run_model(job.model, inputs), job) for _ in range(4)]
    return sorted(times[1:])[1] / batch_size(inputs)


def _samples(batches: Sequence[Any]) -> int:
    return sum(map(batch_size, batches))


def _calibrated(job: Job, layers: Sequence[LayerInfo]) -> tuple[float, dict[str, InputMetric]]:
    """Seconds of the moments of all layers, from one batch of them; one metric of every kind of layer."""
    few = list({_key(info): info for info in layers}.values())
    watch = Stopwatch(job.device)
    curvature = {}
    if job.settings.calibration.curvature:
        classes = job.settings.search.divergence == "kl"
        curvature = output_curvature(job.model, few, job.calibration[:1], classes=classes, seed=job.settings.seed)
    found: dict[str, InputMetric] = {}
    for group in memory_groups(few):
        found |= collect_metrics(job.model, group, job.calibration[:1], curvature=curvature, seed=job.settings.seed)
    share = len(layers) / len(few)
    return watch.seconds() * share * len(job.calibration), {_key(i): found[i.name] for i in few}  # type: ignore[misc]


def _kinds(job: Job, layers: Sequence[LayerInfo], metrics: Any, reporter: Reporter) -> dict[LayerInfo, _Kind]:
    """One layer of every kind: scored as the run scores it, and a few of its structures fitted."""
    space = job.settings.space
    first = {_key(info): info for info in reversed(layers)}
    found = {}
    with reporter.task("measuring fits", len(first)) as task, threads(None if job.device.type == "cuda" else 1):
        for done, (key, info) in enumerate(first.items(), start=1):
            weight = layer_weight(job.model, info).double()
            watch = Stopwatch(job.device)
            pool = candidates(info, space)
            chosen = [pool[i] for i in shortlist(pool, scores(pool, weight, space.max_fits), space.max_options)]
            score_s = watch.seconds()
            fit_s = _fit_seconds_of(job, chosen, Refiner(weight, metrics[key]))
            found[key] = _Kind(len(pool), tuple(chosen), score_s, fit_s)
            task.update(done, info.name)
    return found


def _fit_seconds_of(job: Job, chosen: Sequence[CandidateStructure], refiner: Refiner) -> float:
    """Of one of these, on average: some are fitted, spread over their flops whenever time is up."""
    order = sorted(range(len(chosen)), key=lambda i: (i + 1) * GOLDEN % 1)[:FITTED]
    watch, done = Stopwatch(job.device), 0
    for i in order:
        refiner.fit(chosen[i].structure, steps=job.settings.calibration.refine_steps)
        done += 1
        if done >= FEWEST_FITTED and watch.seconds() > FIT_S:
            break
    return watch.seconds() / max(done, 1)


def _fit_seconds(layers: Sequence[LayerInfo], kinds: dict[LayerInfo, _Kind]) -> float:
    return sum(kinds[_key(i)].score_s + kinds[_key(i)].fit_s * len(kinds[_key(i)].shortlist) for i in layers)


def _workers(job: Job, layers: Sequence[LayerInfo], seconds: float) -> int:
    """Processes that fit tables."""
    several = job.device.type != "cuda" and seconds > LEAST_SECONDS
    return min(torch.get_num_threads(), len(layers)) if several else 1


def _tables(
    job: Job, layers: Sequence[LayerInfo], kinds: dict[LayerInfo, _Kind], moments_s: float, folder: RunFolder
) -> Stage:
    """Of the layers whose tables are not there yet."""
    kept = _kept(job, layers, folder)
    left = [info for info in layers if info.name not in kept]
    seconds = _fit_seconds(left, kinds)
    count = sum(len(kinds[_key(i)].shortlist) for i in left)
    amount = f"{count:,} options of {len(left)} layers, fitted on {_samples(job.calibration):,} samples"
    if kept:
        amount += f"; tables of {len(kept)} layers are there already"
    return Stage("tables", amount, moments_s * len(left) / len(layers) + seconds / _workers(job, left, seconds))


def _kept(job: Job, layers: Sequence[LayerInfo], folder: RunFolder) -> set[str]:
    """Names of the layers whose tables the run would find; none where the granularity of ranks is to be measured."""
    if folder.layout.exists():
        granularity = int(read_json(folder.layout)["granularity"])
    elif "latency_ms" not in job.settings.bounds.names:
        granularity = 1
    elif job.profile is not None and job.profile.fitted is not None:
        granularity = job.profile.fitted.granularity
    else:
        return set()
    cache, space = tables_folder(job, folder), job.settings.space.with_granularity(granularity)
    keys = table_keys(job, layers, space)
    return {name for name, key in keys.items() if all(path.exists() for path in table_files(cache, key))}


def _latencies(job: Job, layers: Sequence[LayerInfo], kinds: dict[LayerInfo, _Kind], reporter: Reporter) -> list[Stage]:
    """The clock's part, where latency is budgeted and not predicted."""
    if "latency_ms" not in job.settings.bounds.names or job.elsewhere is not None:
        return []
    runtime = job.runtime(job.memory_formats[0])
    info = max(layers, key=lambda i: len(kinds[_key(i)].shortlist))
    few = kinds[_key(info)].shortlist[:TIMED]
    jobs = [(info, c.structure, Schedule.parse(str(c.cost.schedule)), "factored") for c in few]
    reporter.say("measuring latencies of a few options")
    seconds = _once(lambda: DeviceProfile.empty(runtime).measure(jobs, job.batch, runtime), job)  # type: ignore[arg-type]
    count = sum(len(kinds[key].shortlist) for key in {_key(i) for i in layers}) * TIMED_SCHEDULES
    return [Stage("latencies", f"{count:,} ways to run an option, at most", seconds / max(len(few), 1) * count)]


def _search(job: Job, layers: Sequence[LayerInfo], kinds: dict[LayerInfo, _Kind], pass_s: float) -> list[Stage]:
    trials, held_out = job.settings.search.trials, _samples(job.holdout)
    copy_s = _once(lambda: copy_model(job.model), job)
    seen = _samples(first_batches(job.holdout, SAMPLES))
    options = sum(len(kinds[_key(i)].shortlist) for i in layers)
    affordable = trials * held_out // seen
    responses = min(options, affordable) if affordable >= LEAST_OPTIONS * len(layers) else 0
    amount, seconds = f"{trials} networks on {held_out:,} samples", trials * (copy_s + 1.25 * held_out * pass_s)
    if (limit_s := job.settings.search.time_limit_s) is not None and limit_s < seconds:
        amount, seconds = f"{amount}, or as many as {limit_s:,.0f} s allow", limit_s
    return [
        Stage("responses", f"{responses:,} options", responses * (copy_s + seen * pass_s)),
        Stage("trials", amount, seconds),
    ]


def _sequential_seconds(job: Job, layers: Sequence[LayerInfo], kinds: dict[LayerInfo, _Kind], pass_s: float) -> float:
    """Of a network's fits layer after layer: a fit each, passes of both networks up to the layer, its divergence."""
    fits_s = 0.0
    if job.settings.calibration.sequential_steps:
        fits_s = sum(kinds[_key(i)].fit_s for i in layers) + len(layers) * 2 * _samples(job.calibration) * pass_s
    return fits_s + _samples(job.holdout) * pass_s


def _peak_bytes() -> int:
    """Of memory that this process has taken so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _disk_bytes(job: Job, layers: Sequence[LayerInfo], kinds: dict[LayerInfo, _Kind]) -> int:
    tables = sum(len(kinds[_key(i)].shortlist) * (kinds[_key(i)].params * PARAM_BYTES + OPTION_BYTES) for i in layers)
    bound = dict(job.settings.bounds.items()).get("params")
    share = bound.value if bound is not None and bound.relative else 1.0
    weights = share * sum(t.numel() * t.element_size() for t in job.model.state_dict().values())
    trained = CHECKPOINT if job.trains else 0
    trained_too = job.settings.finetune.candidates * (1 + trained)
    return int(tables + weights * (1 + _fitted(job) + trained_too) + REPORT_BYTES)


def _fitted(job: Job) -> int:
    """How many networks are fitted layer after layer: those that are trained, and those that lean to cheap weights."""
    return job.settings.finetune.candidates + len(job.settings.search.leanings)
