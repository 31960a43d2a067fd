"""A run of objects and another budget of it, as a process of a team: `torchrun ... -m tests.team_finishing FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.test_finishing import compressed_object

if __name__ == "__main__":
    torch.set_num_threads(1)
    result = compressed_object(Path(sys.argv[1]) / "run")
    result.finish(budget={"params": "0.5x"}, out=Path(sys.argv[1]) / "smaller")
