"""Another budget for a finished run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sekron_search
from sekron_search.cli import app
from sekron_search.config import Config
from sekron_search.costs.traced import traced_flops
from sekron_search.errors import ConfigError, InfeasibleBudgetError, RunFolderError
from sekron_search.files import read_json, read_yaml, write_json
from sekron_search.jobs import job_from_config
from sekron_search.progress import Reporter
from sekron_search.run import run
from sekron_search.rundir import RunFolder
from sekron_search.search.budget import Budget
from sekron_search.search.knapsack import additive_errors
from sekron_search.search.record import SearchRecord
from sekron_search.select import select, with_network
from tests.cases import CONFIG, small_net, write_config

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("run")
    path = write_config(folder, CONFIG, **{"epochs: 2": "epochs: 0"})
    run(job_from_config(Config.load(path)), RunFolder(folder / "out"), Reporter(), resume=False)
    return RunFolder(folder / "out")


def test_the_record_holds_all_options_and_reads_back(finished: RunFolder, tmp_path: Path) -> None:
    record = SearchRecord.load(finished.network)
    record.save(tmp_path / "network.json")
    assert SearchRecord.load(tmp_path / "network.json") == record
    assert record.budgeted == ("flops", "params")
    assert all(kept[0] == 0 for kept in record.searched)
    assert any(len(kept) < len(t.options) for kept, t in zip(record.searched, record.network.tables, strict=True))
    for trial in read_json(finished.search)["trials"]:
        costs = record.network.costs(record.whole(tuple(trial["assignment"])))
        assert costs == pytest.approx(trial["costs"])


def test_the_runs_own_budget_is_answered_by_its_best_trial(finished: RunFolder) -> None:
    found = select(finished, Budget(flops="0.6x", params="0.8x"))
    trials = [t for t in read_json(finished.search)["trials"] if t["feasible"] and not t["pruned"]]
    best = min(t["divergence"] for t in trials)
    assert min(c.divergence for c in (found.chosen, *found.others) if c.divergence is not None) == best
    assert found.lower_bound <= min(found.chosen.error, *(c.error for c in found.others))
    assert 0 <= found.gap < 1


def test_a_new_budget_is_answered_by_a_network_that_meets_it(finished: RunFolder) -> None:
    budget = Budget(params="0.45x")
    found = select(finished, budget)
    assert found.record.budgeted == ("flops", "params")
    written = with_network(finished, found, Reporter())
    assert all(choice.divergence is not None for choice in (written.chosen, *written.others))
    assert written.chosen.divergence == min(c.divergence or 0 for c in (written.chosen, *written.others))
    home = finished.selections / "params-0.45x"
    network = sekron_search.load(home)
    original = small_net()
    params = [sum(p.numel() for p in n.parameters()) for n in (network, original)]
    assert params[0] == written.chosen.costs["params"] <= 0.45 * params[1]
    counted = traced_flops(network, (torch.randn(4, 3, 8, 8),)).total
    assert counted == pytest.approx(written.chosen.costs["flops"], rel=1e-9)
    saved = read_json(home / "selection.json")
    assert saved["chosen"]["source"] == written.chosen.source
    assert set(saved["structures"]) == {t.name for t in found.record.network.tables}


def test_the_knapsack_answers_where_trials_are_far_away(finished: RunFolder) -> None:
    """Hardly any compression is asked for: every trial has given up far more than needed."""
    found = select(finished, Budget(flops="0.99x"))
    assert found.chosen.source == "knapsack"
    assert "additive error" in found.reason
    errors = additive_errors(found.record.network)
    assert found.chosen.error == pytest.approx(
        sum(float(e[i]) for e, i in zip(errors, found.chosen.assignment, strict=True))
    )
    assert all(other.error > found.chosen.error for other in found.others)


def test_budgets_that_cannot_be_answered_say_why(finished: RunFolder) -> None:
    with pytest.raises(InfeasibleBudgetError, match="best reachable"):
        select(finished, Budget(flops="0.001x"))
    with pytest.raises(ConfigError, match="measured no latencies"):
        select(finished, Budget(latency_ms="0.9x"))


def test_the_command_prints_the_answer_and_writes_its_network(finished: RunFolder, tmp_path: Path) -> None:
    arguments = ["select", str(finished.path), "--budget", "flops=0.5x", "--budget", "params=0.6x"]
    printed = CliRunner().invoke(app, [*arguments, "--print-only", "--out", str(tmp_path / "none")])
    assert printed.exit_code == 0, printed.output
    assert "flops: asked at most" in printed.output
    assert "conv3: " in printed.output
    assert not (tmp_path / "none").exists()
    written = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "net")])
    assert written.exit_code == 0, written.output
    assert "not measured" not in written.output
    assert sekron_search.load(tmp_path / "net")(torch.randn(2, 3, 8, 8)).shape == (2, 4)
    for wrong in (["--budget", "flops"], ["--budget", "flops=0.5x", "--budget", "flops=0.4x"]):
        refused = CliRunner().invoke(app, ["select", str(finished.path), *wrong])
        assert isinstance(refused.exception, ConfigError)
        assert "expected every cost once" in str(refused.exception)


def test_unfinished_changed_and_damaged_runs_are_refused(finished: RunFolder, tmp_path: Path) -> None:
    copy = RunFolder(tmp_path / "copy")
    shutil.copytree(finished.path, copy.path)
    found = select(copy, Budget(params="0.5x"))
    tables = found.record.network.tables
    fewer = replace(tables[0], options=tables[0].options[:-1])
    network = replace(found.record.network, tables=(fewer, *tables[1:]))
    with pytest.raises(RunFolderError, match="no longer those of its search"):
        with_network(copy, replace(found, record=replace(found.record, network=network)), Reporter())
    write_json(copy.network, {"format": 77})
    with pytest.raises(RunFolderError, match="expected format 4, got 77"):
        select(copy, Budget(params="0.5x"))
    write_json(copy.network, {"format": 4, "network": {}})
    with pytest.raises(RunFolderError, match="damaged"):
        select(copy, Budget(params="0.5x"))
    copy.network.unlink()
    with pytest.raises(RunFolderError, match="not finished its search"):
        select(copy, Budget(params="0.5x"))


def test_a_network_given_as_an_object_is_only_printed(finished: RunFolder, tmp_path: Path) -> None:
    copy = RunFolder(tmp_path / "copy")
    shutil.copytree(finished.path, copy.path)
    config = read_yaml(copy.config, "config")
    copy.config.write_text(json.dumps({k: v for k, v in config.items() if k not in ("model", "data")}))
    done = CliRunner().invoke(app, ["select", str(copy.path), "--budget", "flops=0.5x"])
    assert isinstance(done.exception, RunFolderError)
    assert "given as an object" in str(done.exception)
    assert "flops: asked at most" in done.output
