"""The slots of a study, shared by any number of workers through an Optuna storage.

A slot is claimed by one atomic step, the creation of a running trial that names it, and one look at what is there:
of the trials of a slot that have not failed, the one of the smallest number owns it. Numbers are given in the order
in which trials become visible, so whoever finds no smaller one knows that none will come. A trial that has failed
never runs again, so an owner that was given up on cannot finish what another one has taken over.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.samplers import RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from sekron_search.errors import StorageError
from sekron_search.search.liveness import Process, Watch
from sekron_search.search.storage import PATIENCE_S, Store, experimental, open_store
from sekron_search.search.trial import Trial

#: Seconds between two signs of life of a worker.
HEARTBEAT_S = 5.0

#: Seconds without a sign of life after which a worker is given up on.
GRACE_S = 60.0

#: Attributes of the study.
FACTS, CLOSED, OVER, FILES = "facts", "closed", "over", "files"

#: Attributes of a trial.
SLOT, WORKER, TRIAL, STRUCTURES, REASON = "slot", "worker", "trial", "structures", "why it failed"
_PROCESS, _BEAT = "sekron:process", "sekron:beat"


@dataclass(frozen=True)
class Claim:
    """A slot that is this process's to evaluate.

    Args:
        slot: The slot.
        number: Of Optuna's trial.
        trial_id: Of Optuna's trial, in the storage.
    """

    slot: int
    number: int
    trial_id: int


class Ledger:
    """Which slots of a study are finished, being worked on, or free; make one with `open`."""

    def __init__(self, store: Store, study_id: int, name: str, heartbeat_s: float, grace_s: float) -> None:
        self.name = name
        self.where = store.where
        self.heartbeat_s = heartbeat_s
        self._store, self._study_id = store, study_id
        self._process = Process.here()
        self._watch = Watch(grace_s)
        self._random = random.SystemRandom()  # workers must not draw alike
        self._mine: set[int] = set()
        self._known: dict[int, Trial] = {}
        #: How many trials this process has finished.
        self.num_finished = 0

    @classmethod
    def open(
        cls,
        url: str | os.PathLike[str] | Store,
        name: str,
        *,
        objectives: Sequence[str],
        facts: Mapping[str, Any] | None,
        heartbeat_s: float = HEARTBEAT_S,
        grace_s: float = GRACE_S,
    ) -> Ledger:
        """Make a study, or join it.

        Args:
            url: Of the storage.
            name: Of the study in it.
            objectives: Names of the values of a trial; all are minimised.
            facts: What the study is, as plain JSON. None: whatever it is; it has to be there.
            heartbeat_s: Seconds between two signs of life.
            grace_s: Seconds without one after which others are given up on.

        Raises:
            StorageError: If the storage cannot be opened, or the study in it is another one, or is not there.
        """
        store = open_store(url)
        try:
            if facts is not None:
                with contextlib.suppress(DuplicatedStudyError):
                    directions = [StudyDirection.MINIMIZE] * len(objectives)
                    store.patiently(lambda: store.backend.create_new_study(directions, name))
            study_id = store.patiently(lambda: store.backend.get_study_id_from_name(name))
            ledger = cls(store, study_id, name, heartbeat_s, grace_s)
            if facts is not None:
                ledger._agree(dict(facts), list(objectives))
        except KeyError:
            store.release()
            raise StorageError(f"storage {store.where}: it holds no study {name!r}") from None
        except BaseException:
            store.release()
            raise
        return ledger

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *error: object) -> None:
        self.disconnect()

    def disconnect(self) -> None:
        """Give the storage's connections back; the study stays as it is."""
        self._store.release()

    @property
    def facts(self) -> dict[str, Any]:
        """What the study is; empty until its maker has said so."""
        return dict(self._attributes().get(FACTS, {}))

    @property
    def closed(self) -> bool:
        """Whether the search is over."""
        return bool(self._attributes().get(CLOSED))

    def close(self, counted: Iterable[int] | None = None) -> None:
        """Say that the search is over, if nobody has yet: workers leave.

        Args:
            counted: Slots of the trials that count, where others may still finish some; all if None.
        """
        if self.closed:
            return
        value = True if counted is None else sorted(counted)
        self._store.patiently(lambda: self._store.backend.set_study_user_attr(self._study_id, CLOSED, value))

    def conclude(self) -> None:
        """Say that no other search of this run follows."""
        self._store.patiently(lambda: self._store.backend.set_study_user_attr(self._study_id, OVER, True))

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """The files that go with the study, by name: their artifact's identifier, hash and size."""
        return dict(self._attributes().get(FILES, {}))

    def set_files(self, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Say which files go with the study."""
        wanted = json.loads(json.dumps(files))
        self._store.patiently(lambda: self._store.backend.set_study_user_attr(self._study_id, FILES, wanted))

    def finished(self) -> dict[int, Trial]:
        """The finished slots that count, each once."""
        counted = self._counted()
        found: dict[int, Trial] = {}
        for frozen in self._trials():
            if frozen.state == TrialState.COMPLETE and SLOT in frozen.user_attrs:
                if frozen.number not in self._known:
                    self._known[frozen.number] = Trial.from_json(frozen.user_attrs[TRIAL])
                found.setdefault(frozen.user_attrs[SLOT], self._known[frozen.number])
        return {slot: found[slot] for slot in sorted(found) if counted is None or slot in counted}

    def claim(self, slots: Iterable[int]) -> Claim | None:
        """Take a free one of these slots; None if all are finished or being worked on.

        A worker that is alone takes the lowest one. Those of workers that were given up on are free.
        """
        wanted = sorted(set(slots))
        self._give_up_on_the_dead()
        while True:
            trials = self._trials()
            owners = _owners(trials)
            free = [slot for slot in wanted if slot not in owners]
            if not free:
                return None
            here = self._process.to_json()
            alone = all(t.system_attrs.get(_PROCESS) == here for t in trials)
            # Several that ask at the same time seldom draw the same one.
            # The first slots come first: what ends early shall have them.
            begun = any(t.state == TrialState.COMPLETE for t in trials)
            slot = self._random.choice(free) if begun and not alone else free[0]
            claim = self._propose(slot)
            owner = _owners(self._trials()).get(slot)
            if owner == claim.number:
                self._mine.add(claim.number)
                return claim
            self._fail(claim.trial_id, f"trial {owner} was first" if owner is not None else "given up on by others")

    @contextlib.contextmanager
    def working(self, claim: Claim) -> Iterator[None]:
        """Give signs of life in the background. An exception inside frees the slot and is raised again."""
        stop = threading.Event()
        beats = threading.Thread(target=self._beat, args=(claim, stop), name=f"heartbeat of {claim.slot}", daemon=True)
        beats.start()
        try:
            yield
        except BaseException as error:
            stop.set()
            # What went wrong may be the storage; then others find out by themselves.
            with contextlib.suppress(StorageError):
                self._fail(claim.trial_id, f"{type(error).__name__}: {error}"[:1000], patience_s=self.heartbeat_s)
            raise
        finally:
            stop.set()
            beats.join(self.heartbeat_s)
            self._mine.discard(claim.number)

    def finish(
        self,
        claim: Claim,
        trial: Trial,
        values: Sequence[float],
        violations: Mapping[str, float],
        structures: Mapping[str, str] | None = None,
    ) -> bool:
        """Record a finished slot.

        Args:
            claim: What was claimed.
            trial: What came out.
            values: Of the objectives.
            violations: By how much each constraint is violated; at most 0: met.
            structures: What each layer became, for people who look at the study.

        Returns:
            Whether it counts: not if others gave up on this process meanwhile, and the slot is theirs, or the search
            was closed without it.
        """
        backend, number = self._store.backend, claim.trial_id

        def record() -> None:
            asked = optuna.trial.Trial(self.study(), number)
            there = asked.constraints
            for name, violation in violations.items():
                if name not in there:
                    asked.set_constraint(name, violation)
            if structures is not None:
                backend.set_trial_user_attr(number, STRUCTURES, dict(structures))
            backend.set_trial_user_attr(number, TRIAL, trial.to_json())
            backend.set_trial_state_values(number, TrialState.COMPLETE, [float(v) for v in values])

        with contextlib.suppress(UpdateFinishedTrialError):
            self._store.patiently(record)
        # Read again: what could not be answered may have been written all the same.
        counts = self._store.patiently(lambda: backend.get_trial(number)).state == TrialState.COMPLETE
        counted = self._counted()
        counts = counts and (counted is None or claim.slot in counted)
        self.num_finished += counts
        return counts

    def _counted(self) -> list[int] | None:
        """Slots that count, once the search was closed while others were being worked on; None if all do."""
        closed = self._attributes().get(CLOSED)
        return closed if isinstance(closed, list) else None

    def _agree(self, facts: dict[str, Any], objectives: list[str]) -> None:
        """Say what the study is, or check that it is that."""
        backend = self._store.backend
        wanted = json.loads(json.dumps(facts))
        if not self.facts:
            study = self.study()
            with experimental():
                self._store.patiently(lambda: study.set_metric_names(objectives))
            self._store.patiently(lambda: backend.set_study_user_attr(self._study_id, FACTS, wanted))
        found = self.facts
        if changed := sorted(key for key in {*wanted, *found} if wanted.get(key) != found.get(key)):
            raise StorageError(
                f"storage {self.where}: its study {self.name!r} is another one (different: {', '.join(changed)}); "
                "choose another storage, or restore what changed"
            )

    def _propose(self, slot: int) -> Claim:
        template = create_trial(
            state=TrialState.RUNNING,
            user_attrs={SLOT: slot, WORKER: str(self._process)},
            system_attrs={_PROCESS: self._process.to_json(), _BEAT: 0},
        )
        # A creation that is made again because the answer was lost leaves a trial that gives no signs of life.
        backend = self._store.backend
        trial_id = self._store.patiently(lambda: backend.create_new_trial(self._study_id, template))
        return Claim(slot, self._store.patiently(lambda: backend.get_trial(trial_id)).number, trial_id)

    def _give_up_on_the_dead(self) -> None:
        backend, looked = self._store.backend, self._watch.looks()
        for frozen in self._trials():
            if frozen.state != TrialState.RUNNING or frozen.number in self._mine or SLOT not in frozen.user_attrs:
                continue
            owner = Process.from_json(frozen.system_attrs[_PROCESS])
            stopped = self._watch.has_stopped(frozen.number, frozen.system_attrs[_BEAT], looked)
            if stopped or owner.is_gone:
                number = frozen.number
                trial_id = backend.get_trial_id_from_study_id_trial_number(self._study_id, number)
                self._fail(trial_id, f"{owner} {'is gone' if owner.is_gone else 'went silent'}, saw {self._process}")

    def _fail(self, trial_id: int, reason: str, patience_s: float = PATIENCE_S) -> None:
        """Free a trial's slot; nothing happens if the trial is finished."""
        backend = self._store.backend

        def record() -> None:
            backend.set_trial_user_attr(trial_id, REASON, reason)
            backend.set_trial_state_values(trial_id, TrialState.FAIL)

        with contextlib.suppress(UpdateFinishedTrialError):
            self._store.patiently(record, patience_s=patience_s)

    def _beat(self, claim: Claim, stop: threading.Event) -> None:
        beat = 0
        while not stop.wait(self.heartbeat_s):
            beat += 1
            try:
                self._store.backend.set_trial_system_attr(claim.trial_id, _BEAT, beat)
            except UpdateFinishedTrialError:
                return  # finished, or others gave up on this process: `finish` will say so
            except self._store.failures:
                continue  # the storage may come back before the others give up

    def _trials(self) -> list[FrozenTrial]:
        backend = self._store.backend
        return self._store.patiently(lambda: backend.get_all_trials(self._study_id, deepcopy=False))

    def _attributes(self) -> dict[str, Any]:
        return self._store.patiently(lambda: self._store.backend.get_study_user_attrs(self._study_id))

    def study(self) -> optuna.Study:
        """The study as Optuna has it; not to draw anything, its sampler is one that looks at no other trials."""
        return self._store.patiently(
            lambda: optuna.load_study(study_name=self.name, storage=self._store.backend, sampler=RandomSampler())
        )


def _owners(trials: Iterable[FrozenTrial]) -> dict[int, int]:
    """The trial that owns each slot that is not free, by slot."""
    owners: dict[int, int] = {}
    for frozen in trials:
        if frozen.state in (TrialState.RUNNING, TrialState.COMPLETE) and SLOT in frozen.user_attrs:
            slot = frozen.user_attrs[SLOT]
            owners[slot] = min(owners.get(slot, frozen.number), frozen.number)
    return owners
