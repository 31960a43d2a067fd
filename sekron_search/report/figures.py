"""The page's plots as plain data for plotly.js; texts are escaped, because it reads them as a kind of HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sekron_search.report.audit import best_cheap
from sekron_search.report.style import BLACK, BLUE, GREEN, GREY, LABELS, ORANGE, PALE

Figure = dict[str, Any]

#: Layers' names along an axis are cut to so many letters.
NAME_LENGTH = 24
#: Plotly's marker symbols, in the order of `COLOURS`.
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down")
COLOURS = (BLUE, ORANGE, GREEN, GREY, BLACK)
#: Pixels for a layer's bar.
BAR = 20


def make_figures(report: Mapping[str, Any]) -> dict[str, list[Figure]]:
    """The plots of each picture, by its name; the Pareto fronts are drawn by the page's own script."""
    figures = {"layers": _layers(report["layers"])}
    if report["optimality"] is not None:
        figures["optimality"] = [_additive(report), _hypervolume(report)]
    if report["curve"]:
        figures["finetuning"] = _training(report)
    if report.get("audit") is not None:
        figures["audit"] = [_audit(report["audit"])]
    return figures


def plot_text(text: str) -> str:
    """Text that plotly.js shows as it is."""
    return escape(" ".join(text.splitlines()), quote=False)


def short_name(name: str) -> str:
    """A layer's name, its beginning left out where it is long."""
    return name if len(name) <= NAME_LENGTH else "…" + name[1 - NAME_LENGTH :]


def _figure(title: str, x: Figure, y: Figure, data: list[Figure], **layout: Any) -> Figure:
    axes = {"xaxis": {**x, "title": {"text": x["title"]}}, "yaxis": {**y, "title": {"text": y["title"]}}}
    return {"data": data, "layout": {"title": {"text": plot_text(title)}, **axes, **layout}}


def _layers(layers: Sequence[Mapping[str, Any]]) -> list[Figure]:
    costs = {"params": "parameters", "flops": LABELS["flops"], "latency_ms": "latency, ms per batch"}
    shown = [cost for cost in costs if all(layer["after"][cost] is not None for layer in layers)]
    figures = [_bars(costs[cost], layers, [layer["before"][cost] for layer in layers], cost) for cost in shown]
    return [*figures, _bars("relative output error", layers, None, "error")]


def _bars(title: str, layers: Sequence[Mapping[str, Any]], before: list[float] | None, name: str) -> Figure:
    after = [layer["error"] if before is None else layer["after"][name] for layer in layers]
    rows = list(range(len(layers)))
    names = [plot_text(layer["name"]) for layer in layers]
    data: list[Figure] = []
    for label, values, colour, width in (("before", before, PALE, 0.8), ("after", after, BLUE, 0.45)):
        if values is None:
            continue
        texts = [f"{layer}: {value:,.6g}" for layer, value in zip(names, values, strict=True)]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": label,
                "x": values,
                "y": rows,
                "width": width,
                "marker": {"color": ORANGE if before is None else colour, "line": {"color": GREY, "width": 0.5}},
                "hovertext": texts,
                "hoverinfo": "text",
                "textposition": "none",
            }
        )
    ticks = {"tickvals": rows, "ticktext": [plot_text(short_name(layer["name"])) for layer in layers]}
    return _figure(
        title,
        {"title": "", "rangemode": "tozero", "nticks": 5},
        {"title": "", "autorange": "reversed", "automargin": True, "showgrid": False, **ticks},
        data,
        barmode="overlay",
        height=150 + BAR * len(layers),
        showlegend=before is not None,
    )


def _additive(report: Mapping[str, Any]) -> Figure:
    facts, budgets = report["optimality"], report["budgets"]
    cost = budgets[0]["name"]
    styles = iter(zip(("dot", "dash", "dashdot", "longdash"), (ORANGE, GREEN, GREY, BLACK), strict=True))
    data: list[Figure] = []
    for number, (tightened, points) in enumerate(additive_fronts(report)):
        line: Figure = {"width": 2, "color": BLUE}
        if number > 0:
            dash, colour = next(styles)
            line = {"width": 1.3, "dash": dash, "color": colour}
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": f"least under {' and '.join(tightened)}",
                "x": [p["costs"][cost] for p in points],
                "y": [p["error"] for p in points],
                "line": line,
            }
        )
    chosen = report["original"][cost] + sum(x["after"][cost] - x["before"][cost] for x in report["layers"])
    if cost in ("flops", "params") and facts["error"] > 0:
        marker = {"symbol": "diamond-open", "size": 13, "color": BLACK, "line": {"width": 2}}
        point = {"x": [chosen], "y": [facts["error"]], "marker": marker}
        data.append({"type": "scatter", "mode": "markers", "name": "chosen", **point})
    return _figure(
        "The proven front",
        {"title": LABELS[cost]},
        {"title": "additive error", "type": "log", "exponentformat": "power"},
        data,
        height=420,
        shapes=[_vertical(budgets[0]["bound"])],
        annotations=[_above(budgets[0]["bound"], "budget")],
    )


def additive_fronts(report: Mapping[str, Any]) -> list[tuple[list[str], list[Mapping[str, Any]]]]:
    """The proven fronts that are drawn, by which costs are tightened: all together first, then each on its own.

    Their points are in the order of the first budget's cost.
    """
    every = [budget["name"] for budget in report["budgets"]]
    return [
        (
            tightened,
            sorted(
                (p for p in report["optimality"]["front"] if p["tightened"] == tightened and p["error"] > 0),
                key=lambda p: p["costs"][every[0]],
            ),
        )
        for tightened in [every, *([name] for name in every if len(every) > 1)]
    ]


def _hypervolume(report: Mapping[str, Any]) -> Figure:
    facts = report["optimality"]["hypervolume"]
    line = {"color": ORANGE, "shape": "hv", "width": 2}
    data = [{"type": "scatter", "mode": "lines", "x": facts["trials"], "y": facts["shares"], "line": line}]
    y = {"title": "hypervolume, share of the box", "tickformat": ".0%"}
    return _figure("What trials added", {"title": "trial"}, y, data, showlegend=False)


def _training(report: Mapping[str, Any]) -> list[Figure]:
    others = other_curves(report)
    x = {"title": "epoch", "rangemode": "tozero", "dtick": max(1, len(report["curve"]) // 8)}
    figures = []
    for key, title, colour in curves_of(report):
        data = [
            {**_curve(curve, key), "name": f"trial {trial}", "line": {"color": GREY, "width": 1}, "marker": {"size": 4}}
            for trial, curve in others.items()
        ]
        style = {
            "marker": {"symbol": "circle" if key == "metric" else "square", "size": 7},
            "line": {"color": colour, "width": 2},
        }
        data.append({**_curve(report["curve"], key), "name": "chosen", **style})
        values = {y for curve in data for y in curve["y"]}
        y = {"title": "", **({"range": around(*values)} if len(values) == 1 else {})}
        figures.append(_figure(title, x, y, data, showlegend=bool(others)))
    found = report["learning_rate"]
    if found is not None:
        figures.append(_learning_rate(found))
    return figures


def around(value: float) -> list[float]:
    """Limits of an axis on which all values are the same one, which would else be taken for the middle of 0 to 2."""
    margin = 0.02 * abs(value) or 0.02
    return [value - margin, value + margin]


def _curve(curve: Sequence[Mapping[str, float]], key: str) -> Figure:
    points = {"x": [row["epoch"] for row in curve], "y": [row[key] for row in curve]}
    return {"type": "scatter", "mode": "lines+markers", **points}


def has_metric(report: Mapping[str, Any]) -> bool:
    """Whether the metric in rows of curves is one: without a metric they hold the negative loss in its place."""
    return report["validation_metric"] is not None


def curves_of(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What curves show: key of their rows, title, colour."""
    loss = ("loss", "training loss", ORANGE)
    if not has_metric(report):
        return [loss]
    return [("metric", f"{report['metric_name']} on the validation split", BLUE), loss]


def other_curves(report: Mapping[str, Any]) -> dict[int, Sequence[Mapping[str, float]]]:
    """Curves of the candidates that were trained and not chosen, by trial."""
    return {c["trial"]: c["curve"] for c in report["candidates"] if c.get("curve") and not c["chosen"]}


def raised_from(found: Mapping[str, Any]) -> float | None:
    """The best learning rate of the short trainings, where a higher one was taken; runs of before took none."""
    best: float = found.get("best_in_trials", math.inf)
    return best if found["learning_rate"] > best else None


def taken(found: Mapping[str, Any]) -> str:
    """What a found learning rate is called in plots."""
    return "taken" if raised_from(found) is None else "taken, raised"


def _learning_rate(found: Mapping[str, Any]) -> Figure:
    tried = sorted((rate, loss) for rate, loss in found["trials"] if loss is not None)
    rates, losses = [rate for rate, _ in tried], [loss for _, loss in tried]
    marker = {"symbol": "square", "size": 8, "color": GREY}
    data = [{"type": "scatter", "mode": "lines+markers", "x": rates, "y": losses, "marker": marker}]
    data[0]["line"] = {"color": GREY, "width": 1}
    return _figure(
        "loss of short trainings",
        {"title": "learning rate", "type": "log", "exponentformat": "power", "dtick": 1},
        {"title": ""},
        data,
        showlegend=False,
        shapes=[_vertical(found["learning_rate"])],
        annotations=[_above(found["learning_rate"], taken(found), log=True)],
    )


def _audit(audit: Mapping[str, Any]) -> Figure:
    best = best_cheap(audit)
    data: list[Figure] = []
    for number, budget in enumerate(best["within"]):
        own = [candidate for candidate in audit["candidates"] if candidate["budget"] == budget]
        style = {"symbol": SYMBOLS[number % len(SYMBOLS)], "color": COLOURS[number % len(COLOURS)], "size": 9}
        points = {"x": [c["scores"][best["name"]] for c in own], "y": [c["metric"] for c in own]}
        data.append({"type": "scatter", "mode": "markers", "name": plot_text(budget), "marker": style, **points})
    positive = all(candidate["scores"][best["name"]] > 0 for candidate in audit["candidates"])
    shapes: list[Figure] = []
    annotations: list[Figure] = []
    if audit["original_metric"] is not None:
        level = audit["original_metric"]
        ends = {"xref": "paper", "x0": 0, "x1": 1, "y0": level, "y1": level}
        shapes = [{"type": "line", **ends, "line": {"color": GREY, "dash": "dash", "width": 1}}]
        place = {"xref": "paper", "x": 1, "xanchor": "right", "y": level, "yanchor": "bottom"}
        annotations = [{**place, "text": "original", "showarrow": False}]
    return _figure(
        f"{len(audit['candidates'])} random networks: Kendall's tau {best['tau']:.2f}",
        {"title": plot_text(f"{best['label']} (before training)"), "type": "log" if positive else "linear"},
        {"title": plot_text(f"{audit['metric_name']} after training")},
        data,
        height=420,
        shapes=shapes,
        annotations=annotations,
    )


def _vertical(x: float) -> Figure:
    line = {"color": GREEN, "dash": "dash", "width": 1.5}
    return {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": line}


def _above(x: float, text: str, *, log: bool = False) -> Figure:
    """A word at the top of a vertical line; plotly.js wants the logarithm of where it is on a logarithmic axis."""
    at = math.log10(x) if log else x
    return {"x": at, "y": 1, "yref": "paper", "yanchor": "bottom", "text": text, "showarrow": False}
