"""Plot of `benchmarks/results/rivals.json`, metrics against flops and latency: python -m benchmarks.rivals.plot."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl

from benchmarks.results_file import RESULTS, samples_of
from benchmarks.rivals.methods import RIVALS
from benchmarks.tasks import TASKS

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

#: By method: colours that the colour-blind tell apart (Okabe and Ito 2008), and markers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
STYLES = {
    "ours": ("black", "o"),
    "ours, as fast as the best rival": ("black", "s"),
    **dict(zip(RIVALS, zip(COLOURS, "^vD<>PX", strict=True), strict=True)),
}


def plot(path: Path) -> None:
    """A row per network and way of training, a panel of latencies per processor, for they cannot be compared.

    Every dot is the mean over the seeds of a method under a budget; one budget alone makes no picture.
    """
    samples = [s for s in samples_of(path) if "failed" not in s]
    rows: dict[tuple[str, int, bool], list[dict[str, Any]]] = {}
    for sample in samples:
        rows.setdefault((sample["network"], sample["epochs"], sample["mirrored_teacher"]), []).append(sample)
    rows = {row: own for row, own in rows.items() if len({s["budget"] for s in own}) > 1}
    processors = list(dict.fromkeys(s["processor"] for s in samples))
    size = (2.5 + 4.5 * (1 + len(processors)), 4.2 * len(rows))
    figure, panels = plt.subplots(
        len(rows), 1 + len(processors), figsize=size, constrained_layout=True, squeeze=False, sharey="row"
    )
    handles: dict[str, Any] = {}
    for ((network, epochs, mirrored), own), (left, *others) in zip(rows.items(), panels, strict=True):
        task = TASKS[network]
        handles |= _panel(left, own, "flops_ratio", task.factor)
        left.set(xlabel="flops, of the original's", ylabel=f"{task.unit.split()[-1]} on the test split")
        for axes, processor in zip(others, processors, strict=True):
            there = [s for s in own if s["processor"] == processor]
            axes.set_visible(bool(there))
            handles |= _panel(axes, there, "latency_ratio", task.factor)
            axes.set(xlabel="measured latency, of the original's")
            axes.set_title(processor, fontsize=10)
        left.set_title(f"{network}, {epochs} epochs{', mirrored teacher' if mirrored else ''}", fontsize=10)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)


def _panel(axes: Axes, samples: list[dict[str, Any]], key: str, factor: float) -> dict[str, Any]:
    """One dot per method and budget, those of a method connected; by method, what a legend shows."""
    found = {}
    for method, (colour, marker) in STYLES.items():
        own = [s for s in samples if s["method"] == method]
        budgets = dict.fromkeys(s["budget"] for s in own)
        dots = sorted(
            (
                mean(s[key] for s in own if s["budget"] == budget),
                mean(factor * s["test"] for s in own if s["budget"] == budget),
            )
            for budget in budgets
        )
        if dots:
            line = "none" if method == "ours, as fast as the best rival" else "-"
            (found[method],) = axes.plot(*zip(*dots, strict=True), color=colour, marker=marker, linestyle=line)
    axes.grid(alpha=0.3)
    return found


if __name__ == "__main__":
    plot(RESULTS / "rivals.json")
