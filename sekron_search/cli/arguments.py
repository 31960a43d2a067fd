"""What several commands share: their arguments and exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

#: Exit code of a run that ended well but whose network, as measured, misses a budget.
BUDGET_MISSED = 3

ConfigArgument = Annotated[
    Path, typer.Argument(help="YAML file that describes model, data and budget.", metavar="CONFIG")
]
RunArgument = Annotated[Path, typer.Argument(help="Run folder.", metavar="RUN")]
