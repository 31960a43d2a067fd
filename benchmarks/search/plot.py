"""Plot of `benchmarks/results/search.json`: python -m benchmarks.search.plot."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np

from benchmarks.results_file import RESULTS, samples_of

mpl.use("Agg")
import matplotlib.pyplot as plt

STYLES = {
    "ours": ("black", 2.5),
    "knapsack alone": ("#888888", 2.0),
    "knapsack without responses": ("#bbbbbb", 2.0),
}


def plot(path: Path) -> None:
    """Hypervolume against trials: lines are means over the seeds, bands reach from the least to the largest."""
    samples = samples_of(path)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), constrained_layout=True)
    colours = iter(plt.get_cmap("tab20").colors)  # type: ignore[attr-defined]
    for name, rows in samples["hypervolume"].items():
        values = np.array(rows)
        count = np.arange(1, values.shape[1] + 1)
        colour, width = STYLES.get(name, (next(colours), 1.2))
        for axes in (left, right):
            axes.plot(count, values.mean(0), label=name, color=colour, linewidth=width)
            axes.fill_between(count, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0)
    best = max(np.max(rows) for rows in samples["hypervolume"].values())
    left.set(xscale="log", ylabel="hypervolume of (divergence, flops)", title="all searches")
    right.set(xlim=(8, 100), ylim=(0.965 * best, 1.003 * best), title="those that start from the knapsack, enlarged")
    for axes in (left, right):
        axes.set_xlabel("trials")
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    plot(RESULTS / "search.json")
