"""What the report says, section by section, for Markdown and for the page alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sekron_search.report.document import Column, Items, Picture, Section, Table
from sekron_search.report.figures import has_metric, other_curves, raised_from
from sekron_search.report.verdict import UNITS, shown
from sekron_search.search.trial import LEANING


def sorted_front(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The candidates of the front, the least divergent first."""
    return sorted(report["front"], key=lambda candidate: float(candidate["objectives"]["divergence"]))


def front_section(report: Mapping[str, Any]) -> Section:
    """The Pareto front as plots and a table."""
    front = sorted_front(report)
    costs = [name for name in UNITS if front and name in front[0]["objectives"]]
    rows = tuple(
        (
            str(candidate["trial"]),
            f"{candidate['objectives']['divergence']:.4g}",
            *(shown(name, candidate["objectives"][name]) for name in costs),
            "yes" if candidate["feasible"] else "no",
            candidate["source"],
        )
        for candidate in front
    )
    columns = [Column("trial"), Column("divergence"), *map(Column, costs)]
    columns += [Column("within budget", "text"), Column("from", "text")]
    head = (
        f"{report['num_trials']} trials of {report['num_distinct_networks']} distinct networks; "
        f"divergence ({report['divergence_name']}) of the outputs from the original's, "
        "before any training; costs as predicted."
    )
    pictures = [
        Picture(f"front_{b['name']}", f"Pareto front: divergence against {b['name']}") for b in report["budgets"]
    ]
    pictures.append(Picture("fronts", "Pareto fronts of all other pairs of objectives"))
    chosen = next((i for i, candidate in enumerate(front) if candidate["chosen"]), None)
    return Section("Pareto front", (head, *pictures, Table(tuple(columns), rows, chosen)))


def candidates_section(report: Mapping[str, Any]) -> Section:
    """The candidates that were fitted and measured, and where several were trained, how long and what they reached."""
    costs = [budget["name"] for budget in report["budgets"]]
    trained, after_training = _after_training(report)
    rows = tuple(
        (
            f"candidates/{row['folder']}",
            str(row["trial"]),
            f"{row['divergence']:.4g}",
            f"{row['divergence_before_sequential_fit']:.4g}",
            *(shown(name, row["costs"][name]) for name in costs),
            "" if row["metric"] is None else f"{row['metric']:.4f}",
            *reached,
        )
        for row, reached in zip(report["candidates"], after_training, strict=True)
    )
    columns = [Column("folder", "code"), Column("trial"), Column("divergence")]
    columns += [Column("before the fit layer after layer"), *map(Column, costs), Column("validation")]
    columns += trained
    chosen = next((i for i, row in enumerate(report["candidates"]) if row["chosen"]), None)
    leaning = any(trial["source"] == LEANING for trial in report["trials"])
    others = ", and those that lean to layers of cheap weights" if leaning else ""
    least = " Those that diverge least then are trained." if leaning else ""
    later = " Then trained, the worse ones not to the end: the last columns." if trained else ""
    text = f"The best trials{others}, fitted layer after layer and measured, before training.{least}{later}"
    return Section("Candidates", (text, Table(tuple(columns), rows, chosen)))


def _after_training(report: Mapping[str, Any]) -> tuple[list[Column], list[tuple[str, ...]]]:
    """Of several candidates that were trained, for how many epochs and what they reached; nothing of a single one."""
    if not other_curves(report):
        return [], [()] * len(report["candidates"])
    curves = [row.get("curve") or (report["curve"] if row["chosen"] else ()) for row in report["candidates"]]
    ends = [curve[-1] if curve else {} for curve in curves]
    shown = {"epoch": ("epochs trained", ".0f")}
    if has_metric(report):
        shown["metric"] = ("validation, trained", ".4f")
    if any("divergence" in end for end in ends):  # where halving goes by it
        shown["divergence"] = ("divergence, trained", ".4g")
    cells = [tuple(format(end[key], form) if key in end else "" for key, (_, form) in shown.items()) for end in ends]
    return [Column(title) for title, _ in shown.values()], cells


def training_section(report: Mapping[str, Any]) -> Section | None:
    """The chosen candidate's curve and its learning rate; None if nothing was trained."""
    diverged = report.get("diverged")
    stopped: tuple[str, ...] = ()
    if diverged is not None:
        as_fitted = report.get("as_fitted", not report["curve"])  # reports of earlier versions do not say
        kept = "the weights as they were fitted" if as_fitted else "the weights of the epoch before"
        stopped = (f"Training diverged in epoch {diverged['epoch']}; {kept} count. {diverged['message']}",)
    if not report["curve"]:
        return Section("Fine-tuning", (*stopped, *_learning_rate(report))) if stopped else None
    titles = {"loss": "loss"} | ({"metric": "validation"} if has_metric(report) else {})
    rows = tuple((f"{row['epoch']:.0f}", *(f"{row[key]:.4f}" for key in titles)) for row in report["curve"])
    table = Table(tuple(map(Column, ("epoch", *titles.values()))), rows)
    picture = Picture("finetuning", "Fine-tuning")
    return Section("Fine-tuning", (*stopped, *_kept(report), picture, *_learning_rate(report), table))


def _kept(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Why the network is not the trained one, where it is not."""
    if not report.get("as_fitted"):
        return ()
    stays = "The network stays as it was fitted: training has made "
    if not has_metric(report):
        return (f"{stays}the outputs on the held-out calibration data no nearer to those that it was trained to give.",)
    return (
        f"{stays}the validation metric lower, or, where that is chance or does not count, the outputs on the "
        "validation data no nearer to those that it was trained to give.",
    )


def _learning_rate(report: Mapping[str, Any]) -> tuple[str, ...]:
    found = report["learning_rate"]
    if found is None:
        return ()
    losses = ", ".join(
        f"{'infinite' if loss is None else format(loss, '.4g')} at {rate:.2g}" for rate, loss in found["trials"]
    )
    best = raised_from(found)
    higher = "" if best is None else f": {best:.2g} was best in them, and is raised for the longer one"
    return (f"Learning rate {found['learning_rate']:.2g}, found by short trainings{higher}; their losses: {losses}.",)


def exports_section(exports: Sequence[Mapping[str, Any]]) -> Section | None:
    """What was exported, and how the files compare with the networks; None if nothing was."""
    if not exports:
        return None
    blocks: list[str | Table] = []
    for record in exports:
        sizes = " and ".join(map(str, record["batch_sizes"]))
        blocks.append(
            f"{record['file']}: {record['num_bytes']:,} bytes; opened again, its outputs are within "
            f"{record['rel_difference']:.1e} of the network's (relative to the largest), with batches of {sizes}."
        )
        if record["networks"]:
            blocks.append(_exported_networks(record))
    return Section("Exports", tuple(blocks))


def _exported_networks(record: Mapping[str, Any]) -> Table:
    """The exported networks side by side, as their runtime runs them."""
    rows = tuple(
        (
            f"{network['name']}, {network['precision']}",
            "" if network["metric"] is None else f"{network['metric']:.4f}",
            f"{network['num_bytes']:,}",
            f"{network['latency_ms']:.3f} ± {network['latency_noise_ms']:.3f}",
        )
        for network in record["networks"]
    )
    columns = [Column(f"in {record['runtime']}", "text"), Column(record["metric_name"]), Column("bytes")]
    return Table((*columns, Column(f"latency, ms per batch of {record['latency_batch_size']}")), rows)


def _elsewhere(report: Mapping[str, Any]) -> list[str]:
    """Other processors than the run was begun on, where it was moved."""
    begun = report["environment"]["processor"]
    trained, measured = (report.get("training") or {}).get("trained_on", []), report.get("measured_on", begun)
    did = [*(("trained", name) for name in trained), ("measured", measured)]
    return [f"{what} on {name}" for what, name in did if name != begun]


def provenance_section(report: Mapping[str, Any]) -> Section:
    """What the run ran on."""
    facts = report["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    items = (
        f"{facts['processor']}, {facts['machine']}, {facts['device']}, {facts['num_threads']} threads, "
        f"{facts['runtime']}",
        *_elsewhere(report),
        f"Python {facts['python']}; {packages}",
        f"seed {facts['seed']}, started {facts['date']}",
    )
    return Section("How this was made", (Items(items),))
