"""What a layer sees, for every kind of layer, against what the layer itself computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sekron_search import calibration
from sekron_search.calibration import Moments, collect_metrics, output_rows, unfold_input
from sekron_search.inspection import inspect_model
from sekron_search.kron import families as fam
from sekron_search.kron.dense import dense_weight, native_weight
from sekron_search.kron.metric import InputMetric
from sekron_search.kron.projection import project, reconstruct_batch
from sekron_search.kron.refine import refine
from sekron_search.model import LayerInfo, layer_like, layer_weight, replace_layers
from sekron_search.sequential import fit_sequentially
from tests.cases import LAYERS, layer_of

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def case(name: str) -> tuple[Any, Tensor, LayerInfo]:
    dense, x = layer_of(name)
    return dense, x, inspect_model(nn.Sequential(dense), x).layers[0]


def exact_metric(dense: nn.Module, x: Tensor, info: LayerInfo) -> InputMetric:
    columns = unfold_input(x, info, dense).double()
    second = columns @ columns.mT / columns.shape[-1]
    return InputMetric.damped(second, columns.mean(-1), damping=0.0)


@pytest.mark.parametrize("name", LAYERS)
def test_the_weight_times_the_columns_is_the_output(name: str) -> None:
    dense, x, info = case(name)
    columns = unfold_input(x, info, dense)
    found = dense_weight(dense).flatten(2) @ columns + dense.bias.reshape(info.geometry.groups, -1, 1)
    torch.testing.assert_close(found, output_rows(dense(x), info), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_the_weight_goes_back_into_the_dense_layer(name: str) -> None:
    dense, _, info = case(name)
    assert dense_weight(dense).shape == (info.geometry.groups, *info.weight_shape)
    assert torch.equal(native_weight(dense_weight(dense), info.kind), dense.weight)


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_output_error_is_what_the_metric_says(name: str) -> None:
    """The metric's norm against the layer itself, on the inputs that the metric came from."""
    dense, x, info = case(name)
    other, _, _ = case(name)
    dense.bias = other.bias = None
    expected = float((dense(x) - other(x)).norm() / dense(x).norm())
    weights = dense_weight(dense), dense_weight(other)
    assert exact_metric(dense, x, info).rel_error(*weights) == pytest.approx(expected, rel=1e-5)
    layers = inspect_model(nn.Sequential(dense), x).layers
    collected = collect_metrics(nn.Sequential(dense), layers, [(x,)], damping=0.0)["0"]
    assert collected.rel_error(*weights) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", LAYERS)
def test_refinement_lowers_the_error_of_the_replaced_layers_output(name: str) -> None:
    dense, x, info = case(name)
    structure = fam.spatial_svd(info.weight_shape, 1)
    weight = dense_weight(dense).detach().double()
    metric = exact_metric(dense, x, info)
    start = project(weight, structure)
    dense.bias = None

    def error(factors: Any) -> float:
        layer = layer_like(nn.Sequential(dense), "0", structure)
        layer.set_factors(factors)
        return float(((layer(x) - dense(x)).norm() / dense(x).norm()).detach())

    refined = refine(structure, start, weight, metric, steps=30)
    assert error(refined.factors) == pytest.approx(refined.rel_error, rel=1e-3)
    before = metric.rel_error(weight, reconstruct_batch(structure, start.factors))
    assert error(start.factors) == pytest.approx(before, rel=1e-3)
    assert refined.rel_error <= before


@pytest.mark.parametrize("name", LAYERS)
def test_fitting_in_sequence_keeps_the_mean_and_lowers_the_error(name: str) -> None:
    dense, x, info = case(name)
    assert info.output_shift == "correctable"
    original = nn.Sequential(dense)
    layer = layer_like(original, "0", fam.spatial_svd(info.weight_shape, 1))
    layer.set_factors(project(dense_weight(dense), layer.structure).factors)
    compressed = replace_layers(original, {"0": layer})
    x = x + 0.5  # a mean to be made up for
    before = float((compressed(x) - original(x)).detach().norm())
    fit_sequentially(compressed, original, [info], [(x,)], steps=30)
    rows = [output_rows(network(x), info).mean(-1) for network in (compressed, original)]
    torch.testing.assert_close(*rows, rtol=1e-3, atol=1e-4)
    assert float((compressed(x) - original(x)).detach().norm()) < before


def test_output_sizes_may_differ_between_batches() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.up(x[..., ::2, ::2], output_size=x.shape[2:])
            return found

    original, batches = Net(), [(torch.randn(4, 4, size, size),) for size in (8, 9)]
    info = inspect_model(original, batches[0]).layers[0]
    layer = layer_like(original, "up", fam.dense(info.weight_shape))
    start = dense_weight(original.up).detach()
    layer.set_factors([start + 0.1 * torch.randn_like(start)])
    compressed = replace_layers(original, {"up": layer})
    metric = collect_metrics(original, [info], batches)["up"]
    assert metric.rel_error(start, start) == 0.0
    fit_sequentially(compressed, original, [info], batches, steps=1)
    for inputs in batches:
        assert compressed(*inputs).shape == original(*inputs).shape
        rows = output_rows(original(*inputs), info)
        columns = unfold_input(inputs[0][..., ::2, ::2], info, original.up, original(*inputs))
        bias = original.up.bias
        assert bias is not None
        torch.testing.assert_close(start.flatten(2) @ columns + bias[:, None], rows, rtol=1e-4, atol=1e-5)


def test_few_samples_damp_the_moment() -> None:
    """More unknowns than samples: fits to a moment that shows a few directions only must not run away in the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8, bias=False))
    info = inspect_model(model, torch.randn(2, 64)).layers[0]
    few = collect_metrics(model, [info], [(torch.randn(16, 64),)])[info.name]
    many = collect_metrics(model, [info], [(torch.randn(8192, 64),)])[info.name]
    weight = layer_weight(model, info).double()
    structure = fam.channel_svd(info.weight_shape, 4)
    start = project(weight, structure)
    plain = many.rel_error(weight, reconstruct_batch(structure, start.factors))
    fitted = refine(structure, start, weight, few)
    assert many.rel_error(weight, reconstruct_batch(structure, fitted.factors)) < 1.2 * plain


@torch.no_grad()
@pytest.mark.parametrize("name", ["conv2d", "linear", "conv_transpose2d"])
def test_inputs_unfolded_in_pieces_give_the_same_moments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, x, info = case(name)
    rows = output_rows(dense(x), info)
    found = []
    for most in (1 << 26, 1):
        monkeypatch.setattr(calibration, "MAX_UNFOLDED", most)
        moments = Moments(info, seed=0)
        moments.add(x, dense, output=dense(x), rows=rows)
        found.append(moments.collected())
    for whole, pieces in zip([*found[0][0], *found[0][1]], [*found[1][0], *found[1][1]], strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1.0, 300.0), (1e-21, 0.0), (1e18, 0.0)])
def test_the_best_weight_for_its_own_outputs_is_the_weight_itself(scale: float, shift: float) -> None:
    """Large means and extreme scales of the inputs cost hardly a digit."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 8)
    info = inspect_model(nn.Sequential(layer), torch.randn(2, 64)).layers[0]
    moments = Moments(info, seed=0)
    for _ in range(4):
        x = (torch.randn(1024, 64) + shift) * scale
        exact = x.double() @ layer.weight.double().mT
        moments.add(x, layer, rows=output_rows(exact, info))
    weight = dense_weight(layer).double()
    best = moments.best_weight(weight)
    assert float((best - weight).norm() / weight.norm()) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("value", [0.0, -1.0, 3.7])
def test_a_group_whose_input_is_constant_keeps_its_weight(value: float) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 3, groups=4, bias=False)
    x = torch.randn(64, 4, 6, 6)
    x[:, 0] = value
    info = inspect_model(nn.Sequential(layer, nn.BatchNorm2d(4)), x).layers[0]
    moments = Moments(info, seed=0)
    moments.add(x, layer, rows=1.5 * output_rows(layer(x), info))
    weight = dense_weight(layer).double()
    best = moments.best_weight(weight)
    torch.testing.assert_close(best[0], weight[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(best[1:], 1.5 * weight[1:], rtol=0.05, atol=0.02)
    assert bool(torch.isfinite(moments.metric(None).moment).all())
