"""What the report says of layers: structures, costs before and after, the runner-up, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sekron_search.report.document import Column, Items, Picture, Section, Table
from sekron_search.report.verdict import UNITS, shown

#: Columns of a layer's costs.
SIDES = ("before", "after", "change", "runner-up")

#: Behind a structure that is run as a dense layer.
REBUILT = ", rebuilt at load"


def layers_section(report: Mapping[str, Any]) -> Section:
    """Every layer, and those that were left alone."""
    rows = tuple(
        (
            layer["name"],
            structure_of(layer),
            _share(layer, "flops"),
            _share(layer, "params"),
            time_of(layer),
            f"{layer['error']:.3f}",
            layer["reason"],
            runner_up_of(layer) or "",
        )
        for layer in report["layers"]
    )
    columns = [Column("layer", "text"), Column("structure", "code"), *map(Column, ("flops", "params", "time"))]
    columns += [Column("output error"), Column("why", "text"), Column("runner-up", "code")]
    picture = Picture("layers", "Layer by layer")
    costs = "What layers cost before and after, and what the runner-up, the option nearest in what is budgeted, would:"
    return Section("Layers", (picture, Table(tuple(columns), rows), costs, _all_costs(report), *left_alone(report)))


def _all_costs(report: Mapping[str, Any]) -> Table:
    """`layer_costs` of all layers, one below the other."""
    rows = tuple(
        (layer["name"], *row, *[""] * (1 + len(SIDES) - len(row)))
        for layer in report["layers"]
        for row in layer_costs(layer).rows
    )
    return Table((Column("layer", "text"), Column("cost", "text"), *map(Column, SIDES)), rows)


def layer_costs(layer: Mapping[str, Any]) -> Table:
    """Costs and error of a layer before, after, and of the runner-up if there is one."""
    sides = [side for side in (layer["before"], layer["after"], layer["runner_up"]) if side is not None]
    rows = []
    for name, (label, _) in UNITS.items():
        before, after = layer["before"][name], layer["after"][name]
        if before is None or after is None:
            continue
        cells = [_with_noise(name, side) for side in sides]
        cells.insert(2, ratio(before, after))
        rows.append((label, *cells))
    errors = [f"{side['error']:.3f}" for side in (layer, layer["runner_up"]) if side is not None]
    rows.append(("relative output error", "", errors[0], "", *errors[1:]))
    return Table((Column("", "text"), *map(Column, SIDES[: len(sides) + 1])), tuple(rows))


def _with_noise(name: str, side: Mapping[str, Any]) -> str:
    if side[name] is None:
        return ""
    noise = f" ± {side['latency_noise_ms']:.3f}" if name == "latency_ms" else ""
    return shown(name, side[name]) + noise


def ratio(before: float, after: float) -> str:
    """What is left of a cost; nothing if there was none."""
    return f"{after / before:.2f}x" if before else ""


def left_alone(report: Mapping[str, Any]) -> tuple[str | Items, ...]:
    """The layers that were no part of the search, and why; nothing if all were."""
    if not report["left_alone"]:
        return ()
    texts = tuple(f"{skipped['name']} ({skipped['type']}): {skipped['reason']}" for skipped in report["left_alone"])
    return "Left alone:", Items(texts)


def structure_of(layer: Mapping[str, Any]) -> str:
    """The structure's text form, and whether it is run as a dense layer."""
    if layer["family"] == "dense":
        return "dense"
    return f"{layer['structure']}{REBUILT if layer['execution'] == 'dense' else ''}"


def runner_up_of(layer: Mapping[str, Any]) -> str | None:
    """The runner-up's structure likewise; None if the layer had no other option."""
    found = layer["runner_up"]
    if found is None:
        return None
    return f"{found['structure']}{REBUILT if found.get('execution') == 'dense' else ''}"


def time_of(layer: Mapping[str, Any]) -> str:
    """The latency of a layer, and its share of the original's."""
    after = layer["after"]
    if after["latency_ms"] is None:
        return "not measured"
    share = after["latency_ms"] / layer["before"]["latency_ms"]
    return f"{after['latency_ms']:.3f} ± {after['latency_noise_ms']:.3f} ms, {share:.2f}x"


def _share(layer: Mapping[str, Any], cost: str) -> str:
    return ratio(layer["before"][cost], layer["after"][cost])
