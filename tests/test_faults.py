"""What goes wrong in the world: memory, disks, networks that are no functions of their inputs."""

from __future__ import annotations

import ctypes
import datetime
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sekron_search.assembly import Assembler
from sekron_search.cli import main
from sekron_search.config import Config
from sekron_search.data import DataBundle, batches, input_batches, readable
from sekron_search.errors import DataError, is_out_of_memory
from sekron_search.export import Factory
from sekron_search.files import read_json
from sekron_search.job import checked_metric
from sekron_search.jobs import job_from_config
from sekron_search.model import run_model
from sekron_search.progress import Reporter
from sekron_search.repeatable import check_repeatable
from sekron_search.run import run
from sekron_search.rundir import RunFolder
from sekron_search.search.options import Assignment
from sekron_search.search.trial import Evaluation
from sekron_search.training_data import TrainingData
from tests.cases import CONFIG, SPACE, SmallNet, blobs, small_net, write_config

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)

#: More than any machine has: 64 TiB.
TOO_MANY = 2**44


def test_a_trial_without_memory_counts_as_the_worst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = {"epochs: 2": "epochs: 0", "candidates: 2": "candidates: 1", SPACE: ""}
    config = write_config(tmp_path, CONFIG, **replaced)
    assemble, tried, failed, alone = Assembler.with_factors, list[Assignment](), set[Assignment](), list[Assignment]()

    def hungry(self: Assembler, assignment: Assignment) -> nn.Module:
        changed = sum(option > 0 for option in assignment)
        if changed == 1 and assignment[1]:  # a response of the second layer
            alone.append(assignment)
            torch.empty(TOO_MANY)
        if changed > 1 and assignment not in tried:
            tried.append(assignment)
        if assignment in tried[1:4]:
            failed.add(assignment)
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
    assert sum(trial["pruned"] for trial in report["trials"]) >= len(failed)
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


def test_a_want_of_memory_is_told_from_other_errors() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"))
    with pytest.raises(RuntimeError) as lacked:
        hungry()
    assert is_out_of_memory(lacked.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(DataError("metric: it failed: cannot allocate memory"))


def hungry_batches() -> Iterator[Any]:
    hungry()
    yield None


@pytest.mark.parametrize(
    "call",
    [
        lambda: checked_metric(lambda network: torch.empty(TOO_MANY).sum().item(), "metric")(small_net()),
        lambda: next(readable(hungry_batches())),
        lambda: Factory("tests.test_faults:hungry").build(),
    ],
    ids=["metric", "data", "model factory"],
)
def test_a_want_of_memory_in_functions_of_users_is_no_mistake_of_theirs(call: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError) as lacked:
        call()
    assert is_out_of_memory(lacked.value)


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


@pytest.mark.parametrize("limit", [pytest.param(100, marks=pytest.mark.slow), 30_000])
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


def as_any_user() -> None:
    """Root may write anywhere: not so a process that begins after this, which has lost the right (Linux)."""
    prctl_drop_from_bounding_set, capability_to_override_permissions = 24, 1
    if os.geteuid() == 0:
        ctypes.CDLL(None, use_errno=True).prctl(prctl_drop_from_bounding_set, capability_to_override_permissions)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line, as a user who is not root."""
    own = [sys.executable, "-W", "ignore", "-m", "sekron_search.cli", *arguments]
    return subprocess.run(own, capture_output=True, text=True, cwd=ROOT, check=False, preexec_fn=as_any_user)


def set_mode(folder: Path, mode: int) -> None:
    """Of a folder and all folders in it."""
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        path.chmod(mode)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" and os.geteuid() == 0, reason="nothing is read-only for root")
def test_folders_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    config = write_config(tmp_path, CONFIG, **{"epochs: 2": "epochs: 0", "trials: 8": "trials: 2"})
    out = RunFolder(tmp_path / "begun")
    assert command("run", str(config), "--out", str(out.path)).returncode == 0
    report = read_json(out.report)
    out.report.unlink()
    (tmp_path / "locked").mkdir()
    for folder in (tmp_path / "locked", out.path):
        set_mode(folder, 0o555)
    try:
        for options in (["--out", str(tmp_path / "locked" / "out")], ["--out", str(out.path), "--resume"]):
            done = command("run", str(config), *options)
            assert done.returncode == 1
            last = done.stderr.splitlines()[-1]
            assert re.fullmatch(rf"error: .*{options[1]}.*: cannot be written: Permission denied", last)
            assert "Traceback" not in done.stderr
        assert "interrupted" in command("list", str(tmp_path)).stdout
        assert command("show", str(out.path)).returncode == 0
    finally:
        for folder in (tmp_path / "locked", out.path):
            set_mode(folder, 0o755)
    assert command("run", str(config), "--out", str(out.path), "--resume").returncode == 0
    again = read_json(out.report)
    assert (again["front"], again["layers"]) == (report["front"], report["layers"])


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


class Faults:
    """What goes wrong in `faulty_net` and `faulty_data`: nothing, or one thing until it is mended."""

    network, data = False, False


class FaultyNet(SmallNet):
    """Draws random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, training=Faults.network)


def faulty_net() -> nn.Module:
    network = FaultyNet()
    network.load_state_dict(small_net().state_dict())
    return network


class FaultyData(Dataset[tuple[Tensor, Tensor]]):
    """Whose samples cannot be read any more in the second epoch of fine-tuning."""

    def __init__(self) -> None:
        self.whole, self.reads = blobs(256), 0

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        # For calibration, a check, how far the network is, what layers vary by, and training.
        if Faults.data and self.reads > 64 + 128 + 32 + 256 + 32 + 256 + 40:
            raise OSError("the disk is gone")
        images, labels = self.whole[index]
        return images, labels


def faulty_data() -> DataBundle:
    return DataBundle(FaultyData(), blobs(64, seed=1), blobs(64, seed=2))


def faulty_config(folder: Path) -> Path:
    own = {"tests.cases:small_net": f"{__name__}:faulty_net", "tests.cases:small_data": f"{__name__}:faulty_data"}
    less = {"trials: 8": "trials: 4", "candidates: 2": "candidates: 1, learning_rate: 0.001"}
    return write_config(folder, CONFIG, **own, **less)


def found(report: dict[str, Any]) -> list[Any]:
    """What the same run always comes to."""
    return [report[key] for key in ("front", "layers", "curve", "validation_metric")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What the run comes to in which nothing goes wrong."""
    home = tmp_path_factory.mktemp("undisturbed")
    job = job_from_config(Config.load(faulty_config(home)))
    return found(run(job, RunFolder(home / "out"), Reporter(), resume=False))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("network", "error: the network's outputs for the same inputs differ .*: it draws random numbers or keeps .*"),
        ("data", "error: the data: batch 2 could not be read: OSError: the disk is gone"),
    ],
)
def test_a_run_goes_on_after_what_was_wrong_is_mended(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    undisturbed: list[Any],
    fault: str,
    says: str,
) -> None:
    options = ["run", str(faulty_config(tmp_path)), "--out", str(tmp_path / "out"), "--resume"]
    monkeypatch.setattr(sys, "argv", ["sekron-search", *options])
    monkeypatch.setattr(Faults, fault, True)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert re.fullmatch(says, capsys.readouterr().err.splitlines()[-1])
    assert len([*(tmp_path / "out").glob("candidates/*/checkpoint.pt")]) == (fault == "data")
    assert not (tmp_path / "out" / "report.json").exists()
    monkeypatch.setattr(Faults, fault, False)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert found(read_json(tmp_path / "out" / "report.json")) == undisturbed


@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_that_is_set_between_two_parts_of_a_run_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: list[Any], days: int
) -> None:
    job, folder = job_from_config(Config.load(faulty_config(tmp_path))), RunFolder(tmp_path / "out")
    evaluate, calls = Assembler.evaluate, []

    def interrupted(self: Assembler, *arguments: Any) -> Evaluation:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Assembler, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(job, folder, Reporter(), resume=False)
    shift, now, ns = datetime.timedelta(days=days), time.time, time.time_ns

    class Shifted(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Shifted:
            return super().now(tz) + shift

    monkeypatch.setattr(time, "time", lambda: now() + shift.total_seconds())
    monkeypatch.setattr(time, "time_ns", lambda: ns() + int(shift.total_seconds()) * 10**9)
    patched = [m for name, m in sys.modules.items() if name.startswith("optuna.") and has_clock(m)]
    assert any(module.__name__.startswith("optuna.storages") for module in patched)
    for module in patched:
        monkeypatch.setattr(module, "datetime", Shifted)
    assert found(run(job, folder, Reporter(), resume=True)) == undisturbed


def has_clock(module: ModuleType) -> bool:
    return vars(module).get("datetime") is datetime.datetime
