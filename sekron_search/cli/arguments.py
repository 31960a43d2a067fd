"""What several commands share: their arguments, exit codes and errors of usage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sekron_search.cli.completion import run_folders
from sekron_search.errors import ConfigError

#: Exit code of a run that ended well but whose network, as measured, misses a budget.
BUDGET_MISSED = 3

#: Exit code of a command that was called in a wrong way.
WRONG_USAGE = 2

#: Exit code of a command that Ctrl-C has ended.
INTERRUPTED = 130

#: What networks are exported as.
EXPORT_FORMATS = ("onnx", "pt2", "safetensors")

#: Short names of costs in `--budget`.
SHORT_COSTS = {"latency": "latency_ms"}

ConfigArgument = Annotated[
    Path, typer.Argument(help="YAML file that describes model, data and budget.", metavar="CONFIG")
]
StorageOption = Annotated[
    str | None,
    typer.Option(
        help="Where the search is kept: a journal file, postgresql://USER:PASSWORD@HOST/DATABASE, grpc://HOST:PORT; by "
        "default the run folder's own journal.",
        metavar="URL",
    ),
]
ArtifactsOption = Annotated[
    str | None,
    typer.Option(
        help="Folder or s3://BUCKET/PREFIX for what workers need that do not see the run folder.", metavar="URL"
    ),
]
RunArgument = Annotated[Path, typer.Argument(help="Run folder.", metavar="RUN", autocompletion=run_folders)]
BudgetOption = Annotated[
    list[str],
    typer.Option(
        help="A cost and its bound, such as flops=0.4x, params=2e5 or latency=0.5x; may be repeated. flops, params, "
        "peak_activation_bytes, or latency: ms per batch of latency.batch_size samples, of 1 unless it is set.",
        metavar="COST=BOUND",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, all else on standard error.")
]

#: Units of times, in seconds.
UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class UsageError(ConfigError):
    """Arguments of a command that are wrong, or do not go together; names the option."""


def seconds(text: str, option: str) -> float:
    """A time such as 90s, 10m or 2h, in seconds.

    Raises:
        UsageError: If it is none; names the option.
    """
    number, unit = (text[:-1], text[-1]) if text and text[-1] in UNITS_S else (text, "s")
    try:
        value = float(number) * UNITS_S[unit]
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(f"{option}: expected a time such as 90s, 10m or 2h, got {text!r}")
    return value


def check_format(format: str, option: str) -> None:
    """Raise an error, before any long work, if networks cannot be exported so.

    Raises:
        UsageError: If there is no such format; names the option.
        ConfigError: If what it needs is not installed.
    """
    if format not in EXPORT_FORMATS:
        raise UsageError(f"{option}: expected {', '.join(EXPORT_FORMATS)}, got {format!r}")
    if format == "onnx":
        from sekron_search.exchange import codec

        codec("onnx")


def budget_of(texts: list[str]) -> dict[str, str]:
    """Costs and their bounds from `--budget` options.

    Raises:
        UsageError: If one is not COST=BOUND, there is no such cost, or one comes twice.
    """
    from sekron_search.search.budget import COST_NAMES

    bounds: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = SHORT_COSTS.get(name, name)
        if equals and name not in COST_NAMES:
            names = [*SHORT_COSTS, *(cost for cost in COST_NAMES if cost not in SHORT_COSTS.values())]
            raise UsageError(f"--budget {text}: unknown cost {name!r}; expected any of {', '.join(names)}")
        if not equals or name in bounds:
            raise UsageError(f"--budget: expected every cost once, as in flops=0.4x, got {text!r}")
        bounds[name] = value
    return bounds
