"""Plot of `benchmarks/results/proxies.json`: python -m benchmarks.proxies.plot."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

import matplotlib as mpl

from benchmarks.results_file import RESULTS, samples_of

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

STYLES = (("#0072B2", "o"), ("#E69F00", "s"), ("#009E73", "^"))


def plot(path: Path) -> None:
    """Accuracy after training against every proxy, a marker for every budget."""
    record = samples_of(path)
    columns = 3
    rows = -(-len(record["proxies"]) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(12, 3.4 * rows), sharey=True, constrained_layout=True)
    for axes, proxy in zip(panels.flat, record["proxies"], strict=False):
        for budget, (colour, marker) in zip(proxy["within"], STYLES, strict=True):
            own = [c for c in record["candidates"] if c["budget"] == budget]
            scores = [abs(c["scores"][proxy["name"]]) for c in own]
            accuracies = [100 * c["metric"] for c in own]
            axes.scatter(scores, accuracies, c=colour, marker=marker, s=22, label=budget)
        if proxy["name"] not in ("flops", "untrained_metric"):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"tau {proxy['tau']:.2f} ({proxy['low']:.2f} to {proxy['high']:.2f})", fontsize=10)
        axes.set_xlabel(fill(proxy["label"], 44), fontsize=9)
        axes.grid(alpha=0.3)
    for axes in panels[:, 0]:
        axes.set_ylabel("accuracy after one epoch, %")
    panels.flat[0].legend(fontsize=8)
    for axes in panels.flat[len(record["proxies"]) :]:
        axes.set_visible(False)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    plot(RESULTS / "proxies.json")
