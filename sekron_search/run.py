"""A whole run: prepare, search, finish, report; every stage is skipped where the run folder has its result."""

from __future__ import annotations

import dataclasses
import datetime
import platform
import sys
from importlib import metadata
from typing import Any

import torch
import yaml
from torch import nn

from sekron_search.audit import audit, check_audit, plan_audit
from sekron_search.candidate import Finished, Searched
from sekron_search.candidates import Finder
from sekron_search.catalog import finished_report
from sekron_search.costs.profile import DeviceProfile, Provenance
from sekron_search.costs.traced import traced_flops
from sekron_search.data import SplitMetric
from sekron_search.errors import RunFolderError, SekronError
from sekron_search.export import factory_json, load, save_artefact
from sekron_search.files import read_json, write_json, write_text
from sekron_search.job import Job
from sekron_search.model import output_tensors
from sekron_search.pick import Pick
from sekron_search.prepare import prepare, prepare_whole
from sekron_search.progress import Reporter
from sekron_search.report.facts import RunFacts
from sekron_search.report.latency import profile_facts
from sekron_search.report.write import write_report
from sekron_search.rundir import RunFolder
from sekron_search.runtimes.base import MemoryFormat, threads, with_memory_format
from sekron_search.search.record import SearchRecord
from sekron_search.sharing import Sharing
from sekron_search.team import Team
from sekron_search.team_task import Task
from sekron_search.timing import Layout, network_costs, own_threads

#: Under which key the first process of a team says the report at the end.
OVER = "over"


def run(
    job: Job, folder: RunFolder, reporter: Reporter, *, resume: bool, sharing: Sharing | None = None
) -> dict[str, Any]:
    """Do all stages, or those that are left, and return the report.

    Among processes that torchrun has started the first one does, and the others help it to train.

    Args:
        job: What to do.
        folder: Where.
        reporter: Told of the progress.
        resume: Whether a folder that holds the run already may be gone on with.
        sharing: Where the search is shared with workers; no part of the run's identity.

    Raises:
        SekronError: On bad input, each before the long work that it would waste.
    """
    team = Team.here()
    if team.rank > 0:
        return _assist(job, team)
    report = None
    try:
        report = _run(job, folder, reporter, resume=resume, sharing=sharing)
    finally:
        team.told({OVER: report})  # None if it failed
    return report


def _assist(job: Job, team: Team) -> dict[str, Any]:
    """Take part in all trainings of the team's first process; its report."""
    job.model.eval()
    with threads(job.settings.latency.num_threads):
        while OVER not in (told := team.told()):
            task = Task.from_plain(told)
            job.distillation_by(task.config).assist(task)
    report: dict[str, Any] | None = told[OVER]
    if report is None:
        raise SekronError("the run failed in the first process; its message says why")
    return report


def _run(
    job: Job, folder: RunFolder, reporter: Reporter, *, resume: bool, sharing: Sharing | None = None
) -> dict[str, Any]:
    job.model.eval()
    sharing = sharing or Sharing()
    sharing.check()
    check_audit(job)
    fingerprint = job.fingerprint()
    with (
        folder.claimed(fingerprint, resume=resume),
        folder.failures_kept(),
        threads(own_threads(job, folder)),
    ):
        if folder.report.exists():
            finished = finished_report(folder)
            write_report(folder)
            return finished
        begun = datetime.datetime.now(datetime.UTC)
        settings = job.settings.model_dump(mode="json")
        write_text(folder.config, yaml.safe_dump({**settings, **job.source}, sort_keys=False))
        pick = Pick.of(folder)
        tables = prepare(job, folder, reporter) if pick is None else prepare_whole(job, folder, reporter)
        planned = plan_audit(job, tables.network)
        _write_environment(job, folder, tables.layout.memory_format, begun)
        finder = Finder(job, tables, folder, reporter, sharing)
        searched = _searched(finder) if pick is None else finder.take(pick)
        chosen = finder.finish(searched)
        reporter.say("measuring the saved and re-loaded network beside the original")
        layout = tables.layout
        networks = {"original": job.model, "compressed": _saved(job, folder, chosen.network, layout.memory_format)}
        formats = {"original": layout.original_format, "compressed": layout.memory_format}
        facts = RunFacts(
            settings=job.settings.model_copy(update={} if pick is None else {"budget": dict(pick.budget)}),
            inspection=tables.inspection,
            network=searched.network,
            latency=_latency_facts(job, folder, layout, searched),
            trials=searched.trials,
            candidates={finder.home(c.assignment).name: c for c in searched.candidates},
            chosen=chosen,
            learning_rate=_learning_rate(folder),
            costs=network_costs(job, {name: (network, formats[name]) for name, network in networks.items()}),
            metrics=_metrics(job, {**networks, "untrained": finder.load(chosen.candidate)}),
            batch_size=job.batch,
            uncounted=traced_flops(networks["compressed"], job.example_inputs).uncounted,
            environment=read_json(folder.environment),
        )
        report = {
            **facts.to_json(),
            "diverged": _diverged(chosen),
            "audit": audit(finder.assembler, planned, folder, reporter),
            "finishes": None if pick is None else pick.to_json(),
            "measured_on": Provenance.here(job.runtime(layout.memory_format)).processor,
        }
        write_json(folder.report, report)
        write_report(folder)
        return finished_report(folder)  # plain data, as every later call and the other processes of a team get it


def _searched(finder: Finder) -> Searched:
    """The search's result; all options of the layers are recorded, for other budgets."""
    searched, tables = finder.search(), finder.tables
    whole = dataclasses.replace(tables.whole or tables.network, latency_scale=searched.network.latency_scale)
    SearchRecord.of(whole, searched.network, finder.job.settings.bounds.names).save(finder.folder.network)
    return searched


def _saved(job: Job, folder: RunFolder, network: nn.Module, memory_format: MemoryFormat) -> nn.Module:
    """The network as users will get it: saved and loaded again, and checked to be the same."""
    save_artefact(folder.compressed, network, job.factory, memory_format)
    network = with_memory_format(network, memory_format)
    loaded = load(folder.path, model=job.model if job.factory is None else None).to(job.device)
    with torch.no_grad():
        outputs = [output_tensors(n.eval()(*job.example_inputs)) for n in (network, loaded)]
    if not all(torch.equal(a, b) for a, b in zip(*outputs, strict=True)):
        raise RunFolderError(
            f"{folder.compressed}: the re-loaded network's outputs differ from those of the one that was saved; the "
            "factory builds another architecture, or the network keeps state outside of its state dict"
        )
    return loaded


def _latency_facts(job: Job, folder: RunFolder, layout: Layout, searched: Searched) -> dict[str, Any] | None:
    """How latency was measured, and how well sums over layers predict it; None where it was not budgeted."""
    if "latency_ms" not in job.settings.bounds.names:
        return None
    runtime = job.runtime(layout.memory_format)
    return {
        "predicted_for": None if job.elsewhere is None else job.elsewhere.provenance.processor,
        "runtime": runtime.name,
        "version": runtime.version(),
        "num_threads": runtime.thread_count,
        "memory_format": layout.memory_format,
        "original_memory_format": layout.original_format,
        "granularity": layout.granularity,
        "calibration": read_json(folder.calibration)["networks"],
        "scale": searched.network.latency_scale,
        "profile": profile_facts(DeviceProfile.load(folder.profile)),
        "candidates": [
            {
                "predicted": c.predicted["latency_ms"] / searched.network.unchanged("latency_ms"),
                "measured": c.latency_share,
                "noise": c.costs["latency_noise_ms"] / c.base_latency_ms,
            }
            for c in searched.candidates
        ],
    }


def _learning_rate(folder: RunFolder) -> dict[str, Any] | None:
    """What was found, and tried; None where a rate was given, or nothing was trained."""
    return dict(read_json(folder.learning_rate)) if folder.learning_rate.exists() else None


def _diverged(chosen: Finished) -> dict[str, Any] | None:
    """In which epoch the chosen candidate's fine-tuning diverged, and how; None if it did not."""
    return None if chosen.diverged is None else {"epoch": len(chosen.curve) + 1, "message": chosen.diverged}


def _metrics(job: Job, networks: dict[str, nn.Module]) -> dict[str, float | None]:
    """The metric of the report, on data that nothing before has seen where there is such data; `RunFacts.metrics`."""
    metric = job.test or job.validate
    found = {name: None if metric is None else metric(network) for name, network in networks.items()}
    return {**found, "samples": metric.shares_of if isinstance(metric, SplitMetric) else None}


def _write_environment(job: Job, folder: RunFolder, memory_format: MemoryFormat, begun: datetime.datetime) -> None:
    """What the run ran on; written once."""
    if folder.environment.exists():
        return
    packages = ("sekron-search", "torch", "optuna", "fvcore", "numpy", "scipy", "safetensors")
    write_json(
        folder.environment,
        {
            **dataclasses.asdict(Provenance.here(job.runtime(memory_format))),
            "date": begun.isoformat(timespec="seconds"),
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "packages": {name: metadata.version(name) for name in packages},
            "seed": job.settings.seed,
            "factory": factory_json(job.factory),
        },
    )
