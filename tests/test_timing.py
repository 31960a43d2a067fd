"""Latency budgets: layouts, calibration, corrections. Clocks are replaced by arithmetic."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import sekron_search.candidates
import sekron_search.costs.layers
import sekron_search.prepare
import sekron_search.timing
from sekron_search.candidate import Candidate
from sekron_search.candidates import MAX_ROUNDS, Finder
from sekron_search.config import Config
from sekron_search.costs import predict
from sekron_search.costs.design import design
from sekron_search.costs.layers import Measurement, layer_key
from sekron_search.costs.measure import Latency
from sekron_search.costs.profile import DeviceProfile
from sekron_search.costs.trace import traced_operations
from sekron_search.costs.traced import traced_flops
from sekron_search.deployment import deploy
from sekron_search.errors import ConfigError, InfeasibleBudgetError
from sekron_search.files import read_json, write_json
from sekron_search.jobs import job_from_config
from sekron_search.kron.plan import make_plan
from sekron_search.model import kronecker_layers
from sekron_search.prepare import prepare
from sekron_search.progress import Reporter
from sekron_search.run import run
from sekron_search.rundir import RunFolder
from sekron_search.runtimes.base import threads
from sekron_search.runtimes.registry import make_runtime
from sekron_search.search.budget import Budget
from sekron_search.search.knapsack import additive_errors, solve_knapsack
from sekron_search.search.options import LayerTable, Network, Option
from sekron_search.timing import Placed, own_threads
from tests.cases import CONFIG, SPACE, Noted, write_config

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)

LATENCY = (
    CONFIG.replace(SPACE, "")
    .replace("{flops: 0.6x, params: 0.8x}", "{latency_ms: 0.7x}")
    .replace("trials: 8", "trials: 4")
)

#: Milliseconds of a network for each of its multiply-adds per sample.
MS_PER_FLOP = 1e-5


def layer_ms(job: Measurement) -> float:
    info, structure, schedule, _ = job
    flops = make_plan(structure, info.geometry, schedule).cost(info.input_size).flops
    return MS_PER_FLOP * flops * info.positions_per_sample


def measured_as(monkeypatch: pytest.MonkeyPatch, latency: Callable[[Measurement], Latency]) -> None:
    """Profiles measure what is said instead of a layer's time."""

    def measure(self: DeviceProfile, jobs: Sequence[Measurement], samples: int, runtime: Any, **options: Any) -> None:
        self.layers |= {layer_key(*job, samples): latency(job) for job in jobs}

    monkeypatch.setattr(DeviceProfile, "measure", measure)


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Layers take time by their flops; networks too, times a factor if anything in them was replaced."""

    def install(*, slower: float = 1.0, channels_last: float = 1.0) -> None:
        def latencies(job: Any, networks: Mapping[str, Placed]) -> dict[str, Latency]:
            def of(network: nn.Module, form: str) -> float:
                own = MS_PER_FLOP * traced_flops(network, job.example_inputs).total
                return (
                    own
                    * (channels_last if form == "channels_last" else 1.0)
                    * (slower if kronecker_layers(network) else 1.0)
                )

            return {name: Latency(of(*placed), 0.0, 3) for name, placed in networks.items()}

        for module in (sekron_search.timing, sekron_search.candidates):
            monkeypatch.setattr(module, "network_latencies", latencies)
        measured_as(monkeypatch, lambda job: Latency(layer_ms(job), 0.0, 3))
        monkeypatch.setattr(sekron_search.timing, "granularity_of", lambda runtime: 4)

    return install


def finder_in(folder: Path, text: str = LATENCY) -> Finder:
    job, out = job_from_config(Config.load(write_config(folder, text))), RunFolder(folder / "out")
    with out.claimed(job.fingerprint(), resume=False):
        return Finder(job, prepare(job, out, Reporter()), out, Reporter())


def test_exact_clocks_need_no_correction(clocks: Callable[..., None], tmp_path: Path) -> None:
    clocks()
    searched = finder_in(tmp_path).search()
    assert searched.excess <= 1
    assert searched.network.latency_scale == pytest.approx(1.0, abs=0.05)
    assert read_json(tmp_path / "out" / "search.json")["round"] == 1


def test_networks_that_gain_less_than_their_layers_are_calibrated(clocks: Callable[..., None], tmp_path: Path) -> None:
    clocks(slower=1.1)
    searched = finder_in(tmp_path).search()
    assert searched.excess <= 1
    assert searched.network.latency_scale < 0.97
    rows = read_json(tmp_path / "out" / "calibration.json")["networks"]
    assert all(row["measured_saving"] < row["summed_saving"] for row in rows)


def test_a_missed_latency_is_searched_again_with_a_corrected_sum(clocks: Callable[..., None], tmp_path: Path) -> None:
    clocks()
    finder = finder_in(tmp_path)
    finder._calibration()  # while sums still agree with networks
    clocks(slower=1.3)  # more than the slack of what the first round finds
    searched = finder.search()
    assert read_json(tmp_path / "out" / "search.json")["round"] > 1
    assert searched.excess <= 1
    assert searched.network.latency_scale < 0.98


@pytest.mark.parametrize(
    ("alone", "more", "bound"),
    [((1.25, 1.05), (0.15, 0.03), "1.3x"), ((0.97, 0.8), (0.18, 0.2), "1.1x"), ((1.1, 0.7), (0.3, 0.1), "1.1x")],
)
def test_networks_slower_than_the_original_are_corrected_too(
    alone: tuple[float, float], more: tuple[float, float], bound: str
) -> None:
    """Layers that the budget lets be slower cost more in the network than alone."""

    def option(structure: str, flops: int, error: float, ms: float) -> Option:
        return Option(structure, "x", "", "factored", flops, flops, 1, error, error, ms, 0.0)

    options = option("dense", 100, 0.0, 1.0), option("gentle", 50, 0.1, alone[0]), option("rough", 50, 0.2, alone[1])
    layers = tuple(LayerTable(f"layer{i}", options) for i in range(4))
    network = Network(layers, {"flops": 400.0, "params": 400.0, "latency_ms": 4.0, "peak_activation_bytes": 1.0})
    budget = Budget.of({"flops": "0.5x", "latency_ms": bound})
    finder: Any = SimpleNamespace(bounds=budget.resolve(network.original), budget=budget, network=network)
    corrected = dict(finder.bounds)
    excesses = []
    for _ in range(MAX_ROUNDS):
        assignment = solve_knapsack(finder.network, corrected, additive_errors(network)).assignment
        measured_ms = network.cost(assignment, "latency_ms") + sum((0.0, *more)[index] for index in assignment)
        costs = {"flops": network.cost(assignment, "flops"), "latency_ms": measured_ms, "latency_samples": 9.0}
        costs["latency_noise_ms"] = 0.0
        predicted = dict(finder.network.costs(assignment))
        original = {"flops": 400.0, "latency_ms": 4.0}
        candidate = Candidate(assignment, 0, 0.1, 0.1, predicted, costs, original, 4.0, None)
        excesses.append(candidate.excess(budget))
        if excesses[-1] <= 1:
            break
        Finder._correct(finder, corrected, [candidate])
    assert len(excesses) > 1
    assert excesses[-1] <= 1


def test_savings_that_are_rounding_say_nothing_of_sums(clocks: Callable[..., None], tmp_path: Path) -> None:
    clocks()
    finder = finder_in(tmp_path)
    row = {"summed_saving": -1e-14, "measured_saving": -0.09, "noise": 0.01}
    write_json(finder.folder.calibration, {"original_ms": 1.0, "networks": [row, row | {"summed_saving": 1e-14}]})
    assert finder._calibration() == 1.0


def test_a_run_goes_on_with_the_threads_that_it_was_measured_with(clocks: Callable[..., None], tmp_path: Path) -> None:
    clocks()
    finder = finder_in(tmp_path, re.sub(r", num_threads: \d+", "", LATENCY))
    job, folder, here = finder.job, finder.folder, torch.get_num_threads()
    assert job.settings.latency.num_threads is None
    with threads(here + 1):
        with pytest.raises(ConfigError, match=f"num_threads = {here}, this run uses {here + 1}"):
            prepare(job, folder, Reporter())
        with threads(own_threads(job, folder)):
            prepare(job, folder, Reporter())
        assert run(job, folder, Reporter(), resume=True)["environment"]["num_threads"] == here
    profile = folder.path / "given.yaml"
    profile.write_text(folder.profile.read_text())
    latency = job.settings.latency.model_copy(update={"profile": profile, "any_profile": True})
    given = replace(job, settings=job.settings.model_copy(update={"latency": latency}))
    assert own_threads(given, folder) is None, "its threads are not the run's"


def test_a_latency_out_of_reach_is_told(clocks: Callable[..., None], tmp_path: Path) -> None:
    clocks()
    finder = finder_in(tmp_path)
    finder._calibration()
    clocks(slower=50.0)
    assert finder.search().excess > 1


def test_a_bound_is_tightened_where_no_network_became_faster(clocks: Callable[..., None], tmp_path: Path) -> None:
    clocks()
    finder = finder_in(tmp_path)
    finder._calibration()
    clocks(slower=5.0)
    assert finder.search().excess <= 1
    assert read_json(finder.folder.search)["round"] > 1


def test_the_memory_format_is_the_fastest_and_the_original_has_its_own(
    clocks: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks(channels_last=0.8)
    finder = finder_in(tmp_path)
    assert finder.tables.layout.memory_format == finder.tables.layout.original_format == "channels_last"
    assert finder.tables.layout.granularity == 4
    # Savings count from the original in the format of the tables, budgets from the original at its best.
    other = replace(finder.tables.layout, memory_format="contiguous")
    tables = replace(finder.tables, layout=other)
    assert tables.network.unchanged("latency_ms") == pytest.approx(tables.original["latency_ms"] / 0.8)
    assert tables.network.original["latency_ms"] == tables.original["latency_ms"]


def test_ranks_follow_the_granularity_under_a_latency_budget(clocks: Callable[..., None], tmp_path: Path) -> None:
    clocks()
    finder = finder_in(tmp_path)
    ranks = {
        int(size)
        for table in finder.network.tables
        for option in table.options[1:]
        for size in (item.partition("=")[2] for item in option.structure.partition(";")[2].split(","))
    }
    assert ranks
    assert max(ranks) > 4
    assert all(rank % 4 == 0 or rank < 4 for rank in ranks)


def test_options_that_are_not_faster_are_left_out(
    clocks: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks()

    def slow(job: Measurement) -> bool:
        return job[0].name == "conv2" and not job[1].is_dense

    measured_as(monkeypatch, lambda job: Latency(layer_ms(job) * (100 if slow(job) else 1), 0.0, 3))
    found = {table.name: table.options for table in finder_in(tmp_path).network.tables}
    assert len(found["conv2"]) == 1
    assert len(found["conv3"]) > 1


def test_a_profile_of_another_machine_predicts_and_nothing_is_measured_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "FITTED", 40)
    monkeypatch.setattr(predict, "STEPS", 5)
    profile = DeviceProfile.empty(make_runtime("pytorch-eager"))
    profile.provenance = replace(profile.provenance, processor="a slow one", num_threads=torch.get_num_threads())
    profile.operations = {
        o: Latency(0.01 + o.flops / 1e6 + o.moved_bytes / 1e6, 0.001, 5) for o in design(0, quick=True)[::3]
    }
    profile.fit(granularity=8, node_ms=0.0)
    (tmp_path / "slow.yaml").write_text(profile.to_yaml())

    def forbidden(*args: Any, **options: Any) -> None:
        raise AssertionError("measured here")

    for module in (sekron_search.timing, sekron_search.costs.layers):
        monkeypatch.setattr(module, "measure_callables", forbidden)
    text = CONFIG.replace("params: 0.8x", "latency_ms: 1.5x").replace(
        "latency: {", "latency: {profile: slow.yaml, memory_format: contiguous, "
    )
    finder = finder_in(tmp_path, text.replace("trials: 8", "trials: 3"))
    assert finder.tables.layout.granularity == 8
    searched = finder.search()
    assert searched.excess <= 1
    candidate = searched.candidates[0]
    assert candidate.costs["latency_samples"] == 0
    assert candidate.original["latency_ms"] == pytest.approx(finder.tables.original["latency_ms"])
    traced = traced_operations(deploy(finder.job.model, finder.job.example_inputs), finder.job.example_inputs)
    assert candidate.original["latency_ms"] == pytest.approx(profile.model.predict_sum(traced.operations).ms, rel=0.01)


def test_options_that_are_surely_slower_are_none_even_where_budgets_need_them(
    clocks: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks()

    measured_as(monkeypatch, lambda job: Latency(layer_ms(job) * (1 if job[1].is_dense else 100), 0.0, 3))
    monkeypatch.setattr(sekron_search.prepare, "LATENCY_DOUBT", 1000)
    text = CONFIG.replace("params: 0.8x", "flops: 0.5x, latency_ms: 1x")
    job = job_from_config(Config.load(write_config(tmp_path, text)))
    tables = prepare(job, RunFolder(tmp_path / "out"), Reporter())
    assert all(len(table.options) == 1 for table in tables.network.tables)


def test_where_clocks_are_too_noisy_to_tell_what_is_faster_the_budget_decides(
    clocks: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks()

    measured_as(monkeypatch, lambda job: Latency(layer_ms(job), 10 * layer_ms(job), 3))
    text = CONFIG.replace("params: 0.8x", "flops: 0.5x, latency_ms: 1x")
    job, folder = job_from_config(Config.load(write_config(tmp_path, text))), RunFolder(tmp_path / "out")
    noted = Noted()
    tables = prepare(job, folder, noted)
    assert sum("within the noise of the clock" in line for line in noted.told) == 1
    assert all(len(table.options) > 1 for table in tables.network.tables)
    impossible = {**job.settings.bounds.resolve(tables.original), "latency_ms": 1e-9}
    with pytest.raises(InfeasibleBudgetError, match=r"latencies are uncertain by 1000%: measured anew, on an idle"):
        solve_knapsack(tables.network, impossible, tables.network.values("flops"))
