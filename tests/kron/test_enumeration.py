from __future__ import annotations

from itertools import product
from math import prod

from hypothesis import given
from hypothesis import strategies as st

from sekron_search.kron.enumeration import (
    FAMILIES,
    FamilyName,
    Skeleton,
    factor_shapes,
    largest_where,
    ordered_factorizations,
    padded_shapes,
    rank_choices,
    rank_ladder,
    skeletons,
)
from sekron_search.kron.families import GRAPHS
from sekron_search.kron.structure import Shape, Structure


@given(st.integers(1, 60), st.integers(1, 4))
def test_ordered_factorizations_are_all(number: int, count: int) -> None:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    expected = [t for t in product(divisors, repeat=count) if prod(t) == number]
    assert list(ordered_factorizations(number, count)) == expected


def test_number_of_pairs_of_a_resnet_kernel() -> None:
    # 7 divisors of 64 twice, 2 of 3 twice, less the two pairs of which one factor is a single number.
    assert sum(1 for _ in factor_shapes((64, 64, 3, 3), 2)) == 7 * 7 * 2 * 2 - 2


def test_every_skeleton_reconstructs_the_weight_shape() -> None:
    shape = (8, 6, 3, 3)
    for name, build in FAMILIES.items():
        skeletons = list(build(shape, 3))
        assert skeletons, name
        for skeleton in skeletons:
            structure = skeleton.with_ranks([1] * len(skeleton.names))
            assert structure.weight_shape == shape
        assert len(set(skeletons)) == len(skeletons)


def test_prime_and_trivial_shapes_enumerate() -> None:
    assert [s.shapes for s in FAMILIES["sekron"]((7, 1, 1, 1), 2)] == []
    assert len(list(FAMILIES["sekron"]((7, 5, 1, 1), 2))) == 2
    assert list(FAMILIES["tucker2"]((7, 5, 1, 1), 2)) == []


@given(st.integers(1, 300), st.integers(1, 20), st.integers(1, 8))
def test_rank_ladder_climbs_within_its_bounds(largest: int, levels: int, multiple: int) -> None:
    ladder = rank_ladder(largest, levels, multiple)
    assert ladder == sorted(set(ladder))
    assert len(ladder) <= levels
    assert all(rank % multiple == 0 for rank in ladder if rank >= multiple)
    assert 1 <= ladder[0] <= ladder[-1] == (largest if largest < multiple else largest - largest % multiple)


def test_rank_ladder_has_small_ranks_too() -> None:
    assert rank_ladder(96, 8, 16) == [1, 2, 4, 8, 16, 32, 48, 96]
    assert rank_ladder(5, 3, 16) == [1, 2, 5]


def test_channels_are_padded_to_a_multiple_where_that_is_cheap() -> None:
    assert padded_shapes((7, 13, 3, 3), 8) == [(7, 16, 3, 3), (8, 13, 3, 3), (8, 16, 3, 3)]
    assert padded_shapes((31, 64, 3, 1), 8) == [(32, 64, 3, 1)]
    assert padded_shapes((3, 12, 3, 3, 3), 8) == []  # 8 for 3 and 16 for 12 would cost too much
    assert padded_shapes((7, 13, 3, 3), 1) == []


@given(st.tuples(*[st.integers(1, 40)] * 2, *[st.integers(1, 3)] * 2), st.integers(1, 16), st.sampled_from([*FAMILIES]))
def test_padded_skeletons_are_new_and_split_what_is_padded(shape: Shape, multiple: int, family: FamilyName) -> None:
    plain = list(FAMILIES[family](shape, 2))
    found = list(skeletons(family, shape, 2, multiple))
    assert found[: len(plain)] == plain
    assert len(set(found)) == len(found)
    for skeleton in found[len(plain) :]:
        padded = skeleton.with_ranks([1] * len(skeleton.names)).weight_shape
        assert padded[2:] == shape[2:]
        assert padded != shape
        for mode in (0, 1):
            if padded[mode] != shape[mode]:
                assert shape[mode] < padded[mode] <= 1.25 * shape[mode]
                assert padded[mode] % multiple == 0
                assert max(factor[mode] for factor in skeleton.shapes) < padded[mode]


def test_three_kernel_axes_enumerate() -> None:
    for name, build in FAMILIES.items():
        for skeleton in build((4, 2, 2, 3, 1), 3):
            assert skeleton.with_ranks([1] * len(skeleton.names)).weight_shape == (4, 2, 2, 3, 1), name


def test_rank_choices_fit_and_reach_the_limit() -> None:
    limit = 500

    def fits(structure: Structure) -> bool:
        return structure.num_params < limit

    skeleton = Skeleton(((16, 1, 3, 1), (1, 16, 1, 3)), GRAPHS["cp"](2))
    ranks = [s.ranks[0][1] for s in rank_choices(skeleton, fits, 6)]
    assert ranks[0] == 1
    assert ranks[-1] == 5  # 5 * 96 = 480 parameters; 6 * 96 do not fit
    nested = Skeleton(((4, 1, 3, 1), (4, 4, 1, 1), (1, 4, 1, 3)), GRAPHS["sekron"](3))
    found = list(rank_choices(nested, fits, 6))
    assert len(found) > 3
    assert all(fits(s) for s in found)


@given(st.integers(0, 50), st.integers(1, 50))
def test_largest_where(limit: int, upper: int) -> None:
    assert largest_where(lambda n: n <= limit, upper) == min(limit, upper)
