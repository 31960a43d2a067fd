"""A PostgreSQL server of its own for the tests, from the distribution's package."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

PASSWORD = "open sesame"


def postgres_programs() -> Path | None:
    """The folder of initdb and postgres; Debian keeps them off the path."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((f for f in reversed(folders) if (f / "initdb").exists() and (f / "pg_ctl").exists()), None)


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The URL of a server that runs meanwhile; the test is skipped where there is none to run."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    user: str | None = None
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        known = {entry.pw_name for entry in pwd.getpwall()}
        user = "postgres" if "postgres" in known else "nobody"
    with tempfile.TemporaryDirectory(prefix="sekron-postgres-") as name:
        folder = Path(name)
        if user is not None:
            shutil.chown(folder, user)
        (folder / "password").write_text(PASSWORD)
        (folder / "password").chmod(0o644)

        def run(program: str, *arguments: str) -> None:
            with (folder / "log").open("ab") as log:
                subprocess.run(
                    [programs / program, *arguments], user=user, cwd=folder, stdout=log, stderr=log, check=True
                )

        data, port = str(folder / "data"), free_port()
        run("initdb", "--no-sync", "-D", data, "-U", "sekron", "--auth=scram-sha-256", f"--pwfile={folder}/password")
        settings = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder} -c fsync=off"
        run("pg_ctl", "-D", data, "-w", "-l", f"{folder}/server.log", "-o", settings, "start")
        try:
            yield f"postgresql://sekron:{PASSWORD.replace(' ', '%20')}@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "-D", data, "-m", "fast", "-w", "stop")


def new_database(server: str) -> str:
    """The URL of an empty database of a server."""
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return f"{server.rpartition('/')[0]}/{name}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
