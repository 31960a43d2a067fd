from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sekron_search.kron import families as fam
from sekron_search.kron import spectra as module
from sekron_search.kron.enumeration import factor_shapes
from sekron_search.kron.projection import fit_batch, project, reconstruct_batch
from sekron_search.kron.spectra import PairSpectra, core_tails, error_bound, nested_tails
from sekron_search.kron.structure import Shape, Structure
from sekron_search.kron.svd import core_of
from tests.cases import SHAPE, STRUCTURES, random_factors


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tails_by_svd(weight: Tensor, first: Shape, second: Shape) -> Tensor:
    """Squared errors at ranks 0, 1, ... from the singular values of the unfolding itself."""
    values = torch.linalg.svdvals(fam.sekron([first, second], [1]).unfold(weight)).square().sum(0)
    tails = torch.cat([values, values.new_zeros(1)]).flip(0).cumsum(0).flip(0)
    return tails / weight.square().sum()


@pytest.mark.parametrize("shape", [SHAPE, (12, 5, 3, 1), (4, 6, 2, 3, 2)])
@pytest.mark.parametrize("workers", [1, 2])
def test_every_pair_spectrum_is_that_of_the_unfolding(shape: tuple[int, ...], workers: int) -> None:
    """Partial traces of larger Gram matrices included: most spectra here come from those."""
    weight = gaussian(2, *shape)
    pairs = list(factor_shapes(shape, 2))
    spectra = PairSpectra(weight)
    spectra.compute([first for first, _ in pairs], workers=workers)
    for first, second in pairs:
        expected = tails_by_svd(weight, first, second)
        torch.testing.assert_close(spectra.tails(first), expected, rtol=1e-9, atol=1e-12)


def test_spectra_in_single_precision_are_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DOUBLE_UP_TO", 4)
    weight = gaussian(1, *SHAPE)
    for first, second in factor_shapes(SHAPE, 2):
        expected = tails_by_svd(weight, first, second)
        torch.testing.assert_close(PairSpectra(weight).tails(first), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-20, 1e20, 0.0])
def test_scale_does_not_matter(scale: float) -> None:
    weight = gaussian(1, *SHAPE)
    found = PairSpectra(weight * scale).error((8, 1, 1, 1), 3)
    assert found == (pytest.approx(PairSpectra(weight).error((8, 1, 1, 1), 3), rel=1e-9) if scale else 0.0)


def test_half_precision_weights_are_scored() -> None:
    weight = gaussian(1, *SHAPE).to(torch.bfloat16)
    assert PairSpectra(weight).error((8, 1, 1, 1), 3) == pytest.approx(
        PairSpectra(weight.double()).error((8, 1, 1, 1), 3), rel=1e-9
    )


@pytest.mark.parametrize(
    "sequence", [((2, 3, 1, 1), (2, 1, 3, 1), (2, 2, 1, 3)), ((8, 1, 1, 1), (1, 6, 1, 1), (1, 1, 3, 3))]
)
def test_nested_tails_are_the_errors_of_the_recursion(sequence: tuple[Shape, ...]) -> None:
    weight = gaussian(2, *SHAPE)
    other = (sequence[0], tuple(a * b for a, b in zip(sequence[1], sequence[2], strict=True)))
    limits = (8, 9)
    found = nested_tails(weight, {sequence: limits, other: (5,)})
    norms = weight.flatten(1).norm(dim=1)
    for a in range(1, limits[0] + 1):
        for b in range(1, limits[1] + 1):
            _, errors = fit_batch(weight, fam.sekron(sequence, [a, b]), sweeps=0)
            squared = found[sequence][:, a - 1, b - 1]
            torch.testing.assert_close(squared.sqrt() / norms, errors, rtol=1e-6, atol=1e-7)
    for rank in range(1, 6):
        _, errors = fit_batch(weight, fam.sekron(other, [rank]), sweeps=0)
        torch.testing.assert_close(found[other][:, rank - 1].sqrt() / norms, errors, rtol=1e-6, atol=1e-7)


def test_nested_tails_of_four_factors() -> None:
    structure = STRUCTURES["SeKron S=4"]
    weight = gaussian(1, *SHAPE)
    limits = tuple(size for _, size in structure.ranks)
    tails = nested_tails(weight, {structure.shapes: limits})[structure.shapes]
    _, errors = fit_batch(weight, structure, sweeps=0)
    assert float(tails[0, -1, -1, -1].sqrt() / weight.norm()) == pytest.approx(float(errors), rel=1e-6)


@pytest.mark.parametrize("name", [name for name, s in STRUCTURES.items() if s.num_factors > 1])
@pytest.mark.parametrize("seed", range(3))
def test_no_fit_comes_below_its_bound(name: str, seed: int) -> None:
    structure = STRUCTURES[name]
    weight = gaussian(1, *SHAPE, seed=seed)
    bound = error_bound(structure, PairSpectra(weight))
    _, errors = fit_batch(weight, structure, sweeps=300, starts=4)
    assert bound <= float(errors) * (1 + 1e-9)
    assert bound > 0.3 * float(errors), "a bound near zero would spare nothing"


def test_bound_of_two_factors_is_their_error() -> None:
    weight = gaussian(1, *SHAPE)
    structure = STRUCTURES["Kronecker"]
    _, errors = fit_batch(weight, structure)
    assert error_bound(structure, PairSpectra(weight)) == pytest.approx(float(errors), rel=1e-9)


def test_known_spectra_bound_larger_ones() -> None:
    weight = gaussian(1, 16, 16, 3, 3)
    spectra = PairSpectra(weight)
    spectra.compute([(4, 1, 1, 1), (8, 1, 1, 1), (4, 2, 1, 1)])
    bounds = [spectra.bound_from_nested((8, 4, 1, 1), rank) for rank in range(1, 33)]
    errors = [PairSpectra(weight).error((8, 4, 1, 1), rank) for rank in range(1, 33)]
    assert all(bound <= error + 1e-12 for bound, error in zip(bounds, errors, strict=True))
    assert bounds[0] > 0.5


def test_tall_unfoldings_are_decomposed_from_their_smaller_side() -> None:
    """The larger Gram matrix of these would take 34 GB."""
    weight = gaussian(1, 1024, 256, 1, 1)
    sequence: tuple[Shape, ...] = ((512, 128, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1))
    tails = nested_tails(weight, {sequence: (2, 2)})[sequence]
    structure = fam.sekron(sequence, [2, 2])
    _, errors = fit_batch(weight, structure, sweeps=0)
    assert float((tails[0, 1, 1] / weight.square().sum()).sqrt()) == pytest.approx(float(errors), rel=1e-6)
    _, better = fit_batch(weight, structure, sweeps=3, starts=2)
    assert float(better) <= float(errors) + 1e-9


def test_factors_that_share_no_mode_share_a_spectrum() -> None:
    spectra = PairSpectra(gaussian(1, *SHAPE))
    assert spectra.tails((8, 1, 1, 1)) is spectra.tails((1, 6, 3, 3))
    assert spectra.tails((4, 1, 1, 1)) is not spectra.tails((2, 6, 3, 3))


def test_a_bound_from_single_precision_stays_below_an_exact_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DOUBLE_UP_TO", 64)
    structure = fam.channel_svd((256, 256, 1, 1), 8)
    weight = (gaussian(256, 8) @ gaussian(8, 256, seed=1))[None, :, :, None, None]
    spectra = PairSpectra(weight)
    assert error_bound(structure, spectra) <= float(fit_batch(weight, structure)[1]) + 1e-9


@pytest.mark.parametrize("ranks", [(1, 1), (3, 2), (6, 4), (2, 4)])
def test_errors_of_cores_at_all_ranks_are_those_of_their_bases(ranks: tuple[int, int]) -> None:
    """The corner of the rotated weight against the projection onto the leading singular vectors of both modes."""
    weight = gaussian(2, 6, 4, 3, 3)
    structure = fam.tucker2((6, 4, 3, 3), ranks)
    core = core_of(structure)
    assert core is not None
    tails = core_tails(structure, weight, core)
    assert tails.shape == (2, 7, 5)
    for w, found in zip(weight, tails, strict=True):
        out = torch.linalg.svd(w.flatten(1)).U[:, : ranks[0]]
        inner = torch.linalg.svd(w.movedim(1, 0).flatten(1)).U[:, : ranks[1]]
        kept = torch.einsum("fr,fchw,cs->rshw", out, w, inner)
        assert float(found[ranks]) == pytest.approx(float(w.square().sum() - kept.square().sum()), abs=1e-9)
        fitted = project(w[None], structure, sweeps=100).rel_error ** 2 * float(w.square().sum())
        assert fitted <= float(found[ranks]) + 1e-9


def test_what_is_traced_from_single_precision_has_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small spectrum, exact alone, but traced from a large one: its bound has to make up for that."""
    structure = Structure.parse("8x8x1x1[a] * 4x2x1x1[a] * 4x8x1x1[a]; a=1")
    weight = reconstruct_batch(structure, [a.double() for a in random_factors(structure, groups=1)])
    monkeypatch.setattr(module, "DOUBLE_UP_TO", 64)
    spectra = PairSpectra(weight)
    spectra.compute([(8, 8, 1, 1), (8, 16, 1, 1), (32, 4, 1, 1)], workers=1)
    assert spectra.error((8, 8, 1, 1), 1) > 1e-6  # more than rounding in double leaves
    assert error_bound(structure, spectra) < 1e-6
