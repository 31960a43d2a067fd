"""From the tables to one network: search, fit the best candidates layer after layer, measure, fine-tune, choose."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from sekron_search.assembly import Assembler
from sekron_search.candidate import Candidate, Finished, Searched
from sekron_search.choice import Judged, judged, measured_in_training, preferred
from sekron_search.divergence import ChosenBy
from sekron_search.errors import DataError, DivergedError, InfeasibleBudgetError
from sekron_search.export import save_artefact
from sekron_search.files import read_json, write_json
from sekron_search.job import Job
from sekron_search.learning_rate import tuned
from sekron_search.network_tables import Tables
from sekron_search.pick import Pick
from sekron_search.progress import Reporter
from sekron_search.rundir import RunFolder
from sekron_search.runtimes.base import with_memory_format
from sekron_search.search.budget import CostName
from sekron_search.search.knapsack import additive_errors, best_reachable, infeasible, solve_knapsack
from sekron_search.search.options import Assignment
from sekron_search.search.problem import Problem
from sekron_search.search.record import SearchRecord, read_trials, trial_of
from sekron_search.search.study import Halving, take_part
from sekron_search.search.trial import LEANING, Trial, best_feasible
from sekron_search.sharing import Sharing
from sekron_search.tensor_files import read_checkpoint, read_tensors, write_tensors
from sekron_search.timing import network_costs, network_latencies
from sekron_search.training_state import Measure, how_trained

#: How often the search is repeated with corrected costs when its networks miss the budget as measured.
MAX_ROUNDS = 4

#: A correction is larger than the measurements ask for by this factor.
MARGIN = 0.98

#: Networks from the original to the fastest on which sums over layers are calibrated, as shares of the way.
CALIBRATION_LEVELS = (0.35, 0.65, 0.9)

#: However badly layers predict the network, less than this is noise.
LEAST_SCALE = 0.05

#: A saving that is a smaller share of the network's latency tells nothing of how savings add up.
LEAST_SAVING = 0.01


class Finder:
    """Searches, fits, measures and trains candidates, each step kept in the run folder and done once.

    Args:
        job: What to do.
        tables: What every layer can become.
        folder: The run folder.
        reporter: Told of the progress.
        sharing: Where the search is shared with workers.
    """

    def __init__(
        self, job: Job, tables: Tables, folder: RunFolder, reporter: Reporter, sharing: Sharing | None = None
    ) -> None:
        self.job, self.tables, self.folder, self.reporter = job, tables, folder, reporter
        self.sharing = sharing or Sharing()
        self.assembler = Assembler(job, tables)
        self.network = tables.network
        self.budget = job.settings.bounds
        self.bounds = self.budget.resolve(tables.original)
        self.deadline: float | None = None

    def search(self) -> Searched:
        """Search, measure the candidates as whole networks, and search again where the tables were too hopeful."""
        if "latency_ms" in self.bounds:
            self.network = replace(self.network, latency_scale=self._calibration())
        limit_s = self.job.settings.search.time_limit_s
        self.deadline = None if limit_s is None else time.monotonic() + limit_s
        corrected = dict(self.bounds)
        best: Searched | None = None
        told: dict[str, Any] = {}
        for number in range(1, MAX_ROUNDS + 1):
            try:
                trials = self._trials(corrected, number)
            except InfeasibleBudgetError:
                if best is None:
                    raise
                break  # no network meets the corrected bounds: the one that misses the budget by least has to do
            candidates = [self._candidate(t) for t in best_feasible(trials, self.job.settings.finetune.candidates)]
            if not candidates and any(t.feasible for t in trials):
                raise DataError(
                    "search: the network of every trial within the budget overflows or runs out of memory "
                    f"({len(trials)} trials); give a smaller calibration.batch_size, or check the network's outputs"
                )
            if not candidates:
                raise infeasible(self.network, self.bounds)
            searched = Searched(trials, candidates, self.network, min(c.excess(self.budget) for c in candidates))
            if best is None or searched.excess < best.excess:
                best = searched
                told = {"round": number, "bounds": dict(corrected), "trials": [t.to_json() for t in trials]}
            if best.excess <= 1 or number == MAX_ROUNDS:
                break
            self._correct(corrected, candidates)
            self.reporter.say("the measured networks miss the budget; searching again with corrected costs")
        assert best is not None
        write_json(self.folder.search, told)  # of the round that counts: the report names trials by their numbers
        self.sharing.conclude(self.folder)
        self.network = best.network
        return replace(best, candidates=best.candidates + self._leaning(best))

    def _leaning(self, searched: Searched) -> list[Candidate]:
        """The trials that lean to cheap weights, but for those that are candidates already."""
        leaning = [t for t in searched.trials if t.source == LEANING]
        asked = len(self.job.settings.search.leanings)
        if len(leaning) < asked:
            self.reporter.say(
                f"{asked - len(leaning)} of {asked} trials that lean (search.leanings) were left out: they come last, "
                "and the time was over, or there are too few trials"
            )
        known = {c.assignment for c in searched.candidates}
        return [self._candidate(t) for t in best_feasible(leaning, asked) if t.assignment not in known]

    def take(self, pick: Pick) -> Searched:
        """What another run's search has found, with the picked trial as the only candidate: nothing is searched.

        Raises:
            RunFolderError: If the options of the layers are no longer those of that search.
        """
        record = SearchRecord.load(self.folder.network)
        record.check_options([f.table.options for f in self.tables.fitted], self.folder.network)
        self.network, self.budget = record.network, pick.bounds
        trials = read_trials(self.folder.search)
        candidate = self._candidate(trial_of(trials, pick.trial, self.folder.search))
        return Searched(trials, [candidate], self.network, candidate.excess(self.budget))

    def _correct(self, corrected: dict[CostName, float], candidates: Sequence[Candidate]) -> None:
        """Make the costs of the tables, or their bounds, agree with the candidate that kept most of its promise."""
        for name, bound in self.bounds.items():
            if name == "latency_ms":
                continue
            ratio = min(c.costs[name] / c.predicted[name] for c in candidates)
            if ratio > 1:
                corrected[name] = bound / ratio * MARGIN
        if "latency_ms" in self.bounds and min(c.ratio("latency_ms", self.budget) for c in candidates) > 1:
            whole, scale = self.network.unchanged("latency_ms"), self.network.latency_scale
            shares = [(c.latency_share, c.predicted["latency_ms"] / whole) for c in candidates]
            kept = [(1 - m) / (1 - p) for m, p in shares if m < 1 and p < 1 - LEAST_SAVING]
            if kept:
                factor = min(max(kept), 1.0) * MARGIN
                self.network = replace(self.network, latency_scale=max(scale * factor, LEAST_SCALE))
            else:  # none is faster than the original, which the budget may allow: savings tell nothing
                over = max(min(m / p for m, p in shares), 1.0)
                corrected["latency_ms"] = min(corrected["latency_ms"], self.bounds["latency_ms"] / over) * MARGIN

    def _calibration(self) -> float:
        """What the network gains for a millisecond that its layers gain each on its own: measured on a few networks.

        The least-squares slope through the origin, of measured over summed savings; 1 where none is more than noise.
        """
        if not self.folder.calibration.exists():
            self.reporter.say("calibrating sums of layers against whole networks")
            errors = additive_errors(self.network)
            least = best_reachable(self.network, ["latency_ms"])["latency_ms"]
            original = self.network.unchanged("latency_ms")
            found: dict[str, Assignment] = {}
            for level in CALIBRATION_LEVELS:
                bounds: dict[CostName, float] = {"latency_ms": original + level * (least - original)}
                found[str(level)] = solve_knapsack(self.network, bounds, errors, relative_gap=0.01).assignment
            form = self.tables.layout.memory_format
            networks = {name: (self.assembler.with_factors(assignment), form) for name, assignment in found.items()}
            timed = network_latencies(self.job, {"original": (self.job.model, form), **networks})
            whole = timed["original"].median_ms
            rows = [
                {
                    "summed_saving": 1 - self.network.cost(assignment, "latency_ms") / original,
                    "measured_saving": 1 - timed[name].median_ms / whole,
                    "noise": timed[name].noise_ms / whole,
                }
                for name, assignment in found.items()
            ]
            write_json(self.folder.calibration, {"original_ms": whole, "networks": rows})
        rows = read_json(self.folder.calibration)["networks"]
        rows = [row for row in rows if row["summed_saving"] > LEAST_SAVING]
        summed = sum(row["summed_saving"] ** 2 for row in rows)
        shared = sum(row["summed_saving"] * row["measured_saving"] for row in rows)
        return max(shared / summed, LEAST_SCALE) if rows else 1.0

    def finish(self, searched: Searched) -> Finished:
        """Fine-tune the candidates that meet the budget as measured; the best one, trained or as it was fitted."""
        pool = [c for c in searched.candidates if c.excess(self.budget) <= 1]
        # Where none does: the one that misses it by least.
        pool = pool or [min(searched.candidates, key=lambda c: c.excess(self.budget))]
        pool = sorted(pool, key=lambda c: c.divergence)[: self.job.settings.finetune.candidates]
        halving = Halving(self._chosen_by)
        groups = [
            self._contenders(self._train(candidate, halving, f"fine-tuning {number}/{len(pool)}"), len(pool) == 1)
            for number, candidate in enumerate(pool, start=1)
        ]
        chosen = self._best([one for group in groups for one in group])
        for group in groups:
            kept = chosen if chosen in group else self._best(group)
            if kept.as_fitted and kept.curve:
                self.reporter.say(
                    f"trial {kept.candidate.trial}: training made it no better; it stays as it was fitted"
                )
            home, form = self.home(kept.candidate.assignment), self.tables.layout.memory_format
            save_artefact(home, kept.network, self.job.factory, form)
        return chosen

    def load(self, candidate: Candidate) -> nn.Module:
        """A candidate's network as it was before fine-tuning."""
        network = self.assembler.skeleton(candidate.assignment)
        network.load_state_dict(read_tensors(self.home(candidate.assignment) / "weights.safetensors"))
        return network.to(self.job.device).eval()

    def _trials(self, bounds: Mapping[CostName, float], number: int) -> list[Trial]:
        settings = self.job.settings.search
        problem = Problem(
            self.network,
            bounds,
            trials=settings.trials,
            seed=self.job.settings.seed,
            generation=settings.generation,
            spread=settings.spread,
            leanings=settings.leanings,
        )
        name = f"round {number}: " + ", ".join(f"{n} <= {b:.6g}" for n, b in bounds.items())
        with self.sharing.open(self.folder, self.tables, name, problem) as ledger:
            return take_part(problem, self.assembler.evaluate, ledger, self.reporter, deadline=self.deadline)

    def _candidate(self, trial: Trial) -> Candidate:
        """A trial's network, fitted layer after layer and measured; from the run folder if it is there."""
        home = self.home(trial.assignment)
        if not (home / "candidate.json").exists():
            network = self.assembler.assemble(trial.assignment)
            with self.reporter.task("fitting layer after layer", len(self.tables.layers)) as task:
                divergence = self.assembler.fit(network, task.update)
            write_tensors(home / "weights.safetensors", dict(network.state_dict()))
            layout = self.tables.layout
            costs = network_costs(
                self.job,
                {
                    "original": (self.job.model, layout.original_format),
                    "base": (self.job.model, layout.memory_format),
                    "candidate": (network, layout.memory_format),
                },
            )
            candidate = Candidate(
                assignment=trial.assignment,
                trial=trial.index,
                divergence=divergence,
                divergence_before_sequential_fit=trial.divergence,
                predicted=dict(trial.costs),
                costs=costs["candidate"],
                original=costs["original"],
                base_latency_ms=costs["base"]["latency_ms"],
                metric=self.job.validate(network) if self.job.validate is not None else None,
            )
            write_json(home / "candidate.json", asdict(candidate))
        # What the tables predict changes from round to round, and how trials are numbered from run to run; what was
        # measured does not.
        known = Candidate.load(home)
        return replace(known, assignment=trial.assignment, trial=trial.index, predicted=dict(trial.costs))

    def _train(self, candidate: Candidate, halving: Halving, what: str) -> Finished:
        """A candidate after fine-tuning: as after its last good epoch, or as it was fitted where there is none."""
        job, home, network = self.job, self.home(candidate.assignment), self.load(candidate)
        if job.distillation is None:
            return Finished(candidate, [], network, as_fitted=True)
        distillation = tuned(job.distillation, network, self.folder.learning_rate, self.reporter)
        halving.start()
        diverged, notes = None, [""]

        def keep_on(row: Mapping[str, float]) -> bool:
            names = {"loss": "loss", "metric": job.settings.metric_name, "divergence": "divergence"}
            if job.validate is None:
                del names["metric"]
            told = ", ".join(f"{name} {row[key]:.4g}" for key, name in names.items() if key in row)
            notes.append(f"epoch {row['epoch']:.0f}: {told}")
            return halving.keep_on(row)

        def progress(done: int) -> None:
            if done < distillation.total_batches:  # the last epoch's line says what it reached
                task.update(done, notes[-1])

        with self.reporter.task(what, distillation.total_batches) as task:
            try:
                curve = distillation.train(
                    with_memory_format(network, self.tables.layout.memory_format),  # fastest forward, and backward
                    checkpoint=home / "checkpoint.pt",
                    measure=self._measure(),
                    after_epoch=keep_on,
                    progress=progress,
                )
                task.update(len(curve) * len(distillation.data), notes[-1])
            except DivergedError as error:
                # Another learning rate would be another run: this one makes the best of what it has.
                curve, diverged, network = error.curve, str(error), self.load(candidate)
                if curve:
                    network.load_state_dict(read_checkpoint(home / "checkpoint.pt")["model"])
        if diverged is None and len(curve) < distillation.config.epochs:
            self.reporter.say(f"{what}: trial {candidate.trial} is given up ({notes[-1]}): others were better by then")
        if diverged is not None:
            kept = f"as after epoch {len(curve)}" if curve else "as it was fitted"
            self.reporter.say(f"{what}: {diverged}. The candidate goes on {kept}")
        write_json(home / "curve.json", {"epochs": curve, "diverged": diverged})
        how = how_trained(home / "checkpoint.pt")
        return Finished(candidate, curve, network, diverged=diverged, as_fitted=not curve, training=how)

    @property
    def _chosen_by(self) -> ChosenBy:
        return "divergence" if self.job.validate is None else self.job.settings.finetune.choice

    def _measure(self) -> Measure | None:
        """What is measured after every epoch: what halving goes by too, if several are trained."""
        job, settings = self.job, self.job.settings.finetune
        if self._chosen_by == "divergence" and settings.candidates > 1:
            return lambda network: measured_in_training(job, network)
        return job.measure_in_training

    def _contenders(self, found: Finished, alone: bool) -> list[Finished]:
        """A candidate as it was trained and as it was fitted, for training can hurt; judged where that is needed."""
        before = found.candidate.metric
        if not found.curve and alone:
            return [replace(found, judged=Judged(before))]
        networks, metrics = [found.network], [before]
        if found.curve:
            fitted = with_memory_format(self.load(found.candidate), self.tables.layout.memory_format)
            networks, metrics = [found.network, fitted], [found.curve[-1]["metric"], before]
        marks = judged(self.job, networks, metrics, self.home(found.candidate.assignment) / "judged.safetensors")
        return [
            replace(found, network=network, judged=mark, as_fitted=network is networks[-1])
            for network, mark in zip(networks, marks, strict=True)
        ]

    def _best(self, found: Sequence[Finished]) -> Finished:
        """By what is known of the validation data, or else of the hold-out."""
        known = [one.judged for one in found if one.judged is not None]
        assert len(known) == len(found)
        return found[preferred(known, self.job.settings.finetune.choice)]

    def home(self, assignment: Assignment) -> Path:
        """Folder of a candidate."""
        return self.folder.candidates / self.network.digest(assignment)
