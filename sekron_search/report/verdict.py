"""Whether the budgets are met, and what the network costs before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sekron_search.report.document import Block, Column, Section, Table

#: How costs are called in tables, and how their values are written.
UNITS = {
    "flops": ("multiply-adds per sample", "{:,.0f}"),
    "params": ("parameters", "{:,.0f}"),
    "latency_ms": ("latency, ms", "{:.3f}"),
    "peak_activation_bytes": ("peak activations, bytes", "{:,.0f}"),
}

#: Costs in the order of the verdict.
ORDER = ("latency_ms", "flops", "params", "peak_activation_bytes")


def shown(name: str, value: float) -> str:
    """A cost as text."""
    return UNITS[name][1].format(value)


def headline(report: Mapping[str, Any]) -> str:
    """The verdict in a sentence."""
    met = all(budget["met"] for budget in report["budgets"])
    origin = report.get("finishes")
    told = "" if origin is None else f" This is {origin['source']} of run {origin['run']}, finished afterwards."
    return ("Every budget is met." if met else "Not every budget is met.") + told


def summary(report: Mapping[str, Any]) -> list[str]:
    """The verdict in a few lines of plain text."""
    lines = []
    for budget in report["budgets"]:
        name = budget["name"]
        lines.append(
            f"{name}: asked at most {shown(name, budget['bound'])} ({budget['asked']}), "
            f"got {shown(name, budget['value'])}: {_verdict(report, budget)}"
        )
    before, after = report["original"]["metric"], report["compressed"]["metric"]
    if before is not None and after is not None:
        untrained = report["metric_without_training"]
        lines.append(
            f"{report['metric_name']}: original {before:.4f}, compressed {after:.4f} (untrained {untrained:.4f})"
        )
    return lines


def _verdict(report: Mapping[str, Any], budget: Mapping[str, Any]) -> str:
    verdict = "met" if budget["met"] else "MISSED"
    if budget["name"] == "latency_ms" and is_predicted(report):
        verdict += f" as predicted (± {report['compressed']['latency_noise_ms']:.3f}); measure it on the device"
    return verdict


def is_predicted(report: Mapping[str, Any]) -> bool:
    """Whether the latencies are those of another machine."""
    return report["latency"] is not None and report["latency"]["predicted_for"] is not None


def costs_section(report: Mapping[str, Any]) -> Section:
    """Costs, what was asked of them, and the metric, before and after."""
    head = "Measured on the saved and re-loaded network, beside the original."
    if is_predicted(report):
        head += " Its latency is predicted, for another machine."
    blocks: list[Block] = [head, _table(report)]
    if report["uncounted_operators"]:
        names = ", ".join(f"{name} ({count})" for name, count in sorted(report["uncounted_operators"].items()))
        blocks.append(f"flops are fvcore's count. It does not count these operators of the network: {names}.")
    return Section("Costs", tuple(blocks))


def _table(report: Mapping[str, Any]) -> Table:
    sides = report["original"], report["compressed"]
    budgets = {budget["name"]: budget for budget in report["budgets"]}
    before, after = (side["metric"] for side in sides)
    rows: list[tuple[str, ...]] = []
    if before is not None and after is not None:
        name, untrained = report["metric_name"], report["metric_without_training"]
        for label, value in ((name, after), (f"{name} without training", untrained)):
            rows.append((label, f"{before:.4f}", f"{value:.4f}", f"{value - before:+.4f}", "", ""))
    for name in ORDER:
        label, cells = UNITS[name][0], [shown(name, side[name]) for side in sides]
        if name == "latency_ms":
            label += f" per batch of {report['batch_size']}"
            cells = [f"{cell} ± {side['latency_noise_ms']:.3f}" for cell, side in zip(cells, sides, strict=True)]
        asked = verdict = ""
        if name in budgets:
            asked = f"{shown(name, budgets[name]['bound'])} ({budgets[name]['asked']})"
            verdict = _verdict(report, budgets[name])
        rows.append((label, *cells, f"{sides[1][name] / sides[0][name]:.3f}x", asked, verdict))
    columns = (Column("", "text"), Column("original"), Column("compressed"), Column("change"), Column("asked at most"))
    return Table((*columns, Column("verdict", "text")), tuple(rows))
