"""Commands for devices: profile measures one, export writes a network for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sekron_search.cli.arguments import JsonOption, RunArgument, UsageError, check_format
from sekron_search.cli.completion import candidates
from sekron_search.cli.output import json_alone, print_json

if TYPE_CHECKING:
    from sekron_search.costs.profile import DeviceProfile


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
    as_json: JsonOption = False,
) -> None:
    """Measure this device.

    A designed set of operations, and a model that predicts all others; some minutes. torch-compile takes seconds
    for every one of the thousands of operations: hours. Nothing of any network is needed, unless --for asks for the
    exact latencies of one. After Ctrl-C the same command goes on. Runs use the profile with `latency.profile`, on
    any machine.

    \b
    Example:
      sekron-search profile --runtime onnxruntime --threads 1 --out phone.yaml
    """
    given = {"--runtime": runtime, "--threads": threads, "--memory-format": memory_format, "--device": device}
    with json_alone(as_json):
        found = _measured(out, given, network, merge, seed=seed, quick=quick)
    if as_json:
        print_json(_summary(found, out))
    else:
        _print_summary(found, out)


def _measured(
    out: Path, given: dict[str, Any], network: Path | None, merge: Path | None, *, seed: int, quick: bool
) -> DeviceProfile:
    """The profile, measured to the end, as it is written to `out`."""
    from sekron_search.costs.profile import DeviceProfile
    from sekron_search.costs.profiling import measure_device, with_merged
    from sekron_search.files import write_text
    from sekron_search.progress import ConsoleReporter

    reporter = ConsoleReporter()
    found: DeviceProfile
    found, used, multiple = _empty_profile(given) if network is None else _exact_profile(network, out, given, reporter)
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
        known_granularity=multiple,
    )
    write_text(out, found.to_yaml())
    return found


def _summary(found: DeviceProfile, out: Path) -> dict[str, Any]:
    """What there is to say of a profile, as plain data."""
    from dataclasses import asdict

    from sekron_search.report.latency import profile_facts

    fitted = found.fitted
    assert fitted is not None  # it was measured to the end
    errors = {name: asdict(error) for name, error in fitted.errors.items()}
    return {"profile": str(out), **profile_facts(found), "granularity": fitted.granularity, "errors": errors}


def _print_summary(found: DeviceProfile, out: Path) -> None:
    from sekron_search.costs.profiling import summary_rows

    for name, value in summary_rows(found):
        print(f"{name:<28} {value}")
    print(f"{len(found.operations)} operations and {len(found.layers)} exact latencies written to {out}")


def _empty_profile(given: dict[str, Any]) -> tuple[Any, Any, None]:
    """A profile of a device of which nothing is known, and its runtime."""
    from sekron_search.costs.profile import DeviceProfile
    from sekron_search.runtimes.registry import make_runtime

    used = make_runtime(
        given["--runtime"] or "pytorch-eager",
        num_threads=given["--threads"] or 1,
        device=given["--device"] or "cpu",
        memory_format=given["--memory-format"] or "contiguous",
    )
    return DeviceProfile.empty(used), used, None


def _exact_profile(config: Path, out: Path, given: dict[str, Any], reporter: Any) -> tuple[Any, Any, int | None]:
    """The exact latencies of everything that a config's tables hold, their runtime, and the granularity of channels.

    What was measured stays in a folder beside `out` until all of it is there, so that a killed call is gone on with.
    """
    import shutil

    from sekron_search.config import Config
    from sekron_search.errors import ConfigError
    from sekron_search.files import read_json
    from sekron_search.jobs import job_from_config
    from sekron_search.prepare import measure_profile
    from sekron_search.rundir import RunFolder

    if named := [name for name, value in given.items() if value is not None]:
        raise UsageError(f"--for: the config says with what to measure; leave out {', '.join(named)}")
    job = job_from_config(Config.load(config))
    if job.elsewhere is not None:
        raise ConfigError(f"--for: {config}: its latency.profile is of another machine; leave it out to measure here")
    folder = RunFolder(out.with_name(f"{out.name}.unfinished"))
    with folder.claimed(job.fingerprint(), resume=True):
        found = measure_profile(job, folder, reporter)
        # Without a budget of latency it is not measured. What was, 1 too, is what the options were made with.
        is_measured = "latency_ms" in job.settings.bounds.names
        multiple = int(read_json(folder.layout)["granularity"]) if is_measured else None
    shutil.rmtree(folder.path)
    memory_format: Any = found.provenance.memory_format
    return found, job.runtime(memory_format), multiple


def export(
    run_folder: RunArgument,
    format: Annotated[str, typer.Option(help="onnx, pt2 (torch.export), or safetensors (a folder for load).")],
    candidate: Annotated[
        str | None,
        typer.Option(
            help="Name of a folder in RUN/candidates; by default the network that was chosen.",
            autocompletion=candidates,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; by default in RUN/exports.")] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="ONNX: quantize as well, and measure the original quantized beside it.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a run's network for other programs.

    The file is checked against PyTorch on real inputs.

    \b
    Example:
      sekron-search export runs/demo --format onnx --int8
    """
    check_format(format, "--format")
    if int8 and format != "onnx":
        raise UsageError(f"--int8: for --format onnx only, got {format}")

    from sekron_search.progress import ConsoleReporter
    from sekron_search.run_export import export_run
    from sekron_search.rundir import RunFolder

    folder = RunFolder(run_folder)
    with json_alone(as_json):
        record = export_run(
            folder,
            ConsoleReporter(),
            format=format,  # type: ignore[arg-type]  # checked above
            candidate=candidate,
            out=out,
            int8=int8,
        )
    if as_json:
        print_json({"run": str(run_folder), **record})
        return
    print(
        f"{record['file']}: {record['num_bytes']:,} bytes, within {record['rel_difference']:.1e} of PyTorch's outputs"
    )
    for network in record["networks"]:
        metric = "" if network["metric"] is None else f"{record['metric_name']} {network['metric']:.4f}, "
        print(
            f"{network['name']}, {network['precision']}: {metric}{network['num_bytes']:,} bytes, "
            f"{network['latency_ms']:.3f} ms"
        )
    print(f"report: {folder.page}")
