"""The executor against `conv2d` with the reconstructed weight, in float64."""

from __future__ import annotations

from itertools import permutations
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sekron_search.errors import StructureError
from sekron_search.kron.execute import convolve, execute, load_factor, store_weight
from sekron_search.kron.plan import ConvGeometry, best_plan, make_plan
from sekron_search.kron.structure import Structure
from tests.cases import STRUCTURES, random_factors
from tests.kron.test_structure import structures

PAIRS = st.tuples(st.integers(1, 4), st.integers(1, 4))
PADS = st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2)


def relative_error(structure: Structure, geometry: ConvGeometry, order: tuple[int, ...], *, seed: int = 0) -> float:
    generator = torch.Generator().manual_seed(seed)
    factors = random_factors(structure, groups=geometry.groups, seed=seed)
    weight = torch.cat([structure.reconstruct([a[g] for a in factors]) for g in range(geometry.groups)])
    bias = torch.randn(weight.shape[0], generator=generator, dtype=torch.float64)
    reach = [d * (k - 1) + 1 for d, k in zip(geometry.dilation, weight.shape[2:], strict=True)]
    size = (2, geometry.groups * weight.shape[1], reach[0] + 4, reach[1] + 5)
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    plan = make_plan(structure, geometry, order)
    stored = [store_weight(factors[step.factor], step) for step in plan.steps]
    expected = convolve(x, weight, bias, geometry)
    found = execute(plan, stored, x, bias)
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@settings(max_examples=500, deadline=None)
@given(structures(), PAIRS, PAIRS, PADS, st.integers(1, 3), st.integers(0, 2**16), st.data())
def test_executor_equals_conv2d(
    structure: Structure,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    groups: int,
    seed: int,
    data: st.DataObject,
) -> None:
    # Larger kernels than this only make the dense reference slow.
    if prod(structure.weight_shape[:2]) > 4096 or prod(structure.weight_shape[2:]) > 400:
        structure = Structure.build(
            [(min(f, 2), min(c, 2), min(h, 2), min(w, 2)) for f, c, h, w in structure.shapes],
            structure.carries,
            structure.rank_sizes,
        )
    order = tuple(data.draw(st.permutations(range(structure.num_factors))))
    geometry = ConvGeometry(stride, dilation, padding, groups)
    assert relative_error(structure, geometry, order, seed=seed) < 1e-12


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_order_of_every_family(name: str) -> None:
    structure = STRUCTURES[name]
    geometry = ConvGeometry((2, 1), (1, 2), ((1, 1), (2, 1)), 2)
    for order in permutations(range(structure.num_factors)):
        assert relative_error(structure, geometry, order) < 1e-12


@pytest.mark.parametrize("name", STRUCTURES)
def test_stored_weights_give_the_factors_back(name: str) -> None:
    structure = STRUCTURES[name]
    factors = random_factors(structure, groups=2)
    plan = best_plan(structure, ConvGeometry(groups=2), (8, 8))
    for step in plan.steps:
        factor = factors[step.factor]
        assert torch.equal(load_factor(store_weight(factor, step), step, factor.shape), factor)


def test_a_wrong_dilation_would_be_noticed() -> None:
    """Negative control: the same factors under another geometry give another output."""
    structure = STRUCTURES["Kronecker"]
    factors = [a[None] for a in random_factors(structure)]
    x = torch.randn(1, 6, 9, 9, dtype=torch.float64)

    def output(dilation: int) -> Tensor:
        plan = make_plan(structure, ConvGeometry(dilation=(dilation, dilation)), (0, 1))
        return execute(plan, [store_weight(factors[s.factor], s) for s in plan.steps], x)[..., :4, :4]

    assert not torch.allclose(output(1), output(2))


def test_a_plan_refuses_what_is_no_order() -> None:
    with pytest.raises(StructureError, match="expected an order"):
        make_plan(STRUCTURES["CP"], ConvGeometry(), (0, 0, 1, 2))


def test_best_plan_is_the_cheapest_of_all_orders() -> None:
    geometry = ConvGeometry(padding=((1, 1), (1, 1)))
    for structure in STRUCTURES.values():
        flops = [
            make_plan(structure, geometry, order).cost((16, 16)).flops
            for order in permutations(range(structure.num_factors))
        ]
        assert best_plan(structure, geometry, (16, 16)).cost((16, 16)).flops == min(flops)


def test_the_order_is_worth_two_orders_of_magnitude() -> None:
    structure = Structure.parse("64x1x1x1[a] * 1x64x1x1[a,b] * 1x1x3x1[b,c] * 1x1x1x3[c]; a=16, b=8, c=4")
    flops = [make_plan(structure, ConvGeometry(), o).cost((16, 16)).flops for o in permutations(range(4))]
    assert max(flops) > 100 * min(flops)


def test_chains_need_no_permutation() -> None:
    for name in ("channel SVD", "spatial SVD", "CP", "Tucker-2", "Tensor-Train"):
        assert best_plan(STRUCTURES[name], ConvGeometry(), (8, 8)).num_permutes == 0
