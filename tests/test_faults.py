"""What goes wrong in the world: memory, disks, networks that are no functions of their inputs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sekron_search.api import job_from_config
from sekron_search.assembly import Assembler
from sekron_search.cli import main
from sekron_search.config import Config
from sekron_search.data import batches, input_batches
from sekron_search.errors import DataError
from sekron_search.files import read_json
from sekron_search.model import run_model
from sekron_search.progress import Reporter
from sekron_search.repeatable import check_repeatable
from sekron_search.run import run
from sekron_search.rundir import RunFolder
from sekron_search.search.options import Assignment
from sekron_search.training_data import TrainingData
from tests.cases import CONFIG, SmallNet, blobs, small_net, write_config

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)

#: More than any machine has: 64 TiB.
TOO_MANY = 2**44


def test_a_trial_without_memory_counts_as_the_worst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path, CONFIG, **{"epochs: 2": "epochs: 0", "candidates: 2": "candidates: 1"})
    assemble, failed, alone = Assembler.with_factors, list[Assignment](), list[Assignment]()

    def hungry(self: Assembler, assignment: Assignment) -> nn.Module:
        changed = sum(option > 0 for option in assignment)
        if changed == 1 and assignment[1]:  # a response of the second layer
            alone.append(assignment)
            torch.empty(TOO_MANY)
        if changed > 1 and sum(assignment) % 3 == 0 and len(failed) < 3:
            failed.append(assignment)
            torch.empty(TOO_MANY)
        return assemble(self, assignment)

    job = job_from_config(Config.load(config))
    monkeypatch.setattr(Assembler, "with_factors", hungry)
    with (
        pytest.warns(RuntimeWarning, match="a trial ran out of memory"),
        pytest.warns(RuntimeWarning, match="an option of layer 'conv2' ran out of memory"),
    ):
        report = run(job, RunFolder(tmp_path / "out"), Reporter(), resume=False)
    assert failed
    (kept,) = (tmp_path / "out" / "tables").glob("responses-*.json")
    responses = read_json(kept)["layers"]
    assert len(alone) == len(responses["conv2"])
    assert {response for _, response in responses["conv2"]} == {None}
    assert all(response is not None for name in ("conv1", "conv3", "linear") for _, response in responses[name])
    assert report["num_trials"] == 8
    assert sum(trial["pruned"] for trial in report["trials"]) >= len(set(failed))
    assert all(budget["met"] for budget in report["budgets"])


def test_a_search_in_which_every_trial_lacks_memory_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path, CONFIG, **{"trials: 8": "trials: 2"})

    assemble = Assembler.with_factors

    def hungry(self: Assembler, assignment: Assignment) -> nn.Module:
        if any(assignment):
            raise MemoryError
        return assemble(self, assignment)

    monkeypatch.setattr(Assembler, "with_factors", hungry)
    with pytest.warns(RuntimeWarning), pytest.raises(DataError, match=r"runs out of memory \(2 trials\)"):
        run(job_from_config(Config.load(config)), RunFolder(tmp_path / "out"), Reporter(), resume=False)


def hungry(*_: Any, **__: Any) -> None:
    torch.empty(TOO_MANY)


@pytest.mark.parametrize(
    "where",
    [
        "sekron_search.prepare.collect_metrics",
        "sekron_search.assembly.fit_sequentially",
        "sekron_search.finetune.Distillation._loss",
    ],
)
def test_where_memory_cannot_be_done_without_it_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    config = write_config(tmp_path, CONFIG, **{"trials: 8": "trials: 1", "candidates: 2": "candidates: 1"})
    monkeypatch.setattr(where, hungry)
    monkeypatch.setattr(sys, "argv", ["sekron-search", "run", str(config), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: out of memory (")
    assert "lower calibration.batch_size or latency.batch_size" in told
    assert "finetune.batch_size and raise finetune.accumulate" in told
    assert "allocate memory" in read_json(tmp_path / "out" / "failure.json")["message"]


class Hungry(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.empty(TOO_MANY)


def test_a_network_without_memory_is_not_said_to_be_wrong() -> None:
    with pytest.raises(RuntimeError, match="allocate memory"):
        run_model(Hungry(), (torch.zeros(1),))


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
from sekron_search.cli import main
main()
"""


@pytest.mark.parametrize("limit", [100, 30_000])
def test_a_full_disk_is_told_and_gone_on_from(tmp_path: Path, limit: int) -> None:
    """Files cannot grow beyond a limit, as on a full disk; what lies there is whole, and more room finishes the run."""
    config = write_config(tmp_path, CONFIG, **{"epochs: 2": "epochs: 0", "trials: 8": "trials: 2"})

    def limited(to: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "ignore", "-c", FULL_DISK, str(to), "run", str(config)]
        own = [*command, "--out", str(tmp_path / "out"), "--resume"]
        return subprocess.run(own, capture_output=True, text=True, cwd=ROOT, check=False)

    done = limited(limit)
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "File too large" in last
    assert "Traceback" not in done.stderr
    assert all(read_json(path) is not None for path in (tmp_path / "out").rglob("*.json"))
    done = limited(10**9)
    assert done.returncode == 0, done.stderr
    assert all(budget["met"] for budget in read_json(tmp_path / "out" / "report.json")["budgets"])


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = write_config(tmp_path)
    command = [sys.executable, "-W", "ignore", "-m", "sekron_search.cli", "run", str(config)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "file" / "out")], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 1
    assert "cannot be written" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


class Dropping(SmallNet):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, training=True)


class Counting(SmallNet):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return super().forward(x)


class Remembering(SmallNet):
    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.last = out if self.last is None else 0.5 * (self.last + 2 * out)
        return self.last


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (Dropping, "it draws random numbers"),
        (Counting, r"changes its buffers .*\(seen\)"),
        (Remembering, "keeps state"),
    ],
)
def test_networks_that_are_no_functions_of_their_inputs_are_refused(network: type[nn.Module], says: str) -> None:
    with pytest.raises(DataError, match=says):
        check_repeatable(network(), (torch.randn(4, 3, 8, 8),))


class InPlace(SmallNet):
    """Returns the same tensor every time, with other numbers in it."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = torch.zeros(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.sum += super().forward(x)
        return self.sum


def test_a_network_that_writes_into_what_it_returned_is_refused() -> None:
    with torch.no_grad(), pytest.raises(DataError, match="keeps state"):
        check_repeatable(InPlace(), (torch.randn(4, 3, 8, 8),))


class Caching(SmallNet):
    """Computes a table in its first pass, has a buffer of NaN, and an output that is empty."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("unset", torch.full((2,), float("nan")))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if not hasattr(self, "table"):
            self.register_buffer("table", torch.linspace(0, 1, x.shape[-1]))
        return super().forward(x + self.table), x[:0]


@pytest.mark.parametrize("network", [small_net, Caching])
def test_networks_that_are_functions_of_their_inputs_are_not(network: Callable[[], nn.Module]) -> None:
    check_repeatable(network(), (torch.randn(4, 3, 8, 8),))


class Failing(Dataset[tuple[Tensor, Tensor]]):
    """Whose last samples cannot be read."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index >= 12:
            raise OSError(f"sample {index} is damaged")
        return torch.zeros(3, 8, 8), torch.tensor(0)


def test_data_that_fails_is_told_by_the_number_of_the_batch() -> None:
    says = r"batch 2 could not be read: OSError: sample 12 is damaged"
    with pytest.raises(DataError, match=says):
        list(batches(Failing(), 8))
    with pytest.raises(DataError, match=says):
        input_batches(DataLoader(Failing(), batch_size=8), 8)
    with pytest.raises(DataError, match=says):
        list(TrainingData(DataLoader(Failing(), batch_size=8), 8).epoch(1))
    assert len(list(batches(Failing(), 4, order=range(12)))) == 3


def test_augmentations_that_fail_are_told() -> None:
    def broken(images: Tensor, generator: torch.Generator) -> Tensor:
        return {"images": images}["image"]

    with pytest.raises(DataError, match="train: its augmentation failed: KeyError: 'image'"):
        next(TrainingData(blobs(16), 8, broken).epoch(1))
    with pytest.raises(DataError, match="expected its augmentation to return a tensor, got tuple"):
        next(TrainingData(blobs(16), 8, lambda images, generator: (images,)).epoch(1))  # type: ignore[arg-type,return-value]
    with pytest.raises(RuntimeError, match="allocate memory"):
        next(TrainingData(blobs(16), 8, hungry).epoch(1))  # type: ignore[arg-type]
