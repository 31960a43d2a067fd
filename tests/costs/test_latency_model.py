from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from sekron_search.cli import app
from sekron_search.costs import predict, profiling, sampling
from sekron_search.costs.anchored import node_samples
from sekron_search.costs.design import design, granularity_sweep
from sekron_search.costs.measure import Latency
from sekron_search.costs.operations import Convolution, Copy, Elementwise, Linear, Operation, Pool
from sekron_search.costs.predict import LatencyModel
from sekron_search.costs.profile import DeviceProfile, Measurement
from sekron_search.costs.sampling import turns
from sekron_search.errors import ConfigError
from sekron_search.inspection import inspect_model
from sekron_search.kron import families as fam
from sekron_search.kron.steps import Schedule
from sekron_search.progress import Reporter
from sekron_search.runtimes.base import Runtime
from sekron_search.runtimes.registry import make_runtime

NOISE = 0.03


def synthetic_ms(operation: Operation) -> float:
    """A device with a known law: a call, multiply-adds with channels in blocks of 16, bytes."""
    flops = operation.flops
    if isinstance(operation, Convolution):
        ours = np.array([operation.in_channels, operation.out_channels]) / operation.groups
        flops = int(flops * np.prod(np.ceil(ours / 16) * 16 / ours))
    return float(0.02 + flops / 3e7 + operation.moved_bytes / 4e6)


def measured(operations: list[Operation], seed: int = 0) -> dict[Operation, Latency]:
    noise = np.exp(NOISE * np.random.default_rng(seed).standard_normal(len(operations)))
    return {o: Latency(synthetic_ms(o) * float(n), 0.01, 5) for o, n in zip(operations, noise, strict=True)}


@pytest.fixture(scope="module", autouse=True)
def _coarse_fits() -> Iterator[None]:
    """Kernels from few operations, in few steps: enough for a law that is known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "FITTED", 60)
        patch.setattr(predict, "STEPS", 12)
        yield


@pytest.fixture(scope="module")
def model() -> LatencyModel:
    return LatencyModel(measured(design(0, quick=True)), 16)


def test_the_model_recovers_a_known_law(model: LatencyModel) -> None:
    unseen = [o for o in design(7, quick=True) if isinstance(o, Convolution | Linear | Copy)][::3]
    truth = np.array([synthetic_ms(o) for o in unseen])
    found = model.predict(unseen)
    errors = np.abs(np.array([p.ms for p in found]) / truth - 1)
    assert model.validations["all"].median < 2 * NOISE
    assert model.validations["all"].spearman > 0.99
    assert np.median(errors) < 1.5 * model.validations["all"].median
    within = np.abs(np.array([p.ms for p in found]) - truth) < 2 * np.array([p.std_ms for p in found])
    assert within.mean() > 0.9


def test_shuffled_latencies_give_a_bad_error() -> None:
    operations = design(0, quick=True)
    latencies = list(measured(operations).values())
    np.random.default_rng(0).shuffle(latencies)
    shuffled = LatencyModel(dict(zip(operations, latencies, strict=True)), 16).validations["all"]
    assert shuffled.median > 0.4
    assert shuffled.spearman < 0.6


def test_sums_are_at_least_as_uncertain_as_independent_errors(model: LatencyModel) -> None:
    operations = [o for o in design(7, quick=True) if isinstance(o, Convolution)][:20]
    each, total = model.predict(operations), model.predict_sum(operations)
    assert total.ms == pytest.approx(sum(p.ms for p in each))
    assert total.std_ms <= sum(p.std_ms for p in each) * (1 + 1e-6)
    one = model.predict_sum(operations[:1] * 10)
    assert one.std_ms == pytest.approx(10 * model.predict(operations[:1])[0].std_ms, rel=0.2)


def test_known_hyperparameters_give_the_same_predictions(model: LatencyModel) -> None:
    operations = design(0, quick=True)
    again = LatencyModel(measured(operations), 16, known=model.hyperparameters)
    assert again.predict(operations[:50]) == model.predict(operations[:50])


def test_those_that_take_turns_are_alike_in_size() -> None:
    operations = design(0, quick=True)
    chunks = turns(operations)
    assert sorted(map(str, operations)) == sorted(str(o) for chunk in chunks for o in chunk)
    spans = sorted((min(o.moved_bytes for o in chunk), max(o.moved_bytes for o in chunk)) for chunk in chunks)
    assert all(high <= low for (_, high), (low, _) in pairwise(spans))


def test_granularity_is_found_and_absent_where_time_is_smooth() -> None:
    runtime = make_runtime("pytorch-eager")
    profile = DeviceProfile.empty(runtime)
    profile.operations = {o: Latency(synthetic_ms(o), 0.001, 5) for o in granularity_sweep()}
    assert profiling.granularity(profile) == 16
    profile.operations = {o: Latency(0.02 + o.flops / 3e7, 0.001, 5) for o in granularity_sweep()}
    assert profiling.granularity(profile) == 1


def small_design(seed: int, *, quick: bool) -> list[Operation]:
    """Small operations of every kind."""
    small = [o for o in design(seed, quick=quick) if o.moved_bytes < 2e5 and o.flops < 2e6]
    found: list[type[Operation]] = [Convolution, Linear, Copy, Elementwise, Pool]
    return [o for kind in found for o in small if isinstance(o, kind)][::6]


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "design", small_design)


def job() -> Measurement:
    network = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1))
    info = inspect_model(network, torch.randn(1, 16, 8, 8)).layers[0]
    return info, fam.spatial_svd(info.weight_shape, 5), Schedule((1, 0)), "factored"


@pytest.mark.usefixtures("_small")
def test_profiles_round_trip_with_their_model_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, runner = tmp_path / "profile.yaml", CliRunner()
    command = ["profile", "--quick", "--out", str(out), "--memory-format", "channels_last"]
    real = sampling.measure_operations

    def interrupted(
        operations: list[Operation], runtime: Runtime, *, after_chunk: Callable[[dict[Operation, Latency]], None]
    ) -> None:
        real(operations[:40], runtime, after_chunk=after_chunk)
        raise KeyboardInterrupt

    monkeypatch.setattr(profiling, "measure_operations", interrupted)
    assert runner.invoke(app, command).exit_code == 130
    partial = DeviceProfile.load(out)
    assert len(partial.operations) == 40
    with pytest.raises(ConfigError, match="it has no latency model"):
        partial.latency(job(), 1)
    monkeypatch.setattr(profiling, "measure_operations", real)
    done = runner.invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "channel granularity" in done.output
    profile = DeviceProfile.load(out)
    assert {o: profile.operations[o] for o in partial.operations} == partial.operations
    predicted = profile.latency(job(), 1)
    assert predicted.samples == 0
    assert predicted.median_ms > 0
    assert predicted.noise_ms > 0
    assert profile.latencies([job(), job()], 1) == [predicted, predicted]
    profile.measure([job()], 1, make_runtime("pytorch-eager", memory_format="channels_last"), rounds=3)
    assert profile.latency(job(), 1).samples == 3


def test_merging_takes_the_newer_and_reports_conflicts() -> None:
    old, new = (DeviceProfile.empty(make_runtime("pytorch-eager")) for _ in range(2))
    object.__setattr__(old.provenance, "date", "2020-01-01")
    same, other, alone = Linear(1, 2, 3), Linear(4, 5, 6), Linear(7, 8, 9)
    old.operations = {same: Latency(1.0, 0.1, 5), other: Latency(1.0, 0.1, 5), alone: Latency(1.0, 0.1, 5)}
    new.operations = {same: Latency(1.1, 0.1, 5), other: Latency(9.0, 0.1, 5)}
    for merged, conflicts in (old.merge(new), new.merge(old)):
        assert merged.operations == {**old.operations, **new.operations}
        assert conflicts == [f"{other}: 1 ms before, 9 ms now"]
    foreign = DeviceProfile.empty(make_runtime("pytorch-eager", memory_format="channels_last"))
    with pytest.raises(ConfigError, match="cannot be merged, one has memory_format = 'contiguous'"):
        old.merge(foreign)


@pytest.mark.parametrize("key", ["runtime", "device", "memory_format", "num_threads"])
def test_profiles_of_other_settings_are_refused_unless_forced(key: str) -> None:
    profile = DeviceProfile.empty(make_runtime("pytorch-eager"))
    here = DeviceProfile.empty(make_runtime("pytorch-eager")).provenance
    object.__setattr__(profile.provenance, key, "another")
    with pytest.raises(ConfigError, match=f"measured with {key} = 'another'.*latency.{key}"):
        profile.check_usable(here)
    profile.check_usable(here, force=True)
    object.__setattr__(profile.provenance, key, getattr(here, key))
    object.__setattr__(profile.provenance, "machine", "a phone")
    profile.check_usable(here)


def test_onnxruntime_times_every_operation_by_its_own_clock() -> None:
    pytest.importorskip("onnxruntime")
    runtime = make_runtime("onnxruntime", num_threads=1)
    operations = [o for o in small_design(0, quick=True) if not isinstance(o, Elementwise)][:24]
    with runtime.active():
        found = node_samples(operations, runtime, 2)
    assert found is not None
    assert [len(samples) for samples in found] == [2] * len(operations)
    assert all(ms > 0 for samples in found for ms in samples)


def test_measuring_a_complete_profile_again_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "design", lambda seed, quick: [])
    profile = DeviceProfile.empty(make_runtime("pytorch-eager"))
    profile.operations = measured(granularity_sweep())
    profile.fit(16, 0.0)
    before = profile.to_yaml()

    def refuse() -> None:
        raise AssertionError("it was saved")

    profiling.measure_device(profile, make_runtime("pytorch-eager"), Reporter(), refuse)
    assert profile.to_yaml() == before
