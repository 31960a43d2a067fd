from __future__ import annotations

import os
from collections.abc import Iterator

# Tests run side by side, a process on each core: libraries' threads would only be in each other's way.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from tests.servers import postgres

# Small tensors: more threads only cost time, and the same sums in the same order make runs comparable.
torch.set_num_threads(1)

settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """A PostgreSQL server; tests that ask for it are skipped where there is none."""
    with postgres() as url:
        yield url
