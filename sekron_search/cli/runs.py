"""Commands that make a run and read it: demo, run, inspect, report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sekron_search.cli.arguments import (
    BUDGET_MISSED,
    ArtifactsOption,
    ConfigArgument,
    RunArgument,
    StorageOption,
    seconds,
)


def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything.")] = 0,
) -> None:
    """Train a small network on scikit-learn's digits and compress it: some minutes, no download.

    A second call goes on where the first one stopped.
    """
    from sekron_search.api import job_from_config
    from sekron_search.demo import demo_config, train_original
    from sekron_search.progress import ConsoleReporter
    from sekron_search.run import run as run_stages
    from sekron_search.rundir import RunFolder

    reporter = ConsoleReporter()
    out.parent.mkdir(parents=True, exist_ok=True)
    weights = (out.parent / f"{out.name}-original.safetensors").resolve()
    train_original(weights, seed, reporter)
    config = demo_config(weights, out.resolve(), seed)
    report = run_stages(job_from_config(config), RunFolder(out), reporter, resume=True)
    _conclude(report, out)


def run(
    config: ConfigArgument,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; by default the config's, else a new one in runs/.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that the folder holds, if it holds one.")
    ] = False,
    time_limit: Annotated[
        str | None,
        typer.Option(help="When the search begins no more trials, e.g. 30m; the best so far is gone on with."),
    ] = None,
    storage: StorageOption = None,
    artifacts: ArtifactsOption = None,
) -> None:
    """Compress the network of a config file. Ctrl-C leaves a run that --resume goes on with.

    Exit code 0: every budget is met; 3: the run ended, but its network misses a budget; 1: an error.

    Others help with the search: `sekron-search worker RUN`, with the same --storage and --artifacts; and with the
    training: `torchrun --nproc-per-node 4 -m sekron_search.cli run ...`, one process for each GPU.

    Example: sekron-search run resnet.yaml --out runs/resnet
    """
    from sekron_search.api import job_from_config
    from sekron_search.config import Config
    from sekron_search.errors import ConfigError
    from sekron_search.progress import ConsoleReporter
    from sekron_search.run import run as run_stages
    from sekron_search.rundir import RunFolder
    from sekron_search.sharing import Sharing
    from sekron_search.team import Team

    loaded = Config.load(config)
    if time_limit is not None:
        limited = loaded.search.model_copy(update={"time_limit_s": seconds(time_limit, "--time-limit")})
        loaded = loaded.model_copy(update={"search": limited})
    path = out or loaded.out
    if resume and path is None:
        raise ConfigError("--resume: which run? Name its folder with --out, or with the key 'out' in the config")
    folder = RunFolder.new() if path is None else RunFolder(path)
    first = Team.here().rank == 0
    if first:
        print(f"run folder: {folder.path}", file=sys.stderr)
    job = job_from_config(loaded)
    try:
        report = run_stages(job, folder, ConsoleReporter(), resume=resume, sharing=Sharing(storage, artifacts))
    except KeyboardInterrupt:
        again = f"sekron-search run {config} --out {folder.path} --resume"
        shared = " with the same --storage and --artifacts" if storage or artifacts else ""  # URLs may hold passwords
        print(f"\ninterrupted; go on with: {again}{shared}", file=sys.stderr)
        raise typer.Exit(130) from None
    if first:
        _conclude(report, folder.path)


def inspect(config: ConfigArgument) -> None:
    """Show which layers would be compressed, their dense costs, and what is left alone and why."""
    from rich.console import Console
    from rich.table import Table

    from sekron_search.api import job_from_config
    from sekron_search.config import Config
    from sekron_search.costs.analytic import layer_cost
    from sekron_search.costs.traced import traced_flops
    from sekron_search.inspection import inspect_model
    from sekron_search.kron.families import dense
    from sekron_search.scoring import candidates
    from sekron_search.selection import worthwhile

    job = job_from_config(Config.load(config))
    found = inspect_model(job.model, job.example_inputs)
    searched = worthwhile(found, job.settings.space)
    total = traced_flops(job.model, job.example_inputs).total
    table = Table(title="Layers that can be replaced")
    for column, side in (("layer", "left"), ("kind", "left"), ("F x C x kernel", "left"), ("groups", "right")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for column in ("flops", "% of flops", "params", "structures"):
        table.add_column(column, justify="right")
    for info in found.layers:
        cost = layer_cost(dense(info.weight_shape), info)
        number = f"{len(candidates(info, job.settings.space)):,}" if info in searched.layers else "none"
        table.add_row(
            info.name,
            info.kind,
            "x".join(map(str, info.weight_shape)),
            str(info.geometry.groups),
            f"{cost.flops:,}",
            f"{cost.flops / total:.1%}",
            f"{cost.params:,}",
            number,
        )
    console = Console()
    console.print(table)
    print(
        f"whole network: {total:,.0f} flops per sample, {sum(p.numel() for p in job.model.parameters()):,} parameters"
    )
    for skipped in searched.skipped:
        print(f"left alone: {skipped.name} ({skipped.type}): {skipped.reason}")


def report(run_folder: RunArgument) -> None:
    """Write the report and the plots of a finished run again, and print the verdict."""
    from sekron_search.files import read_json
    from sekron_search.report.write import write_report
    from sekron_search.rundir import RunFolder

    folder = RunFolder(run_folder)
    write_report(folder)
    _conclude(read_json(folder.report), run_folder)


def _conclude(facts: dict[str, Any], folder: Path) -> None:
    from sekron_search.report.verdict import summary

    for line in summary(facts):
        print(line)
    print(f"report: {folder / 'report.html'} (the same as Markdown: report.md)")
    print(f"network: {folder / 'compressed'} (open it with sekron_search.load({str(folder)!r}))")
    if not all(budget["met"] for budget in facts["budgets"]):
        raise typer.Exit(BUDGET_MISSED)
