from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.rivals import __main__ as rivals
from benchmarks.rivals.contest import Contest
from benchmarks.rivals.methods import RIVALS
from sekron_search.api import job_from_config
from sekron_search.config import Config
from sekron_search.costs.traced import traced_flops
from sekron_search.files import read_json, read_tensors
from sekron_search.finetune import Distillation
from sekron_search.job import Job
from sekron_search.progress import Reporter
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
    assert 0.4 < found["flops"] / traced_flops(contest.job.model, contest.job.example_inputs).total <= 0.5
    assert 0 < found["params"] < sum(p.numel() for p in contest.job.model.parameters())
    assert found["latency_ratio"] > 0
    assert found["validation"] == max(found["validation_without_training"], found["curve"][-1]["metric"])
    assert 0 <= found["test"] <= 1
    assert read_json(tmp_path / "rival" / "result.json") == found
    assert read_tensors(tmp_path / "rival" / "weights.safetensors")
    monkeypatch.delattr(Distillation, "train")
    assert contest.enter(name, 0.5, tmp_path / "rival") == found


def test_what_a_rival_cannot_reach_is_told(tmp_path: Path) -> None:
    found = Contest(job_of(tmp_path), Reporter()).enter("uniform Tucker-2", 1e-4, tmp_path / "rival")
    assert "this method reaches" in found["infeasible"]


def test_a_lead_is_over_the_best_rival_on_the_validation_split() -> None:
    def sample(method: str, validation: float, test: float, **more: Any) -> dict[str, Any]:
        case = {"network": "resnet20", "budget": "0.5x", "seed": 0, "epochs": 3, "method": method}
        return case | {"validation": validation, "test": test} | more

    first, second, third = list(RIVALS)[:3]
    lost = {key: value for key, value in sample(third, 0, 0).items() if key not in ("validation", "test")}
    samples = [
        sample(first, 0.90, 0.85),
        sample(second, 0.89, 0.87),  # better on the test split, by which nothing is chosen
        lost | {"infeasible": "expected at most"},
        sample("ours", 0.91, 0.86),
        sample(rivals.OURS_TIMED, 0.92, 0.845),
    ]
    assert rivals.best_rival(samples) == first
    targets = [target.to_json() for target in rivals.targets_of(samples)]
    assert [t["met"] for t in targets] == [True, False]
    assert [t["value"] for t in targets] == pytest.approx([1.0, -0.5])
    assert rivals.best_rival([lost]) is None
    assert rivals.targets_of([lost, sample("ours", 0.9, 0.9)]) == []
