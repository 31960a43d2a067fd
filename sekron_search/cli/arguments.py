"""What several commands share: their arguments and exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sekron_search.errors import ConfigError

#: Exit code of a run that ended well but whose network, as measured, misses a budget.
BUDGET_MISSED = 3

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
RunArgument = Annotated[Path, typer.Argument(help="Run folder.", metavar="RUN")]

#: Units of times, in seconds.
UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(text: str, option: str) -> float:
    """A time such as 90s, 10m or 2h, in seconds.

    Raises:
        ConfigError: If it is none; names the option.
    """
    number, unit = (text[:-1], text[-1]) if text and text[-1] in UNITS_S else (text, "s")
    try:
        value = float(number) * UNITS_S[unit]
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{option}: expected a time such as 90s, 10m or 2h, got {text!r}")
    return value
