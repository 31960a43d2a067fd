from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sekron_search.api import job_from_config
from sekron_search.assembly import Assembler
from sekron_search.config import Config
from sekron_search.files import read_json
from sekron_search.job import Job
from sekron_search.network_tables import Tables
from sekron_search.prepare import prepare
from sekron_search.progress import Reporter
from sekron_search.response import TABLE_SAMPLES, LinearResponse, first_samples, spread_options
from sekron_search.rundir import RunFolder
from sekron_search.search.options import LayerTable, Option
from tests.cases import CONFIG, write_config

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


def job_of(folder: Path, trials: int = 200) -> Job:
    job = job_from_config(Config.load(write_config(folder, CONFIG, **{"trials: 8": f"trials: {trials}"})))
    job.model.eval()
    return job


def prepared(job: Job, folder: RunFolder) -> Tables:
    folder.path.mkdir(exist_ok=True)
    return prepare(job, folder, Reporter())


def table(*errors: float) -> LayerTable:
    options = [Option("1", "dense", "0", "factored", 1, 1, 1, e, e) for e in errors]
    return LayerTable("a", tuple(options))


def test_responses_are_the_divergences_with_one_layer_alone(tmp_path: Path) -> None:
    job, folder = job_of(tmp_path), RunFolder(tmp_path / "out")
    tables = prepared(job, folder)
    linear = LinearResponse(Assembler(job, tables), TABLE_SAMPLES)
    for layer, fitted in enumerate(tables.fitted):
        options = fitted.table.options
        assert [e for e, _ in fitted.table.responses] == sorted({o.error for o in options} - {0.0})
        for error, response in fitted.table.responses:
            index = max(i for i, o in enumerate(options) if o.error == error)
            assert response == pytest.approx(linear.divergence_alone(layer, index), rel=1e-4)
    assert tables.whole is not None
    for whole, fitted in zip(tables.whole.tables, tables.fitted, strict=True):
        assert whole.responses == fitted.table.responses
    assert sum(len(t.options) for t in tables.whole.tables) > sum(len(f.table.options) for f in tables.fitted)


def test_what_is_measured_of_a_layer_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, folder = job_of(tmp_path), RunFolder(tmp_path / "out")
    measure, seen = LinearResponse.divergence_alone, []

    def killed(self: LinearResponse, layer: int, option: int) -> float:
        if layer == 1:
            raise KeyboardInterrupt
        return measure(self, layer, option)

    def counted(self: LinearResponse, layer: int, option: int) -> float:
        seen.append(layer)
        return measure(self, layer, option)

    monkeypatch.setattr(LinearResponse, "divergence_alone", killed)
    with pytest.raises(KeyboardInterrupt):
        prepared(job, folder)
    monkeypatch.setattr(LinearResponse, "divergence_alone", counted)
    resumed = prepared(job, folder)
    assert 0 not in seen
    assert 1 in seen
    seen.clear()
    assert prepared(job, folder).network == resumed.network
    assert seen == []
    monkeypatch.undo()
    again = prepared(job_of(tmp_path), RunFolder(tmp_path / "other"))
    assert again.network.tables == resumed.network.tables


def test_responses_of_other_options_are_measured_anew(tmp_path: Path) -> None:
    job, folder = job_of(tmp_path), RunFolder(tmp_path / "out")
    tables = prepared(job, folder)
    told = read_json(folder.responses)
    name = tables.layers[0].name
    told[name][0][0] *= 2
    folder.responses.write_text(json.dumps(told))
    assert prepared(job, folder).network == tables.network


def test_responses_cost_no_more_than_the_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    measure = LinearResponse.divergence_alone

    def counted(self: LinearResponse, layer: int, option: int) -> float:
        calls.append((layer, option))
        return measure(self, layer, option)

    monkeypatch.setattr(LinearResponse, "divergence_alone", counted)
    counts = {}
    for trials in (200, 20, 1):
        calls.clear()
        job = job_of(tmp_path, trials)
        tables = prepared(job, RunFolder(tmp_path / str(trials)))
        held_out = sum(len(inputs[0]) for inputs in job.holdout)
        assert len(calls) * min(TABLE_SAMPLES, held_out) <= trials * held_out
        assert len(calls) == sum(len(f.table.responses) for f in tables.fitted)
        counts[trials] = len(calls)
    assert counts[200] > counts[20] > counts[1] == 0
    assert all(f.table.responses == () for f in tables.fitted)


def test_options_are_spread_over_the_logarithm_of_their_errors() -> None:
    one, two = table(0.0, 0.8, 0.1, 0.11, 0.2, 0.21, 0.4, 0.1), table(0.0, 0.5, 0.3)
    assert spread_options([one, two], most=100) == [[7, 3, 4, 5, 6, 1], [2, 1]]
    assert spread_options([one, two], most=6) == [[7, 5, 6, 1], [2, 1]]
    assert spread_options([one, two], most=5) in ([[7, 4, 1], [2, 1]], [[7, 5, 1], [2, 1]])
    assert spread_options([one, two], most=4) == []
    assert spread_options([one, table(0.0)], most=100) == []


def test_first_samples_are_those_of_the_first_batches() -> None:
    batches = [(torch.arange(start, start + 4.0)[:, None], torch.tensor(1.0)) for start in (0, 4, 8)]
    for count in (3, 4, 6, 12, 20):
        found = torch.cat([inputs[0] for inputs in first_samples(batches, count)])
        assert found.flatten().tolist() == list(range(min(count, 12)))
