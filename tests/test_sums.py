from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sekron_search.inspection import inspect_model
from sekron_search.sums import observe, scale_at_sum

IMAGES = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A convolution and a batch-norm, and what a test does with their results."""

    def __init__(self, end: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.end = end
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
            self.norm.running_var.fill_(4.0)  # type: ignore[union-attr]
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.end(x, y, self.norm(y))


def scale(end: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor | None:
    model = Block(end)
    with torch.no_grad():
        return scale_at_sum(model, (IMAGES,), inspect_model(model, IMAGES).layers[0])


def in_place(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    z += x
    return z.relu_()


@pytest.mark.parametrize("end", [lambda x, y, z: torch.relu(z + x), lambda x, y, z: x + z, in_place])
def test_the_scale_of_a_residual_sum_is_the_batch_norms(end: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    found = scale(end)
    assert found is not None
    expected = torch.tensor([[0.5, -1.0, 0.25, 1.5]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "end",
    [
        lambda x, y, z: z,
        lambda x, y, z: torch.relu(z) + x,
        lambda x, y, z: torch.cat([z + x, z], 1),
        lambda x, y, z: z + y,
        lambda x, y, z: z + x[:, :1],
        lambda x, y, z: z + 1.0,
    ],
    ids=["no sum", "a nonlinearity between", "another use", "with itself", "of other shapes", "with a number"],
)
def test_other_sums_do_not_count(end: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    assert scale(end) is None


def test_what_is_observed_is_what_the_network_computes() -> None:
    model = Block(in_place)
    with torch.no_grad():
        seen = observe(model, (IMAGES,), "conv", to_sum=True)
        short = observe(model, (IMAGES,), "conv", to_sum=False)
        output = model.conv(IMAGES)
    assert seen.other is IMAGES
    assert short.other is None
    for found in (seen, short):
        torch.testing.assert_close(found.entered, IMAGES)
        torch.testing.assert_close(found.output, output)


@pytest.mark.parametrize("dead", ["norm", "conv"])
def test_a_branch_that_gives_nothing_makes_up_for_nothing(dead: str) -> None:
    """Zero-initialised residual branches: nothing of the layer arrives at the sum."""
    model = Block(lambda x, y, z: z + x)
    with torch.no_grad():
        getattr(model, dead).weight.zero_()
        assert scale_at_sum(model, (IMAGES,), inspect_model(model, IMAGES).layers[0]) is None
