from __future__ import annotations

import pytest
import torch

from sekron_search.errors import StructureError
from sekron_search.kron.merge import merge_factors, merged_structure, merges
from sekron_search.kron.structure import Structure
from tests.cases import STRUCTURES, STRUCTURES_3D, random_factors
from tests.oracles import kronecker_weight

MANY = {**STRUCTURES, **{f"3-d {name}": structure for name, structure in STRUCTURES_3D.items()}}


@pytest.mark.parametrize("name", [n for n, s in MANY.items() if s.num_factors > 1])
def test_merged_factors_reconstruct_the_same_weight(name: str) -> None:
    structure = MANY[name]
    factors = random_factors(structure)
    expected = kronecker_weight(structure, factors)
    for first in range(structure.num_factors - 1):
        merged = merged_structure(structure, first)
        assert merged.num_factors == structure.num_factors - 1
        found = [a[0] for a in merge_factors(structure, [a[None] for a in factors], first)]
        torch.testing.assert_close(kronecker_weight(merged, found), expected, rtol=1e-12, atol=1e-12)


def test_merges_are_the_partitions_into_runs() -> None:
    structure = STRUCTURES["CP"]
    found = set()
    for positions in merges(structure):
        merged = structure
        for first in positions:
            merged = merged_structure(merged, first)
        assert 1 < merged.num_factors < 4
        found.add(merged)
    assert len(found) == len(list(merges(structure))) == 6
    assert not list(merges(STRUCTURES["channel SVD"]))


def test_the_spatial_factors_of_cp_merge_into_a_depthwise_kernel() -> None:
    merged = merged_structure(Structure.parse("8x1x1x1[a] * 1x6x1x1[a] * 1x1x3x1[a] * 1x1x1x3[a]; a=5"), 2)
    assert str(merged) == "8x1x1x1[a] * 1x6x1x1[a] * 1x1x3x3[a]; a=5"


def test_a_pair_has_to_exist() -> None:
    with pytest.raises(StructureError, match="0 to 0, got 1"):
        merged_structure(STRUCTURES["channel SVD"], 1)
