"""Write the report of a run folder: Markdown and plots, from `report.json` alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sekron_search.errors import RunFolderError
from sekron_search.files import atomic, read_json, write_text
from sekron_search.report.audit import audit_section
from sekron_search.report.facts import FORMAT
from sekron_search.report.optimality import optimality_section
from sekron_search.rundir import RunFolder

_UNITS = {
    "flops": ("multiply-adds per sample", "{:,.0f}"),
    "params": ("parameters", "{:,.0f}"),
    "latency_ms": ("latency, ms", "{:.3f}"),
    "peak_activation_bytes": ("peak activations, bytes", "{:,.0f}"),
}


def write_report(folder: RunFolder) -> None:
    """Write `report.md` and the plots.

    Raises:
        RunFolderError: If the run has no report yet, or one of another version.
    """
    # matplotlib takes a second to import, and nothing but this needs it.
    from sekron_search.report.plots import make_plots

    folder.read_manifest()
    if not folder.report.exists():
        raise RunFolderError(
            f"run folder {folder.path}: not finished, it has no report.json; go on with `run --resume`"
        )
    report = read_json(folder.report)
    version = report.get("format") if isinstance(report, dict) else None
    if version != FORMAT:
        raise RunFolderError(f"{folder.report}: format {version!r}, this version reads {FORMAT}")
    try:
        plots = make_plots(report)
        text = markdown(report, list(plots), [read_json(path) for path in sorted(folder.exports.glob("*.json"))])
    except (KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(
            f"{folder.report}, or a file in {folder.exports}, is damaged: {type(error).__name__}: {error}"
        ) from None
    for name, figure in plots.items():
        for ending in ("png", "svg"):
            with atomic(folder.plots / f"{name}.{ending}") as path:
                metadata = {"Date": None} if ending == "svg" else {}
                figure.savefig(path, format=ending, dpi=130, metadata=metadata)
    write_text(folder.markdown, text)


def markdown(report: dict[str, Any], plots: list[str], exports: Sequence[dict[str, Any]] = ()) -> str:
    """The report as Markdown.

    Args:
        report: The contents of `report.json`.
        plots: Names of the plots.
        exports: What was exported, as `export_run` records it.
    """
    sections = [
        "# Compression report",
        _verdict(report),
        _costs(report),
        _latency(report),
        _front(report, [p for p in plots if p.startswith("front_")]),
        optimality_section(report, plots),
        _layers(report),
        _candidates(report),
        _training(report),
        audit_section(report.get("audit")),
        _exports(exports),
        _provenance(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def summary(report: dict[str, Any]) -> list[str]:
    """The verdict in a few lines of plain text."""
    lines = []
    for budget in report["budgets"]:
        verdict = "met" if budget["met"] else "MISSED"
        if budget["name"] == "latency_ms" and _is_predicted(report):
            verdict += f" as predicted (± {report['compressed']['latency_noise_ms']:.3f}); measure it on the device"
        _, form = _UNITS[budget["name"]]
        lines.append(
            f"{budget['name']}: asked at most {form.format(budget['bound'])} ({budget['asked']}), "
            f"got {form.format(budget['value'])}: {verdict}"
        )
    before, after = report["original"]["metric"], report["compressed"]["metric"]
    if before is not None and after is not None:
        untrained = report["metric_without_training"]
        lines.append(
            f"{report['metric_name']}: original {before:.4f}, compressed {after:.4f} (untrained {untrained:.4f})"
        )
    return lines


def _is_predicted(report: dict[str, Any]) -> bool:
    """Whether the latencies are those of another machine."""
    return report["latency"] is not None and report["latency"]["predicted_for"] is not None


def _verdict(report: dict[str, Any]) -> str:
    met = all(budget["met"] for budget in report["budgets"])
    head = "**Every budget is met.**" if met else "**Not every budget is met.**"
    origin = report.get("finishes")
    told = "" if origin is None else f" This is {_cell(origin['source'])} of run {origin['run']}, finished afterwards."
    return head + told + "\n\n" + "\n".join(f"- {line}" for line in summary(report))


def _costs(report: dict[str, Any]) -> str:
    rows = ["| | original | compressed | ratio |", "| --- | ---: | ---: | ---: |"]
    for name, (label, form) in _UNITS.items():
        before, after = report["original"][name], report["compressed"][name]
        noise = ""
        if name == "latency_ms":
            label += f" per batch of {report['batch_size']}"
            noise = " ± {:.3f}"
        cells = [
            form.format(side[name]) + (noise.format(side["latency_noise_ms"]) if noise else "")
            for side in (report["original"], report["compressed"])
        ]
        rows.append(f"| {label} | {cells[0]} | {cells[1]} | {after / before:.3f} |")
    head = "Measured on the saved and re-loaded network, beside the original."
    if _is_predicted(report):
        head += " Its latency is predicted, for another machine."
    text = f"## Costs\n\n{head}\n\n" + "\n".join(rows)
    if report["uncounted_operators"]:
        names = ", ".join(f"{name} ({count})" for name, count in sorted(report["uncounted_operators"].items()))
        text += f"\n\nflops are fvcore's count. It does not count these operators of the network: {names}."
    return text


def _latency(report: dict[str, Any]) -> str:
    facts = report["latency"]
    if facts is None:
        return ""
    foreign = facts["predicted_for"]
    threads = f"{facts['num_threads']} thread" + ("s" if facts["num_threads"] > 1 else "")
    whole = "measured" if foreign is None else "by the whole network's operations"
    rows = [f"| network | saved, by the sum of its layers | saved, {whole} |", "| --- | ---: | ---: |"]
    for i, row in enumerate(facts["calibration"], start=1):
        rows.append(f"| calibration {i} | {row['summed_saving']:.1%} | {row['measured_saving']:.1%} |")
    for i, row in enumerate(facts["candidates"], start=1):
        rows.append(f"| candidate {i}, as predicted | {1 - row['predicted']:.1%} | {1 - row['measured']:.1%} |")
    how = "Measured" if foreign is None else f"Predicted by the profile of another machine ({foreign}), not measured,"
    formats = f"memory format {facts['memory_format']} (the original: {facts['original_memory_format']})"
    return (
        f"## Latency\n\n{how} in {facts['runtime']} ({facts['version']}), {threads}, {formats}, on networks as they "
        "are deployed: plain modules, batch-norms folded. Unless the budget allows for a slower network, options that "
        "are not faster than the layer they replace, beyond the noise, were left out. A millisecond that layers save "
        f"one by one saves {facts['scale']:.2f} ms in the network, by the networks below, each beside the original; "
        "predictions allow for that.\n\n" + "\n".join(rows)
    )


def _front(report: dict[str, Any], plots: list[str]) -> str:
    costs = [name for name in _UNITS if report["front"] and name in report["front"][0]["objectives"]]
    rows = [
        "| trial | divergence | " + " | ".join(costs) + " | within budget | from |",
        "| ---: " * (2 + len(costs)) + "| --- | --- |",
    ]
    for candidate in sorted(report["front"], key=lambda c: c["objectives"]["divergence"]):
        values = [_UNITS[name][1].format(candidate["objectives"][name]) for name in costs]
        mark = " **chosen**" if candidate["chosen"] else ""
        rows.append(
            f"| {candidate['trial']}{mark} | {candidate['objectives']['divergence']:.4g} | "
            + " | ".join(values)
            + f" | {'yes' if candidate['feasible'] else 'no'} | {candidate['source']} |"
        )
    pictures = "\n".join(f"![Pareto front: {name}](plots/{name}.png)" for name in plots)
    head = (
        f"## Pareto front\n\n{report['num_trials']} trials of {report['num_distinct_networks']} distinct networks; "
        f"divergence ({report['divergence_name']}) of the outputs from the original's, "
        "before any training; costs as predicted."
    )
    return f"{head}\n\n{pictures}\n\n" + "\n".join(rows)


def _layers(report: dict[str, Any]) -> str:
    rows = [
        "| layer | structure | flops | params | time | output error | why |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for layer in report["layers"]:
        flops = layer["after"]["flops"] / layer["before"]["flops"]
        params = layer["after"]["params"] / layer["before"]["params"]
        rebuilt = ", rebuilt at load" if layer["execution"] == "dense" and layer["family"] != "dense" else ""
        structure = "dense" if layer["family"] == "dense" else f"{layer['structure']}{rebuilt}"
        rows.append(
            f"| {_cell(layer['name'])} | `{structure}` | {flops:.2f}x | {params:.2f}x | {_time(layer)} | "
            f"{layer['error']:.3f} | "
            f"{_cell(layer['reason'])} |"
        )
    text = "## Layers\n\n![Layer by layer](plots/layers.png)\n\n" + "\n".join(rows)
    if report["left_alone"]:
        text += "\n\nLeft alone:\n\n" + "\n".join(
            f"- {_cell(s['name'])} ({_cell(s['type'])}): {_cell(s['reason'])}" for s in report["left_alone"]
        )
    return text


def _time(layer: dict[str, Any]) -> str:
    before, after = layer["before"]["latency_ms"], layer["after"]["latency_ms"]
    if after is None:
        return "not measured"
    return f"{after:.3f} ± {layer['after']['latency_noise_ms']:.3f} ms, {after / before:.2f}x"


def _candidates(report: dict[str, Any]) -> str:
    costs = [budget["name"] for budget in report["budgets"]]
    rows = [
        "| folder | trial | divergence | before the fit layer after layer | " + " | ".join(costs) + " | validation |",
        "| --- |" + " ---: |" * (4 + len(costs)),
    ]
    for row in report["candidates"]:
        values = " | ".join(_UNITS[name][1].format(row["costs"][name]) for name in costs)
        metric = "" if row["metric"] is None else f"{row['metric']:.4f}"
        rows.append(
            f"| `candidates/{row['folder']}`{' **chosen**' if row['chosen'] else ''} | {row['trial']} | "
            f"{row['divergence']:.4g} | {row['divergence_before_sequential_fit']:.4g} | {values} | {metric} |"
        )
    return "## Candidates\n\nThe best trials, fitted layer after layer and measured, before training.\n\n" + "\n".join(
        rows
    )


def _training(report: dict[str, Any]) -> str:
    if not report["curve"]:
        return ""
    rows = ["| epoch | loss | validation |", "| ---: | ---: | ---: |"]
    rows += [f"| {row['epoch']:.0f} | {row['loss']:.4f} | {row['metric']:.4f} |" for row in report["curve"]]
    return "## Fine-tuning\n\n![Fine-tuning](plots/finetuning.png)\n\n" + _learning_rate(report) + "\n".join(rows)


def _learning_rate(report: dict[str, Any]) -> str:
    found = report["learning_rate"]
    if found is None:
        return ""
    losses = ", ".join(f"{_loss(loss)} at {rate:.2g}" for rate, loss in found["trials"])
    return f"Learning rate {found['learning_rate']:.2g}, found by short trainings; their losses: {losses}.\n\n"


def _loss(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.4g}"


def _exports(exports: Sequence[dict[str, Any]]) -> str:
    if not exports:
        return ""
    parts = ["## Exports"]
    for record in exports:
        sizes = " and ".join(map(str, record["batch_sizes"]))
        parts.append(
            f"`{_cell(record['file'])}`: {record['num_bytes']:,} bytes; opened again, its outputs are within "
            f"{record['rel_difference']:.1e} of the network's (relative to the largest), with batches of {sizes}."
        )
        if record["networks"]:
            parts.append(_exported_networks(record))
    return "\n\n".join(parts)


def _exported_networks(record: dict[str, Any]) -> str:
    """The exported networks side by side, as their runtime runs them."""
    rows = [
        f"| in {record['runtime']} | {record['metric_name']} | bytes | "
        f"latency, ms per batch of {record['latency_batch_size']} |",
        "| --- | ---: | ---: | ---: |",
    ]
    for network in record["networks"]:
        metric = "" if network["metric"] is None else f"{network['metric']:.4f}"
        latency = f"{network['latency_ms']:.3f} ± {network['latency_noise_ms']:.3f}"
        rows.append(f"| {network['name']}, {network['precision']} | {metric} | {network['num_bytes']:,} | {latency} |")
    return "\n".join(rows)


def _provenance(report: dict[str, Any]) -> str:
    facts = report["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    return (
        "## How this was made\n\n"
        f"- {facts['processor']}, {facts['machine']}, {facts['device']}, {facts['num_threads']} threads, "
        f"{facts['runtime']}\n"
        f"- Python {facts['python']}; {packages}\n"
        f"- seed {facts['seed']}, started {facts['date']}\n"
        '- open the network with `sekron_search.load("THIS FOLDER")`'
    )


def _cell(text: str) -> str:
    """Text for a table cell of Markdown, with nothing in it that Markdown or HTML would act on."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
