"""The stages of a run, each skipped where its result exists: inspect, tables, profile, search, finish, report."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from sekron_search.calibration import collect_metrics
from sekron_search.config import Settings
from sekron_search.costs.measure import measure_networks, threads
from sekron_search.costs.memory import PeakMemory, peak_memory
from sekron_search.costs.profile import DeviceProfile, Provenance, layer_key
from sekron_search.costs.traced import reestimate_batch_norm, traced_flops
from sekron_search.errors import ConfigError, DataError, RunFolderError
from sekron_search.export import Factory, factory_json, load, save_artefact, state_digest
from sekron_search.files import read_json, read_tensors, write_json, write_tensors, write_text
from sekron_search.finetune import TrainingData, finetune
from sekron_search.kron.structure import Structure
from sekron_search.model import (
    Inputs,
    Inspection,
    LayerInfo,
    as_inputs,
    batch_size,
    build_layer,
    inspect_model,
    layer_weight,
    replace_layers,
)
from sekron_search.progress import Reporter
from sekron_search.proxies import mean_divergence, reference_outputs
from sekron_search.report.facts import build_report
from sekron_search.report.write import write_report
from sekron_search.rundir import RunFolder
from sekron_search.search.budget import CostName
from sekron_search.search.knapsack import infeasible, solve_knapsack
from sekron_search.search.options import Assignment, LayerTable, Network, Option
from sekron_search.search.study import Halving, Trial, best_feasible, run_study
from sekron_search.sequential import fit_sequentially
from sekron_search.tables import FittedLayer, build_tables, cheapest_table, selected

#: How often the search is repeated with a corrected latency model when its networks miss the budget as measured.
MAX_ROUNDS = 3

Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Job:
    """Everything a run needs, wherever it came from.

    Args:
        model: The trained network; never changed.
        example_inputs: The batch on which latency and peak memory are meant.
        calibration: Inputs on which layers are fitted.
        holdout: Other inputs, on which the divergence is measured.
        settings: What to do.
        validate: Metric for choosing, higher is better.
        test: Metric for the report, on data that nothing before has seen.
        train: For fine-tuning.
        factory: How the architecture is built, for the artefact.
        source: What the model and the data are, for the run folder's identity.
    """

    model: nn.Module
    example_inputs: Inputs
    calibration: Sequence[Inputs]
    holdout: Sequence[Inputs]
    settings: Settings
    validate: Metric | None = None
    test: Metric | None = None
    train: TrainingData | None = None
    factory: Factory | None = None
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return torch.device(self.settings.device)

    @property
    def batch(self) -> int:
        """Samples of the example batch."""
        return batch_size(self.example_inputs)


def run(job: Job, folder: RunFolder, reporter: Reporter, *, resume: bool) -> dict[str, Any]:
    """Do all stages, or those that are left, and return the report.

    Raises:
        SekronError: On bad input, each before the long work that it would waste.
    """
    job.model.eval()
    fingerprint: dict[str, Any] = {
        "settings": job.settings.model_dump(mode="json"),
        "model": state_digest(job.model),
        "source": dict(job.source),
    }
    with folder.claimed(fingerprint, resume=resume), threads(job.settings.latency.num_threads):
        if folder.report.exists():
            write_report(folder)
            finished: dict[str, Any] = read_json(folder.report)
            return finished
        _write_environment(job, folder)
        write_text(folder.config, yaml.safe_dump({**fingerprint["settings"], **job.source}, sort_keys=False))
        prepared = prepare(job, folder, reporter)
        evaluator = Evaluator(job, prepared.layers, prepared.fitted)
        searched = _search_until_met(job, folder, reporter, prepared, evaluator)
        best = _finish_candidates(job, folder, reporter, prepared, searched)
        return _report(job, folder, reporter, prepared, searched, best)


@dataclass(frozen=True)
class Tables:
    """The original's facts, and what every layer can become."""

    inspection: Inspection
    layers: tuple[LayerInfo, ...]
    original: dict[str, float]
    memory: PeakMemory
    fitted: tuple[FittedLayer, ...]


@dataclass(frozen=True)
class Prepared(Tables):
    """The tables with latencies, as the search sees them."""

    network: Network


def fit_tables(job: Job, folder: RunFolder, reporter: Reporter) -> Tables:
    """Inspect the network, check that the budget can be met, and fit every layer's options."""
    settings = job.settings
    inspection = inspect_model(job.model, job.example_inputs)
    layers = tuple(selected(inspection.layers, settings.space))
    if not layers:
        skipped = "; ".join(f"'{s.name}': {s.reason}" for s in inspection.skipped[:5])
        raise DataError(
            f"no layer can be replaced ({skipped or 'there is none, or the search space excludes them all'}); "
            "see `sekron-search inspect`"
        )
    original = _original_costs(job, folder, reporter)
    memory = peak_memory(job.model, job.example_inputs, tuple(info.name for info in layers))
    element = next(job.model.parameters()).element_size() * job.batch
    _check_reachable(job, layers, original, memory, element)
    with reporter.task("calibrating", len(job.calibration)) as task, torch.no_grad():
        reference_outputs(job.model, job.calibration[:1])
        metrics = collect_metrics(job.model, layers, job.calibration, seed=settings.seed, progress=task.update)
    fitted: list[FittedLayer] = []
    with reporter.task("fitting options", len(layers)) as task:
        for table in build_tables(
            layers,
            lambda info: layer_weight(job.model, info),
            metrics,
            settings.space,
            folder.tables,
            bytes_per_sample=element,
            steps=settings.calibration.refine_steps,
        ):
            fitted.append(table)
            task.update(len(fitted), f"{table.table.name}: {len(table.table.options)} options")
    return Tables(inspection, layers, original, memory, tuple(fitted))


def prepare(job: Job, folder: RunFolder, reporter: Reporter) -> Prepared:
    """The tables, and the latencies of their options where latency is budgeted."""
    tables = fit_tables(job, folder, reporter)
    fitted = tables.fitted
    if "latency_ms" in job.settings.bounds.names:
        profile = _measure_options(job, folder, reporter, tables)
        fitted = tuple(_with_latency(f, i, profile, job.batch) for f, i in zip(fitted, tables.layers, strict=True))
    network = Network(
        tuple(dataclasses.replace(f.table, outside_bytes=tables.memory.outside[f.table.name]) for f in fitted),
        tables.original,
        float(tables.memory.floor),
    )
    return Prepared(tables.inspection, tables.layers, tables.original, tables.memory, fitted, network)


def measure_profile(job: Job, folder: RunFolder, reporter: Reporter) -> DeviceProfile:
    """A device profile of every option of the job's network, measured here."""
    with threads(job.settings.latency.num_threads):
        return _measure_options(job, folder, reporter, fit_tables(job, folder, reporter))


class Evaluator:
    """Assembles the network of an assignment and measures how far its outputs are from the original's."""

    def __init__(self, job: Job, layers: Sequence[LayerInfo], fitted: Sequence[FittedLayer]) -> None:
        self.job, self.layers, self.fitted = job, layers, fitted
        self.references = reference_outputs(job.model, job.holdout)

    def assemble(self, assignment: Assignment) -> nn.Module:
        """The network with the fitted factors, the biases corrected, batch-norm statistics re-estimated."""
        replacements: dict[str, nn.Module] = {}
        for info, fitted, index in zip(self.layers, self.fitted, assignment, strict=True):
            option = fitted.table.options[index]
            if option.is_original:
                continue
            layer = build_layer(
                self.job.model,
                info,
                structure=Structure.parse(option.structure),
                factors=[a.to(self.job.device) for a in fitted.factors[index]],
                order=option.order,
                execution=option.execution,
            )
            shift = fitted.shifts[index]
            if info.output_shift == "correctable" and layer.bias is not None and shift is not None:
                with torch.no_grad():
                    layer.bias.add_(shift.to(layer.bias))
            replacements[info.name] = layer
        network = replace_layers(self.job.model, replacements).eval()
        reestimate_batch_norm(network, self.job.calibration)
        return network

    def divergence(self, network: nn.Module) -> float:
        """Of a network's outputs on the held-out calibration inputs."""
        name = self.job.settings.search.divergence
        return mean_divergence(name, network, self.job.holdout, self.references)

    def __call__(self, assignment: Assignment) -> float:
        """Divergence of an assignment."""
        return self.divergence(self.assemble(assignment))


@dataclass(frozen=True)
class Searched:
    """What the search gave: all trials, the candidates with their measured costs, and the bounds in force."""

    trials: list[Trial]
    candidates: list[dict[str, Any]]
    network: Network
    bounds: dict[CostName, float]


def _search_until_met(
    job: Job, folder: RunFolder, reporter: Reporter, prepared: Prepared, evaluator: Evaluator
) -> Searched:
    """Search, measure the candidates as whole networks, and search again where the latency model was too hopeful."""
    bounds = job.settings.bounds.resolve(prepared.original)
    corrected = dict(bounds)
    for number in range(1, MAX_ROUNDS + 1):
        trials = _search(job, folder, reporter, prepared, evaluator, corrected, number)
        candidates = _measure_candidates(job, folder, reporter, prepared, evaluator, trials)
        if any(all(c["costs"][n] <= b for n, b in bounds.items()) for c in candidates) or number == MAX_ROUNDS:
            break
        for name, bound in bounds.items():
            ratio = min(c["costs"][name] / c["predicted"][name] for c in candidates)
            if ratio > 1:
                corrected[name] = bound / ratio * 0.98
        reporter.say("the measured networks miss the budget; searching again with corrected costs")
    return Searched(trials, candidates, prepared.network, bounds)


def _search(
    job: Job,
    folder: RunFolder,
    reporter: Reporter,
    prepared: Prepared,
    evaluator: Evaluator,
    bounds: Mapping[CostName, float],
    number: int,
) -> list[Trial]:
    settings = job.settings
    trials: list[Trial] = []
    best = float("inf")
    total = settings.search.trials
    with reporter.task("searching", total) as task:
        for trial in run_study(
            prepared.network,
            bounds,
            evaluator,
            storage=f"sqlite:///{folder.study}",
            name=f"round {number}: " + ", ".join(f"{n} <= {b:.6g}" for n, b in bounds.items()),
            trials=total,
            seed=settings.seed,
            sampler=settings.search.sampler,
        ):
            trials.append(trial)
            best = min(best, trial.divergence) if trial.feasible else best
            task.update(len(trials), f"best divergence {best:.4g}")
    write_json(folder.search, {"round": number, "bounds": dict(bounds), "trials": [t.to_json() for t in trials]})
    return trials


def _measure_candidates(
    job: Job,
    folder: RunFolder,
    reporter: Reporter,
    prepared: Prepared,
    evaluator: Evaluator,
    trials: Sequence[Trial],
) -> list[dict[str, Any]]:
    """The best feasible trials as networks: fitted layer after layer, then measured; stored in the run folder."""
    settings = job.settings
    chosen = best_feasible(trials, settings.finetune.candidates)
    if not chosen:
        raise infeasible(prepared.network, settings.bounds.resolve(prepared.original))
    records = []
    for trial in chosen:
        record_path = _candidate_folder(folder, trial.assignment) / "candidate.json"
        if not record_path.exists():
            network = evaluator.assemble(trial.assignment)
            if settings.calibration.sequential_steps:
                before = {name: t.clone() for name, t in network.state_dict().items()}
                with reporter.task("fitting layer after layer", len(prepared.layers)) as task:
                    fit_sequentially(
                        network,
                        job.model,
                        prepared.layers,
                        job.calibration,
                        steps=settings.calibration.sequential_steps,
                        progress=task.update,
                    )
                divergence = evaluator.divergence(network)
                if divergence > trial.divergence:
                    network.load_state_dict(before)
                    divergence = trial.divergence
            else:
                divergence = trial.divergence
            write_tensors(record_path.parent / "weights.safetensors", dict(network.state_dict()))
            record = {
                "assignment": list(trial.assignment),
                "trial": trial.index,
                "divergence": divergence,
                "divergence_before_sequential_fit": trial.divergence,
                "predicted": dict(trial.costs),
                "costs": _network_costs(job, {"candidate": network})["candidate"],
                "metric": job.validate(network) if job.validate is not None else None,
            }
            write_json(record_path, record)
        records.append(read_json(record_path))
    return records


def _finish_candidates(
    job: Job, folder: RunFolder, reporter: Reporter, prepared: Prepared, searched: Searched
) -> dict[str, Any]:
    """Fine-tune the candidates that meet the budget as measured; the best by the validation metric."""
    settings = job.settings
    met = [c for c in searched.candidates if all(c["costs"][n] <= b for n, b in searched.bounds.items())]
    pool = met or searched.candidates
    halving = Halving()
    results: list[tuple[dict[str, Any], list[dict[str, float]], float | None, nn.Module]] = []
    for record in pool:
        curve: list[dict[str, float]] = []
        home = _candidate_folder(folder, tuple(record["assignment"]))
        network = _candidate_network(job, prepared, home, record)
        if job.train is not None and settings.finetune.epochs > 0:
            halving.start()
            total = len(job.train) * settings.finetune.epochs
            with reporter.task(f"fine-tuning {len(results) + 1}/{len(pool)}", total) as task:
                curve = finetune(
                    network,
                    job.model,
                    job.train,
                    settings.finetune,
                    divergence=settings.search.divergence,
                    validate=job.validate,
                    checkpoint=home / "checkpoint.pt",
                    after_epoch=halving.keep_on,
                    device=job.device,
                    progress=task.update,
                )
            write_json(home / "curve.json", curve)
        metric = curve[-1]["metric"] if curve else record["metric"]
        if curve and job.validate is not None and record["metric"] > metric:
            # Training can hurt where there is little data: then the network stays as it was fitted.
            network, metric = _candidate_network(job, prepared, home, record), record["metric"]
        results.append((record, curve, metric, network))
    # Without any metric the divergence decides; candidates come in its order.
    best = max(range(len(results)), key=lambda i: (results[i][2] if results[i][2] is not None else 0.0, -i))
    record, curve, metric, network = results[best]
    save_artefact(folder.compressed, network, job.factory)
    return {**record, "curve": curve, "validation_metric": metric, "budget_met_before_training": bool(met)}


def _report(
    job: Job, folder: RunFolder, reporter: Reporter, prepared: Prepared, searched: Searched, best: dict[str, Any]
) -> dict[str, Any]:
    """Re-load the artefact, measure it beside the original, and write everything down."""
    reporter.say("measuring the saved and re-loaded network beside the original")
    reloaded = load(folder.path, model=job.model if job.factory is None else None).to(job.device)
    costs = _network_costs(job, {"original": job.model, "compressed": reloaded})
    test = job.test or job.validate
    metric = {
        name: None if test is None else test(m) for name, m in (("original", job.model), ("compressed", reloaded))
    }
    assignment = tuple(best["assignment"])
    untrained = _candidate_network(job, prepared, _candidate_folder(folder, assignment), best)
    metric["untrained"] = None if test is None else test(untrained)
    report = build_report(
        network=prepared.network,
        inspection=prepared.inspection,
        bounds=searched.bounds,
        budget=job.settings.bounds,
        trials=searched.trials,
        best=best,
        costs=costs,
        metrics=metric,
        batch=job.batch,
        metric_name=job.settings.metric,
        divergence_name=job.settings.search.divergence,
        uncounted=read_json(folder.original)["uncounted"],
        environment=read_json(folder.environment),
    )
    write_json(folder.report, report)
    write_report(folder)
    return report


def _original_costs(job: Job, folder: RunFolder, reporter: Reporter) -> dict[str, float]:
    """Costs of the original, measured once per run folder so that budgets mean the same after a resume."""
    if not folder.original.exists():
        reporter.say("measuring the original network")
        costs = _network_costs(job, {"original": job.model})["original"]
        uncounted = traced_flops(job.model, job.example_inputs).uncounted
        write_json(folder.original, {"costs": costs, "uncounted": uncounted})
    costs = read_json(folder.original)["costs"]
    return {name: float(value) for name, value in costs.items()}


def _network_costs(job: Job, networks: Mapping[str, nn.Module]) -> dict[str, dict[str, float]]:
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
    job: Job, layers: Sequence[LayerInfo], original: Mapping[str, float], memory: PeakMemory, element: int
) -> None:
    """Refuse a budget that no choice of structures can meet, before anything is fitted or measured."""
    counted = [name for name in job.settings.bounds.names if name != "latency_ms"]
    resolved = job.settings.bounds.resolve(original)
    bounds: dict[CostName, float] = {name: resolved[name] for name in counted}
    if not bounds:
        return
    tables = tuple(
        dataclasses.replace(cheapest_table(i, job.settings.space, element), outside_bytes=memory.outside[i.name])
        for i in layers
    )
    network = Network(tables, original, float(memory.floor))
    solve_knapsack(network, bounds, network.values("flops"), relative_gap=1.0)


def _measure_options(job: Job, folder: RunFolder, reporter: Reporter, tables: Tables) -> DeviceProfile:
    """The device profile with every option's latency; kept in the run folder."""
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
        (info, Structure.parse(o.structure), o.order, o.execution)
        for info, f in zip(tables.layers, tables.fitted, strict=True)
        for o in f.table.options
    ]
    missing = {layer_key(*j, job.batch) for j in jobs} - set(profile.latencies)
    with reporter.task("measuring options", len(missing)) as task:
        profile.measure(
            jobs,
            job.batch,
            progress=lambda done, total: task.update(done),
            after_group=lambda: write_text(folder.profile, profile.to_yaml()),
        )
    write_text(folder.profile, profile.to_yaml())
    # What is on disk counts, rounded as it is: a resumed run reads it from there.
    return DeviceProfile.load(folder.profile)


def _with_latency(fitted: FittedLayer, info: LayerInfo, profile: DeviceProfile, batch: int) -> FittedLayer:
    options = []
    for option in fitted.table.options:
        structure = Structure.parse(option.structure)
        found = profile.latencies[layer_key(info, structure, option.order, option.execution, batch)]
        options.append(dataclasses.replace(option, latency_ms=found.median_ms, latency_noise_ms=found.noise_ms))
    return dataclasses.replace(fitted, table=LayerTable(fitted.table.name, tuple(options)))


def _candidate_folder(folder: RunFolder, assignment: Assignment) -> Path:
    """Folder of a candidate, named after its assignment."""
    return folder.candidates / hashlib.sha256(repr(tuple(assignment)).encode()).hexdigest()[:10]


def _candidate_network(job: Job, prepared: Prepared, home: Path, record: Mapping[str, Any]) -> nn.Module:
    """A candidate as it was before fine-tuning."""
    replacements: dict[str, nn.Module] = {}
    for info, table, index in zip(prepared.layers, prepared.network.tables, record["assignment"], strict=True):
        option: Option = table.options[index]
        if not option.is_original:
            structure = Structure.parse(option.structure)
            weight = layer_weight(job.model, info)
            empty: list[Tensor] = [weight.new_zeros(info.geometry.groups, *s) for s in structure.factor_shapes]
            replacements[info.name] = build_layer(
                job.model, info, structure=structure, factors=empty, order=option.order, execution=option.execution
            )
    network = replace_layers(job.model, replacements)
    network.load_state_dict(read_tensors(home / "weights.safetensors"))
    return network.to(job.device).eval()


def _write_environment(job: Job, folder: RunFolder) -> None:
    """What the run ran on; written once."""
    if folder.environment.exists():
        return
    packages = ("sekron-search", "torch", "optuna", "fvcore", "numpy", "scipy", "safetensors")
    write_json(
        folder.environment,
        {
            **dataclasses.asdict(Provenance.here(job.device, job.settings.latency.num_threads)),
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "packages": {name: metadata.version(name) for name in packages},
            "seed": job.settings.seed,
            "factory": factory_json(job.factory),
        },
    )


def new_folder(path: Path | None) -> RunFolder:
    """The run folder at a path; by default runs/run-1, run-2, ... in the working directory, the first that is free."""
    if path is not None:
        return RunFolder(path)
    for number in range(1, 10_000):
        candidate = Path("runs") / f"run-{number}"
        if not candidate.exists():
            return RunFolder(candidate)
    raise RunFolderError("runs/ holds ten thousand runs; clear it, or name a folder")


def example_batch(batches: Sequence[Inputs], size: int) -> Inputs:
    """The first `size` samples of calibration inputs, as the example batch.

    Raises:
        ConfigError: If there are too few samples.
    """
    arguments = zip(*batches, strict=True)
    joined = as_inputs(tuple(torch.cat(list(argument)) for argument in arguments))
    if batch_size(joined) < size:
        raise ConfigError(
            f"latency.batch_size is {size}, but there are only {batch_size(joined)} calibration samples to fill it"
        )
    return tuple(argument[:size] for argument in joined)
