from __future__ import annotations

import copy
import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sekron_search.assembly import Assembler
from sekron_search.config import Config, make_settings
from sekron_search.files import read_json, write_json
from sekron_search.job import Job
from sekron_search.jobs import job_from_config
from sekron_search.kron.layer import KroneckerLayer
from sekron_search.model import Inputs, first_batches
from sekron_search.network_tables import Tables
from sekron_search.prepare import prepare
from sekron_search.progress import Reporter
from sekron_search.rundir import RunFolder
from sekron_search.search.budget import Budget
from sekron_search.search.knapsack import additive_errors, curvature_errors
from sekron_search.search.options import LayerTable, Option
from sekron_search.table_responses import SAMPLES, _Alone, _checked, _Rows, spread_options, with_responses
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


def alone(assembler: Assembler, layer: int, option: int) -> float:
    """The divergence, from its definition: a dense layer of the option's weight, batch-norms by the batch."""
    tables = assembler.tables
    assignment = tuple(option if i == layer else 0 for i in range(len(tables.layers)))
    made = assembler.with_factors(assignment).get_submodule(tables.layers[layer].name)
    networks = [copy.deepcopy(assembler.job.model) for _ in range(2)]
    own: Any = networks[0].get_submodule(tables.layers[layer].name)
    assert isinstance(made, KroneckerLayer)
    with torch.no_grad():
        own.weight.copy_(made.group_weights().reshape(own.weight.shape))
        if own.bias is not None:
            assert made.bias is not None
            own.bias.copy_(made.bias)
        total, count = 0.0, 0
        for inputs in assembler.job.holdout[:2]:  # batches of 32
            q, p = (torch.softmax(network.train()(*inputs).double() / 4, 1) for network in networks)
            total += 16 * float((p * (p / q).log()).sum())
            count += len(p)
    return total / count


def test_responses_are_the_divergences_with_one_layer_alone(tmp_path: Path) -> None:
    job, folder = job_of(tmp_path), RunFolder(tmp_path / "out")
    tables = prepared(job, folder)
    assembler = Assembler(job, tables)
    for layer, fitted in enumerate(tables.fitted):
        options = fitted.table.options
        errors = sorted({o.error for o in options} - {0.0})
        assert [e for e, _ in fitted.table.responses] in (errors, errors[1:])  # the least may be lost in rounding
        for error, response in fitted.table.responses[::4]:
            index = max(i for i, o in enumerate(options) if o.error == error)
            assert response == pytest.approx(alone(assembler, layer, index), rel=1e-3, abs=1e-6)
    assert tables.whole is not None
    for whole, fitted in zip(tables.whole.tables, tables.fitted, strict=True):
        assert whole.responses == fitted.table.responses
    assert sum(len(t.options) for t in tables.whole.tables) > sum(len(f.table.options) for f in tables.fitted)


class Odd(nn.Module):
    """Two layers and a batch-norm; a tensor without a batch axis, and a dictionary, are arguments too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(24, 24), nn.BatchNorm1d(24), nn.Linear(24, 24)

    def forward(self, x: Tensor, shift: Tensor, more: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        hidden: Tensor = self.norm(self.a(x + shift[0] + more["y"]))
        return self.b(hidden.relu()), self.b.weight.sum()


def test_batches_are_taken_whole() -> None:
    """For what is part of a batch nobody knows, and one sample alone has no statistics."""

    def inputs(count: int) -> Inputs:
        generator = torch.Generator().manual_seed(count)
        x, y, shift = (torch.randn(n, 24, generator=generator) for n in (count, count, 80))
        return x, shift, {"y": y}

    found = {}
    for count in (63, 200):
        torch.manual_seed(0)
        batches = [inputs(count), inputs(count + 1)]
        settings = make_settings(Budget.of({"flops": "0.5x"}), {"search": {"divergence": "mse", "trials": 500}})
        job = Job(Odd().eval(), inputs(2), batches, batches, settings)
        with tempfile.TemporaryDirectory() as home:
            tables = prepare(job, RunFolder(home), Reporter())
        found[count] = [f.table.responses for f in tables.fitted]
        assert all(found[count])
    assert found[63] != found[200]


def test_images_may_differ_in_size_from_batch_to_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1)).eval()
    batches = [(torch.randn(1, 3, size, 20 - size),) for size in (8, 10, 12)]
    settings = make_settings(Budget.of({"flops": "0.5x"}), {"search": {"divergence": "mse", "trials": 500}})
    tables = prepare(Job(model, batches[0], batches, batches, settings), RunFolder(tmp_path), Reporter())
    assert all(len(f.table.responses) > 3 for f in tables.fitted)


def test_a_network_that_breaks_is_bad_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = _Alone.divergence

    def breaks(self: _Alone, layer: int, option: int) -> float:
        return math.nan if layer == 1 and option == 2 else measured(self, layer, option)

    monkeypatch.setattr(_Alone, "divergence", breaks)
    folder = RunFolder(tmp_path / "out")
    tables = prepared(job_of(tmp_path), folder)
    responses = [r for f in tables.fitted for _, r in f.table.responses]
    broken = dict(tables.fitted[1].table.responses)[tables.fitted[1].table.options[2].error]
    assert all(0 < r < math.inf for r in responses)
    assert broken == max(responses)
    assert responses.count(broken) == 1
    assert prepared(job_of(tmp_path), folder).network == tables.network


def test_a_layer_that_can_only_stay_needs_no_responses(tmp_path: Path) -> None:
    """As under a budget of latency, where none of its options is faster."""
    job, folder = job_of(tmp_path), RunFolder(tmp_path / "out")
    tables = prepared(job, folder)
    first, *others = tables.fitted
    only = dataclasses.replace(tables, fitted=(first.kept([False] * len(first.table.options)), *others))
    found = with_responses(job, only, tmp_path / "tables", Reporter())
    assert found.fitted[0].table.responses == ()
    assert [f.table.responses for f in found.fitted[1:]] == [f.table.responses for f in others]
    assert additive_errors(found.network)[0].tolist() == [0.0]
    assert additive_errors(found.network)[1][1] != curvature_errors(found.network)[1][1]


def test_what_is_lost_in_rounding_is_left_out() -> None:
    rows: _Rows = [(0.01, -3e-8), (0.02, 2e-7), (0.1, 0.25), (0.5, None)]
    assert _checked(rows, 4.0) == ((0.1, 0.25), (0.5, 8.0))
    assert _checked(rows[:2], 4.0) == ((0.02, 4e-6),)
    assert _checked([], 4.0) == ()


def test_what_is_measured_of_a_layer_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, folder = job_of(tmp_path), RunFolder(tmp_path / "out")
    measure, seen = _Alone.divergence, []

    def killed(self: _Alone, layer: int, option: int) -> float:
        if layer == 1:
            raise KeyboardInterrupt
        return measure(self, layer, option)

    def counted(self: _Alone, layer: int, option: int) -> float:
        seen.append(layer)
        return measure(self, layer, option)

    monkeypatch.setattr(_Alone, "divergence", killed)
    with pytest.raises(KeyboardInterrupt):
        prepared(job, folder)
    monkeypatch.setattr(_Alone, "divergence", counted)
    resumed = prepared(job, folder)
    assert 0 not in seen
    assert 1 in seen
    seen.clear()
    assert prepared(job, folder).network == resumed.network
    assert seen == []
    monkeypatch.undo()
    again = prepared(job_of(tmp_path), RunFolder(tmp_path / "other"))
    assert again.network.tables == resumed.network.tables


@pytest.mark.parametrize("damage", ["other", "edited", "[]", "null", '{"layers": {"conv1": 3}}', "NaN"])
def test_responses_that_are_damaged_are_measured_anew(tmp_path: Path, damage: str) -> None:
    job, folder = job_of(tmp_path), RunFolder(tmp_path / "out")
    tables = prepared(job, folder)
    (kept,) = folder.tables.glob("responses-*.json")
    told = read_json(kept)
    if damage == "other":  # of other options: their errors differ
        told["layers"]["conv1"][0][0] *= 2
        write_json(kept, told)
    else:
        kept.write_text(kept.read_text().replace("0.", "1.", 1) if damage == "edited" else damage)
    assert prepared(job, folder).network == tables.network


def test_responses_cost_no_more_than_the_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    measure = _Alone.divergence

    def counted(self: _Alone, layer: int, option: int) -> float:
        calls.append((layer, option))
        return measure(self, layer, option)

    monkeypatch.setattr(_Alone, "divergence", counted)
    counts = {}
    for trials in (200, 20, 1):
        calls.clear()
        job = job_of(tmp_path, trials)
        tables = prepared(job, RunFolder(tmp_path / str(trials)))
        held_out = sum(len(inputs[0]) for inputs in job.holdout)
        assert len(calls) * min(SAMPLES, held_out) <= trials * held_out
        assert 0 <= len(calls) - sum(len(f.table.responses) for f in tables.fitted) <= 1  # one may be lost in rounding
        counts[trials] = len(calls)
    assert counts[200] > counts[20] > counts[1] == 0
    assert all(f.table.responses == () for f in tables.fitted)


def test_options_are_spread_over_the_logarithm_of_their_errors() -> None:
    one, two = table(0.0, 0.8, 0.1, 0.11, 0.2, 0.21, 0.4, 0.1), table(0.0, 0.5, 0.3)
    assert spread_options([one, two], most=100) == [[7, 3, 4, 5, 6, 1], [2, 1]]
    assert spread_options([one, two], most=6) == [[7, 5, 6, 1], [2, 1]]
    assert spread_options([one, two], most=5) in ([[7, 4, 1], [2, 1]], [[7, 5, 1], [2, 1]])
    assert spread_options([one, two], most=4) == [[], []]
    assert spread_options([two, table(0.0, 0.1)], most=3) == [[2, 1], [1]]
    assert spread_options([two, table(0.0)], most=100) == [[2, 1], []]


def test_the_first_batches_suffice_for_the_samples() -> None:
    batches = [(torch.zeros(4, 1), torch.tensor(1.0)) for _ in range(3)]
    assert [len(first_batches(batches, n)) for n in (1, 3, 4, 5, 8, 9, 12, 20)] == [1, 1, 1, 2, 2, 3, 3, 3]
