from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from sekron_search.assembly import Assembler
from sekron_search.audit import Examiner, Planned, audit, check_audit, plan_audit
from sekron_search.config import Config
from sekron_search.errors import ConfigError, DataError, InfeasibleBudgetError, RunFolderError
from sekron_search.files import read_json, write_json
from sekron_search.finetune import Distillation
from sekron_search.job import Job
from sekron_search.jobs import job_from_config
from sekron_search.network_tables import Tables
from sekron_search.prepare import prepare
from sekron_search.progress import Reporter
from sekron_search.proxies import PROXIES
from sekron_search.ranking import kendall
from sekron_search.report.audit import audit_section
from sekron_search.report.plots import audit_plot
from sekron_search.rundir import RunFolder
from tests.cases import CONFIG, SPACE, write_config

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)

AUDIT = (
    CONFIG.replace(SPACE, "").replace("epochs: 2,", "epochs: 2, learning_rate: 1.0e-3,")
    + "audit: {candidates: 6, budgets: [{flops: 0.7x}, {flops: 0.5x}, {flops: 0.35x}]}\n"
)


def job_of(folder: Path, text: str = AUDIT, **replaced: str) -> Job:
    folder.mkdir(parents=True, exist_ok=True)
    return job_from_config(Config.load(write_config(folder, text, **replaced)))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Tables, Path]:
    home = tmp_path_factory.mktemp("audit")
    job = job_of(home)
    job.model.eval()
    return job, prepare(job, RunFolder(home / "out"), Reporter()), home / "out"


@pytest.fixture(scope="module")
def record(prepared: tuple[Job, Tables, Path]) -> dict[str, Any]:
    job, tables, out = prepared
    found = audit(Assembler(job, tables), plan_audit(job, tables.network), RunFolder(out), Reporter())
    assert found is not None
    return found


def untimed(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in record["candidates"]]


def test_candidates_are_distinct_meet_their_budgets_and_are_the_same_again(
    prepared: tuple[Job, Tables, Path],
) -> None:
    job, tables, _ = prepared
    planned = plan_audit(job, tables.network)
    assert len({p.assignment for p in planned}) == 6
    assert [p.budget for p in planned] == ["flops 0.7x", "flops 0.5x", "flops 0.35x"] * 2
    for candidate in planned:
        share = tables.network.cost(candidate.assignment, "flops") / tables.network.original["flops"]
        assert share <= float(candidate.budget.removeprefix("flops ").removesuffix("x"))
    assert plan_audit(job, tables.network) == planned
    other = job_of(prepared[2].parent / "other", AUDIT, **{"audit: {": "audit: {seed: 1, "})
    assert plan_audit(other, tables.network) != planned


def test_without_budgets_of_its_own_it_looks_around_the_runs(prepared: tuple[Job, Tables, Path]) -> None:
    _, tables, out = prepared
    job = job_of(out.parent / "around", CONFIG + "audit: {candidates: 6}\n")
    planned = plan_audit(job, tables.network)
    costs = [tables.network.costs(p.assignment)["flops"] / tables.network.original["flops"] for p in planned]
    assert planned[1].budget == "flops 0.6x, params 0.8x"
    assert max(costs[2::3]) < min(costs[1::3]) <= 0.6 < max(costs[::3])


def test_the_record_has_every_proxy_and_its_taus(record: dict[str, Any], prepared: tuple[Job, Tables, Path]) -> None:
    assert record == read_json(prepared[2] / "audit.json")
    assert [p["name"] for p in record["proxies"]] == list(PROXIES)
    metrics = [row["metric"] for row in record["candidates"]]
    for proxy in record["proxies"]:
        scores = [-row["scores"][proxy["name"]] for row in record["candidates"]]
        assert proxy["tau"] == pytest.approx(kendall(scores, metrics))
        assert proxy["low"] <= proxy["high"]
        assert list(proxy["within"]) == ["flops 0.7x", "flops 0.5x", "flops 0.35x"]
        assert proxy["seconds"] >= 0
    assert not (prepared[2] / "audit").exists() or not list((prepared[2] / "audit").iterdir())


def test_candidates_are_trained_as_the_runs_own_for_the_epochs_of_the_audit(
    record: dict[str, Any], prepared: tuple[Job, Tables, Path], tmp_path: Path
) -> None:
    """The same network, trained by the run's own distillation with that number of epochs."""
    job, tables, _ = prepared
    assert job.distillation is not None
    assert job.train is not None
    assembler, row = Assembler(job, tables), record["candidates"][0]
    examiner = Examiner(assembler, RunFolder(tmp_path))
    network = examiner.subject(Planned(row["budget"], tuple(row["assignment"]))).fitted
    config = job.settings.finetune.model_copy(update={"epochs": 1})
    curve = Distillation(job.model, job.train, config, "kl").train(
        network,
        checkpoint=tmp_path / "checkpoint.pt",
        measure=job.measure_in_training,
        after_epoch=lambda *_: True,
        progress=lambda _: None,
    )
    assert [c["metric"] for c in curve] == [row["metric"]]


@pytest.mark.parametrize("inside", ["between candidates", "in the training"])
def test_a_killed_audit_goes_on_to_the_same_result(
    inside: str,
    record: dict[str, Any],
    prepared: tuple[Job, Tables, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job, tables, out = prepared
    folder = RunFolder(tmp_path)
    folder.original.write_text((out / "original.json").read_text())
    planned = plan_audit(job, tables.network)
    trained: list[int] = []
    train = Distillation.train

    def killed(self: Distillation, *args: Any, **how: Any) -> Any:
        trained.append(1)
        if len(trained) == 3 and inside == "in the training":
            raise KeyboardInterrupt
        curve = train(self, *args, **how)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return curve

    monkeypatch.setattr(Distillation, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        audit(Assembler(job, tables), planned, folder, Reporter())
    assert len(read_json(folder.audit)["candidates"]) == 2
    resumed = audit(Assembler(job, tables), planned, folder, Reporter())
    assert resumed is not None
    assert len(trained) == 3 + 4  # what was finished is not trained again
    assert untimed(resumed) == untimed(record)
    assert [p["tau"] for p in resumed["proxies"]] == [p["tau"] for p in record["proxies"]]


def test_what_a_record_lacks_is_added_without_training(
    record: dict[str, Any], prepared: tuple[Job, Tables, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, tables, out = prepared
    folder = RunFolder(tmp_path)
    folder.original.write_text((out / "original.json").read_text())
    rows = [
        {**row, "scores": {name: value for name, value in row["scores"].items() if name != "divergence_fitted"}}
        for row in record["candidates"]
    ]
    write_json(folder.audit, {"candidates": rows})
    monkeypatch.setattr(Distillation, "train", lambda *_, **__: pytest.fail("a candidate was trained"))
    planned = plan_audit(job, tables.network)
    resumed = audit(Assembler(job, tables), planned, folder, Reporter())
    assert resumed is not None
    assert untimed(resumed) == untimed(record)
    with pytest.raises(RunFolderError, match=r"audit\.json: it is of other candidates; delete it"):
        audit(Assembler(job, tables), planned[::-1], folder, Reporter())


def test_no_candidates_no_audit(prepared: tuple[Job, Tables, Path], tmp_path: Path) -> None:
    job = job_of(tmp_path, CONFIG)
    check_audit(job)
    assert plan_audit(job, prepared[1].network) == []
    assert audit(Assembler(job, prepared[1]), [], RunFolder(tmp_path), Reporter()) is None
    assert not (tmp_path / "audit.json").exists()
    assert audit_section(None) is None


def test_what_cannot_be_audited_is_refused_early(prepared: tuple[Job, Tables, Path], tmp_path: Path) -> None:
    job = prepared[0]
    with pytest.raises(DataError, match=r"audit\.candidates is 6, but there is no training data"):
        check_audit(dataclasses.replace(job, train=None))
    with pytest.raises(DataError, match=r"audit\.candidates is 6, but there is no validation metric"):
        check_audit(dataclasses.replace(job, validate=None))
    timed = job_of(tmp_path, AUDIT, **{"{flops: 0.7x}": "{latency_ms: 0.7x}"})
    with pytest.raises(ConfigError, match=r"'audit\.budgets': latency_ms is not part of the run's budget"):
        check_audit(timed)
    tight = job_of(tmp_path, AUDIT, **{"{flops: 0.35x}": "{flops: 0.0001x}"})
    with pytest.raises(InfeasibleBudgetError, match="no choice of structures meets the budgets"):
        plan_audit(tight, prepared[1].network)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{candidates: 5}", r"audit.*at least 6"),
        ("{candidates: 4, budgets: [{flop: 0.5x}]}", "unknown cost 'flop'"),
        ("{candidates: 4, budgets: [{flops: -1}]}", "expected a positive number"),
        ("{candidates: 4, epochs: 0}", r"audit\.epochs"),
    ],
)
def test_bad_sections_name_what_is_wrong(section: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        job_of(tmp_path, CONFIG + f"audit: {section}\n")


def test_the_report_says_how_far_to_trust(record: dict[str, Any]) -> None:
    def written(audit: dict[str, Any]) -> str:
        section = audit_section(audit)
        assert section is not None
        return section.markdown()

    text = written(record)
    assert "## How far to trust the proxies" in text
    for proxy in PROXIES.values():
        assert f"| {proxy.label} |" in text

    def with_taus(tau: float) -> dict[str, Any]:
        proxies = [{**p, "tau": tau, "mean_within": tau} for p in record["proxies"]]
        return {**record, "proxies": proxies}

    assert "names the better one in 95% of the cases" in written(with_taus(0.9))
    assert "Its order can be trusted" in written(with_taus(0.9))
    assert "tells good networks from bad ones" in written(with_taus(0.5))
    assert "says little" in written(with_taus(0.1))
    assert "says little" in written(with_taus(-0.5))
    assert len(audit_plot(record).axes[0].collections) == 3
