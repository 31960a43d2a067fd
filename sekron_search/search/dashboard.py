"""Optuna's dashboard on a study's storage."""

from __future__ import annotations

import importlib.util

from sekron_search.errors import StorageError
from sekron_search.search.storage import Store


def show(store: Store, host: str, port: int) -> None:
    """Serve the dashboard until the process ends.

    Raises:
        StorageError: If it is not installed, or the address cannot be served.
    """
    if importlib.util.find_spec("optuna_dashboard") is None:
        raise StorageError("dashboard: optuna-dashboard is not installed: pip install 'sekron-search[dashboard]'")
    from optuna_dashboard import run_server

    try:
        run_server(store.backend, host=host, port=port)
    except OSError as error:
        raise StorageError(
            f"dashboard: cannot be served at {host}:{port}: {error.strerror}; give another --port"
        ) from None
