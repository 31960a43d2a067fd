"""The report as one page of HTML that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import plotly.offline
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from sekron_search.kron.families import family
from sekron_search.kron.structure import Structure
from sekron_search.report import style
from sekron_search.report.audit import audit_section
from sekron_search.report.document import Picture, Section, Table
from sekron_search.report.drawing import drawing
from sekron_search.report.figures import make_figures
from sekron_search.report.latency import latency_section
from sekron_search.report.layers import REBUILT, layer_costs, left_alone, ratio, runner_up_of, structure_of
from sekron_search.report.optimality import optimality_section
from sekron_search.report.sections import (
    candidates_section,
    exports_section,
    front_section,
    provenance_section,
    sorted_front,
    training_section,
)
from sekron_search.report.usage import finish_command, use_section
from sekron_search.report.verdict import costs_section, headline, summary

#: With so many replaced layers or fewer, the page shows them opened.
OPENED = 12

#: Significant digits of what plots show.
DIGITS = 6


@dataclass(frozen=True)
class Layer:
    """What the page shows of a layer.

    Args:
        name: Of the module.
        family: Of its structure.
        structure: Its text form.
        drawing: The same as SVG.
        shares: What is left of parameters, flops and time, as text.
        costs: Before, after, and of the runner-up.
        runner_up: Its structure; None if the layer had no other option.
        reason: Why it was chosen.
        opened: Whether all this is shown from the start.
    """

    name: str
    family: str
    structure: str
    drawing: Markup
    shares: tuple[tuple[str, str], ...]
    costs: Table
    runner_up: str | None
    reason: str
    opened: bool


def make_page(report: Mapping[str, Any], exports: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page.

    Everything that comes from the run is escaped on its way into HTML, JSON and plots; should that ever fail, the
    page's content security policy still runs no script but its own, and lets nothing be fetched.

    Args:
        report: The contents of `report.json`.
        exports: What was exported, as `export_run` records it.

    Raises:
        StructureError: If the report holds a structure that is none.
    """
    figures = make_figures(report)
    script, library = _own("page.js"), plotly.offline.get_plotlyjs()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    front = front_section(report)
    sections = {
        "costs": costs_section(report),
        "front": Section(front.title, tuple(block for block in front.blocks if not isinstance(block, Picture))),
        "optimality": optimality_section(report),
        "training": training_section(report),
        "audit": audit_section(report.get("audit")),
        "latency": latency_section(report),
        "candidates": candidates_section(report),
        "exports": exports_section(exports),
        "provenance": provenance_section(report),
        "use": use_section(report),
    }
    return environment.from_string(_own("page.html")).render(
        policy=f"default-src 'none'; base-uri 'none'; form-action 'none'; img-src data: blob:; "
        f"style-src 'unsafe-inline'; script-src {_source_of(library)} {_source_of(script)}",
        css=Markup(_own("page.css")),
        colours={name.lower(): getattr(style, name) for name in ("BLUE", "ORANGE", "GREEN", "GREY", "BLACK", "PALE")},
        headline=headline(report),
        summary=summary(report),
        met=all(budget["met"] for budget in report["budgets"]),
        about=_about(report["environment"]),
        axes=_axes(report),
        sections=sections,
        layers=_layers(report),
        left_alone=left_alone(report),
        titles={name: [figure["layout"]["title"]["text"] for figure in group] for name, group in figures.items()},
        layers_picture=Picture("layers", "Layer by layer, before and after"),
        data=htmlsafe_json_dumps(_data(report, figures), dumps=_compact),
        library=Markup(library),
        script=Markup(script),
    )


def _own(name: str) -> str:
    return resources.files("sekron_search.report").joinpath(name).read_text(encoding="utf-8")


def _source_of(script: str) -> str:
    """A script as the content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _about(environment: Mapping[str, Any]) -> str:
    """Which network, when, where and by what."""
    factory = environment["factory"]
    network = () if factory is None else (factory["reference"],)
    version = f"sekron-search {environment['packages']['sekron-search']}"
    return ", ".join((*network, environment["date"], environment["processor"], version))


def _layers(report: Mapping[str, Any]) -> list[Layer]:
    opened = sum(layer["family"] != "dense" for layer in report["layers"]) <= OPENED
    return [
        Layer(
            name=layer["name"],
            family=layer["family"],
            structure=structure_of(layer),
            drawing=Markup(drawing(layer["structure"])),
            shares=_shares(layer),
            costs=layer_costs(layer),
            runner_up=runner_up_of(layer),
            reason=layer["reason"],
            opened=opened and layer["family"] != "dense",
        )
        for layer in report["layers"]
    ]


def _shares(layer: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    names = {"params": "params", "flops": "flops", "latency_ms": "time"}
    shares = [
        (label, ratio(layer["before"][name], layer["after"][name]))
        for name, label in names.items()
        if layer["after"][name] is not None
    ]
    return (*shares, ("error", f"{layer['error']:.3f}"))


def _axes(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The objectives that every trial has, and their budgets."""
    bounds = {budget["name"]: budget["bound"] for budget in report["budgets"]}
    divergence = {"name": "divergence", "label": f"divergence from the original ({report['divergence_name']})"}
    axes: list[dict[str, Any]] = [{**divergence, "bound": None}]
    for name in sorted(style.LABELS, key=lambda name: name not in bounds):
        if all(name in trial for trial in report["trials"]):
            axes.append({"name": name, "label": style.LABELS[name], "bound": bounds.get(name)})
    return axes


def _data(report: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    """What the page's script reads. Structures are numbered, layer by layer: fronts hold the same ones many times."""
    axes, front = _axes(report), sorted_front(report)
    names = [axis["name"] for axis in axes]
    layers = list(front[0]["structures"]) if front else []
    shown = [{layer: _structure(c, layer) for layer in layers} for c in front]
    options = {layer: list(dict.fromkeys(structures[layer] for structures in shown)) for layer in layers}
    on_front = {tuple(c["objectives"][name] for name in names) for c in front}
    others = [t for t in report["trials"] if tuple(t[name] for name in names) not in on_front]
    return {
        "axes": axes,
        "others": [{**_trial(t, t, names), "pruned": t["pruned"]} for t in others],
        "front": [
            {
                **_trial(c, c["objectives"], names),
                "trial": c["trial"],
                "chosen": c["chosen"],
                "structures": [options[layer].index(structures[layer]) for layer in layers],
            }
            for c, structures in zip(front, shown, strict=True)
        ],
        "layers": layers,
        "options": list(options.values()),
        "families": [[family(Structure.parse(text.removesuffix(REBUILT))) for text in own] for own in options.values()],
        "finish": finish_command(report),
        "figures": figures,
    }


def _structure(candidate: Mapping[str, Any], layer: str) -> str:
    """A layer's structure in a candidate of the front, and whether it is run as a dense layer."""
    rebuilt = layer in candidate.get("rebuilt", ())
    return f"{candidate['structures'][layer]}{REBUILT if rebuilt else ''}"


def _trial(facts: Mapping[str, Any], objectives: Mapping[str, float], names: Sequence[str]) -> dict[str, Any]:
    values = [float(f"{objectives[name]:.{DIGITS}g}") if name == "divergence" else objectives[name] for name in names]
    return {"values": values, "feasible": facts["feasible"], "source": facts["source"]}


def _compact(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"), allow_nan=False)
