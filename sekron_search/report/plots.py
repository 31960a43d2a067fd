"""Plots of a finished run, from its `report.json`; the only module that imports matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sekron_search.report.audit import best_cheap
from sekron_search.report.figures import additive_fronts, around, curves_of, other_curves, taken
from sekron_search.report.style import BLACK, BLUE, GREEN, GREY, LABELS, ORANGE, PALE
from sekron_search.search.pareto import front


def make_plots(report: dict[str, Any]) -> dict[str, Figure]:
    """All plots by file name (without ending)."""
    budgeted = [b["name"] for b in report["budgets"]]
    plots: dict[str, Callable[[], Figure]] = {f"front_{name}": _front_plot(report, name) for name in budgeted}
    plots["fronts"] = lambda: _pairs_plot(report)
    plots["layers"] = lambda: _layers_plot(report)
    if report["optimality"] is not None:
        plots["optimality"] = lambda: _optimality_plot(report)
    if report["curve"]:
        plots["finetuning"] = lambda: _curve_plot(report)
    if report.get("audit") is not None:
        plots["audit"] = lambda: audit_plot(report["audit"])
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        return {name: make() for name, make in plots.items()}


def save_plot(figure: Figure, path: Path, ending: str) -> None:
    """Write a plot as PNG or SVG, the same bytes for the same report.

    Args:
        figure: One of `make_plots`.
        path: The file, whatever its name.
        ending: "png" or "svg".
    """
    with mpl.rc_context({"svg.hashsalt": "sekron"}):
        figure.savefig(path, format=ending, dpi=130, metadata={"Date": None} if ending == "svg" else {})


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _front_plot(report: dict[str, Any], cost: str) -> Callable[[], Figure]:
    def draw() -> Figure:
        figure, axes = _figure(7, 4.5)
        bound = next(b["bound"] for b in report["budgets"] if b["name"] == cost)
        trials = [t for t in report["trials"] if not t["pruned"]]  # their divergences are extrapolated
        for source, colour, marker, label in (
            ("knapsack", ORANGE, "s", "knapsack's starts"),
            (None, GREY, "o", "trials of the search"),
        ):
            own = [t for t in trials if (t["source"] == "knapsack") == (source == "knapsack")]
            axes.scatter(
                [t[cost] for t in own],
                [t["divergence"] for t in own],
                c=colour,
                marker=marker,
                s=22,
                label=label,
                zorder=2,
            )
        front = sorted(report["front"], key=lambda c: c["objectives"][cost])
        axes.plot(
            [c["objectives"][cost] for c in front],
            [c["objectives"]["divergence"] for c in front],
            color=BLUE,
            linewidth=1,
            marker=".",
            label="Pareto front (all objectives)",
            zorder=1,
        )
        chosen = [c for c in front if c["chosen"]]
        axes.scatter(
            [c["objectives"][cost] for c in chosen],
            [c["objectives"]["divergence"] for c in chosen],
            facecolors="none",
            edgecolors=BLACK,
            marker="D",
            s=110,
            label="chosen",
            zorder=3,
        )
        axes.axvline(bound, color=GREEN, linestyle="--", linewidth=1.2, label="budget")
        axes.set_xlabel(LABELS[cost])
        axes.set_ylabel(f"divergence from the original ({report['divergence_name']})")
        if all(t["divergence"] > 0 for t in trials):
            axes.set_yscale("log")
        axes.set_title(f"{len(trials)} trials: divergence without training against {cost}")
        axes.legend(fontsize=8)
        return figure

    return draw


def _pairs_plot(report: dict[str, Any]) -> Figure:
    """The trials over every pair of objectives that no `front_COST` shows, and the front of the two."""
    names = ["divergence", *(cost for cost in LABELS if all(cost in trial for trial in report["trials"]))]
    large = {("divergence", budget["name"]) for budget in report["budgets"]}
    pairs = [pair for pair in itertools.combinations(names, 2) if pair not in large]
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(3.6 * columns, 3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    trials = [t for t in report["trials"] if not t["pruned"]]
    for axes, (up, across) in zip(grid, pairs, strict=False):
        axes.scatter([t[across] for t in trials], [t[up] for t in trials], c=GREY, s=10)
        points = [(t[across], t[up]) for t in trials]
        steps = [points[i] for i in front(points)]
        axes.step([x for x, _ in steps], [y for _, y in steps], color=BLUE, linewidth=1, marker=".", where="post")
        chosen = [c["objectives"] for c in report["front"] if c["chosen"]]
        axes.scatter([c[across] for c in chosen], [c[up] for c in chosen], c="none", edgecolors=BLACK, marker="D", s=60)
        axes.set(xlabel=_axis_label(across), ylabel=_axis_label(up))
        axes.ticklabel_format(scilimits=(-3, 4))
        if up == "divergence" and all(t[up] > 0 for t in trials):
            axes.set_yscale("log")
    for axes in grid[len(pairs) :]:
        axes.set_axis_off()
    figure.suptitle("Other pairs of objectives: trials, the front of the two (lines), chosen (diamond)")
    return figure


def _axis_label(name: str) -> str:
    return LABELS.get(name, name).removesuffix(" (predicted)")


def _layers_plot(report: dict[str, Any]) -> Figure:
    layers = report["layers"]
    costs = [c for c in ("params", "flops", "latency_ms") if all(layer["after"][c] is not None for layer in layers)]
    figure = Figure(figsize=(3 + 2.6 * len(costs), max(2.5, 0.28 * len(layers) + 1.6)), layout="constrained")
    left, *others, right = figure.subplots(1, len(costs) + 1, sharey=True, width_ratios=[*[3] * len(costs), 2])
    rows = range(len(layers))
    for axes, cost in zip((left, *others), costs, strict=True):
        before = [layer["before"][cost] for layer in layers]
        after = [layer["after"][cost] for layer in layers]
        axes.barh(rows, before, color=PALE, edgecolor=GREY, linewidth=0.5, label="before")
        axes.barh(rows, after, color=BLUE, height=0.5, label="after")
        axes.set_xlabel(_axis_label(cost))
        axes.ticklabel_format(axis="x", scilimits=(-3, 4))
    left.legend(fontsize=8)
    right.barh(rows, [layer["error"] for layer in layers], color=ORANGE, height=0.5)
    right.set_xlabel("relative output error")
    right.set_xlim(left=0)
    left.set_yticks(list(rows), [layer["name"] for layer in layers], fontsize=8)
    left.invert_yaxis()
    figure.suptitle("Layer by layer: costs before and after, error before any training")
    return figure


def _optimality_plot(report: dict[str, Any]) -> Figure:
    facts, budgets = report["optimality"], report["budgets"]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    cost = budgets[0]["name"]
    for number, (tightened, points) in enumerate(additive_fronts(report)):
        what = " and ".join(tightened)
        style = {"color": BLUE, "marker": "."} if number == 0 else {"linestyle": ":", "linewidth": 1.2}
        left.plot(
            [p["costs"][cost] for p in points], [p["error"] for p in points], label=f"least under {what}", **style
        )
    chosen = sum(layer["after"][cost] - layer["before"][cost] for layer in report["layers"]) + report["original"][cost]
    if cost in ("flops", "params") and facts["error"] > 0:
        left.scatter([chosen], [facts["error"]], facecolors="none", edgecolors=BLACK, marker="D", s=90, label="chosen")
    left.axvline(budgets[0]["bound"], color=GREEN, linestyle="--", linewidth=1.2, label="budget")
    left.set_yscale("log")
    left.set_xlabel(LABELS[cost])
    left.set_ylabel("additive error")
    left.legend(fontsize=7)
    right.step(facts["hypervolume"]["trials"], facts["hypervolume"]["shares"], color=ORANGE, where="post")
    right.set_xlabel("trial")
    right.set_ylabel("hypervolume, share of the reference box")
    figure.suptitle("How close to the best: the proven front, and what trials added")
    return figure


def _curve_plot(report: dict[str, Any]) -> Figure:
    found = report["learning_rate"]
    figure = Figure(figsize=(9 if found is not None else 6.5, 3.4), layout="constrained")
    shown = curves_of(report)
    panels = list(figure.subplots(1, len(shown) + (found is not None), squeeze=False)[0])
    epochs = [row["epoch"] for row in report["curve"]]
    for axes, (key, label, colour) in zip(panels, shown, strict=False):
        marker = "o" if key == "metric" else "s"
        for trial, curve in other_curves(report).items():
            points = [row["epoch"] for row in curve], [row[key] for row in curve]
            axes.plot(*points, color=GREY, linewidth=1, marker=".", label=f"trial {trial}")  # one epoch makes no line
        values = [row[key] for row in report["curve"]]
        axes.plot(epochs, values, color=colour, marker=marker, markersize=4, label="chosen")
        if len(axes.get_lines()) > 1:
            axes.legend(fontsize=8)
        axes.set(xlabel="epoch", ylabel=label)
        if len({y for line in axes.get_lines() for y in line.get_ydata()}) == 1:
            axes.set_ylim(*around(values[0]))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[len(shown) :]:
        tried = sorted((rate, loss) for rate, loss in found["trials"] if loss is not None)
        axes.semilogx([rate for rate, _ in tried], [loss for _, loss in tried], color=GREY, marker="s")
        axes.axvline(found["learning_rate"], color=GREEN, linestyle="--", linewidth=1.2, label=taken(found))
        axes.set(xlabel="learning rate", ylabel="loss of short trainings")
        axes.minorticks_off()  # their labels lie on each other
        axes.set_xticks([rate for rate, _ in tried], [f"{rate:.1g}" for rate, _ in tried], fontsize=8)
        axes.legend(fontsize=8)
    figure.suptitle("Fine-tuning")
    return figure


def audit_plot(audit: dict[str, Any]) -> Figure:
    """The metric after training against the best cheap proxy, a marker for every budget."""
    best = best_cheap(audit)
    figure, axes = _figure(6.5, 4.2)
    styles = [(BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (GREY, "D"), (BLACK, "v")]
    for number, budget in enumerate(best["within"]):
        own = [c for c in audit["candidates"] if c["budget"] == budget]
        colour, marker = styles[number % len(styles)]
        scores, metrics = [c["scores"][best["name"]] for c in own], [c["metric"] for c in own]
        axes.scatter(scores, metrics, c=colour, marker=marker, s=28, label=budget)
    if audit["original_metric"] is not None:
        axes.axhline(audit["original_metric"], color=GREY, linestyle="--", linewidth=1, label="original")
    if all(c["scores"][best["name"]] > 0 for c in audit["candidates"]):
        axes.set_xscale("log")
    axes.set_xlabel(f"{best['label']} (before training)")
    axes.set_ylabel(f"{audit['metric_name']} after training")
    axes.set_title(f"{len(audit['candidates'])} random networks: Kendall's tau {best['tau']:.2f}")
    axes.legend(fontsize=8)
    return figure
