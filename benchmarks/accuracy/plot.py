"""Plot of `benchmarks/results/accuracy.json`, losses against epochs: python -m benchmarks.accuracy.plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.results_file import RESULTS, samples_of
from benchmarks.tasks import TASKS

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

#: Colours that the colour-blind tell apart (Okabe and Ito 2008), and markers, by the order of the lines.
COLOURS, MARKERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"), "osD^vP"


def plot(path: Path) -> None:
    """A panel per unit; lines are means over seeds, dots the single seeds; at no epochs, what nobody has trained."""
    samples = samples_of(path)
    units = list(dict.fromkeys(TASKS[s["network"]].unit for s in samples))
    figure, panels = plt.subplots(
        1, len(units), figsize=(6.2 * len(units), 4.4), constrained_layout=True, squeeze=False
    )
    for unit, axes in zip(units, panels[0], strict=True):
        _panel(axes, [s for s in samples if TASKS[s["network"]].unit == unit])
        axes.set(xlabel="epochs of fine-tuning", ylabel=f"{unit} lost on the test split")
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)


def _panel(axes: Axes, samples: list[dict[str, Any]]) -> None:
    cases = dict.fromkeys((s["network"], s["budget"]) for s in samples)
    for (network, budget), colour, marker in zip(cases, COLOURS, MARKERS, strict=False):
        own = [s for s in samples if (s["network"], s["budget"]) == (network, budget)]
        lost: dict[int, list[float]] = {}
        for sample in own:
            lost.setdefault(sample["epochs"], []).append(sample["lost"]["test"])
        before = [s["lost_without_training"] for s in own]
        lost[0] = before
        epochs = sorted(lost)
        means = [sum(lost[n]) / len(lost[n]) for n in epochs]
        axes.plot(epochs, means, color=colour, marker=marker, label=f"{network}, {budget} flops")
        for n in epochs:
            axes.plot([n] * len(lost[n]), lost[n], ".", color=colour, alpha=0.5)
    axes.set_xscale("symlog", linthresh=1)
    ticks = sorted({0, *(s["epochs"] for s in samples)})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)


if __name__ == "__main__":
    plot(RESULTS / "accuracy.json")
