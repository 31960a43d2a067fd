"""The executor against `conv2d` with the reconstructed weight, in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sekron_search.errors import StructureError
from sekron_search.kron.execute import convolve, execute, execute_transposed, load_factor, ready_weights, store_weight
from sekron_search.kron.geometry import ConvGeometry
from sekron_search.kron.plan import best_plan, make_plan
from sekron_search.kron.steps import Schedule
from sekron_search.kron.structure import Structure
from tests.cases import SHAPE, STRUCTURES, STRUCTURES_3D, random_factors
from tests.kron.test_structure import structures

ONE_TO_FOUR = st.integers(1, 4)
ENDS = st.tuples(st.integers(0, 3), st.integers(0, 3))


def schedules(structure: Structure) -> st.SearchStrategy[Schedule]:
    factors = range(structure.num_factors)
    folded = st.sets(st.sampled_from(factors)).map(lambda chosen: tuple(sorted(chosen)))
    return st.builds(Schedule, st.permutations(factors).map(tuple), folded)


def all_or_nothing_folded(structure: Structure) -> list[Schedule]:
    orders = list(permutations(range(structure.num_factors)))
    return [Schedule(order, folded) for order in orders for folded in ((), tuple(sorted(order)))]


def geometries(axes: int) -> st.SearchStrategy[ConvGeometry]:
    numbers, ends = st.tuples(*[ONE_TO_FOUR] * axes), st.tuples(*[ENDS] * axes)
    return st.builds(ConvGeometry, numbers, numbers, ends, st.integers(1, 3))


def reconstructed(structure: Structure, factors: list[Tensor], groups: int) -> Tensor:
    return torch.stack([structure.reconstruct([a[g] for a in factors]) for g in range(groups)])


def relative_error(structure: Structure, geometry: ConvGeometry, schedule: Schedule, *, seed: int = 0) -> float:
    generator = torch.Generator().manual_seed(seed)
    factors = random_factors(structure, groups=geometry.groups, seed=seed)
    weight = reconstructed(structure, factors, geometry.groups).flatten(0, 1)
    bias = torch.randn(weight.shape[0], generator=generator, dtype=torch.float64)
    size = [d * (k - 1) + 5 + i for i, (d, k) in enumerate(zip(geometry.dilation, structure.kernel, strict=True))]
    x = torch.randn(2, geometry.groups * weight.shape[1], *size, generator=generator, dtype=torch.float64)
    plan = make_plan(structure, geometry, schedule)
    stored = ready_weights(plan, [store_weight(factors[step.factor], step) for step in plan.steps])
    expected = convolve(x, weight, bias, geometry)
    found = execute(plan, stored, x, bias)
    assert found.shape == expected.shape
    assert found.shape[2:] == geometry.output_size(tuple(size), structure.kernel)
    return float((found - expected).abs().max() / expected.abs().max())


def transposed_error(
    structure: Structure, geometry: ConvGeometry, schedule: Schedule, output_padding: tuple[int, ...], *, seed: int
) -> float:
    """Against torch's own transposed convolution; the paddings before and after an axis are equal."""
    generator = torch.Generator().manual_seed(seed)
    factors = random_factors(structure, groups=geometry.groups, seed=seed)
    weight = reconstructed(structure, factors, geometry.groups).transpose(1, 2).flatten(0, 1)
    bias = torch.randn(geometry.groups * weight.shape[1], generator=generator, dtype=torch.float64)
    # Large enough for something to be left of the output when the padding is taken off.
    size = [2 * p // s + 3 + i for i, (s, (p, _)) in enumerate(zip(geometry.stride, geometry.padding, strict=True))]
    x = torch.randn(2, weight.shape[0], *size, generator=generator, dtype=torch.float64)
    plan = make_plan(structure, geometry, schedule)
    stored = ready_weights(plan, [store_weight(factors[step.factor], step) for step in plan.steps])
    run = {2: F.conv_transpose2d, 3: F.conv_transpose3d}[len(size)]
    padding = [before for before, _ in geometry.padding]
    expected = run(x, weight, bias, geometry.stride, padding, output_padding, geometry.groups, geometry.dilation)
    found = execute_transposed(plan, stored, x, bias, output_padding)
    assert found.shape == expected.shape
    assert found.shape[2:] == geometry.transposed_size(tuple(size), structure.kernel, output_padding)
    assert geometry.unread(tuple(found.shape[2:]), structure.kernel) == output_padding
    return float((found - expected).abs().max() / expected.abs().max())


def moderate(structure: Structure) -> Structure:
    """Larger kernels than this only make the dense reference slow."""
    if prod(structure.weight_shape[:2]) <= 4096 and prod(structure.kernel) <= 400:
        return structure
    shapes = [tuple(min(n, 2) for n in shape) for shape in structure.shapes]
    return Structure.build(shapes, structure.carries, structure.rank_sizes)


@settings(max_examples=500, deadline=None)
@given(structures(), geometries(2), st.integers(0, 2**16), st.data())
def test_executor_equals_conv2d(structure: Structure, geometry: ConvGeometry, seed: int, data: st.DataObject) -> None:
    schedule = data.draw(schedules(structure))
    assert relative_error(moderate(structure), geometry, schedule, seed=seed) < 1e-12


@settings(max_examples=100, deadline=None)
@given(structures(axes=3, largest=2, most=3), geometries(3), st.integers(0, 2**16), st.data())
def test_executor_equals_conv3d(structure: Structure, geometry: ConvGeometry, seed: int, data: st.DataObject) -> None:
    schedule = data.draw(schedules(structure))
    assert relative_error(structure, geometry, schedule, seed=seed) < 1e-12


def check_transposed(structure: Structure, geometry: ConvGeometry, seed: int, data: st.DataObject) -> None:
    schedule = data.draw(schedules(structure))
    output_padding = tuple(data.draw(st.integers(0, stride - 1)) for stride in geometry.stride)
    even = tuple((before, before) for before, _ in geometry.padding)
    geometry = replace(geometry, padding=even, transposed=True)
    assert transposed_error(structure, geometry, schedule, output_padding, seed=seed) < 1e-12


@settings(max_examples=300, deadline=None)
@given(structures(), geometries(2), st.integers(0, 2**16), st.data())
def test_transposed_executor_equals_conv_transpose2d(
    structure: Structure, geometry: ConvGeometry, seed: int, data: st.DataObject
) -> None:
    check_transposed(moderate(structure), geometry, seed, data)


@settings(max_examples=50, deadline=None)
@given(structures(axes=3, largest=2, most=3), geometries(3), st.integers(0, 2**16), st.data())
def test_transposed_executor_equals_conv_transpose3d(
    structure: Structure, geometry: ConvGeometry, seed: int, data: st.DataObject
) -> None:
    check_transposed(structure, geometry, seed, data)


def test_transposed_executor_is_the_adjoint_where_paddings_differ() -> None:
    structure = STRUCTURES["Kronecker"]
    factors = random_factors(structure, groups=2)
    forward = ConvGeometry((2, 3), (1, 2), ((1, 2), (0, 3)), 2)
    x = torch.randn(2, 2 * SHAPE[1], 9, 11, dtype=torch.float64)
    y = convolve(x, reconstructed(structure, factors, 2).flatten(0, 1), None, forward)
    swapped = Structure.build(
        [(c, f, *kernel) for f, c, *kernel in structure.shapes], structure.carries, structure.rank_sizes
    )
    plan = make_plan(swapped, replace(forward, transposed=True), Schedule((1, 0)))
    turned = [a.transpose(2, 3).contiguous() for a in factors]  # axes: group, rank, f, c, kernel
    stored = ready_weights(plan, [store_weight(turned[step.factor], step) for step in plan.steps])
    z = torch.randn_like(y)
    back = execute_transposed(plan, stored, z, None, forward.unread((9, 11), structure.kernel))
    assert back.shape == x.shape
    torch.testing.assert_close((y * z).sum(), (x * back).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_order_of_every_family(name: str) -> None:
    structure = STRUCTURES[name]
    geometry = ConvGeometry((2, 1), (1, 2), ((1, 1), (2, 1)), 2)
    for schedule in all_or_nothing_folded(structure):
        assert relative_error(structure, geometry, schedule) < 1e-12
        even = ConvGeometry((2, 1), (1, 2), ((1, 1), (2, 2)), 2, transposed=True)
        assert transposed_error(structure, even, schedule, (1, 0), seed=0) < 1e-12


@pytest.mark.parametrize("name", STRUCTURES_3D)
def test_every_order_of_every_family_in_3d(name: str) -> None:
    structure = STRUCTURES_3D[name]
    geometry = ConvGeometry((2, 1, 1), (1, 2, 1), ((1, 1), (2, 1), (0, 1)), 2)
    found = all_or_nothing_folded(structure)
    for schedule in found[:: len(found) // 150 + 1]:
        assert relative_error(structure, geometry, schedule) < 1e-12


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
        plan = make_plan(structure, ConvGeometry(dilation=(dilation, dilation)), Schedule((0, 1)))
        stored = [store_weight(factors[s.factor], s) for s in plan.steps]
        return execute(plan, ready_weights(plan, stored), x)[..., :4, :4]

    assert not torch.allclose(output(1), output(2))


def test_a_plan_refuses_what_is_no_order() -> None:
    with pytest.raises(StructureError, match="expected an order"):
        make_plan(STRUCTURES["CP"], ConvGeometry(), Schedule((0, 0, 1, 2)))


def test_a_plan_refuses_a_geometry_of_other_axes() -> None:
    with pytest.raises(StructureError, match="a kernel of 3 axes; expected as many strides"):
        make_plan(STRUCTURES_3D["channel SVD"], ConvGeometry(), Schedule((0, 1)))


def test_best_plan_is_the_cheapest_of_all_orders() -> None:
    geometry = ConvGeometry(padding=((1, 1), (1, 1)))
    for structure in STRUCTURES.values():
        flops = [
            make_plan(structure, geometry, Schedule(order)).cost((16, 16)).flops
            for order in permutations(range(structure.num_factors))
        ]
        assert best_plan(structure, geometry, (16, 16)).cost((16, 16)).flops == min(flops)


@pytest.mark.parametrize("name", STRUCTURES)
def test_folding_changes_neither_flops_nor_what_is_stored(name: str) -> None:
    structure, geometry = STRUCTURES[name], ConvGeometry(groups=2)
    for order in permutations(range(structure.num_factors)):
        plans = [make_plan(structure, geometry, Schedule(order, folded)) for folded in ((), tuple(sorted(order)))]
        assert plans[0].cost((8, 8)).flops == plans[1].cost((8, 8)).flops
        assert sum(prod(s.stored_shape) for s in plans[1].steps) == 2 * structure.num_params
        assert plans[1].num_repeated_weights == 0


def test_large_shared_factors_are_folded() -> None:
    structure = Structure.parse("4x4x1x1[a] * 64x64x3x3[a]; a=1")
    plan = best_plan(structure, ConvGeometry(padding=((1, 1), (1, 1))), (14, 14))
    assert plan.num_permutes == 0
    assert plan.num_repeated_weights == 0


def test_schedules_round_trip_as_text() -> None:
    assert Schedule.parse("2*,0,1*") == Schedule((2, 0, 1), (1, 2))
    for schedule in (Schedule((0,)), Schedule((2, 0, 1), (1, 2))):
        assert Schedule.parse(str(schedule)) == schedule
    with pytest.raises(StructureError, match="expected a schedule such as '1\\*,0', got 'b,a'"):
        Schedule.parse("b,a")


def test_the_order_is_worth_two_orders_of_magnitude() -> None:
    structure = Structure.parse("64x1x1x1[a] * 1x64x1x1[a,b] * 1x1x3x1[b,c] * 1x1x1x3[c]; a=16, b=8, c=4")
    flops = [make_plan(structure, ConvGeometry(), Schedule(o)).cost((16, 16)).flops for o in permutations(range(4))]
    assert max(flops) > 100 * min(flops)


def test_chains_need_no_permutation() -> None:
    for name in ("channel SVD", "spatial SVD", "CP", "Tucker-2", "Tensor-Train"):
        assert best_plan(STRUCTURES[name], ConvGeometry(), (8, 8)).num_permutes == 0
