"""Plot of `benchmarks/results/rivals.json`, metrics against flops and latency: python -m benchmarks.rivals.plot."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median, mode
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


#: What lies further below the best than so many times as far as the median does is told in words: dots that are close
#: together could not be told apart beside it.
FURTHEST = 4


def plot(path: Path) -> None:
    """A row per network and way of training; on the right latencies, of the processor that most of the row ran on.

    Latencies of different processors cannot be compared. Every dot is the mean over the seeds of a method under a
    budget; one budget alone makes no picture.
    """
    samples = [s for s in samples_of(path) if "failed" not in s]
    rows: dict[tuple[str, int, bool], list[dict[str, Any]]] = {}
    for sample in samples:
        rows.setdefault((sample["network"], sample["epochs"], sample["mirrored_teacher"]), []).append(sample)
    rows = {row: own for row, own in rows.items() if len({s["budget"] for s in own}) > 1}
    figure, panels = plt.subplots(
        len(rows), 2, figsize=(11.5, 3.8 * len(rows)), constrained_layout=True, squeeze=False, sharey="row"
    )
    handles: dict[str, Any] = {}
    for ((network, epochs, mirrored), own), (left, right) in zip(rows.items(), panels, strict=True):
        task = TASKS[network]
        processor = mode(s["processor"] for s in own)
        by_flops = _dots(own, "flops_ratio", task.factor)
        handles |= _panel(left, by_flops)
        there = [s for s in own if s["processor"] == processor]
        handles |= _panel(right, _dots(there, "latency_ratio", task.factor))
        if len(there) < len(own):
            _note(right, f"not shown: {len(own) - len(there)} of {len(own)} samples, of another processor")
        _keep_apart(left, by_flops)
        left.set(xlabel="flops, of the original's", ylabel=f"{task.unit.split()[-1]} on the test split")
        left.set_title(f"{network}, {epochs} epochs{', mirrored teacher' if mirrored else ''}", fontsize=10)
        right.set(xlabel="measured latency, of the original's")
        right.set_title(processor, fontsize=10)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", frameon=False, fontsize=9, ncols=5)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)


def _dots(samples: list[dict[str, Any]], key: str, factor: float) -> dict[str, list[tuple[float, float]]]:
    """By method, a dot per budget, from left to right."""
    found = {}
    for method in STYLES:
        own = [s for s in samples if s["method"] == method]
        parts = [[s for s in own if s["budget"] == budget] for budget in dict.fromkeys(s["budget"] for s in own)]
        found[method] = sorted((mean(s[key] for s in part), mean(factor * s["test"] for s in part)) for part in parts)
    return {method: dots for method, dots in found.items() if dots}


def _panel(axes: Axes, dots: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Dots of a method connected; by method, what a legend shows."""
    found = {}
    for method, own in dots.items():
        colour, marker = STYLES[method]
        line = "none" if method == "ours, as fast as the best rival" else "-"
        (found[method],) = axes.plot(*zip(*own, strict=True), color=colour, marker=marker, linestyle=line)
    axes.grid(alpha=0.3)
    return found


def _keep_apart(axes: Axes, dots: dict[str, list[tuple[float, float]]]) -> None:
    """Leave out what is far below all others, and say what it is."""
    values = [y for own in dots.values() for _, y in own]
    best = max(values)
    least = best - FURTHEST * (best - median(values))
    if least == best:
        return
    far = {method: [f"{y:.2f}" for _, y in own if y < least] for method, own in dots.items()}
    below = [f"{method} {' and '.join(dict.fromkeys(told))}" for method, told in far.items() if told]
    if below:
        axes.set_ylim(least, best + 0.1 * (best - least))
        _note(axes, "below: " + ",\n".join(below))


def _note(axes: Axes, text: str) -> None:
    axes.text(0.98, 0.03, text, transform=axes.transAxes, ha="right", fontsize=8)


if __name__ == "__main__":
    plot(RESULTS / "rivals.json")
