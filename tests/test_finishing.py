"""Another network of a finished run's search, finished."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import sekron_search
import sekron_search.run
from sekron_search.candidates import Finder
from sekron_search.config import Config
from sekron_search.costs.traced import traced_flops
from sekron_search.data import evaluate
from sekron_search.errors import ConfigError, RunFolderError
from sekron_search.files import read_json, write_json
from sekron_search.finishing import finish_run
from sekron_search.fitting import Fitter
from sekron_search.jobs import job_from_config
from sekron_search.progress import Reporter
from sekron_search.run import run
from sekron_search.rundir import RunFolder
from sekron_search.search.budget import Budget
from sekron_search.select import select, with_network
from tests.cases import CONFIG, SPACE, blobs, small_data, small_net, write_config

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("run")
    path = write_config(folder, CONFIG, **{"trials: 8": "trials: 6", SPACE: ""})
    run(job_from_config(Config.load(path)), RunFolder(folder / "out"), Reporter(), resume=False)
    return RunFolder(folder / "out")


def others(folder: RunFolder) -> list[dict[str, Any]]:
    """The trials of the front that the run did not finish."""
    report = read_json(folder.report)
    done = {c["trial"] for c in report["candidates"]}
    return [c for c in report["front"] if c["trial"] not in done]


@pytest.fixture
def no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a search nor a fit of a table can happen."""

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("this was done already")

    monkeypatch.setattr(Finder, "search", refused)
    monkeypatch.setattr(Fitter, "fit", lambda self, jobs: refused() if jobs else iter(()))


def test_another_trial_becomes_a_run_of_its_own(finished: RunFolder, no_search: None) -> None:
    other = others(finished)[0]
    before = {path: path.stat().st_mtime_ns for path in finished.path.rglob("*") if path.is_file()}
    result = sekron_search.finish(finished.path, trial=other["trial"], progress=False)
    assert result.path == finished.finished / f"trial-{other['trial']}"
    assert all(path.stat().st_mtime_ns == at for path, at in before.items() if path.name != ".lock")
    report = read_json(result.path / "report.json")
    assert report == result.report
    assert {layer["name"]: layer["structure"] for layer in report["layers"]} == other["structures"]
    assert report["compressed"]["flops"] == pytest.approx(other["objectives"]["flops"], rel=1e-6)
    assert [c["trial"] for c in report["candidates"]] == [other["trial"]]
    assert report["finishes"]["run"] == finished.identity
    assert len(report["curve"]) == 2
    rates = [read_json(folder.learning_rate)["trials"] for folder in (finished, RunFolder(result.path))]
    assert rates[0] != rates[1], "the rate of a network that was not trained before is its own"
    network = sekron_search.load(result.path)
    assert traced_flops(network, torch.randn(1, 3, 8, 8)).total == report["compressed"]["flops"]
    accuracy = evaluate(network, small_data().test, "accuracy", batch_size=512)
    assert accuracy == pytest.approx(report["compressed"]["metric"])
    text = (result.path / "report.md").read_text()
    assert f"This is trial {other['trial']} of run {finished.identity}, finished afterwards." in text
    assert f"sekron-search finish SOURCE --trial {other['trial']} --out OTHER" in text
    assert "sekron-search run " not in text
    assert not (result.path / "tables").exists()
    assert not (result.path / "study.journal").exists()


def test_the_trial_that_the_run_chose_comes_out_the_same(finished: RunFolder, tmp_path: Path, no_search: None) -> None:
    own = read_json(finished.report)
    chosen = next(c["trial"] for c in own["candidates"] if c["chosen"])
    target, report = finish_run(finished, Reporter(), trial=chosen, out=tmp_path / "again")
    assert target.learning_rate.read_bytes() == finished.learning_rate.read_bytes()
    assert report["divergence"] == own["divergence"]
    assert report["compressed"]["metric"] == own["compressed"]["metric"]
    assert [(b["name"], b["value"], b["met"]) for b in report["budgets"]] == [
        (b["name"], b["value"], b["met"]) for b in own["budgets"]
    ]
    x = blobs(8).tensors[0]
    assert torch.equal(sekron_search.load(target.path)(x), sekron_search.load(finished.path)(x))


def test_a_killed_finish_is_gone_on_with_to_the_same_network(
    finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_search: None
) -> None:
    number = others(finished)[-1]["trial"]
    train = Finder._train

    def killed(self: Finder, *args: Any) -> Any:
        train(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Finder, "_train", killed)
        with pytest.raises(KeyboardInterrupt):
            finish_run(finished, Reporter(), trial=number, out=tmp_path / "killed")
    assert not (tmp_path / "killed" / "report.json").exists()
    target, report = finish_run(finished, Reporter(), trial=number, out=tmp_path / "killed")
    whole, wanted = finish_run(finished, Reporter(), trial=number, out=tmp_path / "whole")
    assert report["curve"] == wanted["curve"]
    x = blobs(8).tensors[0]
    assert torch.equal(sekron_search.load(target.path)(x), sekron_search.load(whole.path)(x))
    # The folder is one that `run --resume` would go on with, too.
    job = job_from_config(Config.load(target.config))
    assert run(job, target, Reporter(), resume=True) == report


def test_a_selection_is_finished_and_judged_by_its_own_budget(finished: RunFolder, no_search: None) -> None:
    with_network(finished, select(finished, Budget(params="0.45x")), Reporter())
    target, report = finish_run(finished, Reporter(), selection="params-0.45x")
    assert [b["name"] for b in report["budgets"]] == ["params"]
    assert report["budgets"][0]["met"]
    assert report["compressed"]["params"] <= 0.45 * sum(p.numel() for p in small_net().parameters())
    selected = read_json(finished.selections / "params-0.45x" / "selection.json")
    structures = {name: row["structure"] for name, row in selected["structures"].items()}
    assert {layer["name"]: layer["structure"] for layer in report["layers"]} == structures
    with_network(finished, select(finished, Budget(params="0.7x")), Reporter())
    again = finished.selections / "params-0.7x" / "selection.json"
    write_json(
        finished.selections / "params-0.45x" / "selection.json", {**read_json(again), "budget": selected["budget"]}
    )
    with pytest.raises(RunFolderError, match=r"finishes (another network|selection params-0.45x)"):
        finish_run(finished, Reporter(), selection="params-0.45x")
    # What was finished answers for itself: other budgets, and other trials.
    assert select(target, Budget(params="0.5x")).chosen.costs["params"] > 0


def test_what_cannot_be_finished_says_why(finished: RunFolder, tmp_path: Path) -> None:
    first, second = (c["trial"] for c in others(finished)[:2])
    with pytest.raises(RunFolderError, match=r"number of one of its trials \(0 to 5\), got 77"):
        finish_run(finished, Reporter(), trial=77)
    with pytest.raises(RunFolderError, match=r"one of its selections .*, got 'none'"):
        finish_run(finished, Reporter(), selection="none")
    with pytest.raises(ConfigError, match="a trial or a selection"):
        finish_run(finished, Reporter())
    copy = RunFolder(tmp_path / "copy")
    shutil.copytree(finished.path, copy.path)
    with pytest.raises(RunFolderError, match="it holds a run with a search of its own"):
        finish_run(finished, Reporter(), trial=first, out=copy.path)
    target, _ = finish_run(finished, Reporter(), trial=first, out=tmp_path / "first")
    with pytest.raises(RunFolderError, match=f"it finishes trial {first} of run"):
        finish_run(finished, Reporter(), trial=second, out=target.path)
    copy.report.unlink()
    with pytest.raises(RunFolderError, match="not a finished run"):
        finish_run(copy, Reporter(), trial=first)


def compressed_object(out: Path, *, seed: int = 0, resume: bool = False) -> sekron_search.Result:
    """A run of a network that nothing but this program can build."""
    torch.manual_seed(seed)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 12, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(12, 12, 3, padding=1),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(12, 4),
    )
    images = blobs(64).tensors[0]
    return sekron_search.compress(
        network,
        images[:2],
        budget={"params": "0.7x"},
        calibration=images,
        train=blobs(64),
        search={"trials": 8},
        calibration_settings={"refine_steps": 2, "sequential_steps": 2, "batch_size": 32},
        latency={"rounds": 2},
        finetune={"epochs": 1, "batch_size": 32},
        out=out,
        resume=resume,
        progress=False,
    )


def test_networks_given_as_objects_are_finished_from_the_result(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    first = compressed_object(tmp_path / "run")
    request.getfixturevalue("no_search")
    number = others(RunFolder(first.path))[0]["trial"]
    other = first.finish(trial=number, progress=False)
    assert other.path == first.path / "finished" / f"trial-{number}"
    assert other.report["finishes"]["source"] == f"trial {number}"
    x = blobs(8).tensors[0]
    assert torch.equal(sekron_search.load(other.path, model=first.job.model)(x), other.model(x))
    # The next program gets the result again, without another search, and goes on with it.
    again = compressed_object(tmp_path / "run", resume=True)
    assert again.report == first.report
    smaller = again.finish(budget={"params": "0.5x"}, out=tmp_path / "smaller", progress=False)
    assert smaller.path == tmp_path / "smaller"
    assert [(b["name"], b["met"]) for b in smaller.report["budgets"]] == [("params", True)]
    assert smaller.report["compressed"]["params"] <= 0.5 * smaller.report["original"]["params"]
    assert "compress(model, ..., out=RUN, resume=True)" in (first.path / "report.md").read_text()
    assert "compress(model, ..., out=SOURCE, resume=True)" in (smaller.path / "report.md").read_text()


def test_objects_that_are_others_now_are_refused(tmp_path: Path) -> None:
    first = compressed_object(tmp_path / "run")
    number = first.front[0]["trial"]
    for arguments in ({}, {"trial": number, "budget": {"params": "0.5x"}}):
        with pytest.raises(ConfigError, match="a trial, a selection or a budget"):
            first.finish(**arguments, progress=False)
    with torch.no_grad():
        first.job.model[0].weight += 1  # type: ignore[index]
    with pytest.raises(RunFolderError, match="model"):
        dataclasses.replace(first, job=dataclasses.replace(first.job)).finish(trial=number, progress=False)
    with pytest.raises(RunFolderError, match=r"given as an object.*resume=True\)\.finish\(trial=N\)"):
        sekron_search.finish(first.path, trial=number, progress=False)
