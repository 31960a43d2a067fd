from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sekron_search.curvature import output_curvature
from sekron_search.inspection import inspect_model
from sekron_search.kron.conv import KroneckerConv
from sekron_search.kron.families import channel_svd
from sekron_search.model import layer_like, replace_layers
from sekron_search.sequential import fit_sequentially

IMAGES = torch.randn(256, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Parallel(nn.Module):
    """Two convolutions of one input, added."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(4, 6, 3, bias=False), nn.Conv2d(4, 6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        s = self.a(x)
        sum_: Tensor = s + self.b(x)
        return sum_


class Sequence(nn.Sequential):
    """Two convolutions, one after the other."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 5, 3))


def fitted_error(model: nn.Module, name: str, *, curvature: bool = False) -> tuple[float, float]:
    """Error of the output with the layer at rank 2, before and after the sequential fit."""
    layers = inspect_model(model.eval(), IMAGES).layers
    info = next(i for i in layers if i.name == name)
    structure = channel_svd(info.weight_shape, 2)
    dense = model.get_submodule(name)
    assert isinstance(dense, nn.Conv2d)
    compressed = replace_layers(model, {name: KroneckerConv.from_conv(dense, structure)}).eval()
    found = output_curvature(model, layers, [(IMAGES,)], classes=True) if curvature else None

    def error() -> float:
        with torch.no_grad():
            expected, got = model(IMAGES), compressed(IMAGES)
        return float((got - expected).norm() / expected.norm())

    before = error()
    fit_sequentially(compressed, model, layers, [(IMAGES,)], steps=20, curvature=found)
    return before, error()


def test_a_branch_makes_up_for_the_error_of_what_it_is_added_to() -> None:
    """The second convolution sees what the first one saw, so it can take up the whole error."""
    before, after = fitted_error(Parallel(), "a")
    assert before > 0.1
    assert after < 0.02 * before


@pytest.mark.parametrize("curvature", [False, True])
def test_a_dense_layer_makes_up_for_what_was_replaced_before_it(curvature: bool) -> None:
    before, after = fitted_error(Sequence(), "0", curvature=curvature)
    assert after < 0.95 * before


def test_layers_before_the_first_replaced_one_stay() -> None:
    model = Sequence().eval()
    layers = inspect_model(model, IMAGES).layers
    structure = channel_svd(layers[1].weight_shape, 2)
    compressed = replace_layers(model, {"1": layer_like(model, "1", structure)}).eval()
    fit_sequentially(compressed, model, layers, [(IMAGES,)], steps=5)
    assert torch.equal(compressed.get_submodule("0").weight, model[0].weight)  # type: ignore[arg-type]
