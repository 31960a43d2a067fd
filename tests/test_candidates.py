from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sekron_search.candidates
from sekron_search.assembly import Assembler
from sekron_search.candidate import Searched
from sekron_search.candidates import Finder
from sekron_search.choice import Judged
from sekron_search.config import Config
from sekron_search.files import read_json
from sekron_search.finetune import Distillation
from sekron_search.jobs import job_from_config
from sekron_search.prepare import prepare
from sekron_search.progress import Reporter
from sekron_search.rundir import RunFolder
from sekron_search.search.study import Halving
from sekron_search.search.trial import Trial
from sekron_search.sections import FinetuneConfig
from sekron_search.tensor_files import write_tensors
from sekron_search.timing import network_costs
from tests.cases import CONFIG, Noted, write_config

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


@pytest.fixture
def finder(tmp_path: Path) -> Finder:
    config = write_config(tmp_path, CONFIG, **{"trials: 8": "trials: 3", "params: 0.8x": "params: 0.9x"})
    job, folder = job_from_config(Config.load(config)), RunFolder(tmp_path / "out")
    with folder.claimed(job.fingerprint(), resume=False):
        return Finder(job, prepare(job, folder, Reporter()), folder, Reporter())


def measure_more(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Networks cost more than their tables say, as latencies often do."""

    def costs(*args: Any) -> dict[str, dict[str, float]]:
        found = network_costs(*args)
        return {n: {**c, "flops": c["flops"] * (1 if n == "original" else factor)} for n, c in found.items()}

    monkeypatch.setattr(sekron_search.candidates, "network_costs", costs)


def test_tables_that_are_too_hopeful_are_corrected_by_what_was_measured(
    finder: Finder, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_more(monkeypatch, 1.3)
    searched = finder.search()
    assert searched.excess <= 1
    found = read_json(finder.folder.search)
    assert found["round"] == 2
    assert found["bounds"]["flops"] == pytest.approx(finder.bounds["flops"] / 1.3 * 0.98, rel=1e-3)
    assert all(c.costs["flops"] > 1.2 * c.predicted["flops"] for c in searched.candidates)


def test_a_budget_that_turns_out_impossible_leaves_the_nearest_network(
    finder: Finder, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_more(monkeypatch, 50)
    searched = finder.search()
    assert searched.excess > 1
    assert finder.finish(searched).candidate in searched.candidates


def test_of_networks_that_miss_the_budget_the_nearest_to_it_is_taken(finder: Finder) -> None:
    settings = finder.job.settings.model_copy(update={"finetune": FinetuneConfig(epochs=0, candidates=2)})
    finder.job = replace(finder.job, settings=settings)
    candidate = finder.search().candidates[0]
    pool = [
        replace(candidate, trial=number, divergence=far, costs={n: times * c for n, c in candidate.original.items()})
        for number, (far, times) in enumerate([(0.1, 3.0), (0.3, 1.2), (0.2, 2.0)])
    ]
    assert all(one.excess(finder.budget) > 1 for one in pool)
    assert finder.finish(Searched([], pool, finder.network, 1.2)).candidate.trial == 1


@pytest.mark.parametrize(("fitted", "trained"), [(1.0, 0.9), (0.9, 1.0)])
def test_without_a_metric_outputs_on_the_hold_out_decide(
    finder: Finder, monkeypatch: pytest.MonkeyPatch, fitted: float, trained: float
) -> None:
    """Whatever a training says of its loss: weights times 0.9 give other outputs."""
    finder.job = replace(finder.job, validate=None)
    candidate = finder.search().candidates[0]
    good = finder.load(candidate).state_dict()

    def times(factor: float) -> dict[str, torch.Tensor]:
        return {name: factor * t if t.is_floating_point() else t for name, t in good.items()}

    def train(self: Distillation, model: nn.Module, **other: Any) -> list[dict[str, float]]:
        model.load_state_dict(times(trained))
        return [{"epoch": 1.0, "loss": 1.0, "metric": -1.0}]

    monkeypatch.setattr(sekron_search.candidates, "tuned", lambda distillation, *_: distillation)
    monkeypatch.setattr(Distillation, "train", train)
    write_tensors(finder.home(candidate.assignment) / "weights.safetensors", times(fitted))
    found = finder.finish(Searched([], [candidate], finder.network, 1.0))
    assert found.metric is None
    assert found.as_fitted == (fitted == 1)
    assert all(torch.equal(tensor, good[name]) for name, tensor in found.network.state_dict().items())


@pytest.mark.parametrize(("choice", "epochs"), [("metric", [8, 8]), ("divergence", [8, 1])])
def test_halving_goes_by_what_networks_are_chosen_by(
    finder: Finder, monkeypatch: pytest.MonkeyPatch, choice: str, epochs: list[int]
) -> None:
    """The second network is the better one by the metric, and by the losses, and the worse one by its outputs."""
    finetune = finder.job.settings.finetune.model_copy(update={"choice": choice})
    finder.job = replace(finder.job, settings=finder.job.settings.model_copy(update={"finetune": finetune}))
    finder.reporter = noted = Noted()
    searched = finder.search()
    pool = sorted(searched.candidates, key=lambda c: c.divergence)
    assert len(pool) == 2
    outcomes = iter([{"loss": 0.2, "metric": 0.5}, {"loss": 0.1, "metric": 0.6}])
    rows = []

    def train(
        self: Distillation, model: nn.Module, *, measure: Any, after_epoch: Any, **other: Any
    ) -> list[dict[str, float]]:
        outcome, curve = next(outcomes), []
        for epoch in range(1, 9):
            curve.append({**measure(model), "epoch": float(epoch), **outcome})
            rows.append(curve[-1])
            if not after_epoch(curve[-1]):
                break
        return curve

    monkeypatch.setattr(sekron_search.candidates, "tuned", lambda distillation, *_: distillation)
    monkeypatch.setattr(Distillation, "train", train)
    finder.finish(replace(searched, excess=1.0))
    assert [len(read_json(finder.home(c.assignment) / "curve.json")["epochs"]) for c in pool] == epochs
    if choice == "divergence":
        assert rows[0]["divergence"] < rows[-1]["divergence"]
    else:
        assert "divergence" not in rows[0], "it takes time"
    assert any(note.startswith(f"fine-tuning 1/2: epoch {epochs[0]}: loss 0.2, accuracy 0.5") for note in noted.notes)
    given_up = f"fine-tuning 2/2: trial {pool[1].trial} is given up (epoch 1: loss 0.1, accuracy 0.6, divergence "
    assert any(text.startswith(given_up) for text in noted.told) == (choice == "divergence")


def test_halving_goes_by_the_metric_where_a_curve_of_before_has_no_divergence() -> None:
    halving = Halving("divergence")
    kept = []
    for metric in (0.5, 0.4):
        halving.start()
        kept.append([halving.keep_on({"epoch": epoch, "loss": 0.0, "metric": metric}) for epoch in (1.0, 2.0)])
    assert kept[0] == [True, True]
    assert False in kept[1]


@pytest.mark.parametrize("scale", [0.0, 0.99, 1.0])
def test_what_training_makes_no_better_stays_as_it_was_fitted(
    finder: Finder, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    def train(self: Distillation, model: nn.Module, *, measure: Any, **other: Any) -> list[dict[str, float]]:
        for parameter in model.parameters():
            parameter.data *= scale
        return [{"epoch": 1.0, "loss": 0.0, **measure(model)}]

    monkeypatch.setattr(Distillation, "train", train)
    (candidate,) = finder.search().candidates[:1]
    found = finder.finish(Searched([], [candidate], finder.network, 1.0))
    assert found.as_fitted == (scale < 1)
    fitted = finder.load(candidate).state_dict()
    assert all(torch.equal(tensor, fitted[name]) for name, tensor in found.network.state_dict().items())
    assert found.metric == pytest.approx(candidate.metric)


def test_of_several_that_are_alike_the_nearest_is_chosen(finder: Finder, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = iter([Judged(0.9, torch.ones(9), distance) for distance in (0.3, 0.2, 0.25)])
    monkeypatch.setattr(
        sekron_search.candidates, "judged", lambda job, networks, metrics, path: [next(marks) for _ in networks]
    )
    candidate = finder.search().candidates[0]
    settings = finder.job.settings.model_copy(update={"finetune": FinetuneConfig(epochs=0, candidates=3)})
    finder.job = replace(finder.job, settings=settings)
    pool = [replace(candidate, trial=number) for number in range(3)]
    found = finder.finish(Searched([], pool, finder.network, 1.0))
    assert (found.candidate.trial, found.as_fitted, found.curve) == (1, True, [])


def test_a_candidate_is_fitted_once_and_is_what_its_record_says(finder: Finder) -> None:
    searched = finder.search()
    candidate = searched.candidates[0]
    assert candidate.divergence <= candidate.divergence_before_sequential_fit
    assert finder.assembler.divergence(finder.load(candidate)) == pytest.approx(candidate.divergence, rel=1e-5)
    assert finder.assembler.evaluate(candidate.assignment).divergence == pytest.approx(
        candidate.divergence_before_sequential_fit, rel=1e-5
    )
    assert finder.search() == searched


def test_networks_that_lean_to_cheap_weights_are_fitted_and_the_least_divergent_is_trained(tmp_path: Path) -> None:
    changes = {"trials: 8": "trials: 12, leanings: [-3.0, 3.0]", "candidates: 2": "candidates: 1"}
    config = write_config(tmp_path, CONFIG, **{**changes, "flops: 0.6x, params: 0.8x": "flops: 0.4x"})
    job, folder = job_from_config(Config.load(config)), RunFolder(tmp_path / "out")
    with folder.claimed(job.fingerprint(), resume=False):
        finder = Finder(job, prepare(job, folder, Reporter()), folder, Reporter())
        searched = finder.search()
        assert [t.source for t in searched.trials[-2:]] == ["leaning", "leaning"]
        assert not any(t.pruned for t in searched.trials[-2:])
        fitted = {c.assignment for c in searched.candidates}
        assert len(fitted) == len(searched.candidates) > 1
        assert fitted >= {t.assignment for t in searched.trials[-2:]}
        marked = [replace(c, divergence=float(i)) for i, c in enumerate(reversed(searched.candidates))]
        found = finder.finish(replace(searched, candidates=list(reversed(marked))))
    assert found.candidate == marked[0]
    trained = [
        finder.home(c.assignment) for c in searched.candidates if (finder.home(c.assignment) / "curve.json").exists()
    ]
    assert trained == [finder.home(marked[0].assignment)]


def test_trials_that_lean_and_were_left_out_are_told(finder: Finder, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(finder.reporter, "say", said.append)
    search = finder.job.settings.search.model_copy(update={"leanings": (0.5, 1.0)})
    finder.job = replace(finder.job, settings=finder.job.settings.model_copy(update={"search": search}))
    finder.search()
    assert any(line.startswith("2 of 2 trials that lean (search.leanings) were left out") for line in said)


def trial(divergence: float, partial: tuple[float, ...]) -> Trial:
    return Trial(0, (), divergence, {}, feasible=True, source="search", partial=partial)


def test_what_is_clearly_behind_a_cheaper_network_is_not_measured_to_the_end(
    finder: Finder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assembler = finder.assembler
    start = (0,) * len(finder.network.tables)
    sizes = [inputs[0][:8] for inputs in assembler.job.holdout[:2] for _ in range(5)]
    measured = lambda self, network, number, inputs: 2.0 + 0.01 * (number % 2)  # noqa: E731
    monkeypatch.setattr(Assembler, "_divergence", measured)
    monkeypatch.setattr(assembler, "job", replace(assembler.job, holdout=[(x,) for x in sizes]))
    count = len(sizes)
    assert count == 10
    whole = assembler.evaluate(start)
    assert (len(whole.partial), whole.pruned) == (count, False)
    far = trial(1.0, tuple(1.0 + 0.02 * (i % 3) for i in range(count)))
    behind = assembler.evaluate(start, [far])
    assert behind.pruned
    assert len(behind.partial) == 6
    assert behind.divergence == pytest.approx(2.0, rel=0.02)
    near = trial(2.0, tuple(2.0 + 0.5 * (-1) ** i for i in range(count)))
    assert not assembler.evaluate(start, [near]).pruned, "no more than chance"
    assert not assembler.evaluate(start, [trial(1.0, (1.0, 1.0))]).pruned, "a rival that has not seen as much"
