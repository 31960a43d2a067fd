"""The command select: another budget for a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sekron_search.cli.arguments import RunArgument

if TYPE_CHECKING:
    from sekron_search.select import Choice, Selection


def select(
    run_folder: RunArgument,
    budget: Annotated[
        list[str], typer.Option(help="A cost and its bound, such as flops=0.4x; may be repeated.", metavar="COST=BOUND")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the network; by default RUN/selections/ and the budget.")
    ] = None,
    print_only: Annotated[bool, typer.Option("--print-only", help="Write no network: neither model nor data.")] = False,
) -> None:
    """Answer another budget from the tables and trials of a finished run, in seconds: no search, no training.

    Example: sekron-search select runs/resnet --budget flops=0.4x --budget params=0.5x
    """
    from sekron_search.progress import ConsoleReporter
    from sekron_search.rundir import RunFolder
    from sekron_search.search.budget import Budget
    from sekron_search.select import select as answer
    from sekron_search.select import with_network

    folder = RunFolder(run_folder)
    found = answer(folder, Budget.of(_parsed(budget)))
    try:
        if not print_only:
            found = with_network(folder, found, ConsoleReporter(), out)
    finally:  # the answer stands, whether or not its network can be written
        print("\n".join(_lines(found)))
    if not print_only:
        home = out or folder.selections / found.name
        print(f"network, not fine-tuned: {home} (open it with sekron_search.load({str(home)!r}))")


def _parsed(budget: list[str]) -> dict[str, str]:
    from sekron_search.errors import ConfigError

    bounds: dict[str, str] = {}
    for text in budget:
        name, equals, value = text.partition("=")
        if not equals or name in bounds:
            raise ConfigError(f"--budget: expected every cost once, as in flops=0.4x, got {text!r}")
        bounds[name] = value
    return bounds


def _lines(found: Selection) -> list[str]:
    original = found.record.network.original
    lines = [
        f"{name}: asked at most {bound:,.6g} ({asked}), predicted {found.chosen.costs[name]:,.6g} "
        f"({found.chosen.costs[name] / original[name]:.3f}x)"
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
