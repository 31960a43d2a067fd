from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from sekron_search.errors import StorageError
from sekron_search.search.ledger import Claim, Ledger
from sekron_search.search.liveness import Process, Watch
from sekron_search.search.searches import Search, searches
from sekron_search.search.storage import masked, open_store, serve
from sekron_search.search.trial import Trial, pareto_trials
from tests.processes import CONTEXT, stopped_without_lock, wait_until
from tests.search import toy_worker
from tests.search.toy_worker import OBJECTIVES, evaluate, outcome, work
from tests.servers import PASSWORD, free_port, new_database

KINDS = ["journal", "sqlite", "postgresql", "grpc"]
FACTS = {"trials": 24, "seed": 0, "bounds": {"flops": 0.5}}


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "journal":
        yield str(tmp_path / "study.journal")
    elif request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/study.sqlite3"
    elif request.param == "postgresql":
        yield new_database(request.getfixturevalue("postgresql_url"))
    else:
        port = free_port()
        proxy = CONTEXT.Process(target=serve, args=(f"sqlite:///{tmp_path}/study.sqlite3", "127.0.0.1", port))
        proxy.start()
        yield f"grpc://127.0.0.1:{port}"
        proxy.kill()
        proxy.join()


@pytest.fixture
def journal(tmp_path: Path) -> str:
    return str(tmp_path / "study.journal")


def opened(url: str, name: str = "toy", **settings: float) -> Ledger:
    return Ledger.open(url, name, objectives=OBJECTIVES, facts=FACTS, **settings)


def finish(ledger: Ledger, claim: Claim, divergence: float = 1.0) -> bool:
    trial = dataclasses.replace(outcome(claim.slot, {}), divergence=divergence)
    return ledger.finish(claim, trial, [divergence, 0.0], {"flops": -0.5})


def claimed(ledger: Ledger, slots: range = range(4)) -> Claim:
    claim = ledger.claim(slots)
    assert claim is not None
    return claim


def everything(url: str, name: str) -> list[optuna.trial.FrozenTrial]:
    """All trials as Optuna sees them, with no ledger between."""
    store = open_store(url)
    trials = optuna.load_study(study_name=name, storage=store.backend).get_trials()
    store.release()
    return trials


def start(url: str, name: str, count: int, log: Path, *, slots: int, pause_s: float) -> list[BaseProcess]:
    log.touch()
    found: list[BaseProcess] = [
        CONTEXT.Process(target=work, args=(url, name, slots, pause_s, str(log)), daemon=True) for _ in range(count)
    ]
    for process in found:
        process.start()
    return found


def alone(folder: Path, slots: int) -> dict[int, Trial]:
    """What one worker makes of the same study."""
    with opened(str(folder / "alone.journal")) as ledger:
        evaluate(ledger, slots, pause_s=0, log=folder / "alone.log")
        return ledger.finished()


def front(trials: dict[int, Trial]) -> list[Trial]:
    return pareto_trials(list(trials.values()), ["flops"])


def test_a_slot_goes_from_free_to_finished_once(url: str) -> None:
    with opened(url) as ledger, opened(url) as other:
        assert ledger.facts == FACTS
        assert not other.closed
        first, second = claimed(ledger, range(2)), claimed(other, range(2))
        assert {first.slot, second.slot} == {0, 1}
        assert ledger.claim(range(2)) is None
        with ledger.working(first):
            assert finish(ledger, first, 0.25)
        assert list(other.finished()) == [first.slot]
        assert other.finished()[first.slot].divergence == 0.25
        assert ledger.claim([first.slot]) is None
        ledger.close()
        assert other.closed


def test_what_is_finished_after_a_search_was_closed_does_not_count(url: str) -> None:
    """A run that ran out of time has gone on without it, and goes on so too when it is killed and gone on with."""
    with opened(url) as run, opened(url) as worker, opened(url) as again:
        assert finish(run, claimed(run))
        late = claimed(worker)
        assert late.slot != 0
        run.close(run.finished())
        assert run.closed
        assert not finish(worker, late, 0.1)
        assert worker.num_finished == 0
        worker.close()  # as one that saw all finished
        assert [*again.finished()] == [*run.finished()] == [0]


def test_a_worker_alone_takes_the_slots_in_their_order(journal: str) -> None:
    with opened(journal) as ledger:
        for slot in range(3):
            claim = claimed(ledger, range(3))
            assert (claim.slot, claim.number) == (slot, slot)
            assert finish(ledger, claim)
        assert ledger.claim(range(3)) is None


def test_many_processes_own_each_slot_once(url: str, tmp_path: Path) -> None:
    name, slots, log = uuid.uuid4().hex, 16, tmp_path / "log"
    with opened(url, name) as ledger:
        for process in start(url, name, 4, log, slots=slots, pause_s=0):
            process.join(60)
            assert process.exitcode == 0
        assert ledger.finished() == alone(tmp_path, slots)
    events = Counter(line.split(maxsplit=1)[1] for line in log.read_text().splitlines())
    assert events == {f"{what} {slot}": 1 for what in ("claimed", "recording", "finished") for slot in range(slots)}
    complete = Counter(t.user_attrs["slot"] for t in everything(url, name) if t.state == TrialState.COMPLETE)
    assert complete == dict.fromkeys(range(slots), 1)


@pytest.mark.parametrize("url", ["journal", "postgresql"], indirect=True)
def test_a_killed_workers_trial_is_done_by_another(url: str, tmp_path: Path) -> None:
    name, slots, log = uuid.uuid4().hex, 16, tmp_path / "log"
    with opened(url, name) as ledger:
        (victim,) = start(url, name, 1, log, slots=slots, pause_s=3600)
        wait_until(lambda: "claimed" in log.read_text(), "the first worker began no trial")
        slot = int(log.read_text().split()[-1])
        others = start(url, name, 2, log, slots=slots, pause_s=0)
        wait_until(lambda: log.read_text().count("finished") >= 3, "the others finish no trial")
        assert victim.pid is not None
        stopped_without_lock(victim.pid, Path(url))
        victim.kill()
        for process in (victim, *others):
            process.join(60)
        assert [process.exitcode for process in (victim, *others)] == [-9, 0, 0]
        assert ledger.finished() == (expected := alone(tmp_path, slots))
        assert front(ledger.finished()) == front(expected)
    trials = everything(url, name)
    complete = Counter(t.user_attrs["slot"] for t in trials if t.state == TrialState.COMPLETE)
    assert complete == dict.fromkeys(range(slots), 1)
    dead = [t for t in trials if t.state == TrialState.FAIL and f"process {victim.pid} of" in t.user_attrs["worker"]]
    assert any(t.user_attrs["slot"] == slot and "is gone" in t.user_attrs["why it failed"] for t in dead)
    assert not [t for t in trials if t.state == TrialState.RUNNING]


def test_a_silent_worker_is_given_up_on_and_cannot_finish(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Process.here()
    with opened(url, grace_s=0) as ledger:
        monkeypatch.setattr(
            Process, "here", lambda: dataclasses.replace(here, name="far away", space="another machine")
        )
        with opened(url) as zombie:
            lost = claimed(zombie, range(1))
            assert ledger.claim(range(1)) is None  # the first look says nothing about the time between two signs
            taken = claimed(ledger, range(1))
            assert taken.number > lost.number
            assert not finish(zombie, lost, 7.0)
            assert ledger.finished() == {}
            assert finish(ledger, taken, 0.5)
            assert (zombie.num_finished, ledger.num_finished) == (0, 1)
            assert not finish(zombie, lost, 7.0)
            assert {slot: t.divergence for slot, t in zombie.finished().items()} == {0: 0.5}
    given_up = everything(url, "toy")[lost.number]
    assert given_up.state == TrialState.FAIL
    assert "of far away went silent" in given_up.user_attrs["why it failed"]


@pytest.mark.parametrize("url", ["journal", "postgresql"], indirect=True)
def test_signs_of_life_reach_the_others(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = dataclasses.replace(Process.here(), space="another machine")
    with opened(url, grace_s=0) as ledger:
        monkeypatch.setattr(Process, "here", lambda: elsewhere)
        with opened(url, heartbeat_s=0.01) as other:
            claim = claimed(other, range(1))
            with other.working(claim):
                seen = -1
                for _ in range(3):
                    seen = next_beat(url, claim, seen)
                    assert ledger.claim(range(1)) is None
                assert finish(other, claim)
            assert ledger.claim(range(1)) is None


def next_beat(url: str, claim: Claim, after: int) -> int:
    for _ in range(2000):
        beat: int = everything(url, "toy")[claim.number].system_attrs["sekron:beat"]
        if beat > after:
            return beat
        time.sleep(0.005)
    raise AssertionError("no sign of life")


def test_an_exception_or_interrupt_frees_the_slot(journal: str) -> None:
    with opened(journal) as ledger:
        for error in (KeyboardInterrupt(), ValueError("no such layer")):
            claim = claimed(ledger, range(1))
            with pytest.raises(type(error)), ledger.working(claim):
                raise error
        assert claimed(ledger, range(1)).number == 2
    reasons = [t.user_attrs.get("why it failed") for t in everything(journal, "toy")]
    assert reasons == ["KeyboardInterrupt: ", "ValueError: no such layer", None]


@pytest.mark.parametrize("url", ["journal", "postgresql"], indirect=True)
def test_what_optuna_shows_of_a_trial(url: str) -> None:
    with opened(url) as ledger:
        claim = claimed(ledger)
        trial = outcome(claim.slot, {})
        assert ledger.finish(claim, trial, [0.5, 3.0], {"flops": 0.25}, {"conv1": "4x4[a] * 2x2[a]; a=3"})
    (shown,) = everything(url, "toy")
    assert shown.values == [0.5, 3.0]
    assert shown.constraints == {"flops": 0.25}
    assert shown.user_attrs["structures"] == {"conv1": "4x4[a] * 2x2[a]; a=3"}
    assert Trial.from_json(shown.user_attrs["trial"]) == trial


def test_another_study_of_that_name_is_refused(url: str) -> None:
    opened(url).disconnect()
    with pytest.raises(StorageError, match=r"its study 'toy' is another one \(different: seed, start\)"):
        Ledger.open(url, "toy", objectives=OBJECTIVES, facts={**FACTS, "seed": 1, "start": "later"})
    with pytest.raises(StorageError, match="it holds no study 'none'"):
        Ledger.open(url, "none", objectives=OBJECTIVES, facts=None)


def test_the_searches_of_a_storage(url: str) -> None:
    with opened(url, "first") as first, opened(url, "second") as second:
        first.close()
        store = open_store(url)
        assert searches(store) == [Search("first", FACTS, True, False), Search("second", FACTS, False, False)]
        second.close()
        second.conclude()
        assert searches(store)[1] == Search("second", FACTS, True, True)
        store.release()


def test_a_count_that_does_not_change_has_stopped() -> None:
    now = 0.0
    watch = Watch(10.0, clock=lambda: now)
    assert not watch.has_stopped(1, 0, watch.looks())
    now = 9.0
    assert not watch.has_stopped(1, 0, watch.looks())
    now = 11.0
    assert watch.has_stopped(1, 0, watch.looks())
    assert not watch.has_stopped(2, 0, watch.looks())
    assert not watch.has_stopped(1, 1, watch.looks())
    now = 30.0
    began = watch.looks()
    now = 90.0  # this process slept between the look and the reading
    assert not watch.has_stopped(2, 5, began)
    assert not watch.has_stopped(2, 5, began)


@pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="processes are told apart through Linux's /proc")
def test_a_process_that_ended_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        here = Process.here()
        started = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
        process = dataclasses.replace(here, pid=child.pid, started=started)
        assert not process.is_gone
        assert not here.is_gone
        assert dataclasses.replace(process, started=started - 1).is_gone  # the number is another process's by now
        child.kill()
        child.wait()
    assert dataclasses.replace(process).is_gone
    assert not dataclasses.replace(process, space="another machine").is_gone
    assert not dataclasses.replace(process, started=None).is_gone


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://localhost", "unknown kind 'redis'; expected a file or journal:///PATH"),
        ("grpc://localhost", "expected grpc://HOST:PORT"),
        ("postgresql://me:secret@127.0.0.1:1/db", r"postgresql\+psycopg://me:\*\*\*@127.0.0.1:1/db: cannot be reached"),
        ("postgresql+none://me:secret@127.0.0.1:1/db", r"Can't load plugin.*expected a file or journal"),
    ],
)
def test_a_storage_that_cannot_be_opened(url: str, message: str) -> None:
    with pytest.raises(StorageError, match=message) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


def test_a_wrong_password_is_told_but_not_shown(postgresql_url: str) -> None:
    wrong = postgresql_url.replace(PASSWORD.replace(" ", "%20"), "hidden")
    with pytest.raises(StorageError, match="password authentication failed") as caught:
        open_store(wrong)
    assert "hidden" not in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("pymysql") is not None, reason="PyMySQL is installed")
def test_a_missing_driver_is_named() -> None:
    with pytest.raises(StorageError, match=r"its driver is not installed \(.*pymysql.*pip install pymysql"):
        open_store("mysql://me:secret@localhost/db")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:p@ss/w:rd@host/db", "postgresql://me:***@host/db"),
        ("mysql://host/db?user=me&Password=secret&x=1", "mysql://host/db?user=me&Password=***&x=1"),
        ("grpc://host:13000", "grpc://host:13000"),
        ("runs/one/study.journal", "runs/one/study.journal"),
    ],
)
def test_passwords_are_not_shown(text: str, shown: str) -> None:
    assert masked(text) == shown


def test_half_a_record_is_dropped_from_a_journal(journal: str) -> None:
    with opened(journal) as ledger:
        assert finish(ledger, claimed(ledger))
    with Path(journal).open("a") as file:
        file.write('{"op_code":4,"worker')
    with opened(journal) as ledger:
        assert list(ledger.finished()) == [0]
        assert finish(ledger, claimed(ledger))
    with opened(journal) as again:
        assert list(again.finished()) == [0, 1]


@pytest.mark.parametrize("text", ["not a journal", "not\na journal\n", '{"op_code":"x"}\n{}\n'])
def test_what_is_no_journal_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes"
    path.write_text(text)
    with pytest.raises(StorageError, match="not the journal of a study, or damaged"):
        open_store(path)
    assert path.read_text() == text


def test_a_storage_that_comes_back_is_waited_for(journal: str) -> None:
    store = open_store(journal)
    answers: list[Callable[[], int]] = [fails, fails, lambda: 3]
    assert store.patiently(lambda: answers.pop(0)()) == 3
    with pytest.raises(StorageError, match=r"cannot be reached \(the disk is away\)"):
        store.patiently(fails, patience_s=0)


def fails() -> int:
    raise OSError("the disk is away")


def test_generations_depend_on_what_came_before() -> None:
    """Otherwise the comparison with one worker could not tell a wrong order."""
    some = {slot: outcome(slot, {}) for slot in range(toy_worker.GENERATION)}
    assert outcome(8, some).divergence != outcome(8, {}).divergence
