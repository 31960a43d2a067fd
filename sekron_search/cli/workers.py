"""Commands for many workers: worker, proxy, dashboard."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from sekron_search.cli.arguments import INTERRUPTED, ArtifactsOption, RunArgument, StorageOption, seconds


def worker(
    run_folder: RunArgument,
    storage: StorageOption = None,
    artifacts: ArtifactsOption = None,
    patience: Annotated[
        str, typer.Option(help="How long to wait for a search to begin: 90s, 10m, 2h.", metavar="TIME")
    ] = "10m",
) -> None:
    """Take part in the search of a run.

    As one of any number of processes, until the run searches no more. Start as many as there are cores or GPUs to
    spare, before or after the run. The trials are the same however many there are and whichever of them die.

    \b
    Example:
      sekron-search worker runs/resnet
    """
    patience_s = seconds(patience, "--patience")

    from sekron_search.progress import ConsoleReporter
    from sekron_search.rundir import RunFolder
    from sekron_search.worker import work

    # Schedulers ask processes to end with SIGTERM: the trial is given back, as on Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        count = work(
            RunFolder(run_folder), ConsoleReporter(), storage=storage, artifacts=artifacts, patience_s=patience_s
        )
    except KeyboardInterrupt:
        print("\ninterrupted; the trial is free for others", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    print(f"the run searches no more; this worker did {count} trials")


def proxy(
    storage: Annotated[str, typer.Argument(help="URL of the database.", metavar="URL")],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 13000,
) -> None:
    """Stand between workers and a database.

    They give --storage grpc://HOST:PORT. Neither encrypted nor protected by a password: keep it within the
    cluster's own network.

    \b
    Example:
      sekron-search proxy postgresql://me@database/searches --host 0.0.0.0
    """
    from sekron_search.search.storage import masked, serve

    print(f"serving {masked(storage)} at grpc://{host}:{port}", file=sys.stderr)
    serve(storage, host, port)


def dashboard(
    run_folder: RunArgument,
    storage: StorageOption = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8080,
) -> None:
    """Open optuna-dashboard on the studies of a run.

    \b
    Example:
      sekron-search dashboard runs/resnet
    """
    from sekron_search.errors import RunFolderError
    from sekron_search.rundir import RunFolder
    from sekron_search.search.dashboard import show
    from sekron_search.search.storage import open_store

    journal = RunFolder(run_folder).study
    if storage is None and not journal.exists():
        raise RunFolderError(
            f"{run_folder}: no {journal.name} in it: the run has not begun to search, or was given another --storage"
        )
    print(f"dashboard: http://{host}:{port}/dashboard/ (Ctrl-C ends it)", file=sys.stderr)
    show(open_store(storage or journal), host, port)
