"""Commands that make a run and read it: demo, run, inspect, report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sekron_search.cli.arguments import (
    INTERRUPTED,
    ArtifactsOption,
    JsonOption,
    RunArgument,
    StorageOption,
    UsageError,
    seconds,
)
from sekron_search.cli.completion import run_folders
from sekron_search.cli.configuration import Given, with_config_options
from sekron_search.cli.output import conclude, json_alone, print_json, print_table

if TYPE_CHECKING:
    from sekron_search.config import Config
    from sekron_search.estimate import Estimate
    from sekron_search.rundir import RunFolder


def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything.")] = 0,
) -> None:
    """Train a small network and compress it.

    The network learns scikit-learn's digits: some minutes, no download. A second call goes on where the first one
    stopped.

    \b
    Example:
      sekron-search demo
    """
    from sekron_search.demo import demo_config, train_original
    from sekron_search.jobs import job_from_config
    from sekron_search.progress import ConsoleReporter
    from sekron_search.run import run as run_stages
    from sekron_search.rundir import RunFolder

    reporter = ConsoleReporter()
    out.parent.mkdir(parents=True, exist_ok=True)
    weights = (out.parent / f"{out.name}-original.safetensors").resolve()
    train_original(weights, seed, reporter)
    config = demo_config(weights, out.resolve(), seed)
    report = run_stages(job_from_config(config), RunFolder(out), reporter, resume=True)
    conclude(report, out, as_json=False)


@with_config_options
def run(
    given: Given,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder; by default the config's, else a new one in runs/.", autocompletion=run_folders),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that the folder holds, if it holds one.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only say what would be done, and estimate time, memory and disk; write nothing."
        ),
    ] = False,
    time_limit: Annotated[
        str | None,
        typer.Option(help="When the search begins no more trials, e.g. 30m; the best so far is gone on with."),
    ] = None,
    storage: StorageOption = None,
    artifacts: ArtifactsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compress a network.

    A config file describes it, or options, or both: options win over the file. Ctrl-C leaves a run that --resume goes
    on with. Exit code 0: every budget is met; 3: the run ended, but its network misses a budget.

    Others help with the search: `sekron-search worker RUN`, with the same --storage and --artifacts; and with the
    training: `torchrun --nproc-per-node 4 -m sekron_search.cli run ...`, one process for each GPU.

    \b
    Examples:
      sekron-search run resnet.yaml --out runs/resnet
      sekron-search run resnet.yaml --set search.trials=20 --dry-run
      sekron-search run --model nets:build --data photos --budget latency=0.5x
      sekron-search run --out runs/resnet --resume
    """
    config = _limited(_config(given, out, resume), time_limit)
    folder = _folder(config, out, resume)
    from sekron_search.jobs import job_from_config
    from sekron_search.progress import ConsoleReporter
    from sekron_search.run import run as run_stages
    from sekron_search.sharing import Sharing
    from sekron_search.team import Team

    if dry_run:
        _foretell(config, folder, resume=resume, as_json=as_json)
        return
    if first := Team.here().rank == 0:
        print(f"run folder: {folder.path}", file=sys.stderr)
    try:
        with json_alone(as_json):
            job = job_from_config(config)
            report = run_stages(job, folder, ConsoleReporter(), resume=resume, sharing=Sharing(storage, artifacts))
    except KeyboardInterrupt:
        print(f"\ninterrupted; {_how_to_go_on(folder, shared=bool(storage or artifacts))}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    if first:
        conclude(report, folder.path, as_json=as_json)


def _config(given: Given, out: Path | None, resume: bool) -> Config:
    """The configuration; of the run folder itself where a run is gone on with and no file is named."""
    from sekron_search.rundir import RunFolder

    fallback = None
    if resume and given.config is None and given.model is None:
        if out is None:
            raise UsageError("--resume: which run? Name its folder with --out, or give a CONFIG with the key 'out'")
        fallback = RunFolder(out).config
        if not fallback.exists():
            raise UsageError(
                f"--resume: {out} holds no run that has begun; give a CONFIG, or --model, --data and --budget"
            )
    return given.load(fallback=fallback)


def _limited(config: Config, time_limit: str | None) -> Config:
    """With the time limit of the search that is given, if one is."""
    if time_limit is None:
        return config
    limit_s = seconds(time_limit, "--time-limit")
    if limit_s == 0:
        raise UsageError("--time-limit: expected more than no time, for the search takes at least a trial")
    limited = config.search.model_copy(update={"time_limit_s": limit_s})
    return config.model_copy(update={"search": limited})


def _folder(config: Config, out: Path | None, resume: bool) -> RunFolder:
    from sekron_search.rundir import RunFolder

    path = out or config.out
    if resume and path is None:
        raise UsageError("--resume: which run? Name its folder with --out, or with the key 'out' in the config")
    return RunFolder.new() if path is None else RunFolder(path)


def _how_to_go_on(folder: RunFolder, *, shared: bool) -> str:
    if not folder.config.exists():
        return "nothing was done yet"
    options = " with the same --storage and --artifacts" if shared else ""  # URLs may hold passwords
    return f"go on with: sekron-search run --out {folder.path} --resume{options}"


def _foretell(config: Config, folder: RunFolder, *, resume: bool, as_json: bool) -> None:
    """What `--dry-run` prints."""
    from sekron_search.estimate import estimate
    from sekron_search.jobs import job_from_config
    from sekron_search.progress import ConsoleReporter

    with json_alone(as_json):
        job = job_from_config(config)
        folder.check_free(job.fingerprint(), resume=resume)
        found = estimate(job, ConsoleReporter(), folder)
    if as_json:
        print_json(found.to_json())
        return
    begun = " (holds this run; what is done is not done again)" if folder.manifest.exists() else ""
    runtime = job.runtime(job.memory_formats[0])
    print(f"run folder: {folder.path}{begun}")
    print("budget: " + ", ".join(f"{name} at most {asked}" for name, asked in job.settings.bounds.items()))
    print(f"runtime: {runtime.name} on {runtime.device}, threads: {runtime.thread_count}")
    print(f"device of the search: {job.device}")
    if job.trains:
        print(f"device of the fine-tuning: {job.settings.finetune.device or job.device}")
    print()
    _print_estimate(found)


def _print_estimate(found: Estimate) -> None:
    rows = [[layer.name, f"{layer.structures:,}", f"{layer.options:,}"] for layer in found.layers]
    print_table(["layer", "structures", "options to fit"], rows, left=["layer"])
    print()
    stages = [[stage.name, stage.amount, f"{stage.seconds:,.0f} s"] for stage in found.stages]
    print_table(["stage", "how much", "about"], stages, left=["stage", "how much"])
    print()
    print(f"about {found.seconds / 60:,.1f} minutes in all, with the threads and the load that there are now")
    print(f"about {found.memory_bytes / 2**30:,.1f} GiB of memory, {found.disk_bytes / 2**20:,.0f} MiB of disk")
    if found.device_memory_bytes is not None:
        print(f"about {found.device_memory_bytes / 2**30:,.1f} GiB of the GPU's memory")
    print("These are estimates, from a few measurements on this machine; nothing was written.")


@with_config_options
def inspect(given: Given, as_json: JsonOption = False) -> None:
    """Show which layers can be compressed.

    And what they cost, and what is left alone and why. Needs no budget.

    \b
    Examples:
      sekron-search inspect resnet.yaml
      sekron-search inspect --model nets:build --data photos
    """
    config = given.load(any_budget=True)
    from sekron_search.jobs import job_from_config

    with json_alone(as_json):
        facts = _inspected(job_from_config(config))
    if as_json:
        print_json(facts)
        return
    rows = [
        [
            layer["name"],
            layer["kind"],
            "x".join(map(str, layer["weight_shape"])),
            str(layer["groups"]),
            f"{layer['flops']:,}",
            f"{layer['flops'] / facts['flops']:.1%}",
            f"{layer['params']:,}",
            f"{layer['structures']:,}" if layer["structures"] else "none",
        ]
        for layer in facts["layers"]
    ]
    columns = ["layer", "kind", "F x C x kernel", "groups", "flops", "% of flops", "params", "structures"]
    print_table(columns, rows, left=columns[:3])
    print(f"whole network: {facts['flops']:,.0f} flops per sample, {facts['params']:,} parameters")
    if not rows and not facts["left_alone"]:
        print("nothing to compress: the network has no convolution and no linear layer (modules of torch.nn)")
    for skipped in facts["left_alone"]:
        print(f"left alone: {skipped['name']} ({skipped['type']}): {skipped['reason']}")


def _inspected(job: Any) -> dict[str, Any]:
    """What `inspect` says, as plain data."""
    from sekron_search.costs.analytic import layer_cost
    from sekron_search.costs.traced import traced_flops
    from sekron_search.inspection import inspect_model
    from sekron_search.kron.families import dense
    from sekron_search.scoring import candidates
    from sekron_search.selection import worthwhile

    found = inspect_model(job.model, job.example_inputs)
    searched = worthwhile(found, job.settings.space)
    layers = []
    for info in found.layers:
        cost = layer_cost(dense(info.weight_shape), info)
        layers.append(
            {
                "name": info.name,
                "kind": info.kind,
                "weight_shape": list(info.weight_shape),
                "groups": info.geometry.groups,
                "flops": cost.flops,
                "params": cost.params,
                "structures": len(candidates(info, job.settings.space)) if info in searched.layers else 0,
            }
        )
    return {
        "flops": traced_flops(job.model, job.example_inputs).total,
        "params": sum(p.numel() for p in job.model.parameters()),
        "layers": layers,
        "left_alone": [{"name": s.name, "type": s.type, "reason": s.reason} for s in searched.skipped],
    }


def report(run_folder: RunArgument, as_json: JsonOption = False) -> None:
    """Write a finished run's report again.

    And its plots; prints the verdict.

    \b
    Example:
      sekron-search report runs/demo
    """
    from sekron_search.files import read_json
    from sekron_search.report.write import write_report
    from sekron_search.rundir import RunFolder

    folder = RunFolder(run_folder)
    with json_alone(as_json):
        write_report(folder)
    conclude(read_json(folder.report), run_folder, as_json=as_json)
