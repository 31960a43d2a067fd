"""Workers of a run: real commands, real databases, kills; what is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState
from torch import nn
from typer.testing import CliRunner

from sekron_search.api import compress
from sekron_search.assembly import Assembler
from sekron_search.cli import app
from sekron_search.cli.arguments import seconds
from sekron_search.config import Config
from sekron_search.errors import ConfigError, RunFolderError, SekronError, StorageError
from sekron_search.files import read_json, write_json
from sekron_search.jobs import job_from_config
from sekron_search.progress import Reporter
from sekron_search.run import run
from sekron_search.rundir import RunFolder
from sekron_search.search.budget import CostName
from sekron_search.search.searches import searches
from sekron_search.search.storage import Store, open_store
from sekron_search.search.trial import Trial, pareto_trials
from sekron_search.sharing import Sharing
from sekron_search.table_responses import _Alone
from sekron_search.worker import _fetch, work
from tests.cases import CONFIG, Noted, blobs, small_net, write_config
from tests.processes import CONTEXT, stopped_without_lock, take_part, take_part_without_end, wait_until
from tests.servers import free_port, new_database

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)

TRIALS = 16
SETTINGS = {"trials: 8": f"trials: {TRIALS}", "epochs: 2": "epochs: 0", "candidates: 2": "candidates: 1"}


def run_config(config: Path, out: Path, sharing: Sharing | None = None, *, resume: bool = False) -> dict[str, Any]:
    return run(job_from_config(Config.load(config)), RunFolder(out), Reporter(), resume=resume, sharing=sharing)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), CONFIG, **SETTINGS)


@pytest.fixture(scope="module")
def alone(config: Path) -> Path:
    """The folder of a run that no worker helped."""
    run_config(config, config.parent / "alone")
    return config.parent / "alone"


def interrupted(config: Path, alone: Path, out: Path, sharing: Sharing, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder as it is when the run is interrupted in its first trial; what comes before is taken over."""
    shutil.copytree(alone, out)
    folder = RunFolder(out)
    for path in (folder.study, folder.search, folder.report):
        path.unlink()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Assembler, "evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_config(config, out, sharing, resume=True)
    return out


def worker(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sekron_search.cli", "worker", str(folder), *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def trials_of(store: Store) -> list[FrozenTrial]:
    """The trials of a storage's only search, as Optuna sees them."""
    (search,) = searches(store)
    return optuna.load_study(study_name=search.name, storage=store.backend).get_trials()


def running_trial_of(pid: int, store: Store) -> FrozenTrial | None:
    """The trial that a worker's process is in, if it is in one."""
    own = [t for t in trials_of(store) if f"process {pid} of" in t.user_attrs.get("worker", "")]
    return own[-1] if own and own[-1].state == TrialState.RUNNING else None


@pytest.fixture(params=["journal", "postgresql"])
def storage(request: pytest.FixtureRequest) -> str | None:
    return None if request.param == "journal" else new_database(request.getfixturevalue("postgresql_url"))


def test_a_killed_worker_changes_nothing(
    config: Path, alone: Path, tmp_path: Path, storage: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three workers, one of them the command, and one of the others killed."""
    sharing = Sharing(storage)
    out = interrupted(config, alone, tmp_path / "out", sharing, monkeypatch)
    journal = RunFolder(out).study
    store = open_store(storage or journal)
    victim = CONTEXT.Process(target=take_part_without_end, args=(str(out), storage))
    other = CONTEXT.Process(target=take_part, args=(str(out), storage))
    command: subprocess.Popen[str] | None = None
    try:
        victim.start()
        assert victim.pid is not None
        pid = victim.pid
        wait_until(lambda: running_trial_of(pid, store) is not None, "the first worker began no trial")
        command = worker(out, *(() if storage is None else ("--storage", storage)))
        other.start()
        wait_until(
            lambda: sum(t.state == TrialState.COMPLETE for t in trials_of(store)) >= 2, "the others finish no trial"
        )
        stopped_without_lock(pid, journal)
        lost = running_trial_of(pid, store)
        assert lost is not None
        victim.kill()
        victim.join()
        wait_until(lambda: searches(store)[0].closed or command.poll() is not None, "the search did not end")
        sharing.conclude(RunFolder(out))
        said, complained = command.communicate(timeout=120)
        other.join(120)
        trials = trials_of(store)
    finally:
        store.release()
        if command is not None:
            command.kill()
        for process in (victim, other):
            if process.pid is not None:
                process.kill()
    assert command.returncode == 0, complained
    assert "the run searches no more; this worker did" in said
    assert (victim.exitcode, other.exitcode) == (-9, 0)
    by_slot = Counter(t.user_attrs["slot"] for t in trials if t.state == TrialState.COMPLETE)
    assert by_slot == dict.fromkeys(range(TRIALS), 1)
    assert trials[lost.number].state == TrialState.FAIL
    assert "is gone" in trials[lost.number].user_attrs["why it failed"]
    assert not [t for t in trials if t.state == TrialState.RUNNING]
    found = [t.user_attrs["trial"] for t in trials if t.state == TrialState.COMPLETE]
    expected = read_json(RunFolder(alone).search)["trials"]
    assert sorted(found, key=lambda t: t["index"]) == expected
    costs: list[CostName] = ["flops", "params"]
    fronts = [pareto_trials([Trial.from_json(t) for t in ts], costs) for ts in (found, expected)]
    assert {t.index for t in fronts[0]} == {t.index for t in fronts[1]}
    assert storage is None or storage.split(":")[2].split("@")[0] not in said + complained


def test_a_worker_elsewhere_fetches_what_it_lacks(
    config: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharing = Sharing(f"sqlite:///{tmp_path}/study.sqlite3", str(tmp_path / "artifacts"))
    out = interrupted(config, alone, tmp_path / "out", sharing, monkeypatch)
    moved = out.rename(tmp_path / "unseen")
    elsewhere = RunFolder(tmp_path / "elsewhere")
    given: dict[str, Any] = {"storage": sharing.storage, "patience_s": 0}
    with pytest.raises(RunFolderError, match=r"lacks run\.json.*give --artifacts to the run and to its workers"):
        work(elsewhere, Reporter(), artifacts=None, **given)
    monkeypatch.setattr(_Alone, "divergence", refuse)
    assert work(elsewhere, Reporter(), artifacts=sharing.artifacts, **given) == TRIALS
    assert {p.name for p in elsewhere.tables.iterdir()} == {p.name for p in RunFolder(alone).tables.iterdir()}
    assert list(elsewhere.tables.glob("responses-*.json"))
    monkeypatch.setattr(Assembler, "evaluate", refuse)
    moved.rename(out)
    run_config(config, out, sharing, resume=True)
    assert read_json(RunFolder(out).search) == read_json(RunFolder(alone).search)
    # A worker that comes late sees that all is done.
    assert work(elsewhere, Reporter(), artifacts=sharing.artifacts, **given) == 0


def test_a_worker_waits_for_the_files_of_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run uploads them when its search is there already."""

    class Slow:
        closed, asked = False, 0

        @property
        def files(self) -> dict[str, Any]:
            self.asked += 1
            return {"run.json": {}} if self.asked > 3 else {}

    class Store:
        where = "there"

        def download(self, ledger: Any, folder: Path) -> list[str]:
            return [*ledger.files]

        def release(self) -> None:
            pass

    monkeypatch.setattr("sekron_search.worker.Artifacts.open", lambda url: Store())
    monkeypatch.setattr("sekron_search.worker.POLL_S", 0.0)
    for patience_s, fetched in ((60.0, 1), (0.0, 0)):
        ledger: Any = Slow()
        noted = Noted()
        _fetch(ledger, "there", RunFolder(tmp_path), noted, patience_s)
        assert noted.told == [f"fetched {fetched} files from there"]


def refuse(*_: Any) -> None:
    raise AssertionError("there is nothing left to evaluate")


def test_a_worker_with_other_data_is_refused(
    config: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = interrupted(config, alone, tmp_path / "out", Sharing(), monkeypatch)
    folder = RunFolder(out)
    monkeypatch.setattr("tests.cases.small_net", lambda: small_net(seed=1))
    with pytest.raises(RunFolderError, match=r"it holds another run \(different: model\)"):
        work(folder, Reporter(), storage=None, artifacts=None, patience_s=0)
    monkeypatch.undo()
    monkeypatch.setattr(Assembler, "evaluate", refuse)
    table = sorted(folder.tables.glob("*.json"))[0]
    fits = read_json(table)
    for option in fits["options"][1:]:
        option["error"] += 1
    write_json(table, fits)
    with pytest.raises(StorageError, match=r"is another search than this worker's \(different: tables\)"):
        work(folder, Reporter(), storage=None, artifacts=None, patience_s=0)


def test_a_run_without_a_config_has_no_workers(tmp_path: Path) -> None:
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: Any) -> Any:
            return self.net(x)

    images = blobs(64).tensors[0]
    settings: dict[str, Any] = {"calibration_settings": {"refine_steps": 2, "sequential_steps": 0}}
    settings |= {"search": {"trials": 2}, "latency": {"rounds": 2}, "out": tmp_path / "run", "progress": False}
    compress(Local(), images[:4], budget={"flops": "0.7x"}, calibration=images, **settings)
    store = open_store(RunFolder(tmp_path / "run").study)
    (search,) = searches(store)
    store.backend.set_study_user_attr(store.backend.get_study_id_from_name(search.name), "closed", False)
    store.backend.set_study_user_attr(store.backend.get_study_id_from_name(search.name), "over", False)
    with pytest.raises(RunFolderError, match="its network was given as an object"):
        work(RunFolder(tmp_path / "run"), Reporter(), storage=None, artifacts=None, patience_s=0)


def test_a_worker_waits_for_so_long(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "none")
    with pytest.raises(StorageError, match=r"study\.journal: no search of run .*none has begun in 0 s"):
        work(folder, Reporter(), storage=None, artifacts=None, patience_s=0)
    assert not folder.path.exists()  # the run makes it, and refuses a stranger's


def test_one_of_several_runs_has_to_be_named(alone: Path, config: Path, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.sqlite3"
    store = open_store(storage)
    for name in ("one", "two"):
        study = optuna.create_study(storage=store.backend, study_name=name)
        study.set_user_attr("facts", {"run": name})
    store.release()
    with pytest.raises(StorageError, match=r"2 runs are going on there, and .* does not say which one"):
        work(RunFolder(tmp_path / "none"), Reporter(), storage=storage, artifacts=None, patience_s=0)


def test_artifacts_alone_are_refused_before_long_work(config: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="give --storage too"):
        run_config(config, tmp_path / "out", Sharing(None, str(tmp_path / "artifacts")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "value"), [("90", 90), ("1.5m", 90), ("2h", 7200), ("0s", 0)])
def test_times(text: str, value: float) -> None:
    assert seconds(text, "--patience") == value


@pytest.mark.parametrize("text", ["", "m", "-1s", "1w", "inf"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ConfigError, match="--patience: expected a time such as 90s, 10m or 2h, got"):
        seconds(text, "--patience")


def test_the_dashboard_shows_the_runs_study(alone: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "sekron_search.cli", "dashboard", str(alone), "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            body = answer(f"http://127.0.0.1:{port}/api/studies")
        finally:
            process.kill()
    assert f"run {RunFolder(alone).identity}, round 1" in body


def answer(url: str) -> str:
    for _ in range(600):
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                return str(response.read().decode())
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"nothing answers at {url}")


def test_a_dashboard_of_nothing_or_without_the_package(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = CliRunner().invoke(app, ["dashboard", str(tmp_path)])
    assert isinstance(result.exception, SekronError)
    assert "no study.journal in it" in str(result.exception)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["dashboard", str(alone)])
    assert isinstance(result.exception, StorageError)
    assert "pip install 'sekron-search[dashboard]'" in str(result.exception)
