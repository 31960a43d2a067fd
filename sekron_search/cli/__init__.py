"""The command line. Heavy imports happen inside the commands, so that help is instant."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import typer

from sekron_search.cli import browse, device, runs, select, workers
from sekron_search.cli.arguments import INTERRUPTED, WRONG_USAGE, UsageError
from sekron_search.errors import SekronError, is_out_of_memory

EPILOG = """\b
Examples:
  sekron-search demo
  sekron-search run --model nets:build --weights weights.pt --data photos --budget latency=0.5x
  sekron-search show RUN

\b
Exit codes:
  0    done; every budget is met
  1    an error, told in one line
  2    wrong usage
  3    done, but the network misses a budget
  130  interrupted
"""

#: What to do where memory is short.
LESS_MEMORY = (
    "lower calibration.batch_size or latency.batch_size; if it happened in fine-tuning, lower finetune.batch_size and "
    "raise finetune.accumulate by the same factor"
)


def _interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """A command that says that Ctrl-C has ended it; what versions of typer do with it differs."""

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        try:
            command(**values)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None

    return wrapper


app = typer.Typer(
    name="sekron-search",
    help="Find which tensor factorization each layer of a trained network should get, under a device budget.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text: examples can be copied, files and pipes get no boxes
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "demo": runs.demo,
    "run": runs.run,
    "inspect": runs.inspect,
    "list": browse.list_runs,
    "show": browse.show,
    "compare": browse.compare,
    "select": select.select,
    "finish": select.finish,
    "profile": device.profile,
    "export": device.export,
    "report": runs.report,
    "worker": workers.worker,
    "proxy": workers.proxy,
    "dashboard": workers.dashboard,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_interruptible(_command))


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
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        told = " ".join(str(error).split()) or type(error).__name__
        print(f"error: out of memory ({told}); {LESS_MEMORY}", file=sys.stderr)
        raise SystemExit(1) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        raise SystemExit(1) from None
