"""Commands that read run folders: list, show, compare. They import no torch and answer at once."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sekron_search.cli.arguments import JsonOption, RunArgument, UsageError
from sekron_search.cli.completion import candidates, run_folders, trials
from sekron_search.cli.output import FORMATS, cost_text, number, print_json, print_table

#: Characters of the reason in a list of runs; --json, and failure.json, have all of it.
WIDEST = 120


def list_runs(
    folder: Annotated[
        Path, typer.Argument(help="Where to look, at any depth.", metavar="FOLDER", autocompletion=run_folders)
    ] = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """List run folders.

    With how far each came, its budget, verdict, metric and date.

    \b
    Example:
      sekron-search list
    """
    from sekron_search.catalog import list_runs as list_entries

    entries = list_entries(folder)
    if as_json:
        print_json({"runs": [entry.to_json() for entry in entries]})
        return
    rows = [
        [
            entry.run,
            entry.state + (f" in {entry.stage}" if entry.stage else ""),
            " ".join(f"{name}={bound}" for name, bound in (entry.budget or {}).items()),
            {True: "met", False: "missed", None: ""}[entry.met],
            f"{entry.metric_name} {entry.metric:.4f}" if entry.metric is not None else "",
            (entry.date or "")[:16].replace("T", " "),
            textwrap.shorten(entry.reason or "", WIDEST, placeholder=" ..."),
        ]
        for entry in entries
    ]
    if not rows:
        typer.echo(f"no run folder in {folder}", err=True)
        return
    columns = ["run", "state", "budget", "verdict", "metric", "begun (UTC)", "why"]
    print_table(columns, rows, left=columns)


def show(
    run_folder: RunArgument,
    trial: Annotated[
        int | None, typer.Option(min=0, help="Number of a trial: its costs and layers.", autocompletion=trials)
    ] = None,
    candidate: Annotated[
        str | None, typer.Option(help="Instead: name of a folder in RUN/candidates.", autocompletion=candidates)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a run's front, or one of its networks.

    Of a network: costs, divergence, and the structure of every layer.

    \b
    Examples:
      sekron-search show runs/demo
      sekron-search show runs/demo --trial 7
    """
    from sekron_search.catalog import Searched
    from sekron_search.rundir import RunFolder

    if trial is not None and candidate is not None:
        raise UsageError("--trial, --candidate: give one of the two")
    found = Searched.load(RunFolder(run_folder))
    if trial is None and candidate is None:
        front = found.front()
        if as_json:
            print_json({"run": str(run_folder), "front": front})
        else:
            _print_front(front)
        return
    facts = found.trial(trial) if trial is not None else found.candidate(str(candidate))
    if as_json:
        print_json({"run": str(run_folder), **facts})
    else:
        _print_trial(facts)


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders of finished runs.", metavar="RUN RUN...", autocompletion=run_folders),
    ],
    as_json: JsonOption = False,
) -> None:
    """Put finished runs side by side.

    Budgets, costs, metric, divergence; the layers and the settings that differ. Latencies of different devices,
    runtimes, threads or batch sizes are marked, and not to be compared.

    \b
    Example:
      sekron-search compare runs/half runs/quarter
    """
    from sekron_search.comparison import compare as side_by_side
    from sekron_search.rundir import RunFolder

    if len(runs) < 2:
        raise UsageError("RUN: expected at least two run folders to compare")
    found = side_by_side([RunFolder(path) for path in runs])
    if as_json:
        print_json(found)
        return
    names = [f"run {number}" for number in range(1, len(runs) + 1)]
    for name, summary in zip(names, found["runs"], strict=True):
        origin = summary["finishes"]
        print(f"{name}: {summary['run']}" + (f" ({origin['source']} of run {origin['run']})" if origin else ""))
    _print_by_run("", names, _outcome_rows(found))
    if not found["same_original"]:
        print("the originals differ in flops or params: the runs are of different networks")
    if not found["latencies_comparable"]:
        print("* latencies are of different devices or settings, and not to be compared:")
        rows = {key: [summary["device"][key] for summary in found["runs"]] for key in found["device_differs_in"]}
        _print_by_run("device", names, rows)
    for head, key in (("layer", "layers"), ("setting", "settings")):
        if found[key]:
            print()
            _print_by_run(head, names, found[key])
        else:
            print(f"no {head} differs")


def _print_by_run(head: str, names: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> None:
    """A table with a column for every run."""
    cells = [[name, *("" if value is None else str(value) for value in row)] for name, row in rows.items()]
    print_table([head, *names], cells, left=[head, *names])


def _outcome_rows(found: Mapping[str, Any]) -> dict[str, list[str]]:
    runs: Sequence[Mapping[str, Any]] = found["runs"]
    rows: dict[str, list[str]] = {}
    for name in FORMATS:
        budgets = [next((b for b in run["budgets"] if b["name"] == name), None) for run in runs]
        if any(budgets):
            rows[f"budget {name}"] = [
                "" if b is None else f"{b['asked']}: {'met' if b['met'] else 'MISSED'}" for b in budgets
            ]
    for name in FORMATS:
        mark = "*" if name == "latency_ms" and not found["latencies_comparable"] else ""
        rows[f"{name}{mark}"] = [
            f"{_measured(name, run['original'])} -> {_measured(name, run['compressed'])} "
            f"({run['compressed'][name] / run['original'][name]:.3f}x){mark}"
            for run in runs
        ]
    rows["metric"] = [
        ""
        if run["compressed"]["metric"] is None
        else f"{run['metric_name']} {run['original']['metric']:.4f} -> {run['compressed']['metric']:.4f} "
        f"(untrained {number(run['metric_without_training'])})"
        for run in runs
    ]
    rows["divergence"] = [f"{run['divergence']:.4g} ({run['divergence_name']})" for run in runs]
    return rows


def _measured(name: str, costs: Mapping[str, Any]) -> str:
    """A cost, and of a latency half the interquartile range of its measurements."""
    noise = f" ± {cost_text(name, costs['latency_noise_ms'])}" if name == "latency_ms" else ""
    return f"{cost_text(name, costs[name])}{noise}"


def _print_front(front: Sequence[Mapping[str, Any]]) -> None:
    costs = [name for name in FORMATS if front and name in front[0]["costs"]]
    rows = [
        [
            str(row["trial"]),
            f"{row['divergence']:.4g}",
            *(cost_text(name, row["costs"][name]) for name in costs),
            "yes" if row["feasible"] else "no",
            row["source"],
            "chosen" if row["chosen"] else ("candidate" if row["candidate"] else ""),
        ]
        for row in front
    ]
    print_table(["trial", "divergence", *costs, "within budget", "from", ""], rows, left=["from", ""])


def _print_trial(facts: Mapping[str, Any]) -> None:
    flags = [word for word in ("chosen", "feasible", "pruned") if facts[word]]
    print(f"trial {facts['trial']}, from {facts['source']}" + (f" ({', '.join(flags)})" if flags else ""))
    print(f"divergence {facts['divergence']:.4g}, as the search measured it")
    for name, value in facts["costs"].items():
        print(f"{name}: predicted {cost_text(name, value)} ({value / facts['original'][name]:.3f}x)")
    if facts["measured"] is not None:
        measured = facts["measured"]
        known = ", ".join(f"{name} {cost_text(name, measured['costs'][name])}" for name in FORMATS)
        metric = "" if measured["metric"] is None else f", validation metric {measured['metric']:.4f}"
        print(f"candidate {facts['candidate']}: divergence {measured['divergence']:.4g}, {known}{metric}")
    rows = [
        [
            layer["name"],
            "dense" if layer["family"] == "dense" else layer["structure"],
            f"{layer['flops']:,}",
            f"{layer['params']:,}",
            f"{layer['error']:.3f}",
        ]
        for layer in facts["layers"]
    ]
    print_table(["layer", "structure", "flops", "params", "output error"], rows, left=["layer", "structure"])
