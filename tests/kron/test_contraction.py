from __future__ import annotations

import string

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sekron_search.kron.contraction import MANY_VECTORS, Contraction, contraction

CASES = [
    ("ab,bc->ac", "matrix product"),
    ("zab,zbc->zac", "batched"),
    ("ab,ab->ab", "elementwise"),
    ("a,b->ba", "outer, permuted"),
    ("rab,rb->ra", "matrices times vectors"),
    ("ra,rb,rc->abc", "CP"),
    ("zar,rbs,scz->abc", "ring"),
    ("ab,bc->c", "an index of one operand alone is summed"),
    ("abc->ca", "one operand"),
    ("rsab,rsab->rs", "norms"),
]


@pytest.mark.parametrize("equation", [equation for equation, _ in CASES], ids=[name for _, name in CASES])
@pytest.mark.parametrize("size", [1, 3, MANY_VECTORS])
def test_contraction_is_einsum(equation: str, size: int) -> None:
    inputs, output = equation.split("->")
    sizes = {letter: size if letter == "r" else 2 + i % 3 for i, letter in enumerate(string.ascii_lowercase)}
    operands = [torch.randn([sizes[i] for i in indices], dtype=torch.float64) for indices in inputs.split(",")]
    found = contraction(tuple(inputs.split(",")), output, tuple(sizes.items()))
    expected = torch.einsum(equation, *operands)
    torch.testing.assert_close(found(operands), expected)
    laid_out = [found.lay_out(operands[0]), *operands[1:]]
    torch.testing.assert_close(found(laid_out, laid_out=True), expected)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sets(st.sampled_from("abcdef"), min_size=1, max_size=4).map(sorted), min_size=2, max_size=5),
    st.integers(0, 2**31 - 1),
)
def test_any_contraction_is_einsum(letters: list[list[str]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = {letter: int(torch.randint(1, 4, (), generator=generator)) for letter in "abcdef"}
    inputs = ["".join(indices) for indices in letters]
    used = sorted(set("".join(inputs)))
    output = "".join(i for i in used if int(torch.randint(0, 2, (), generator=generator)))
    operands = [torch.randn([sizes[i] for i in x], generator=generator, dtype=torch.float64) for x in inputs]
    expected = torch.einsum(",".join(inputs) + "->" + output, *operands)
    torch.testing.assert_close(Contraction(inputs, output, sizes)(operands), expected)
