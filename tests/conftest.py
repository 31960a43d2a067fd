from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# Small tensors: more threads only cost time, and the same sums in the same order make runs comparable.
torch.set_num_threads(1)

settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
