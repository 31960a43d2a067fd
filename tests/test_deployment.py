"""Deployed networks do what the compressed ones do, in plain PyTorch, with batch-norms folded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sekron_search
from sekron_search.deployment import deploy
from sekron_search.errors import DataError
from sekron_search.inspection import absorbing_norms
from sekron_search.kron import families as fam
from sekron_search.kron.dense import dense_weight
from sekron_search.kron.layer import Execution
from sekron_search.kron.plain import fold_norm
from sekron_search.model import REPLACEMENTS, replace_layers
from tests.cases import (
    LAYERS,
    STRUCTURES,
    ImageToImage,
    SignalNet,
    VolumeNet,
    layer_of,
    random_factors,
    small_net,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")


class Normed(nn.Module):
    """A layer and the batch-norm after it."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.layer(x))
        return out


def trained_norm(axes: int, channels: int) -> nn.Module:
    """A batch-norm whose statistics, scale and shift all matter."""
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[axes](channels)
    for tensor in (norm.running_var, norm.running_mean, norm.weight, norm.bias):
        assert tensor is not None
        nn.init.uniform_(tensor, 0.5, 2.0)
    return norm.eval()


def compressed(model: nn.Module, execution: Execution = "factored") -> nn.Module:
    """The network with every layer replaced by a channel SVD of full rank but one."""
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if type(module) in REPLACEMENTS:
            f, c, *kernel = dense_weight(module).shape[1:]
            structure = fam.channel_svd((f, c, *kernel), max(1, min(f, c) - 1))
            layers[name] = REPLACEMENTS[type(module)]._fitted(module, structure, None, execution=execution)
    return replace_layers(model, layers)


def names_of_classes(model: nn.Module) -> set[str]:
    return {type(module).__module__.partition(".")[0] for module in model.modules()}


def norms_in(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("family", STRUCTURES)
@pytest.mark.parametrize("bias", [True, False])
def test_every_family(family: str, bias: bool) -> None:
    structure = STRUCTURES[family]
    dense = nn.Conv2d(6, 8, 3, stride=(2, 1), padding=1, bias=bias).double()
    layer = REPLACEMENTS[nn.Conv2d].like(dense, structure, execution="factored")
    layer.set_factors(random_factors(structure, groups=1))
    model = Normed(layer, trained_norm(2, 8)).double().eval()
    x = torch.randn(3, 6, 9, 8, dtype=torch.float64)
    deployed = deploy(model.float(), x.float())
    with torch.no_grad():
        expected, found = model(x.float()), deployed(x.float())
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()
    assert "sekron_search" not in names_of_classes(deployed.layer)  # type: ignore[arg-type]


@pytest.mark.parametrize("execution", ["factored", "dense"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer(name: str, execution: Execution) -> None:
    module, x = layer_of(name)
    model = compressed(nn.Sequential(module), execution).eval()
    with torch.no_grad():
        expected, found = model(x), deploy(model, x)(x)
    assert found.shape == expected.shape
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()
    assert names_of_classes(deploy(model, x)) == {"torch"}


@pytest.mark.parametrize("name", LAYERS)
def test_dense_layers_take_up_batch_norms_exactly(name: str) -> None:
    module, x = layer_of(name)
    module, x = module.double(), x.double()
    axes = max(1, x.dim() - 2)
    if isinstance(module, nn.Linear):
        x = x[:, 0]
    norm = trained_norm(axes, module(x).shape[1]).double()
    with torch.no_grad():
        assert torch.allclose(fold_norm(module, norm)(x), norm(module(x)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (small_net, (2, 3, 8, 8)),
        (ImageToImage, (2, 3, 8, 8)),
        (SignalNet, (2, 3, 16)),
        (VolumeNet, (2, 1, 4, 6, 6)),
    ],
)
def test_whole_networks(build: Any, shape: tuple[int, ...]) -> None:
    original = build()
    x = torch.randn(shape)
    for model in (original, compressed(original)):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        deployed = deploy(model, x)
        assert not deployed.training
        assert norms_in(deployed) == []
        assert norms_in(model) != []
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_norm_that_something_else_sees_stays() -> None:
    class Both(Normed):
        def forward(self, x: Tensor) -> Any:
            y = self.layer(x)
            return self.norm(y), y

    model = Both(nn.Conv2d(3, 4, 3), trained_norm(2, 4))
    x = torch.randn(2, 3, 8, 8)
    assert absorbing_norms(model, x) == {}
    assert norms_in(deploy(model, x)) == ["norm"]


def test_a_norm_over_another_axis_than_the_layers_channels_stays() -> None:
    model = Normed(nn.Linear(6, 5), trained_norm(1, 5))
    assert absorbing_norms(model, torch.randn(4, 6)) == {"layer": "norm"}
    assert absorbing_norms(model, torch.randn(4, 5, 6)) == {}


def test_a_norm_with_a_forward_of_its_own_stays() -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    x = torch.randn(2, 3, 8, 8)
    assert norms_in(deploy(Normed(nn.Conv2d(3, 4, 3), Doubled(4)), x)) == ["norm"]
    hooked = Normed(nn.Conv2d(3, 4, 3), trained_norm(2, 4))
    hooked.norm.register_forward_hook(lambda *_: None)
    assert norms_in(deploy(hooked, x)) == ["norm"]


def test_a_wrong_fold_is_caught_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(dense: Any, norm: Any) -> nn.Module:
        folded: Any = fold_norm(dense, norm)
        if dense.in_channels == 12:
            folded.bias.data += 0.01
        return folded  # type: ignore[no-any-return]

    monkeypatch.setattr("sekron_search.deployment.fold_norm", broken)
    with pytest.raises(DataError, match="first at layer 'conv3'"):
        deploy(small_net(), torch.randn(2, 3, 8, 8))


def test_tolerance_is_the_callers() -> None:
    with pytest.raises(DataError, match=r"more than the tolerance 0\.0e\+00"):
        deploy(small_net(), torch.randn(2, 3, 8, 8), tolerance=0.0)


def test_runs_where_this_package_is_not(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3))
    deployed = sekron_search.deploy(compressed(model), x)
    with torch.no_grad():
        torch.save((deployed, x, deployed(x)), tmp_path / "network.pt")
    code = """
import sys, torch
sys.modules["sekron_search"] = None
model, x, expected = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    assert torch.allclose(model(x), expected, atol=1e-6)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "network.pt")], check=True, timeout=120)
