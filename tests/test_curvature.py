from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sekron_search.curvature import output_curvature
from sekron_search.errors import DataError
from sekron_search.inspection import inspect_model

ROWS = torch.randn(1024, 4, generator=torch.Generator().manual_seed(0))


def linear_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).eval()


def curvature(model: nn.Module, inputs: Tensor, *, classes: bool) -> dict[str, Tensor]:
    return output_curvature(model, inspect_model(model, inputs).layers, [(inputs,)], classes=classes)


@pytest.mark.parametrize("classes", [True, False])
def test_curvature_of_a_linear_network_is_known(classes: bool) -> None:
    model = linear_net()
    found = curvature(model, ROWS, classes=classes)
    with torch.no_grad():
        p = torch.softmax(model(ROWS), 1).double()
    hessian = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0) if classes else torch.eye(3).double()
    weight = model.get_parameter("1.weight").detach().double()
    for name, expected in (("0", weight.mT @ hessian @ weight), ("1", hessian)):
        assert float((found[name][0] - expected).norm() / expected.norm()) < 0.1


def test_in_place_activations_and_frozen_parameters_are_no_hindrance() -> None:
    images = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(96, 3)).eval()
    plain = curvature(model, images, classes=True)
    frozen = curvature(model.requires_grad_(False), images, classes=True)
    assert plain["0"].shape == (2, 3, 3)
    assert plain["3"].shape == (1, 3, 3)
    for name, value in plain.items():
        torch.testing.assert_close(value, frozen[name])
        assert all(p.grad is None for p in model.parameters())


class _Detach(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        raise RuntimeError("no backward here")


class _Break(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _NoBackward.apply(x)  # type: ignore[no-untyped-call]
        return result


def test_a_network_without_gradients_has_no_curvature() -> None:
    assert curvature(nn.Sequential(*linear_net(), _Detach()), ROWS, classes=True) == {}


def test_a_network_that_cannot_be_differentiated_is_refused() -> None:
    with pytest.raises(DataError, match=r"no backward here; set calibration\.curvature to false"):
        curvature(nn.Sequential(*linear_net(), _Break()), ROWS, classes=True)
