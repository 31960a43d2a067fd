"""The command line. Heavy imports happen inside the commands, so that help is instant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sekron_search.errors import SekronError

app = typer.Typer(
    name="sekron-search",
    help="Find which tensor factorization each layer of a trained network should get, under a device budget.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

#: Exit code of a run that ended well but whose network, as measured, misses a budget.
BUDGET_MISSED = 3

ConfigArgument = Annotated[
    Path, typer.Argument(help="YAML file that describes model, data and budget.", metavar="CONFIG")
]
RunArgument = Annotated[Path, typer.Argument(help="Run folder.", metavar="RUN")]


@app.command()
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


@app.command()
def run(
    config: ConfigArgument,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; by default the config's, else a new one in runs/.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that the folder holds, if it holds one.")
    ] = False,
) -> None:
    """Compress the network of a config file. Ctrl-C leaves a run that --resume goes on with.

    Exit code 0: every budget is met; 3: the run ended, but its network misses a budget; 1: an error.

    Example: sekron-search run resnet.yaml --out runs/resnet
    """
    from sekron_search.api import job_from_config
    from sekron_search.config import Config
    from sekron_search.errors import ConfigError
    from sekron_search.progress import ConsoleReporter
    from sekron_search.run import run as run_stages
    from sekron_search.rundir import RunFolder

    loaded = Config.load(config)
    path = out or loaded.out
    if resume and path is None:
        raise ConfigError("--resume: which run? Name its folder with --out, or with the key 'out' in the config")
    folder = RunFolder.new() if path is None else RunFolder(path)
    print(f"run folder: {folder.path}", file=sys.stderr)
    job = job_from_config(loaded)
    try:
        report = run_stages(job, folder, ConsoleReporter(), resume=resume)
    except KeyboardInterrupt:
        print(f"\ninterrupted; go on with: sekron-search run {config} --out {folder.path} --resume", file=sys.stderr)
        raise typer.Exit(130) from None
    _conclude(report, folder.path)


@app.command()
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


@app.command()
def profile(
    out: Annotated[Path, typer.Option(help="YAML file to write; one that is there is completed.")] = Path(
        "profile.yaml"
    ),
    runtime: Annotated[
        str | None, typer.Option(help="pytorch-eager (the default), torch-compile, onnxruntime or openvino.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of an operator; 1 by default.")] = None,
    memory_format: Annotated[str | None, typer.Option(help="contiguous (the default) or channels_last.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Device of torch that runs the operations; cpu by default.")
    ] = None,
    network: Annotated[
        Path | None,
        typer.Option(
            "--for",
            metavar="CONFIG",
            help="Also measure exactly what this config's tables need; runtime, threads, memory format and device are "
            "then the config's.",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A quarter of the operations.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of operations.")] = 0,
    merge: Annotated[Path | None, typer.Option(help="Another profile of this device, to take in.")] = None,
) -> None:
    """Measure this device: a designed set of operations, and a model that predicts all others; some minutes.

    torch-compile takes seconds for every one of the thousands of operations: hours. Nothing of any network is needed,
    unless --for asks for the exact latencies of one. After Ctrl-C the same command goes on. Runs use the profile with
    `latency.profile`, on any machine.

    Example: sekron-search profile --runtime onnxruntime --threads 1 --out phone.yaml
    """
    from sekron_search.costs.profile import DeviceProfile
    from sekron_search.costs.profiling import measure_device, summary_rows, with_merged
    from sekron_search.errors import ConfigError
    from sekron_search.files import write_text
    from sekron_search.progress import ConsoleReporter
    from sekron_search.runtimes.registry import make_runtime

    reporter = ConsoleReporter()
    if network is not None:
        if given := [name for name, value in _named(runtime, threads, memory_format, device) if value is not None]:
            raise ConfigError(f"--for: the config says with what to measure; leave out {', '.join(given)}")
        found, used, multiple = _exact_profile(network, out, reporter)
    else:
        used = make_runtime(
            runtime or "pytorch-eager",  # type: ignore[arg-type]
            num_threads=threads or 1,
            device=device or "cpu",
            memory_format=memory_format or "contiguous",  # type: ignore[arg-type]
        )
        found, multiple = DeviceProfile.empty(used), None
    if out.exists():
        found = with_merged(DeviceProfile.load(out), found, reporter)
    if merge is not None:
        found = with_merged(found, DeviceProfile.load(merge), reporter)
    write_text(out, found.to_yaml())
    measure_device(
        found,
        used,
        reporter,
        lambda: write_text(out, found.to_yaml()),
        seed=seed,
        quick=quick,
        known_granularity=multiple if multiple != 1 else None,  # 1: it was not measured
    )
    for name, value in summary_rows(found):
        print(f"{name:<28} {value}")
    write_text(out, found.to_yaml())
    print(f"{len(found.operations)} operations and {len(found.layers)} exact latencies written to {out}")


def _named(*values: Any) -> list[tuple[str, Any]]:
    return list(zip(("--runtime", "--threads", "--memory-format", "--device"), values, strict=True))


def _exact_profile(config: Path, out: Path, reporter: Any) -> tuple[Any, Any, int]:
    """The exact latencies of everything that a config's tables hold, their runtime, and the granularity of channels.

    What was measured stays in a folder beside `out` until all of it is there, so that a killed call is gone on with.
    """
    import shutil

    from sekron_search.api import job_from_config
    from sekron_search.config import Config
    from sekron_search.errors import ConfigError
    from sekron_search.files import read_json
    from sekron_search.prepare import measure_profile
    from sekron_search.rundir import RunFolder

    job = job_from_config(Config.load(config))
    if job.elsewhere is not None:
        raise ConfigError(f"--for: {config}: its latency.profile is of another machine; leave it out to measure here")
    folder = RunFolder(out.with_name(f"{out.name}.unfinished"))
    with folder.claimed(job.fingerprint(), resume=True):
        found = measure_profile(job, folder, reporter)
        multiple = int(read_json(folder.layout)["granularity"])
    shutil.rmtree(folder.path)
    memory_format: Any = found.provenance.memory_format
    return found, job.runtime(memory_format), multiple


@app.command()
def export(
    run_folder: RunArgument,
    format: Annotated[str, typer.Option(help="onnx, pt2 (torch.export), or safetensors (a folder for load).")],
    candidate: Annotated[
        str | None, typer.Option(help="Name of a folder in RUN/candidates; by default the network that was chosen.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; by default in RUN/exports.")] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="ONNX: quantize as well, and measure the original quantized beside it.")
    ] = False,
) -> None:
    """Write a finished run's network to a file for other programs, checked against PyTorch on real inputs.

    Example: sekron-search export runs/demo --format onnx --int8
    """
    from sekron_search.progress import ConsoleReporter
    from sekron_search.run_export import export_run
    from sekron_search.rundir import RunFolder

    folder = RunFolder(run_folder)
    record = export_run(
        folder,
        ConsoleReporter(),
        format=format,  # type: ignore[arg-type]  # checked there
        candidate=candidate,
        out=out,
        int8=int8,
    )
    print(
        f"{record['file']}: {record['num_bytes']:,} bytes, within {record['rel_difference']:.1e} of PyTorch's outputs"
    )
    for network in record["networks"]:
        metric = "" if network["metric"] is None else f"{record['metric_name']} {network['metric']:.4f}, "
        print(
            f"{network['name']}, {network['precision']}: {metric}{network['num_bytes']:,} bytes, "
            f"{network['latency_ms']:.3f} ms"
        )
    print(f"report: {folder.markdown}")


@app.command()
def report(run_folder: RunArgument) -> None:
    """Write the report and the plots of a finished run again, and print the verdict."""
    from sekron_search.files import read_json
    from sekron_search.report.write import write_report
    from sekron_search.rundir import RunFolder

    folder = RunFolder(run_folder)
    write_report(folder)
    _conclude(read_json(folder.report), run_folder)


def _conclude(facts: dict[str, Any], folder: Path) -> None:
    from sekron_search.report.write import summary

    for line in summary(facts):
        print(line)
    print(f"report: {folder / 'report.md'}")
    print(f"network: {folder / 'compressed'} (open it with sekron_search.load({str(folder)!r}))")
    if not all(budget["met"] for budget in facts["budgets"]):
        raise typer.Exit(BUDGET_MISSED)


def main() -> None:
    """Entry point: an error of ours is one line and exit code 1; Ctrl-C is exit code 130."""
    try:
        app()
    except SekronError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
