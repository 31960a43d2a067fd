"""A worker whose trials are arithmetic: it evaluates slots in generations and notes what it does."""

from __future__ import annotations

import os
import time
from pathlib import Path

from sekron_search.search.ledger import Ledger
from sekron_search.search.trial import Trial

OBJECTIVES = ("divergence", "flops")
GENERATION = 8


def outcome(slot: int, earlier: dict[int, Trial]) -> Trial:
    """A trial that depends on all trials of earlier generations, as those of a real search do."""
    before = sum((index + 1) * trial.divergence for index, trial in earlier.items()) % 7
    divergence = 1.0 + (slot * 37 % 23) / 23 + before / 100
    costs = {"flops": float(slot * 17 % 29)}
    return Trial(slot, (slot % 5, slot % 3), divergence, costs, slot % 2 == 0, "toy")


def evaluate(ledger: Ledger, slots: int, *, pause_s: float, log: Path) -> None:
    """Evaluate until all slots are finished.

    Args:
        ledger: Of the study.
        slots: Number of slots in all.
        pause_s: What a trial takes.
        log: A line is added when a slot is claimed, before it is recorded, and when it is finished.
    """
    generations = [range(start, min(start + GENERATION, slots)) for start in range(0, slots, GENERATION)]
    while len(finished := ledger.finished()) < slots:
        generation = next(g for g in generations if not {*g} <= {*finished})
        claim = ledger.claim(generation)
        if claim is None:
            time.sleep(0.02)
            continue
        with ledger.working(claim):
            note(log, f"claimed {claim.slot}")
            time.sleep(pause_s)
            note(log, f"recording {claim.slot}")
            trial = outcome(claim.slot, {slot: finished[slot] for slot in range(generation.start)})
            flops = trial.costs["flops"]
            if ledger.finish(claim, trial, [trial.divergence, flops], {"flops": flops / 20 - 1}):
                note(log, f"finished {claim.slot}")


def work(url: str, name: str, slots: int, pause_s: float, log: str) -> None:
    """A worker's process."""
    with Ledger.open(url, name, objectives=OBJECTIVES, facts=None) as ledger:
        evaluate(ledger, slots, pause_s=pause_s, log=Path(log))


def note(log: Path, what: str) -> None:
    with log.open("a") as file:  # short lines at the end of a file are written whole
        file.write(f"{os.getpid()} {what}\n")
