"""Whether the budgets are met, and what the network costs before and after."""

from __future__ import annotations

import math
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

#: Of the normal distribution, 95 % lie within so many standard deviations.
Z = 1.96

#: Costs in the order of the verdict.
ORDER = ("latency_ms", "flops", "params", "peak_activation_bytes")


def shown(name: str, value: float) -> str:
    """A cost as text."""
    return UNITS[name][1].format(value)


def interval(share: float, samples: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n), z = 1.96.

    Args:
        share: p, in [0, 1].
        samples: n, of which it is the share.

    Source: Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    square = Z * Z / samples
    middle, spread = share + square / 2, math.sqrt(square * (share * (1 - share) + square / 4))
    return max(0.0, (middle - spread) / (1 + square)), min(1.0, (middle + spread) / (1 + square))


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
    if not _asks_latency(report):
        lines.append(_unasked_latency(report))
    before, after = report["original"]["metric"], report["compressed"]["metric"]
    if before is not None and after is not None:
        untrained = report["metric_without_training"]
        sure = f"95 % interval {_interval(report, after)}; " if report.get("metric_samples") else ""
        lines.append(
            f"{report['metric_name']}: original {before:.4f}, compressed {after:.4f} ({sure}untrained {untrained:.4f})"
        )
    return lines


def _asks_latency(report: Mapping[str, Any]) -> bool:
    return any(budget["name"] == "latency_ms" for budget in report["budgets"])


def _unasked_latency(report: Mapping[str, Any]) -> str:
    """What became of the latency, where nothing was asked of it."""
    before, after = (shown("latency_ms", report[side]["latency_ms"]) for side in ("original", "compressed"))
    slower = ", SLOWER" if _is_slower(report) else ""
    return f"latency_ms: original {before}, compressed {after} ({_change(report, 'latency_ms')}): not asked for{slower}"


def _is_slower(report: Mapping[str, Any]) -> bool:
    """Whether the network takes longer than the original, beyond the noise, and nothing was asked of that."""
    original, compressed = report["original"], report["compressed"]
    longer = compressed["latency_ms"] > original["latency_ms"] and _is_beyond_noise(original, compressed)
    return longer and not _asks_latency(report)


def _change(report: Mapping[str, Any], name: str) -> str:
    """A cost as a multiple of the original's, and whether latencies are apart at all."""
    original, compressed = report["original"], report["compressed"]
    noise = ", within the noise" if name == "latency_ms" and not _is_beyond_noise(original, compressed) else ""
    return f"{compressed[name] / original[name]:.3f}x{noise}"


def _interval(report: Mapping[str, Any], share: float) -> str:
    low, high = interval(share, report["metric_samples"])
    return f"{low:.4f} to {high:.4f}"


def _verdict(report: Mapping[str, Any], budget: Mapping[str, Any]) -> str:
    verdict = "met" if budget["met"] else "MISSED"
    if budget["name"] == "latency_ms" and is_predicted(report):
        verdict += f" as predicted (± {report['compressed']['latency_noise_ms']:.3f}); measure it on the device"
    elif budget["name"] == "latency_ms":
        within = abs(budget["bound"] - budget["value"]) <= report["compressed"]["latency_noise_ms"]
        verdict += ", within the noise" if within else ""
    return verdict


def _is_beyond_noise(original: Mapping[str, Any], compressed: Mapping[str, Any]) -> bool:
    """Whether latencies differ by more than clocks err."""
    noise: float = original["latency_noise_ms"] + compressed["latency_noise_ms"]
    return bool(abs(original["latency_ms"] - compressed["latency_ms"]) > noise)


def is_predicted(report: Mapping[str, Any]) -> bool:
    """Whether the latencies are those of another machine."""
    return report["latency"] is not None and report["latency"]["predicted_for"] is not None


def costs_section(report: Mapping[str, Any]) -> Section:
    """Costs, what was asked of them, and the metric, before and after."""
    head = "Measured on the saved and re-loaded network, beside the original."
    if is_predicted(report):
        head += " Its latency is predicted, for another machine."
    blocks: list[Block] = [head, _table(report), *_advice(report), _noise(report), *_uncertainty(report)]
    if report["uncounted_operators"]:
        names = ", ".join(f"{name} ({count})" for name, count in sorted(report["uncounted_operators"].items()))
        blocks.append(f"flops are fvcore's count. It does not count these operators of the network: {names}.")
    return Section("Costs", tuple(blocks))


def _advice(report: Mapping[str, Any]) -> tuple[str, ...]:
    """What helps where fewer multiply-adds take longer; nothing where they do not."""
    if not _is_slower(report):
        return ()
    return (
        "The network became slower: nothing was asked of its latency, and fewer multiply-adds are often not faster. "
        "With latency_ms: 1x in the budget too, options that are slower than their layers are left out.",
    )


def _noise(report: Mapping[str, Any]) -> str:
    """What the sign behind latencies means."""
    if is_predicted(report):
        return "± is the standard deviation that the latency model gives its prediction."
    return "± is half the interquartile range of repeated measurements: about half of them lie so near."


def _uncertainty(report: Mapping[str, Any]) -> tuple[str, ...]:
    """What the intervals of the metric mean; nothing where there are none."""
    if not report.get("metric_samples"):
        return ()
    return (
        f"The {report['metric_name']} is a share of {report['metric_samples']:,} samples; its 95 % interval (Wilson's) "
        "says how far chance in drawing these may have moved it. The difference of the networks is less uncertain: "
        "it is on the same samples, and chance mostly moves both alike.",
    )


def _table(report: Mapping[str, Any]) -> Table:
    sides = report["original"], report["compressed"]
    budgets = {budget["name"]: budget for budget in report["budgets"]}
    before, after = (side["metric"] for side in sides)
    rows: list[tuple[str, ...]] = []
    if before is not None and after is not None:
        name, untrained = report["metric_name"], report["metric_without_training"]
        rows.append((name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}", "", ""))
        if report.get("metric_samples"):
            rows.append((f"{name}, 95 % interval", _interval(report, before), _interval(report, after), "", "", ""))
        rows.append(
            (f"{name} without training", f"{before:.4f}", f"{untrained:.4f}", f"{untrained - before:+.4f}", "", "")
        )
    for name in ORDER:
        label, cells = UNITS[name][0], [shown(name, side[name]) for side in sides]
        if name == "latency_ms":
            label += f" per batch of {report['batch_size']}"
            cells = [f"{cell} ± {side['latency_noise_ms']:.3f}" for cell, side in zip(cells, sides, strict=True)]
        asked = verdict = ""
        if name in budgets:
            asked = f"{shown(name, budgets[name]['bound'])} ({budgets[name]['asked']})"
            verdict = _verdict(report, budgets[name])
        elif name == "latency_ms" and _is_slower(report):
            verdict = "SLOWER"
        rows.append((label, *cells, _change(report, name), asked, verdict))
    columns = (Column("", "text"), Column("original"), Column("compressed"), Column("change"), Column("asked at most"))
    return Table((*columns, Column("verdict", "text")), tuple(rows))
