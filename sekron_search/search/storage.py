"""Where a study is kept: a journal file, a database, or a proxy in front of one, named by a URL."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import (
    BaseStorage,
    GrpcStorageProxy,
    JournalStorage,
    RDBStorage,
    get_storage,
    run_grpc_proxy_server,
)
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from sekron_search.errors import StorageError

optuna.logging.set_verbosity(optuna.logging.WARNING)

T = TypeVar("T")

#: What stands where, for messages.
FORMS = (
    "a file or journal:///PATH, sqlite:///PATH, postgresql://USER:PASSWORD@HOST/DATABASE, "
    "mysql://USER:PASSWORD@HOST/DATABASE, grpc://HOST:PORT"
)

#: Databases: the driver that is used where the URL names none, and what installs it.
DRIVERS = {
    "postgresql": ("psycopg", "pip install 'sekron-search[postgres]'"),
    "mysql": ("pymysql", "pip install pymysql"),
}

#: Seconds after which the lock of a journal is taken from an owner that died while it held it; it is held for the
#: time of one write.
LOCK_GRACE_S = 30

#: Seconds for which calls are made again while a storage cannot be reached.
PATIENCE_S = 60.0

#: How a journal starts; nothing is written to, or dropped from, files that start otherwise.
_RECORD = b'{"op_code":'

#: Seconds that a connection may take.
CONNECT_S = 15

#: Seconds for which writes to an SQLite file wait for each other.
SQLITE_S = 60


@dataclass(frozen=True)
class Store:
    """An open storage.

    Args:
        backend: Optuna's storage.
        where: The URL, without passwords.
        failures: What it raises when it cannot be reached.
        release: Gives its connections back.
    """

    backend: BaseStorage
    where: str
    failures: tuple[type[Exception], ...]
    release: Callable[[], None] = lambda: None

    def patiently(self, call: Callable[[], T], *, patience_s: float = PATIENCE_S) -> T:
        """What a call returns; it is made again for a while if the storage cannot be reached.

        Raises:
            StorageError: If that does not help.
        """
        give_up = time.monotonic() + patience_s
        pause_s = 0.1
        while True:
            try:
                return call()
            except self.failures as error:
                if time.monotonic() + pause_s > give_up:
                    raise _unreachable(self.where, error) from None
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 5.0)


def open_store(url: str | os.PathLike[str] | Store) -> Store:
    """Open a storage, made where it is a file that does not exist.

    Args:
        url: A path (of a journal file), or a URL: journal:///PATH, sqlite:///PATH, postgresql://..., mysql://...,
            grpc://HOST:PORT.

    Raises:
        StorageError: If the URL's form is not known, its driver is not installed, or nothing answers there; passwords
            are not shown.
    """
    if isinstance(url, Store):
        return url
    text = os.fspath(url)
    if "://" not in text:
        return _journal(Path(text))
    scheme = text.split("://")[0].lower()
    named, _, driver = scheme.partition("+")
    database = "postgresql" if named == "postgres" else named
    if scheme == "journal":
        return _journal(_file(text))
    if scheme == "grpc":
        return _proxy(text)
    if database == "sqlite":
        _file(text).parent.mkdir(parents=True, exist_ok=True)
        return _database(text, "sqlite")
    if database in DRIVERS:
        return _database(f"{database}+{driver or DRIVERS[database][0]}://{text.split('://', 1)[1]}", database)
    raise StorageError(f"storage {masked(text)}: unknown kind {scheme!r}; expected {FORMS}")


def serve(url: str | os.PathLike[str], host: str, port: int) -> None:
    """Answer others' calls to a database, until the process ends: many workers then need few connections to it.

    Raises:
        StorageError: If grpc is not installed, the storage cannot be opened, or is a journal.
    """
    if importlib.util.find_spec("grpc") is None:
        raise StorageError("serving a storage: grpc is not installed: pip install 'sekron-search[grpc]'")
    store = open_store(url)
    if isinstance(store.backend, JournalStorage):
        # Optuna does not support it: https://github.com/optuna/optuna/issues/6084.
        raise StorageError(f"{store.where}: a journal cannot be served; give a database")
    with experimental():
        run_grpc_proxy_server(store.backend, host=host, port=port)


@contextlib.contextmanager
def experimental() -> Iterator[None]:
    """Use what Optuna may still change, without being told each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


def masked(text: str) -> str:
    """A URL, or a message that holds one, without its passwords."""
    text = re.sub(r"(://[^:/@\s]*):[^\s]*@", r"\1:***@", text)
    return re.sub(r"(password=)[^&\s]*", r"\1***", text, flags=re.IGNORECASE)


class _Lock(JournalFileOpenLock):
    """Also drops the half of a record that a crash of the machine left at the end, before anything follows it."""

    def __init__(self, journal: Path) -> None:
        super().__init__(str(journal), grace_period=LOCK_GRACE_S)
        self._journal = journal

    def acquire(self) -> bool:
        super().acquire()
        try:
            _drop_half_record(self._journal)
        except BaseException:
            self.release()
            raise
        return True


def _drop_half_record(path: Path) -> None:
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        if end == 0:
            return
        file.seek(end - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def _journal(path: Path) -> Store:
    # A file made with O_EXCL is a lock on shared disks too, and needs no path that is the same on all machines, as a
    # symbolic link does.
    path = path.expanduser().resolve()
    where = f"journal {path}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        with path.open("rb") as file:
            if not _RECORD.startswith(file.read(len(_RECORD))):
                raise ValueError("it starts with something else")
        return Store(JournalStorage(JournalFileBackend(str(path), lock_obj=_Lock(path))), where, (OSError,))
    except OSError as error:
        raise StorageError(f"{where}: cannot be written: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise StorageError(
            f"{where}: not the journal of a study, or damaged ({error or type(error).__name__}); choose another file"
        ) from None


def _database(url: str, database: str) -> Store:
    where = masked(url)
    options = {"timeout": SQLITE_S} if database == "sqlite" else {"connect_timeout": CONNECT_S}
    if database != "sqlite" and urlsplit(url).scheme.split("+")[1] not in ("psycopg", "psycopg2", "pymysql"):
        options = {}  # drivers differ in how they name it
    attempts = 5
    for attempt in range(attempts):
        try:
            backend = RDBStorage(url, engine_kwargs={"connect_args": options, "pool_pre_ping": True})
            failures = (StorageInternalError, SQLAlchemyError, OSError)
            return Store(get_storage(backend), where, failures, backend.engine.dispose)
        except (ImportError, ModuleNotFoundError) as error:
            how = DRIVERS[database][1] if database in DRIVERS else "see the URL"
            raise StorageError(
                f"storage {where}: its driver is not installed ({error.__cause__ or error}): {how}"
            ) from None
        except (ArgumentError, ValueError, RuntimeError, TypeError) as error:
            raise StorageError(f"storage {where}: {masked(str(error))}; expected {FORMS}") from None
        except (SQLAlchemyError, StorageInternalError) as error:
            # Workers that start together make the tables together; all but one fail once.
            if attempt == attempts - 1:
                raise _unreachable(where, error) from None
        time.sleep(random.uniform(0.1, 0.4))
    raise AssertionError("unreachable")


def _proxy(url: str) -> Store:
    where = masked(url)
    try:
        host, port = urlsplit(url).hostname, urlsplit(url).port
    except ValueError:
        host = port = None
    if not host or not port:
        raise StorageError(f"storage {where}: expected grpc://HOST:PORT")
    if importlib.util.find_spec("grpc") is None:
        raise StorageError(f"storage {where}: grpc is not installed: pip install 'sekron-search[grpc]'")
    import grpc

    with experimental():
        proxy = GrpcStorageProxy(host=host, port=port)
    try:
        proxy.wait_server_ready(timeout=CONNECT_S)
    except ConnectionError as error:
        proxy.close()
        raise _unreachable(where, error) from None
    return Store(proxy, where, (grpc.RpcError, OSError), proxy.close)


def _file(url: str) -> Path:
    """The path of a URL: journal:///absolute and journal://relative, as SQLite's with one slash more."""
    scheme, _, rest = url.partition("://")
    path = unquote(rest.split("?")[0])
    return Path(path[1:] if scheme != "journal" and path.startswith("/") else path)


def _unreachable(where: str, error: Exception) -> StorageError:
    cause = error.__cause__ or error
    lines = [line.strip() for line in masked(str(cause)).splitlines() if line.strip()]
    reason = lines[0] if lines else type(cause).__name__
    return StorageError(f"storage {where}: cannot be reached ({reason}); does it run, and are name and password right?")
