"""Whole runs on a small network: results, artefacts, resuming, refusals."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sekron_search
from sekron_search.catalog import REPORT_FORMAT, Searched, list_runs
from sekron_search.comparison import compare
from sekron_search.config import Config
from sekron_search.costs.traced import traced_flops
from sekron_search.data import evaluate
from sekron_search.errors import ConfigError, DataError, InfeasibleBudgetError, RunFolderError
from sekron_search.files import read_json, write_json
from sekron_search.finetune import Distillation
from sekron_search.jobs import job_from_config
from sekron_search.kron.conv import KroneckerConv
from sekron_search.progress import Reporter
from sekron_search.run import run
from sekron_search.rundir import RunFolder
from sekron_search.training_state import TrainingState
from sekron_search.training_step import Take
from tests.cases import CONFIG, Noted, blobs, nan_net, small_data, small_net, write_config
from tests.pages import Page

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


def run_config(path: Path, out: Path, *, resume: bool = False) -> dict[str, Any]:
    return run(job_from_config(Config.load(path)), RunFolder(out), Reporter(), resume=resume)


def result(out: Path) -> tuple[Any, Any]:
    """The front and the chosen structures."""
    report = read_json(out / "report.json")
    return report["front"], [(layer["name"], layer["structure"]) for layer in report["layers"]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_config(write_config(folder), folder / "out")
    return folder / "out"


def test_report_has_what_others_build_on(finished: Path) -> None:
    report = read_json(finished / "report.json")
    costs = {"flops", "params", "latency_ms", "peak_activation_bytes", "metric"}
    assert costs <= set(report["original"])
    assert costs <= set(report["compressed"])
    assert [b["name"] for b in report["budgets"]] == ["flops", "params"]
    assert all(b["met"] and b["value"] <= b["bound"] for b in report["budgets"])
    assert {"name", "structure", "before", "after", "error", "reason"} <= set(report["layers"][0])
    assert [layer["name"] for layer in report["layers"]] == ["conv1", "conv2", "conv3", "linear"]
    assert sum(c["chosen"] for c in report["front"]) <= 1
    assert all("divergence" in c["objectives"] for c in report["front"])
    here = report["environment"]["processor"]
    assert report["as_fitted"] or report["training"] == {"trained_on": [here], "batch_norm": "frozen"}
    assert report["measured_on"] == here


def test_artefact_is_what_the_report_says(finished: Path) -> None:
    report = read_json(finished / "report.json")
    model = sekron_search.load(finished)
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == report["compressed"]["params"]
    assert traced_flops(model, torch.randn(1, 3, 8, 8)).total == report["compressed"]["flops"]
    accuracy = evaluate(model, small_data().test, "accuracy", batch_size=512)
    assert accuracy == pytest.approx(report["compressed"]["metric"])
    for layer in report["layers"]:
        module = model.get_submodule(layer["name"])
        if layer["family"] != "dense":
            assert str(module.structure) == layer["structure"]
    assert any(isinstance(m, KroneckerConv) for m in model.modules())
    # With the architecture at hand no factory is called.
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(sekron_search.load(finished, model=small_net())(x), model(x))


def test_pictures_and_markdown_are_there(finished: Path) -> None:
    text = (finished / "report.md").read_text()
    assert "**Every budget is met.**" in text
    found = read_json(finished / "learning_rate.json")
    rate, best = found["learning_rate"], found["best_in_trials"]
    higher = f": {best:.2g} was best in them, and is raised for the longer one" if best < rate else ""
    assert f"Learning rate {rate:.2g}, found by short trainings{higher}; their losses" in text
    for name in ("front_flops", "front_params", "layers", "finetuning"):
        assert f"plots/{name}.png" in text
        assert (finished / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (finished / "plots" / f"{name}.svg").read_text().startswith("<?xml")


def test_the_page_shows_the_run(finished: Path) -> None:
    page = Page((finished / "report.html").read_text())
    report, data = read_json(finished / "report.json"), json.loads(page.code["data"])
    assert "Every budget is met." in page.text
    assert [axis["name"] for axis in data["axes"]] == ["divergence", "flops", "params", "peak_activation_bytes"]
    assert len(data["front"]) == len(report["front"])
    assert data["layers"] == ["conv1", "conv2", "conv3", "linear"]
    for layer in report["layers"]:
        assert layer["reason"] in page.text
    assert "not measured" not in page.text  # a latency that nobody asked for takes no room


def test_a_finished_run_is_not_done_again(finished: Path, tmp_path: Path) -> None:
    before = (finished / "report.json").read_bytes()
    with pytest.raises(RunFolderError, match="give --resume"):
        run_config(write_config(tmp_path), finished)
    start = time.monotonic()
    run_config(write_config(tmp_path), finished, resume=True)
    assert time.monotonic() - start < 30
    assert (finished / "report.json").read_bytes() == before


def test_a_time_limit_ends_the_search_and_is_no_part_of_the_run(tmp_path: Path) -> None:
    hurried = write_config(tmp_path, CONFIG, **{"trials: 8": "trials: 8, time_limit_s: 0.001"})
    report = run_config(hurried, tmp_path / "out")
    assert report["num_trials"] == 1
    assert all(budget["met"] for budget in report["budgets"])
    assert run_config(write_config(tmp_path), tmp_path / "out", resume=True) == report


@pytest.mark.parametrize("good", [0, 1])
def test_a_training_that_diverges_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: int) -> None:
    """Its candidates go on as after the last good epoch, or as they were fitted; a resumed run says the same."""
    epoch = Distillation._epoch

    def jump(self: Distillation, state: TrainingState, take: Take, number: int, progress: Any) -> float:
        if number > good:  # what a learning rate does that is far too large
            for group in state.optimizer.param_groups:
                group["lr"] = 1e30
            state.schedule.base_lrs = [1e30 for _ in state.schedule.base_lrs]
        return epoch(self, state, take, number, progress)

    monkeypatch.setattr(Distillation, "_epoch", jump)
    replaced = {"trials: 8": "trials: 2", "epochs: 2": "epochs: 3, learning_rate: 0.001"}
    audit = "audit: {candidates: 6, epochs: 1}\n"
    config, out, noted = write_config(tmp_path, CONFIG + audit, **replaced), RunFolder(tmp_path / "out"), Noted()
    report = run(job_from_config(Config.load(config)), out, noted, resume=False)
    assert all(budget["met"] for budget in report["budgets"])
    assert [row["epoch"] for row in report["curve"]] == [1.0][:good]
    assert report["diverged"]["epoch"] == good + 1
    assert f"in epoch {good + 1}, batch " in report["diverged"]["message"]
    kept = "as after epoch 1" if good else "as it was fitted"
    assert any("lower finetune.learning_rate (now 0.001)" in text and kept in text for text in noted.told)
    network = sekron_search.load(out.path)
    assert all(bool(t.isfinite().all()) for t in network.state_dict().values())
    metrics = report["compressed"]["metric"], report["metric_without_training"]
    assert min(metrics) > 0.5
    assert good or metrics[0] == metrics[1]
    assert all(row["metric"] > 0.3 for row in report["audit"]["candidates"])
    out.report.unlink()
    again = run_config(config, out.path, resume=True)
    assert all(again[key] == report[key] for key in ("diverged", "curve", "layers"))


def test_an_audit_of_the_proxies_is_in_the_report(tmp_path: Path) -> None:
    audited = write_config(tmp_path, CONFIG, **{"trials: 8": "trials: 2"})
    audited.write_text(audited.read_text() + "audit: {candidates: 6, epochs: 1}\n")
    report = run_config(audited, tmp_path / "out")
    assert len(report["audit"]["candidates"]) == 6
    assert {"curvature", "divergence"} <= {proxy["name"] for proxy in report["audit"]["proxies"]}
    assert "plots/audit.png" in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "plots" / "audit.png").exists()


def test_a_run_and_its_tables_may_be_moved(finished: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    elsewhere = write_config(tmp_path, CONFIG + "tables: other_tables\n")
    assert run_config(elsewhere, moved, resume=True) == read_json(finished / "report.json")


def test_another_run_is_refused_its_folder(finished: Path, tmp_path: Path) -> None:
    other = write_config(tmp_path, CONFIG, **{"flops: 0.6x": "flops: 0.7x", "epochs: 2,": "epochs: 3,"})
    with pytest.raises(RunFolderError, match=r"another run \(different: settings budget\.flops, finetune\.epochs\)"):
        run_config(other, finished, resume=True)
    folder = RunFolder(shutil.copytree(finished, tmp_path / "earlier"))
    write_json(folder.manifest, {key: value for key, value in folder.read_manifest().items() if key != "settings"})
    with pytest.raises(RunFolderError, match=r"another run \(different: settings\)"):
        run_config(other, folder.path, resume=True)


def test_folders_of_other_versions_and_strangers_are_refused(finished: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    write_json(old / "run.json", {"format": 0})
    with pytest.raises(RunFolderError, match="format 0, this version reads format 4"):
        run_config(write_config(tmp_path), old, resume=True)
    stranger = tmp_path / "photos"
    stranger.mkdir()
    (stranger / "holiday.jpg").write_text("")
    with pytest.raises(RunFolderError, match="not empty and not a run"):
        run_config(write_config(tmp_path), stranger)
    second = RunFolder(tmp_path / "busy").claimed({}, resume=True)
    with (
        RunFolder(tmp_path / "busy").claimed({}, resume=False),
        pytest.raises(RunFolderError, match="another run is using"),
        second,
    ):
        pass


def test_reports_of_other_versions_are_refused_and_made_again(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "old")
    old, report = RunFolder(tmp_path / "old"), read_json(finished / "report.json")
    assert report["format"] == REPORT_FORMAT
    write_json(old.report, {**report, "format": REPORT_FORMAT - 1})
    says = rf"report\.json: written in format {REPORT_FORMAT - 1}, this version reads format {REPORT_FORMAT}; delete it"
    (entry,) = list_runs(old.path)
    assert entry.state == "unreadable"
    assert re.search(says, entry.reason or "")
    for read in (
        lambda: Searched.load(old),
        lambda: compare([old, RunFolder(finished)]),
        lambda: sekron_search.finish(old.path, trial=0, progress=False),
        lambda: run_config(write_config(tmp_path), old.path, resume=True),
    ):
        with pytest.raises(RunFolderError, match=says):
            read()
    old.report.unlink()
    assert run_config(write_config(tmp_path), old.path, resume=True)["layers"] == report["layers"]


@pytest.mark.parametrize("damage", ["truncated", "exchanged", "edited", "json", "version", "foreign"])
def test_damaged_artefacts_are_refused(finished: Path, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "artefact"
    shutil.copytree(finished / "compressed", copy)
    weights, facts = copy / "model.safetensors", copy / "model.json"
    data = read_json(facts)
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "exchanged":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 255
        weights.write_bytes(bytes(content))
    elif damage == "edited":
        facts.write_text(facts.read_text().replace('"format": 3', '"format": 3, "more": 1'))
    elif damage == "json":
        facts.write_text(facts.read_text()[:50])
    elif damage == "version":
        write_json(facts, {**data, "format": 77})
    else:
        write_json(facts, {**data, "factory": {"reference": "os:system", "kwargs": {"command": "false"}}})
    says = {
        "truncated": "truncated or damaged",
        "exchanged": "not those that were written",
        "edited": "it was changed since it was written",
        "json": "damaged or unreadable",
        "version": "expected format 3, got 77",
        "foreign": "of your own, got 'os:system'",
    }
    with pytest.raises((RunFolderError, ConfigError), match=says[damage]):
        sekron_search.load(copy)


def test_compress_from_python(tmp_path: Path) -> None:
    model, data = small_net(), blobs(128)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = sekron_search.compress(
        model,
        data.tensors[0][:4],
        budget={"flops": "0.6x", "latency_ms": "50x", "peak_activation_bytes": "2x"},
        calibration=data.tensors[0],
        evaluate=lambda m: evaluate(m, blobs(64, seed=1), "accuracy", batch_size=64),
        out=tmp_path / "run",
        progress=False,
        search={"trials": 4},
        calibration_settings={"refine_steps": 3, "sequential_steps": 0},
        latency={"rounds": 3},
    )
    assert all(b["met"] for b in found.report["budgets"])
    assert found.front
    assert found.model(data.tensors[0][:3]).shape == (3, 4)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert (tmp_path / "run" / "profile.yaml").exists()
    layer = found.report["layers"][0]
    assert layer["before"]["latency_ms"] > 0
    # The class can be imported and needs no arguments, so the artefact knows how to build it.
    assert sekron_search.load(tmp_path / "run")(data.tensors[0][:3]).shape == (3, 4)


def test_artefact_of_a_local_class_needs_the_model(tmp_path: Path) -> None:
    class Local(nn.Sequential):
        pass

    model = Local(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()).eval()
    images = blobs(64).tensors[0]
    sekron_search.compress(
        model,
        images[:2],
        budget={"params": "0.7x"},
        calibration=images,
        out=tmp_path / "run",
        progress=False,
        search={"trials": 2, "divergence": "mse"},
        calibration_settings={"refine_steps": 2, "sequential_steps": 2},
        latency={"rounds": 3},
    )
    with pytest.raises(RunFolderError, match=r"call load\(path, model=...\)"):
        sekron_search.load(tmp_path / "run")
    assert sekron_search.load(tmp_path / "run", model=model)(images[:2]).shape == model(images[:2]).shape


def test_rebuilt_weights_meet_a_parameter_budget_at_dense_speed(tmp_path: Path) -> None:
    model, images = small_net(), blobs(64).tensors[0]
    found = sekron_search.compress(
        model,
        images[:2],
        budget={"params": "0.5x", "flops": "1.0x"},
        calibration=images,
        out=tmp_path / "run",
        progress=False,
        space={"dense_execution": True},
        search={"trials": 2},
        calibration_settings={"refine_steps": 2, "sequential_steps": 0},
        latency={"rounds": 3},
    )
    assert all(b["met"] for b in found.report["budgets"])
    torch.testing.assert_close(sekron_search.load(tmp_path / "run")(images[:2]), found.model(images[:2]))


def test_impossible_budgets_are_answered_before_any_fit(tmp_path: Path) -> None:
    path = write_config(tmp_path, CONFIG, **{"{flops: 0.6x, params: 0.8x}": "{flops: 0.0001x, params: 0.9x}"})
    with pytest.raises(InfeasibleBudgetError, match=r"flops: asked at most .*, best reachable .*of the original"):
        run_config(path, tmp_path / "out")
    assert not (tmp_path / "out" / "tables").exists()


def test_bad_networks_and_data_are_refused(tmp_path: Path) -> None:
    images = blobs(16).tensors[0]
    common: dict[str, Any] = {"budget": {"flops": "0.5x"}, "progress": False}
    with pytest.raises(DataError, match="NaN or infinity on the example inputs"):
        sekron_search.compress(nan_net(), images[:2], calibration=images, out=tmp_path / "a", **common)
    with pytest.raises(DataError, match=r"does not run on inputs of shapes \[\(2, 1, 8, 8\)\]"):
        sekron_search.compress(small_net(), images[:2, :1], calibration=images, out=tmp_path / "b", **common)
    with pytest.raises(DataError, match="calibration data is empty"):
        sekron_search.compress(small_net(), images[:2], calibration=[], out=tmp_path / "c", **common)
    bad = torch.full_like(images, float("nan"))
    with pytest.raises(DataError, match="NaN or infinity on the calibration data"):
        sekron_search.compress(small_net(), images[:2], calibration=bad, out=tmp_path / "d", **common)
    with pytest.raises(ConfigError, match="key 'trails' is not known"):
        sekron_search.compress(small_net(), images[:2], calibration=images, trails=3, **common)


def start(config: Path, out: Path) -> subprocess.Popen[bytes]:
    code = "import torch; torch.set_num_threads(1); from sekron_search.cli import main; main()"
    arguments = [sys.executable, "-W", "ignore", "-c", code, "run", str(config), "--out", str(out), "--resume"]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    config = write_config(tmp_path, CONFIG, **{"trials: 8": "trials: 25"})
    begun = time.monotonic()
    whole = start(config, tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr.read() if whole.stderr else ""
    took = time.monotonic() - begun
    moments = random.Random(0)
    kills = 0
    while kills < 20:
        process = start(config, tmp_path / "killed")
        # From before anything is there to the last stage; starting up alone takes several seconds.
        time.sleep(moments.uniform(0.3, 0.9) * took)
        if process.poll() is not None:
            shutil.rmtree(tmp_path / "killed")  # it got to the end: begin again, the kills count on
            continue
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    last = start(config, tmp_path / "killed")
    assert last.wait() == 0, last.stderr.read() if last.stderr else ""
    assert result(tmp_path / "killed") == result(tmp_path / "whole")
