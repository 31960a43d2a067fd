"""Export of what a run found, measured as it will run: accuracy, latency and size of the files themselves."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from sekron_search.costs.measure import measure_callables
from sekron_search.errors import ConfigError, RunFolderError
from sekron_search.exchange import TOLERANCE, ExportedFile, codec, compare, export_network
from sekron_search.export import load
from sekron_search.files import atomic, write_json
from sekron_search.job import Job
from sekron_search.jobs import job_of_run
from sekron_search.model import Inputs, batch_size
from sekron_search.progress import Reporter
from sekron_search.report.write import write_report
from sekron_search.rundir import RunFolder
from sekron_search.runtimes.exported import doubled

#: What to do where no file describes a run's network.
OBJECTS = "call sekron_search.export_network(sekron_search.load(RUN, model=model), example_inputs, path, format=...)"

RunFormat = Literal["onnx", "pt2", "safetensors"]


def export_run(
    folder: RunFolder,
    reporter: Reporter,
    *,
    format: RunFormat,
    candidate: str | None = None,
    out: Path | None = None,
    int8: bool = False,
) -> dict[str, Any]:
    """Export a network of a finished run, compare it with the PyTorch network, record it, and renew the report.

    Args:
        folder: The run folder.
        reporter: Told of the progress.
        format: "onnx", "pt2", or "safetensors": a folder that `load` opens.
        candidate: Name of a folder in `candidates/`; the network that the run chose if None.
        out: Where to; in the run's `exports/` if None. The int8 file lies beside it.
        int8: Whether to write the network with 8-bit weights and activations as well; ONNX only. The original is
            quantized in the same way, for comparison.

    Returns:
        The record, as it is kept in `exports/`.

    Raises:
        ConfigError: If the format is unknown or cannot be int8, or what it needs is not installed.
        DataError: If the network cannot be exported, or what was written differs from it.
        RunFolderError: If the folder holds no finished run, no such candidate, or a run whose network was given as an
            object.
    """
    if format not in ("onnx", "pt2", "safetensors"):
        raise ConfigError(f"export: expected format onnx, pt2 or safetensors, got {format!r}")
    if int8 and format != "onnx":
        raise ConfigError(f"export: int8 is for ONNX only, got format {format}")
    if format != "safetensors":
        codec(format)  # fails at once where a package is missing
    home = _home(folder, candidate)
    job = job_of_run(folder, OBJECTS)
    network = load(home, model=job.model).to(job.device)
    stem = candidate or "compressed"
    path = out or folder.exports / (stem if format == "safetensors" else f"{stem}.{format}")
    reporter.say(f"exporting to {path}")
    if format == "safetensors":
        written = _copy_artefact(job, home, network, path)
    else:
        written = export_network(network, job.example_inputs, path, format=format, more_inputs=[_other_batch(job)])
    record = {
        "file": str(path),
        "format": format,
        "candidate": candidate,
        "num_bytes": written.num_bytes,
        "rel_difference": written.rel_difference,
        "batch_sizes": list(written.batch_sizes),
        "networks": [],
        **(_side_by_side(job, path, reporter, int8=int8) if format == "onnx" else {}),
    }
    write_json(folder.exports / f"{stem}.{format}.json", record)
    write_report(folder)
    return record


def _home(folder: RunFolder, candidate: str | None) -> Path:
    """Folder of the artefact to export."""
    folder.read_manifest()
    if not folder.report.exists():
        raise RunFolderError(f"run folder {folder.path}: not finished; go on with `run --resume`, then export")
    if candidate is None:
        return folder.compressed
    known = sorted(path.parent.name for path in folder.candidates.glob("*/model.json"))
    if candidate not in known:
        raise RunFolderError(
            f"run folder {folder.path}: expected one of its finished candidates {', '.join(known)}, got {candidate!r}"
        )
    return folder.candidates / candidate


def _other_batch(job: Job) -> Inputs:
    """Real inputs that no fit has seen, of another batch size than the example's."""
    held_out = job.holdout[0]
    return held_out if batch_size(held_out) != job.batch else doubled(job.example_inputs)


def _copy_artefact(job: Job, home: Path, network: torch.nn.Module, path: Path) -> ExportedFile:
    """A copy of the artefact, opened again before it takes its place."""
    checks = [job.example_inputs, _other_batch(job)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        for name in ("model.safetensors", "model.json"):
            shutil.copy(home / name, scratch)
        opened = load(scratch, model=job.model).to(job.device)
        with torch.no_grad():
            difference = max(compare(opened, check, network(*check), "safetensors") for check in checks)
        path.mkdir(exist_ok=True)
        num_bytes = 0
        for name in ("model.safetensors", "model.json"):
            num_bytes += (Path(scratch) / name).stat().st_size
            (Path(scratch) / name).replace(path / name)
    return ExportedFile(path, "safetensors", num_bytes, difference, tuple(map(batch_size, checks)))


def _side_by_side(job: Job, path: Path, reporter: Reporter, *, int8: bool) -> dict[str, Any]:
    """The original and the exported network in ONNX Runtime, in float32 and, if asked for, in int8."""
    from sekron_search.runtimes.onnx import to_int8

    with tempfile.TemporaryDirectory(prefix="sekron-export-") as scratch:
        original = Path(scratch) / "original.onnx"
        export_network(job.model, job.example_inputs, original, format="onnx", more_inputs=[_other_batch(job)])
        models = {("original", "float32"): original.read_bytes(), ("compressed", "float32"): path.read_bytes()}
    int8_path = path.with_name(f"{path.stem}-int8{path.suffix}")
    if int8:
        reporter.say("quantizing the original and the compressed network")
        for name in ("original", "compressed"):
            models[name, "int8"] = to_int8(models[name, "float32"], job.calibration)
    networks = _measured(job, models, reporter)
    if int8:
        with atomic(int8_path) as temporary:
            temporary.write_bytes(models["compressed", "int8"])
    return {
        "int8_file": str(int8_path) if int8 else None,
        "tolerance": TOLERANCE,
        "metric_name": job.settings.metric_name,
        **networks,
    }


def _measured(job: Job, models: Mapping[tuple[str, str], bytes], reporter: Reporter) -> dict[str, Any]:
    """Metric, size and interleaved latencies of ONNX models, by (name, precision)."""
    from sekron_search.runtimes.onnx import OnnxNetwork, OnnxRuntime

    runtime = OnnxRuntime(num_threads=job.settings.latency.num_threads)
    metric = job.test or job.validate
    with torch.no_grad():
        output = job.model(*job.example_inputs)
    with runtime.active():
        reporter.say("measuring the exported networks side by side")
        bound = {f"{name} {precision}": runtime.bind(m, job.example_inputs) for (name, precision), m in models.items()}
        latencies = measure_callables(bound, rounds=job.settings.latency.rounds)
        networks = [
            {
                "name": name,
                "precision": precision,
                "num_bytes": len(model),
                "metric": None if metric is None else metric(OnnxNetwork(model, output)),
                "latency_ms": latencies[f"{name} {precision}"].median_ms,
                "latency_noise_ms": latencies[f"{name} {precision}"].noise_ms,
            }
            for (name, precision), model in models.items()
        ]
    return {
        "networks": networks,
        "runtime": runtime.version(),
        "num_threads": runtime.thread_count,
        "latency_batch_size": job.batch,
    }
