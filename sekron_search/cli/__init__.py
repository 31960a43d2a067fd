"""The command line. Heavy imports happen inside the commands, so that help is instant."""

from __future__ import annotations

import sys

import typer

from sekron_search.cli import browse, device, runs, select, workers
from sekron_search.cli.arguments import WRONG_USAGE, UsageError
from sekron_search.errors import SekronError

EPILOG = """\b
Exit codes:
  0    done; every budget is met
  1    an error, told in one line
  2    wrong usage
  3    done, but the network misses a budget
  130  interrupted
"""

app = typer.Typer(
    name="sekron-search",
    help="Find which tensor factorization each layer of a trained network should get, under a device budget.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text: examples can be copied, files and pipes get no boxes
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(runs.demo)
app.command()(runs.run)
app.command()(runs.inspect)
app.command("list")(browse.list_runs)
app.command()(browse.show)
app.command()(browse.compare)
app.command()(select.select)
app.command()(select.finish)
app.command()(device.profile)
app.command()(device.export)
app.command()(runs.report)
app.command()(workers.worker)
app.command()(workers.proxy)
app.command()(workers.dashboard)


def main() -> None:
    """Entry point: an error of ours is one line and exit code 1, or 2 for wrong usage; Ctrl-C is exit code 130."""
    try:
        app()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(WRONG_USAGE) from None
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
