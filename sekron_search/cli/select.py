"""Commands that take another network out of a finished run: select for another budget, finish."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sekron_search.cli.arguments import (
    INTERRUPTED,
    BudgetOption,
    JsonOption,
    RunArgument,
    UsageError,
    budget_of,
    check_format,
)
from sekron_search.cli.completion import selections, trials
from sekron_search.cli.output import conclude, cost_text, json_alone, print_json
from sekron_search.errors import ConfigError

if TYPE_CHECKING:
    from sekron_search.select import Choice, Selection


def select(
    run_folder: RunArgument,
    budget: BudgetOption,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the network; by default RUN/selections/ and the budget.")
    ] = None,
    print_only: Annotated[
        bool, typer.Option("--print-only", help="Write no network; needs neither model nor data.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Answer another budget from a finished run.

    From its tables and trials, in seconds: no search, no training.

    \b
    Example:
      sekron-search select runs/resnet --budget flops=0.4x --budget params=0.5x
    """
    from sekron_search.progress import ConsoleReporter
    from sekron_search.rundir import RunFolder
    from sekron_search.search.budget import Budget
    from sekron_search.select import select as answer
    from sekron_search.select import with_network

    folder = RunFolder(run_folder)
    try:
        asked = Budget.of(budget_of(budget))
    except ConfigError as error:
        raise UsageError(f"--budget: {str(error).removeprefix('--budget: ')}") from None
    found = answer(folder, asked)
    try:
        if not print_only:
            with json_alone(as_json):
                found = with_network(folder, found, ConsoleReporter(), out)
    finally:  # the answer stands, whether or not its network can be written
        if not as_json:
            print("\n".join(_lines(found)))
    home = None if print_only else out or folder.selections / found.name
    if as_json:
        print_json({"run": str(run_folder), **found.to_json(), "network": None if home is None else str(home)})
    elif home is not None:
        print(f"network, not fine-tuned: {home} (open it with sekron_search.load({str(home)!r}))")


def finish(
    run_folder: RunArgument,
    trial: Annotated[
        int | None, typer.Option(min=0, help="Number of a trial, as `show` lists them.", autocompletion=trials)
    ] = None,
    selection: Annotated[
        str | None,
        typer.Option(
            help="Instead: name of a folder in RUN/selections, that `select` wrote.", autocompletion=selections
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder of the result; by default RUN/finished/trial-N or the selection's name."),
    ] = None,
    export: Annotated[
        str | None, typer.Option(help="Also export it: onnx, pt2 or safetensors.", metavar="FORMAT")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Finish another network of a finished run.

    It is fitted, measured, fine-tuned and saved, with a report of its own. Nothing is searched, and no tables are
    made. Killed at any moment, the same command goes on. The settings are the run's own; a selection is judged by
    the budget that it answers.

    \b
    Examples:
      sekron-search finish runs/demo --trial 7
      sekron-search finish runs/demo --selection params-0.3x --export onnx
    """
    if (trial is None) == (selection is None):
        raise UsageError("--trial, --selection: give one of the two")
    if export is not None:
        check_format(export, "--export")

    from sekron_search.finishing import finish_run
    from sekron_search.progress import ConsoleReporter
    from sekron_search.run_export import export_run
    from sekron_search.rundir import RunFolder
    from sekron_search.team import Team

    folder, reporter = RunFolder(run_folder), ConsoleReporter()
    first = Team.here().rank == 0
    try:
        with json_alone(as_json):
            target, report = finish_run(folder, reporter, trial=trial, selection=selection, out=out)
            if export is not None and first:
                exported: dict[str, Any] = export_run(target, reporter, format=export)  # type: ignore[arg-type]
                print(f"exported: {exported['file']}")
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    if first:
        conclude(report, target.path, as_json=as_json)


def _lines(found: Selection) -> list[str]:
    original = found.record.network.original
    lines = [
        f"{name}: asked at most {cost_text(name, bound)} ({asked}), "
        f"predicted {cost_text(name, found.chosen.costs[name])} ({found.chosen.costs[name] / original[name]:.3f}x)"
        for (name, asked), bound in zip(found.budget.items(), found.bounds.values(), strict=True)
    ]
    lines.append(f"chosen: {_choice(found.chosen)}: {found.reason}")
    lines += [f"beside it: {_choice(other)}" for other in found.others]
    lines.append(f"no network of the tables has an additive error below {found.lower_bound:.6g}: gap {found.gap:.2%}")
    searched = ", ".join(found.record.budgeted)
    if set(found.budget.names) != set(found.record.budgeted):
        lines.append(f"the run searched under budgets of {searched}: its trials are best for these")
    for table, option in zip(
        found.record.network.tables, found.record.network.chosen(found.chosen.assignment), strict=True
    ):
        lines.append(f"  {table.name}: {'dense' if option.is_original else option.structure}")
    return lines


def _choice(choice: Choice) -> str:
    measured = "not measured" if choice.divergence is None else f"{choice.divergence:.4g}"
    return f"{choice.source}, divergence {measured}, additive error {choice.error:.6g}"
