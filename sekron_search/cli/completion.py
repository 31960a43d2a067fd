"""What a shell completes: run folders, and what is in them. Reads nothing but small JSON files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import typer


def run_folders(incomplete: str) -> list[str]:
    """Folders that begin so; those that are no runs end in a slash, for runs may lie in them."""
    head, slash, tail = incomplete.rpartition("/")
    try:
        found = sorted(Path(head + slash or ".").iterdir())
    except OSError:
        return []
    return [
        f"{head}{slash}{path.name}" + ("" if (path / "run.json").exists() else "/")
        for path in found
        if path.name.startswith(tail) and not path.name.startswith(".") and path.is_dir()
    ]


def trials(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Numbers of the trials of the run that the command line names, with their divergences."""
    try:
        found = json.loads((_run(ctx) / "search.json").read_text())["trials"]
        known = [(str(trial["index"]), f"divergence {trial['divergence']:.4g}") for trial in found]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [row for row in known if row[0].startswith(incomplete)]


def candidates(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of the run's candidates."""
    return list(_parts(_run(ctx) / "candidates", incomplete))


def selections(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of the run's selections."""
    return list(_parts(_run(ctx) / "selections", incomplete))


def _run(ctx: typer.Context) -> Path:
    # Where the option to complete is the last word, parsing ends there: the arguments before it are not assigned yet.
    return Path(ctx.params.get("run_folder") or next(iter(ctx.args), "."))


def _parts(folder: Path, incomplete: str) -> Iterator[str]:
    for path in sorted(folder.glob("*/")):
        if path.name.startswith(incomplete):
            yield path.name
