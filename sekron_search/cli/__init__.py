"""The command line. Heavy imports happen inside the commands, so that help is instant."""

from __future__ import annotations

import sys

import typer

from sekron_search.cli import device, runs, select, workers
from sekron_search.errors import SekronError

app = typer.Typer(
    name="sekron-search",
    help="Find which tensor factorization each layer of a trained network should get, under a device budget.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    runs.demo,
    runs.run,
    runs.inspect,
    select.select,
    device.profile,
    device.export,
    runs.report,
    workers.worker,
    workers.proxy,
    workers.dashboard,
):
    app.command()(_command)


def main() -> None:
    """Entry point: an error of ours is one line and exit code 1; Ctrl-C is exit code 130."""
    try:
        app()
    except SekronError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
