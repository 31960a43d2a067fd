from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sekron_search.errors import StructureError
from sekron_search.kron.families import GRAPHS, GraphName, family, kronecker
from sekron_search.kron.structure import Structure
from tests.cases import STRUCTURES, STRUCTURES_3D, random_factors
from tests.oracles import kronecker_weight

ALL = [*STRUCTURES.values(), *STRUCTURES_3D.values()]


@st.composite
def structures(draw: st.DrawFn, *, axes: int = 2, largest: int = 4, most: int = 4) -> Structure:
    """Any graph; factors of sizes up to `largest`."""
    count = draw(st.integers(2, most))
    graph: GraphName = draw(st.sampled_from(sorted(GRAPHS)))
    if graph == "tr":
        count = max(count, 3)
    names = {name for carried in GRAPHS[graph](count) for name in carried}
    shapes = [draw(st.tuples(*[st.integers(1, largest)] * (2 + axes))) for _ in range(count)]
    return kronecker(shapes, graph, [draw(st.integers(1, 4)) for _ in names])


def test_text_form_of_the_readme() -> None:
    structure = Structure.parse("16x1x3x1[a] * 1x16x1x3[a]; a=6")
    assert structure.weight_shape == (16, 16, 3, 3)
    assert structure.num_params == 6 * (48 + 48)
    assert str(structure) == "16x1x3x1[a] * 1x16x1x3[a]; a=6"


@given(structures() | structures(axes=3))
def test_text_form_round_trip(structure: Structure) -> None:
    assert Structure.parse(str(structure)) == structure


@pytest.mark.parametrize("text", [" 2x1x1x1 [ a ]*1x2x1x1[a] ; a = 3 ", "2x1x1x1[a]*1x2x1x1[a];a=3"])
def test_text_form_ignores_white_space(text: str) -> None:
    assert str(Structure.parse(text)) == "2x1x1x1[a] * 1x2x1x1[a]; a=3"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot read factor"),
        ("2x2", "four sizes"),
        ("2x2x3x3x3x3", "four sizes .*or five"),
        ("2x2x1x1x1[a] * 1x1x3x3[a]; a=2", "factor 2: expected 5 sizes, as many as factor 1 has"),
        ("2x2x0x1", "at least 1"),
        ("2x2x1x1[a]; a=2", "at least two factors"),
        ("2x2x1x1[a] * 1x1x3x3[a]", "have no size"),
        ("2x2x1x1[a] * 1x1x3x3[a]; a=0", "at least 1"),
        ("2x2x1x1[a] * 1x1x3x3[a]; a=two", "cannot read rank"),
        ("2x2x1x1[a] * 1x1x3x3[a]; a=2, a=3", "cannot read rank"),
        ("2x2x1x1[a,a] * 1x1x3x3[a]; a=2", "distinct"),
        ("2x2x1x1[1] * 1x1x3x3[1]; 1=2", "expected a letter"),
        ("2x2x1x1[a] + 1x1x3x3[a]; a=2", "cannot read factor"),
    ],
)
def test_bad_text_says_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(StructureError, match=says):
        Structure.parse(text)


@pytest.mark.parametrize("structure", ALL, ids=str)
def test_reconstruct_is_the_sum_of_kronecker_products(structure: Structure) -> None:
    factors = random_factors(structure)
    torch.testing.assert_close(
        structure.reconstruct(factors), kronecker_weight(structure, factors), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("structure", ALL, ids=str)
def test_unfold_inverts_fold(structure: Structure) -> None:
    weight = torch.randn(structure.weight_shape)
    assert torch.equal(structure.fold(structure.unfold(weight)), weight)


@pytest.mark.parametrize("name", STRUCTURES)
def test_family_knows_its_name(name: str) -> None:
    expected = {"SeKron S=3": "SeKron", "SeKron S=4": "SeKron", "Kronecker-TT": "Kronecker-Tensor-Train"}
    expected |= {"Kronecker-TR": "Kronecker-Tensor-Ring"}
    assert family(STRUCTURES[name]) == expected.get(name, name)
    if name in STRUCTURES_3D:
        assert family(STRUCTURES_3D[name]) == expected.get(name, name)


def test_family_does_not_depend_on_the_order_of_factors_that_commute() -> None:
    assert family(Structure.parse("1x4x3x1[a] * 8x1x1x3[a]; a=2")) == "spatial SVD"
    assert family(Structure.parse("1x4x1x1[a] * 8x1x3x3[a]; a=2")) == "channel SVD"
    assert family(Structure.parse("1x4x1x3x3[a] * 8x1x3x1x1[a]; a=2")) == "spatial SVD"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("8x1x1x1[a] * 1x4x1x1[a]; a=2", "channel SVD"),  # of a linear layer
        ("8x1x1x1[a] * 1x4x3x1[a]; a=2", "channel SVD"),  # of a 1-d convolution
        ("1x1x3x1[a] * 1x1x1x3[a]; a=1", "spatial SVD"),  # of a depthwise convolution
        ("2x1x1x1[a] * 1x1x3x3[a]; a=1", "spatial basis"),
        ("8x4x3x1[a] * 1x1x1x3[a]; a=2", "Kronecker"),
        ("8x4x1x1x3[a] * 1x1x3x3x1[a]; a=2", "Kronecker"),
    ],
)
def test_family_of_pairs_in_which_some_modes_are_trivial(text: str, name: str) -> None:
    assert family(Structure.parse(text)) == name


def test_num_params_counts_every_entry() -> None:
    for structure in ALL:
        assert structure.num_params == sum(a.numel() for a in random_factors(structure))


def test_reconstruct_refuses_factors_of_other_shapes() -> None:
    structure = STRUCTURES["CP"]
    with pytest.raises(StructureError, match="expected factors of shapes"):
        structure.reconstruct(random_factors(structure)[:-1])
