from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

from sekron_search.costs import layers
from sekron_search.costs.analytic import layer_cost
from sekron_search.costs.layers import random_input, random_layer, traced_layer
from sekron_search.costs.measure import Latency, measure_callables, measure_networks
from sekron_search.costs.memory import peak_memory
from sekron_search.costs.profile import DeviceProfile, Measurement, Provenance, layer_key
from sekron_search.costs.traced import NormStatistics, reestimate_batch_norm, traced_flops
from sekron_search.errors import ConfigError
from sekron_search.inspection import inspect_model
from sekron_search.kron import families as fam
from sekron_search.kron.conv import KroneckerConv
from sekron_search.kron.linear import KroneckerLinear
from sekron_search.kron.steps import Schedule
from sekron_search.kron.structure import Structure
from sekron_search.model import copy_model, layer_like, replace_layers
from sekron_search.runtimes.base import threads
from sekron_search.runtimes.registry import make_runtime
from sekron_search.scoring import candidates
from sekron_search.search.space import SearchSpace
from tests.cases import LAYERS, SHAPE, STRUCTURES, layer_of, small_net

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

EAGER = make_runtime("pytorch-eager")


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("groups", [1, 2])
def test_plan_counts_what_fvcore_counts(name: str, groups: int) -> None:
    structure = STRUCTURES[name]
    conv = nn.Conv2d(SHAPE[1] * groups, SHAPE[0] * groups, 3, stride=2, padding=1, groups=groups)
    layer = KroneckerConv.from_conv(conv, structure, input_size=(12, 10))
    x = torch.randn(3, conv.in_channels, 12, 10)
    analysis = FlopCountAnalysis(layer, x)
    assert analysis.total() == 3 * layer.plan.cost((12, 10)).flops
    assert set(analysis.unsupported_ops()) <= {"aten::add_"}  # the bias of a folded last step
    weights = sum(p.numel() for n, p in layer.named_parameters() if n != "bias")
    assert weights == structure.num_params * groups


SPACE = SearchSpace(families=("sekron", "tucker2", "tt", "kronecker_cp"), max_factors=3, rank_levels=2, max_fits=6)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYERS)
def test_costs_of_every_kind_of_layer_are_fvcores(name: str) -> None:
    """Of the dense layer and of options of it, some of them padded to more channels: flops, params and peak."""
    dense, x = layer_of(name)
    network = nn.Sequential(dense)
    info = inspect_model(network, x).layers[0]
    whole = layer_cost(fam.dense(info.weight_shape), info)
    assert traced_flops(network, x).total == whole.flops
    found = candidates(info, SPACE)
    for candidate in found[:: max(1, len(found) // 20)]:
        layer = layer_like(network, "0", candidate.structure, schedule=candidate.cost.schedule)
        replaced = replace_layers(network, {"0": layer})
        assert traced_flops(replaced, x).total == candidate.cost.flops < whole.flops
        assert sum(p.numel() for p in layer.weights) == candidate.cost.params < whole.params
        traced, planned = peak_memory(replaced, x).peak, 4 * len(x) * candidate.cost.peak_elements
        # What padding by a mode, or unevenly, copies is not in the plan; repeated weights are not either.
        copied = 0 if name not in ("conv2d", "conv2d, same") else 3 * 4 * x.numel()
        assert planned <= traced <= planned + copied + 4 * 8 * candidate.cost.params * 24


@pytest.mark.parametrize("kind", ["conv2d", "linear"])
def test_rebuilt_weights_count_as_dense_layers(kind: str) -> None:
    if kind == "conv2d":
        dense: nn.Module = nn.Conv2d(6, 8, 3)
        layer: nn.Module = KroneckerConv.from_conv(dense, fam.channel_svd(SHAPE, 3), execution="dense")  # type: ignore[arg-type]
        x = torch.randn(2, 6, 9, 9)
    else:
        dense = nn.Linear(6, 8)
        layer = KroneckerLinear.from_linear(dense, fam.channel_svd((8, 6, 1, 1), 3), execution="dense")
        x = torch.randn(2, 6)
    assert traced_flops(layer, x).total == traced_flops(dense, x).total


def test_plan_counts_linear_layers_as_fvcore_does() -> None:
    structure = fam.sekron([(2, 3, 1, 1), (5, 4, 1, 1)], [2])
    layer = KroneckerLinear.from_linear(nn.Linear(12, 10), structure)
    analysis = FlopCountAnalysis(layer, torch.randn(3, 7, 12))
    assert analysis.total() == 21 * layer.plan.cost((1, 1)).flops
    assert set(analysis.unsupported_ops()) <= {"aten::add_"}


@pytest.mark.parametrize("name", STRUCTURES)
def test_peak_of_the_plan_is_what_is_alive(name: str) -> None:
    structure = STRUCTURES[name]
    conv = nn.Conv2d(SHAPE[1], SHAPE[0], 3, padding=1)
    layer = KroneckerConv.from_conv(conv, structure, input_size=(24, 24))
    traced = peak_memory(layer, torch.randn(4, SHAPE[1], 24, 24)).peak
    planned = 4 * 4 * layer.plan.cost((24, 24)).peak_elements
    # Weights that are repeated for the groups that share them are alive too; they are small.
    assert planned <= traced <= planned + 4 * 8 * structure.num_params * 24


def test_peak_of_a_chain_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 1, 1))
    x = torch.randn(1, 2, 10, 10)
    found = peak_memory(model, x, ("0", "2"))
    # The input is held by the caller; at the worst it, the first output and its rectified copy are alive.
    assert found.peak == 4 * 100 * (2 + 8 + 8)
    assert found.outside["0"] == 0
    assert found.outside["2"] == 4 * 100 * 2


def test_traced_flops_are_per_sample_and_say_what_was_not_counted() -> None:
    model = small_net()
    one, many = traced_flops(model, torch.randn(1, 3, 8, 8)), traced_flops(model, torch.randn(6, 3, 8, 8))
    assert one.total == many.total
    assert one.uncounted == {"aten::add": 1, "aten::mean": 1}
    dense = sum(
        layer_cost(fam.dense(info.weight_shape), info).flops
        for info in inspect_model(model, torch.randn(1, 3, 8, 8)).layers
    )
    assert one.total > dense  # batch-norm is counted as well


def test_batch_norm_statistics_are_those_of_the_data() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5))
    data = [(torch.randn(16, 3, 4, 4) * 2 + 1,) for _ in range(3)]
    reestimate_batch_norm(model, data)
    pixels = torch.cat([x for (x,) in data]).permute(1, 0, 2, 3).flatten(1)
    norm = model[0]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, pixels.mean(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.running_var, pixels.var(1, unbiased=False), rtol=1e-4, atol=1e-4)
    assert not any(module.training for module in model.modules())


def statistics_of(model: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    norm = model.get_submodule(name)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def test_batch_norm_statistics_change_by_as_much_as_the_network_does() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3)
    model = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    for name in ("1", "4"):
        mean, var = statistics_of(model, name)
        mean.copy_(torch.randn(4))
        var.copy_(torch.rand(4) + 0.5)
    batches = [(torch.randn(8, 3, 6, 6),) for _ in range(3)]
    trained = NormStatistics(model, batches)
    same = copy_model(model)
    reestimate_batch_norm(same, batches, original=trained)
    for name, tensor in model.state_dict().items():
        assert torch.equal(same.state_dict()[name], tensor) or name.endswith("num_batches_tracked")
    # Outputs of the first layer twice as large, and shifted: so are the statistics, wherever they came from.
    seen = copy_model(model)
    reestimate_batch_norm(seen, batches)
    before = {name: [t.clone() for t in statistics_of(model, name)] for name in ("1", "4")}
    with torch.no_grad():
        assert conv.bias is not None
        conv.weight.mul_(2.0)
        conv.bias.copy_(2 * conv.bias + 1)
    there = copy_model(model)
    reestimate_batch_norm(there, batches)
    reestimate_batch_norm(model, batches, original=trained)
    for name, (mean, var) in before.items():
        (shown, shown_var), (now, now_var) = (statistics_of(m, name) for m in (seen, there))
        new, new_var = statistics_of(model, name)
        torch.testing.assert_close(new, mean + now - shown)
        torch.testing.assert_close(new_var, var * now_var / shown_var)
    torch.testing.assert_close(statistics_of(model, "1")[1], 4 * before["1"][1])
    assert not any(m.training for m in model.modules())


def test_measurements_tell_slow_from_fast() -> None:
    a, b = torch.randn(8, 8), torch.randn(700, 700)
    found = measure_callables({"fast": lambda: a @ a, "slow": lambda: b @ b}, rounds=5)
    assert found["slow"].median_ms > 3 * found["fast"].median_ms
    assert found["fast"].samples == 5


def test_measuring_keeps_threads() -> None:
    model = small_net()
    before = torch.get_num_threads()
    runtime = make_runtime("pytorch-eager", num_threads=2)
    assert measure_networks({"net": model}, torch.randn(2, 3, 8, 8), runtime, rounds=2)["net"].median_ms > 0
    assert torch.get_num_threads() == before
    with threads(2):
        assert torch.get_num_threads() == 2


def test_profile_round_trip(tmp_path: Path) -> None:
    info = inspect_model(small_net(), torch.randn(2, 3, 8, 8)).layers[1]
    structures = [fam.dense(info.weight_shape), fam.spatial_svd(info.weight_shape, 2)]
    profile = DeviceProfile(Provenance.here(EAGER))
    profile.measure(
        [(info, s, Schedule(tuple(range(s.num_factors))), "factored") for s in structures], 4, EAGER, rounds=3
    )
    assert len(profile.layers) == 2
    path = tmp_path / "profile.yaml"
    path.write_text(profile.to_yaml())
    again = DeviceProfile.load(path)
    assert again.provenance == profile.provenance
    key = layer_key(info, structures[1], Schedule((0, 1)), "factored", 4)
    assert again.layers[key].median_ms == pytest.approx(profile.layers[key].median_ms, rel=1e-3)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_every_kind_are_measured(name: str) -> None:
    """The layers that are timed are those of the network, in geometry and in cost."""
    dense, x = layer_of(name)
    info = inspect_model(nn.Sequential(dense), x).layers[0]
    found = candidates(info, SPACE)[0]
    jobs: list[Measurement] = [
        (info, fam.dense(info.weight_shape), Schedule((0,)), "factored"),
        (info, found.structure, found.cost.schedule, "factored"),
        (info, found.structure, found.cost.schedule, "dense"),
    ]
    sample = random_input(info, len(x))
    for job in jobs:
        flops = layer_cost(job[1], info, job[3]).flops
        assert traced_flops(random_layer(*job), sample).total * len(sample) == flops * len(x)
    measured = DeviceProfile(Provenance.here(EAGER))
    measured.measure(jobs, len(x), EAGER, rounds=1)
    assert {key.split()[0] for key in measured.layers} == {info.kind}
    assert len(measured.layers) == 2  # a rebuilt weight runs like the dense layer's


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("format: 99", "expected key 'format' to be 2, got 99"),
        ("[1, 2", "not YAML"),
        ("format: 2\nprovenance: {}\nlayers: {}", "expected keys 'provenance', 'fuses_elementwise'"),
    ],
)
def test_bad_profiles_say_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        DeviceProfile.load(path)


def test_profiles_of_other_thread_counts_are_refused() -> None:
    profile = DeviceProfile(
        Provenance.here(make_runtime("pytorch-eager", num_threads=3)), layers={"x": Latency(1.0, 0.1, 3)}
    )
    with pytest.raises(ConfigError, match="num_threads = 3, this run uses 1"):
        profile.check_usable(Provenance.here(make_runtime("pytorch-eager", num_threads=1)))


def test_batch_norms_that_are_unused_or_reused_keep_their_statistics() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.unused, self.twice, self.last = (nn.BatchNorm2d(3) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.last(self.twice(self.twice(self.first(x))))
            return out

    batches = [(3 + 2 * torch.randn(16, 3, 4, 4),) for _ in range(3)]
    model = Net()
    reestimate_batch_norm(model, batches, until="last")
    fresh = torch.zeros(3)
    for norm, changed in ((model.first, True), (model.unused, False), (model.twice, False), (model.last, False)):
        assert norm.running_mean is not None
        assert torch.equal(norm.running_mean, fresh) is not changed
    torch.testing.assert_close(model.first.running_mean, torch.cat([b for (b,) in batches]).mean((0, 2, 3)))
    reestimate_batch_norm(model, batches)
    assert model.last.running_mean is not None
    assert not torch.equal(model.last.running_mean, fresh)
    assert not model.training


def test_a_norm_that_runs_again_after_a_layer_keeps_its_statistics() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once, self.twice, self.layer = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.twice(self.layer(self.twice(self.once(x))))
            return out

    batches = [(3 + 2 * torch.randn(16, 3, 4, 4),) for _ in range(3)]
    model = Net()
    trained = NormStatistics(model, batches)
    with torch.no_grad():
        batches = [(2 * x,) for (x,) in batches]
    reestimate_batch_norm(model, batches, original=trained, until="layer")
    assert not torch.equal(statistics_of(model, "once")[0], torch.zeros(3))
    assert torch.equal(statistics_of(model, "twice")[0], torch.zeros(3))


def test_a_padded_copy_of_the_input_is_let_go_when_it_has_been_read() -> None:
    structure = Structure.parse("4x7x3x1[a] * 4x2x1x3[a]; a=2")
    layer = KroneckerConv.from_conv(nn.Conv2d(13, 16, 3, padding=1), structure).eval()
    x = torch.randn(1, 13, 32, 32)
    with torch.no_grad():
        layer(x)  # weights are made ready
    predicted = layer.plan.cost((32, 32), (16, 13)).peak_elements * x.element_size()
    assert peak_memory(nn.Sequential(layer), x).peak == predicted


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv_transpose2d"])
def test_layers_are_timed_in_the_precision_of_their_weights(name: str) -> None:
    module, x = layer_of(name)
    keys = []
    for dtype in (torch.float32, torch.bfloat16):
        model: nn.Module = nn.Sequential(module).to(dtype)
        info = inspect_model(model, x.to(dtype)).layers[0]
        structure = fam.channel_svd(info.weight_shape, 2)
        for job in ((info, structure, Schedule((0, 1)), "factored"), (info, structure, Schedule((0, 1)), "dense")):
            given = random_input(info, len(x))
            with torch.no_grad():
                assert random_layer(*job)(given).dtype == given.dtype == dtype
            assert bool(traced_layer(job, len(x), "contiguous").unknown) == (dtype != torch.float32)
        keys.append(layer_key(info, structure, Schedule((0, 1)), "factored", len(x)))
    assert "float32" not in keys[0]
    assert keys[1].partition(" | ")[0] == keys[0].partition(" | ")[0] + " bfloat16"


def test_chunks_of_options_are_compared_through_the_layer_that_takes_part_in_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A machine that becomes slower from chunk to chunk does not make later options look slower."""
    info = inspect_model(small_net(), torch.randn(2, 3, 8, 8)).layers[1]
    structures = [fam.dense(info.weight_shape), *(fam.spatial_svd(info.weight_shape, r) for r in range(1, 6))]
    jobs: list[Measurement] = [(info, s, Schedule(tuple(range(s.num_factors))), "factored") for s in structures]
    slowness = iter([1.0, 2.0, 4.0])

    def timed(calls: dict[str, object], **options: object) -> dict[str, Latency]:
        factor = next(slowness)  # of the name's present value
        return {key: Latency(factor * (1.0 if "schedule" not in key else 0.5), 0.1 * factor, 3) for key in calls}

    monkeypatch.setattr(layers, "CHUNK", 2)
    monkeypatch.setattr(layers, "measure_callables", timed)
    profile = DeviceProfile(Provenance.here(EAGER))
    profile.measure(jobs, 4, EAGER)
    assert sorted(latency.median_ms for latency in profile.layers.values()) == [0.5] * 5 + [1.0]
    assert {latency.noise_ms for latency in profile.layers.values()} == {0.1}
    # Later, on a machine that is eight times slower by then: still compared with the layer as it was first measured.
    slowness = iter([8.0])
    more = fam.spatial_svd(info.weight_shape, 6)
    profile.measure([(info, more, Schedule((0, 1)), "factored")], 4, EAGER)
    assert profile.layers[layer_key(info, more, Schedule((0, 1)), "factored", 4)].median_ms == 0.5
