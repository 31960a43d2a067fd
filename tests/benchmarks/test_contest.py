from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.cifar10.resnet import ResNet20
from benchmarks.rivals import __main__ as rivals
from benchmarks.rivals.contest import Contest, conditions
from benchmarks.rivals.methods import RIVALS
from benchmarks.runs import Run, Runs
from sekron_search.choice import judged, preferred
from sekron_search.config import Config
from sekron_search.costs.profile import Provenance
from sekron_search.files import read_json
from sekron_search.finetune import Distillation
from sekron_search.job import Job
from sekron_search.jobs import job_from_config
from sekron_search.progress import Reporter
from sekron_search.rundir import RunFolder
from sekron_search.tensor_files import read_tensors
from tests.cases import CONFIG, write_config

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def job_of(folder: Path) -> Job:
    text = CONFIG.replace("tests.cases:small_net", "benchmarks.cifar10.resnet:ResNet20")
    text = text.replace("epochs: 2,", "epochs: 1, learning_rate: 1.0e-3,")
    torch.manual_seed(0)
    return job_from_config(Config.load(write_config(folder, text)))


@pytest.mark.parametrize("name", ["channel SVD, ALDS", "structured pruning", "narrower, from scratch"])
def test_a_rival_is_trained_and_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    contest = Contest(job_of(tmp_path), Reporter())
    found = contest.enter(name, 0.5, tmp_path / "rival")
    assert 0.4 < found["flops_ratio"] <= 0.5
    assert 0 < found["params"] < sum(p.numel() for p in contest.job.model.parameters())
    assert found["latency_ratio"] > 0
    assert found["processor"]
    assert found["batch_norm"] == "frozen"
    marks = judged(contest.job, [nn.Identity()] * 2, [0.0, 0.0], tmp_path / "rival" / "judged.safetensors")
    assert [one.metric for one in marks] == pytest.approx(
        [found["curve"][-1]["metric"], found["validation_without_training"]]
    )
    assert found["validation"] == marks[preferred(marks)].metric
    assert 0 <= found["test"] <= 1
    assert read_json(tmp_path / "rival" / "result.json") == found
    assert read_tensors(tmp_path / "rival" / "weights.safetensors")
    monkeypatch.delattr(Distillation, "train")
    assert contest.enter(name, 0.5, tmp_path / "rival") == found


def test_statistics_of_rivals_are_trained_by_the_rule_of_this_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sekron_search.finetune.FAR", 0.0)
    found = Contest(job_of(tmp_path), Reporter()).enter("structured pruning", 0.5, tmp_path / "rival")
    assert found["batch_norm"] == "trained"


def test_what_a_rival_cannot_reach_is_told(tmp_path: Path) -> None:
    found = Contest(job_of(tmp_path), Reporter()).enter("uniform Tucker-2", 1e-4, tmp_path / "rival")
    assert "this method reaches" in found["failed"]


def sample(method: str, validation: float, test: float, seed: int = 0, latency: float = 0.5) -> dict[str, Any]:
    case = {"network": "resnet20", "budget": "0.5x", "epochs": 3, "mirrored_teacher": True, "processor": "A"}
    return case | {"method": method, "seed": seed} | {"validation": validation, "test": test, "latency_ratio": latency}


def failed(method: str, seed: int = 0) -> dict[str, Any]:
    told = sample(method, 0, 0, seed)
    return {key: told[key] for key in rivals.KEYS} | {"failed": "expected at most"}


def test_a_lead_is_over_the_best_rival_on_the_validation_split() -> None:
    first, second, third = list(RIVALS)[:3]
    samples = [
        sample(first, 0.90, 0.85),
        sample(second, 0.89, 0.87),  # better on the test split, by which nothing is chosen
        failed(third),
        sample("ours", 0.91, 0.86),
        sample(rivals.OURS_TIMED, 0.92, 0.845, latency=0.52),
    ]
    assert rivals.best_rival(samples) == first
    targets = [target.to_json() for target in rivals.targets_of(samples)]
    assert [t["met"] for t in targets] == [True, False, False]
    assert [t["value"] for t in targets] == pytest.approx([1.0, -0.5, 1.04])
    assert rivals.best_rival([failed(third)]) is None
    assert rivals.targets_of([failed(third), sample("ours", 0.9, 0.9)]) == []


def test_networks_of_different_teachers_are_not_compared() -> None:
    rival = sample(next(iter(RIVALS)), 0.9, 0.8)
    assert [target.value for target in rivals.targets_of([rival, sample("ours", 0.9, 0.9)])] == pytest.approx([10.0])
    assert rivals.targets_of([rival | {"mirrored_teacher": False}, sample("ours", 0.9, 0.9)]) == []


def test_latencies_are_compared_on_one_processor() -> None:
    rival, timed = sample("uniform CP", 0.9, 0.88, latency=1.2), sample(rivals.OURS_TIMED, 0.9, 0.885, latency=0.9)
    case = f"resnet20, 0.5x flops, 3 epochs, mirrored teacher, 1 seeds: {rivals.OURS_TIMED}"
    names = [
        f"{case}: points of top-1 ahead of uniform CP",
        f"{case}: latency, of that of uniform CP, 1 seeds on the same processor",
    ]
    targets = rivals.targets_of([rival, timed])
    assert [target.name for target in targets] == names
    assert [target.value for target in targets] == pytest.approx([0.5, 0.75])
    elsewhere = rivals.targets_of([rival, timed | {"processor": "B"}])
    assert [target.name for target in elsewhere] == names[:1]


def test_seeds_are_compared_with_the_same_seeds() -> None:
    first, second = list(RIVALS)[:2]
    samples = [
        *(sample("ours", 0.9, 0.80 + 0.01 * seed, seed) for seed in range(3)),
        sample(first, 0.9, 0.80, 0),
        sample(first, 0.9, 0.80, 1),
        sample(second, 0.99, 0.9, 0),
        failed(second, 1),  # a method that fails on a seed is not the best
    ]
    (target,) = rivals.targets_of(samples)
    assert target.value == pytest.approx(0.5)
    assert "2 seeds" in target.name
    (target,) = rivals.targets_of([*samples[3:5], failed("ours", 0), sample("ours", 0.9, 0.9, 1)])
    assert not target.to_json()["met"]


def test_our_time_is_that_of_the_best_rival_of_all_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[dict[str, str], int]] = []

    def run(self: Runs, budget: dict[str, str], *, seed: int, epochs: int) -> None:
        assert epochs == 3
        asked.append((budget, seed))

    monkeypatch.setattr(Runs, "run", run)
    monkeypatch.setattr(rivals, "ours", lambda own: {"test": 0.9})
    monkeypatch.setattr(Provenance, "here", lambda: SimpleNamespace(processor="A"))
    first, second = list(RIVALS)[:2]
    samples = [
        sample(first, 0.90, 0.9, 0, latency=0.7),
        sample(first, 0.90, 0.9, 1, latency=1.2),
        sample(second, 0.95, 0.9, 0, latency=0.1),
        sample(second, 0.80, 0.9, 1, latency=0.1),
    ]
    found = rivals.timed_samples(Runs("resnet20", tmp_path, tmp_path), samples)
    assert asked == [({"latency_ms": "0.7x"}, 0), ({"flops": "0.5x", "latency_ms": "1x"}, 1)]
    assert [(s["method"], s["rival"], s["seed"]) for s in found] == [
        (rivals.OURS_TIMED, first, 0),
        (rivals.OURS_TIMED, first, 1),
    ]
    assert rivals.timed_samples(Runs("resnet20", tmp_path, tmp_path), [failed(first)]) == []
    elsewhere = [one | {"processor": "B"} for one in samples]
    assert rivals.timed_samples(Runs("resnet20", tmp_path, tmp_path), elsewhere) == []


def test_samples_tell_what_they_are_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A rival's, and ours; every key by its own value."""
    job = job_of(tmp_path)
    finetune = job.settings.finetune.model_copy(update={"mirrored_teacher": True})
    job = dataclasses.replace(job, settings=job.settings.model_copy(update={"finetune": finetune}))
    monkeypatch.setattr(Runs, "run", lambda *_, **__: Run(job, RunFolder(tmp_path / "run")))
    monkeypatch.setattr(rivals, "ours", lambda own: {"test": 0.9})
    monkeypatch.setattr(Contest, "enter", lambda self, method, share, home: {"test": share})
    told = {"network": "resnet20", "budget": "0.5x", "epochs": 7, "mirrored_teacher": True, "seed": 4}
    runs = Runs("resnet20", tmp_path, tmp_path)
    for method, test in ((rivals.OURS, 0.9), (next(iter(RIVALS)), 0.5)):
        found = rivals.sample_of(runs, "0.5x", method, seed=4, epochs=7)
        assert found == told | {"method": method, "test": test}
        assert set(rivals.KEYS) < set(found)


def test_what_is_random_hangs_on_the_seed_and_results_on_the_conditions(tmp_path: Path) -> None:
    network, inputs = ResNet20(0.25), torch.randn(1, 3, 8, 8)
    made = [
        RIVALS["narrower, from scratch"].network(network, inputs, 0.5, factory=lambda w: ResNet20(0.25 * w), seed=seed)
        for seed in (0, 0, 1)
    ]
    same, other = (
        torch.equal(made[0].get_parameter("linear.weight"), n.get_parameter("linear.weight")) for n in made[1:]
    )
    assert same
    assert not other
    job = job_of(tmp_path)
    assert conditions(job) == conditions(job_of(tmp_path))
    for change in ({"seed": 3}, {"finetune": job.settings.finetune.model_copy(update={"temperature": 2.0})}):
        changed = dataclasses.replace(job, settings=job.settings.model_copy(update=change))
        assert conditions(changed) != conditions(job)
    budget = job.settings.model_copy(update={"budget": {"flops": "0.3x"}})
    assert conditions(dataclasses.replace(job, settings=budget)) == conditions(job)
