from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sekron_search.errors import StructureError
from sekron_search.kron import families as fam
from sekron_search.kron import projection
from sekron_search.kron.metric import InputMetric
from sekron_search.kron.projection import Fit, balance, fit_batch, project, reconstruct_batch
from sekron_search.kron.refine import refine
from sekron_search.kron.structure import Structure
from sekron_search.kron.svd import core_of, orthogonal_iteration, recursive_svd
from tests.cases import SHAPE, STRUCTURES, random_factors

PAIRS = [name for name, s in STRUCTURES.items() if s.num_factors == 2]
#: Families whose recursion is exact on tensors that they represent; the others need least squares from there.
EXACT = ["dense", *PAIRS, "Tucker", "Tucker-2", "Tensor-Train", "Kronecker-TT", "Kronecker-Tucker"]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def metric_of(weight: Tensor, *, seed: int = 1) -> InputMetric:
    """A badly conditioned second moment of the right size."""
    size = weight[0, 0].numel()
    root = gaussian(weight.shape[0], size, size, seed=seed) * torch.logspace(0, -2, size, dtype=torch.float64)
    return InputMetric.damped(root @ root.mT, torch.zeros(weight.shape[0], size).double())


@pytest.mark.parametrize("name", EXACT)
def test_exactly_representable_weights_are_recovered(name: str) -> None:
    structure = STRUCTURES[name]
    weight = reconstruct_batch(structure, random_factors(structure, groups=2))
    fit = project(weight, structure)
    assert fit.rel_error < 1e-12
    torch.testing.assert_close(reconstruct_batch(structure, fit.factors), weight)


@pytest.mark.parametrize("name", [n for n in STRUCTURES if n not in EXACT])
def test_least_squares_closes_the_recursions_gap(name: str) -> None:
    structure = STRUCTURES[name]
    weight = reconstruct_batch(structure, random_factors(structure, groups=1))
    greedy = project(weight, structure, sweeps=0).rel_error
    fitted = project(weight, structure, sweeps=500, starts=3).rel_error
    assert greedy > 1e-3, "the recursion alone is expected to fall short here"
    assert fitted < greedy / 2


@pytest.mark.parametrize("name", PAIRS)
def test_two_factors_reach_the_eckart_young_bound(name: str) -> None:
    structure = STRUCTURES[name]
    weight = gaussian(1, *SHAPE)
    values = torch.linalg.svdvals(structure.unfold(weight[0]))
    rank = structure.ranks[0][1]
    expected = float(values[rank:].norm() / values.norm())
    assert project(weight, structure).rel_error == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", STRUCTURES)
def test_sweeps_never_raise_the_error(name: str) -> None:
    weight = gaussian(1, *SHAPE, seed=3)
    errors = [project(weight, STRUCTURES[name], sweeps=sweeps).rel_error for sweeps in (0, 1, 5, 25)]
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(errors))


@pytest.mark.parametrize("name", ["SeKron S=3", "SeKron S=4", "CP", "Tensor-Ring", "Kronecker-CP", "Kronecker-TR"])
def test_several_starts_recover_what_the_recursion_misses(name: str) -> None:
    structure = STRUCTURES[name]
    weights = torch.cat([reconstruct_batch(structure, random_factors(structure, groups=1, seed=s)) for s in range(4)])
    _, greedy = fit_batch(weights, structure, sweeps=0)
    factors, errors = fit_batch(weights, structure, sweeps=1000, starts=8)
    assert float(greedy.min()) > 1e-3, "the recursion alone is expected to fall short here"
    assert float(errors.max()) < 1e-6
    torch.testing.assert_close(reconstruct_batch(structure, factors), weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [n for n, s in STRUCTURES.items() if s.num_factors > 2])
def test_more_starts_are_never_worse_and_each_weight_is_fitted_on_its_own(name: str) -> None:
    structure = STRUCTURES[name]
    weights = gaussian(3, *SHAPE)
    _, one = fit_batch(weights, structure, sweeps=60)
    _, several = fit_batch(weights, structure, sweeps=60, starts=4)
    # All weights are swept until the slowest is done: the last digits depend on the company.
    assert bool((several <= one + 1e-4).all())
    _, alone = fit_batch(weights[1:2], structure, sweeps=60)
    assert float(alone) == pytest.approx(float(one[1]), rel=1e-4)


@pytest.mark.parametrize(
    "text",
    ["2x3x1x1 * 2x1x3x1 * 2x2x1x3", "2x3x1x1[a] * 2x1x3x1[a] * 2x2x1x3; a=2", "4x1x3x1[a] * 1x6x1x1[a] * 2x1x1x3; a=3"],
)
def test_factors_that_share_no_index_are_fitted(text: str) -> None:
    structure = Structure.parse(text)
    exact = reconstruct_batch(structure, random_factors(structure, groups=2))
    assert float(fit_batch(exact, structure, sweeps=300, starts=4)[1].max()) < 1e-6
    weight = gaussian(2, *SHAPE)
    _, greedy = fit_batch(weight, structure, sweeps=0)
    _, fitted = fit_batch(weight, structure, sweeps=50)
    assert bool((fitted <= greedy + 1e-9).all())


@pytest.mark.parametrize("name", ["Tucker", "Tucker-2", "Kronecker-TT", "Kronecker-Tucker"])
def test_orthogonal_iteration_never_loses_and_ends_below_the_recursion(name: str) -> None:
    structure = STRUCTURES[name]
    weight = gaussian(2, *SHAPE)
    modes = structure.unfold(weight / weight.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1, 1))
    core = core_of(structure)
    assert core is not None
    errors = []
    for passes in (1, 2, 4, 30):
        factors = orthogonal_iteration(structure, core, modes, passes)
        errors.append(torch.linalg.vector_norm((structure.contract(factors) - modes).flatten(1), dim=1))
    assert all(bool((later <= earlier + 1e-12).all()) for earlier, later in pairwise(errors))
    greedy = structure.contract(recursive_svd(structure, modes)) - modes
    assert bool((errors[-1] <= torch.linalg.vector_norm(greedy.flatten(1), dim=1) + 1e-3).all())
    assert bool((errors[-1] < errors[0]).all())


def test_which_structures_have_a_core() -> None:
    assert {n for n, s in STRUCTURES.items() if s.num_factors > 2 and core_of(s) is not None} == {
        "Tucker",
        "Tucker-2",
        "Kronecker-TT",
        "Kronecker-Tucker",
    }


def test_seed_of_the_random_starts_decides() -> None:
    weights = gaussian(1, *SHAPE)
    fits = [fit_batch(weights, STRUCTURES["CP"], starts=4, seed=seed)[0] for seed in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(fits[0], fits[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(fits[0], fits[2], strict=True))


def test_terms_that_cancel_do_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of rank three that rank-two ones approach with terms of any size (de Silva and Lim 2008)."""
    a, b = gaussian(2, 6)
    weight = torch.einsum("i,j,k->ijk", a, a, b) + torch.einsum("i,j,k->ijk", a, b, a)
    weight = (weight + torch.einsum("i,j,k->ijk", b, a, a)).reshape(1, 6, 6, 6, 1)
    structure = fam.cp((6, 6, 6, 1), 2)

    def largest_term(sweeps: int) -> float:
        factors, errors = fit_batch(weight, structure, sweeps=sweeps, tolerance=0.0)
        assert float(errors) < 0.05
        terms = torch.stack([torch.linalg.vector_norm(f[0].flatten(1), dim=1) for f in factors]).prod(0)
        return float(terms.max() / weight.norm())

    assert largest_term(sweeps=2000) < 50
    assert largest_term(sweeps=20000) < 50
    monkeypatch.setattr(projection, "RIDGE", 1e-6)
    assert largest_term(sweeps=20000) > 50, "with a smaller ridge they do"


@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize("name", [n for n in STRUCTURES if n != "dense"])
def test_scale_of_the_weight_does_not_matter(name: str, scale: float) -> None:
    weight = gaussian(1, *SHAPE)
    scaled = project(weight * scale, STRUCTURES[name])
    assert scaled.rel_error == pytest.approx(project(weight, STRUCTURES[name]).rel_error, rel=1e-6)
    norms = [float(factor.norm()) for factor in scaled.factors]
    assert max(norms) / min(norms) < 1e3, "the scale is shared out"
    single = project((weight * scale).float(), STRUCTURES[name])
    rebuilt = reconstruct_batch(STRUCTURES[name], single.factors) / scale
    assert float((rebuilt - weight).norm() / weight.norm()) == pytest.approx(scaled.rel_error, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", STRUCTURES)
def test_half_precision_weights_are_fitted_in_double(name: str, dtype: torch.dtype) -> None:
    weight = gaussian(1, *SHAPE).to(dtype)
    fit = project(weight, STRUCTURES[name])
    assert all(factor.dtype == dtype and bool(torch.isfinite(factor).all()) for factor in fit.factors)
    assert fit.rel_error == pytest.approx(project(weight.double(), STRUCTURES[name]).rel_error, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", STRUCTURES)
def test_rank_deficient_weights_are_fitted(name: str) -> None:
    """Ranks beyond what the weight has: singular normal matrices, columns without a singular value."""
    u, v = gaussian(2, 8, 1, 1, 1), gaussian(2, 1, 6, 3, 3, seed=1)
    weight = u * v
    fit = project(weight, STRUCTURES[name], sweeps=200, starts=2)
    assert all(bool(torch.isfinite(factor).all()) for factor in fit.factors)
    assert fit.rel_error <= project(weight, STRUCTURES[name], sweeps=0).rel_error + 1e-9


@pytest.mark.parametrize("name", STRUCTURES)
def test_zero_weight_is_fitted_by_zero(name: str) -> None:
    structure = STRUCTURES[name]
    fit = project(torch.zeros(1, *SHAPE), structure)
    assert fit.rel_error == 0
    assert all(bool(torch.isfinite(a).all()) for a in fit.factors)
    assert float(reconstruct_batch(structure, fit.factors).abs().max()) < 1e-12


def test_ranks_beyond_what_the_matrix_has_are_filled() -> None:
    structure = fam.channel_svd((4, 6, 1, 1), 6)
    fit = project(gaussian(1, 4, 6, 1, 1), structure)
    assert fit.rel_error < 1e-12
    assert fit.factors[0].shape == (1, 6, 4, 1, 1, 1)


@pytest.mark.parametrize("shape", [(8, 16, 3, 3), (16, 8, 3, 3)])
@pytest.mark.parametrize("make", [fam.cp, fam.depthwise_cp])
def test_cp_has_use_for_more_terms_than_its_first_factor_has_rows(
    make: Callable[[Sequence[int], int], Structure], shape: tuple[int, ...]
) -> None:
    weight, rows = gaussian(1, *shape), shape[0]
    fits = [project(weight, make(shape, rank), sweeps=10) for rank in (rows, rows + 2, 2 * rows)]
    errors = [fit.rel_error for fit in fits]
    assert errors[1] < 0.98 * errors[0]
    assert errors[2] < 0.85 * errors[1]
    for factor in fits[2].factors:
        sizes = factor.flatten(2).norm(dim=2)
        assert float(sizes.min()) > 0.05 * float(sizes.max())


@pytest.mark.parametrize("name", ["CP", "depthwise CP", "Tensor-Ring"])
def test_single_precision_fits_as_well(name: str) -> None:
    structure, weight = STRUCTURES[name], gaussian(2, *SHAPE)
    exact = project(weight, structure, sweeps=10)
    single = project(weight, structure, sweeps=10, dtype=torch.float32)
    assert single.factors[0].dtype == weight.dtype
    assert single.rel_error == pytest.approx(exact.rel_error, rel=0.01)
    whole = float((reconstruct_batch(structure, single.factors) - weight).norm() / weight.norm())
    assert single.rel_error == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("make", [fam.cp, fam.depthwise_cp])
def test_cp_has_use_for_more_terms_than_there_are_living_rows(
    make: Callable[[Sequence[int], int], Structure],
) -> None:
    weight = gaussian(1, 16, 16, 3, 3)
    weight[:, 4:] = 0
    alone = project(weight[:, :4], make((4, 16, 3, 3), 12), sweeps=20)
    whole = project(weight, make((16, 16, 3, 3), 12), sweeps=20)
    assert whole.rel_error == pytest.approx(alone.rel_error, rel=0.1)


def deficient(kind: str) -> Tensor:
    """Weights that need far fewer terms than ranks go up to."""
    weight = gaussian(1, 16, 16, 3, 3)
    if kind == "rank 3":
        factors = [gaussian(1, 3, size, seed=k) for k, size in enumerate((16, 16, 9))]
        weight = torch.einsum("gra,grb,grc->gabc", *factors).reshape(1, 16, 16, 3, 3)
    elif kind == "no in-channels":
        weight[:, :, 4:] = 0
    elif kind == "small filters":
        weight[:, 4:] *= 1e-5
    else:
        weight = weight[:, :4].repeat(1, 4, 1, 1, 1)
    return weight


@pytest.mark.parametrize("kind", ["rank 3", "no in-channels", "small filters", "repeated filters"])
@pytest.mark.parametrize("rank", [20, 60])
def test_single_precision_bears_more_terms_than_the_weight_needs(kind: str, rank: int) -> None:
    weight, structure = deficient(kind), fam.depthwise_cp((16, 16, 3, 3), rank)
    exact = project(weight, structure, sweeps=40).rel_error
    single = project(weight, structure, sweeps=40, dtype=torch.float32)
    assert single.rel_error < 2 * exact + 1e-3
    assert all(bool(torch.isfinite(a).all()) for a in single.factors)


@pytest.mark.parametrize("scale", [1e-50, 1e39])
def test_single_precision_holds_weights_of_any_scale(scale: float) -> None:
    structure, weight = STRUCTURES["depthwise CP"], gaussian(1, *SHAPE)
    plain = project(weight, structure, sweeps=5, dtype=torch.float32)
    scaled = project(scale * weight, structure, sweeps=5, dtype=torch.float32)
    assert scaled.rel_error == pytest.approx(plain.rel_error, rel=1e-3)
    whole = reconstruct_batch(structure, scaled.factors) / scale
    assert float((whole - weight).norm() / weight.norm()) == pytest.approx(plain.rel_error, rel=1e-3)
    assert fit_batch(weight, structure, sweeps=2, dtype=torch.float32)[1].dtype == torch.float64


def test_the_recursion_alone_leaves_terms_beyond_its_rank_out() -> None:
    structure, weight = fam.depthwise_cp((6, 6, 3, 3), 9), gaussian(1, 6, 6, 3, 3)
    whole = project(weight, structure, sweeps=0)
    assert whole.rel_error == pytest.approx(project(weight, fam.depthwise_cp((6, 6, 3, 3), 6), sweeps=0).rel_error)


def test_nan_is_refused() -> None:
    weight = gaussian(1, *SHAPE)
    weight[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(StructureError, match="NaN or infinity"):
        project(weight, STRUCTURES["CP"])


@pytest.mark.parametrize("name", [n for n in STRUCTURES if n != "dense"])
def test_balance_keeps_the_product_and_evens_the_scale(name: str) -> None:
    structure = STRUCTURES[name]
    factors = random_factors(structure, groups=2)
    skewed = [a * 10.0 ** (3 * k) for k, a in enumerate(factors)]
    even = balance(structure, skewed)
    torch.testing.assert_close(
        reconstruct_batch(structure, even), reconstruct_batch(structure, skewed), rtol=1e-9, atol=1e-9
    )
    norms = [float(a.norm()) for a in even]
    assert max(norms) / min(norms) < 10


@pytest.mark.parametrize("name", [n for n in STRUCTURES if n != "dense"])
def test_refinement_lowers_the_output_error(name: str) -> None:
    structure = STRUCTURES[name]
    weight = gaussian(2, *SHAPE)
    metric = metric_of(weight)
    start = project(weight, structure)
    before = metric.rel_error(weight, reconstruct_batch(structure, start.factors))
    refined = refine(structure, start, weight, metric, steps=30)
    after = metric.rel_error(weight, reconstruct_batch(structure, refined.factors))
    assert after == pytest.approx(refined.rel_error)
    assert after < 0.95 * before


def test_output_error_is_what_the_metric_says() -> None:
    """The metric's norm against the convolution itself, on the data that it came from."""
    x = gaussian(2000, 6 * 9, seed=5)
    weight, other = gaussian(1, *SHAPE), gaussian(1, *SHAPE, seed=7)
    moment = (x.mT @ x / len(x))[None]
    metric = InputMetric.damped(moment, x.mean(0)[None], damping=0.0)
    expected = (x @ (weight - other).flatten(2)[0].mT).norm() / (x @ weight.flatten(2)[0].mT).norm()
    assert metric.rel_error(weight, other) == pytest.approx(float(expected), rel=1e-9)


def test_curvature_weighs_the_rows_of_the_error() -> None:
    """tr(H D M D') from its definition."""
    weight, other = gaussian(2, *SHAPE), gaussian(2, *SHAPE, seed=7)
    plain, root = metric_of(weight), gaussian(2, SHAPE[0], SHAPE[0], seed=9)
    metric = replace(plain, curvature=root @ root.mT)
    difference = (weight - other).flatten(2)
    expected = torch.einsum("gfe,geq,gqp,gfp->", root @ root.mT, difference, plain.moment, difference).sqrt()
    assert float(metric.norm(weight - other)) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("curvature", [False, True])
def test_refined_channel_svd_is_optimal(mirrored: bool, curvature: bool) -> None:
    """With all inputs in one factor and all outputs in the other, whitening and Eckart-Young give the optimum."""
    structure = fam.channel_svd(SHAPE, 3)
    if mirrored:
        structure = replace(structure, shapes=structure.shapes[::-1])
    weight = gaussian(2, *SHAPE)
    metric = metric_of(weight)
    if curvature:
        skewed = gaussian(2, SHAPE[0], SHAPE[0], seed=4) * torch.logspace(0, -1, SHAPE[0], dtype=torch.float64)
        metric = replace(metric, curvature=skewed @ skewed.mT)
    values = torch.linalg.svdvals(rooted(weight, metric))
    optimum = float(values[:, 3:].norm() / values.norm())
    start = project(weight, structure)
    assert refine(structure, start, weight, metric, steps=1).rel_error == pytest.approx(optimum, rel=1e-6)
    descended = refine_by_descent(structure, start, weight, metric)
    assert optimum <= descended <= 1.01 * optimum


def rooted(weight: Tensor, metric: InputMetric) -> Tensor:
    """R' W L with H = R R' and M = L L', the roots by eigenvalues."""
    roots = []
    for matrix in (metric.curvature, metric.moment):
        if matrix is not None:
            values, vectors = torch.linalg.eigh(matrix)
            roots.append(vectors * values.sqrt()[:, None])
    found: Tensor = weight.flatten(2) @ roots[-1]
    return roots[0].mT @ found if len(roots) == 2 else found


def refine_by_descent(structure: Structure, start: Fit, weight: Tensor, metric: InputMetric) -> float:
    """The error that L-BFGS reaches where the closed form is not asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sekron_search.kron.refine.Refiner.is_closed", lambda *args: False)
        return refine(structure, start, weight, metric, steps=400).rel_error


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_refinement_does_not_see_the_scale_of_the_weight(scale: float) -> None:
    structure, weight = STRUCTURES["Kronecker"], gaussian(1, *SHAPE)
    metric = metric_of(weight)
    plain = refine(structure, project(weight, structure), weight, metric, steps=20)
    scaled = refine(structure, project(weight * scale, structure), weight * scale, metric, steps=20)
    assert scaled.rel_error == pytest.approx(plain.rel_error, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_refinement_keeps_the_dtype(dtype: torch.dtype) -> None:
    structure, weight = STRUCTURES["Kronecker"], gaussian(1, *SHAPE).to(dtype)
    metric = metric_of(weight)
    start = project(weight, structure)
    refined = refine(structure, start, weight, metric, steps=20)
    assert all(a.dtype == dtype for a in refined.factors)
    assert refined.rel_error < metric.rel_error(weight, reconstruct_batch(structure, start.factors))


@pytest.mark.parametrize("second", ["zero", "rank one"])
def test_refinement_takes_singular_moments_and_zero_weights(second: str) -> None:
    structure, size = STRUCTURES["Kronecker"], SHAPE[1] * SHAPE[2] * SHAPE[3]
    direction = gaussian(1, size, 1) if second == "rank one" else torch.zeros(1, size, 1, dtype=torch.float64)
    mean = torch.zeros(1, size, dtype=torch.float64)
    singular = torch.zeros(1, SHAPE[0], SHAPE[0], dtype=torch.float64)
    metric = InputMetric.damped(direction @ direction.mT, mean, curvature=singular)
    for weight in (gaussian(1, *SHAPE), torch.zeros(1, *SHAPE, dtype=torch.float64)):
        refined = refine(structure, project(weight, structure), weight, metric, steps=5)
        assert refined.rel_error <= 1
        assert all(bool(torch.isfinite(a).all()) for a in refined.factors)
