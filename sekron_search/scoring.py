"""Which structures a layer could have, and which of them are worth fitting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import numpy as np
from torch import Tensor

from sekron_search.costs.analytic import LayerCost, layer_cost
from sekron_search.kron.enumeration import Skeleton, largest_where, rank_choices, skeletons
from sekron_search.kron.families import Graph, dense, nested_graph
from sekron_search.kron.projection import pad_channels, project
from sekron_search.kron.spectra import PairSpectra, core_tails, error_bound, nested_tails
from sekron_search.kron.structure import Shape, Structure
from sekron_search.kron.svd import core_of
from sekron_search.model import LayerInfo
from sekron_search.search.pareto import non_dominated
from sekron_search.search.space import SearchSpace

#: Least-squares sweeps of a fit that is only there to be scored.
SCORING_SWEEPS = 10

#: With sweeps of more products, entries of the weight times rank, a fit would take minutes: such ranks, at the largest
#: layers those that save least, are left out.
MOST_PRODUCTS = 3e9

#: Fewer options than this of a rank graph would be no choice.
LEAST_SHARE = 3

#: Spectra of unfoldings whose smaller side has at least this size are computed only where a bound leaves them a chance.
LARGE = 256

#: Leaves of a core of more entries are fitted: all their singular vectors would be too many.
MOST_LEAF = 2048


@dataclass(frozen=True)
class CandidateStructure:
    """A structure that is cheaper than the dense layer in flops or parameters, and its costs."""

    structure: Structure
    cost: LayerCost


def candidates(info: LayerInfo, space: SearchSpace) -> tuple[CandidateStructure, ...]:
    """All structures of the space for this layer that are cheaper than dense; layers of equal geometry share them."""
    anonymous = replace(info, name="", output_shift="kept")
    return _candidates(anonymous, space.model_copy(update={"include": (), "exclude": (), "name": ""}))


@lru_cache(maxsize=256)
def _candidates(info: LayerInfo, space: SearchSpace) -> tuple[CandidateStructure, ...]:
    whole = layer_cost(dense(info.weight_shape), info)

    def fits(structure: Structure) -> bool:
        # Rebuilt weights run at dense speed, so only their parameters have to pay; otherwise both costs may not grow.
        if structure.num_params * info.geometry.groups >= whole.params:
            return False
        return space.dense_execution or layer_cost(structure, info).flops < whole.flops

    found: dict[Structure, CandidateStructure] = {}
    for name in space.families:
        # No more than `max_fits` of the longer ones will be fitted: the rest need not be priced, nor kept in memory.
        longer = sum(len(s.shapes) > 2 for s in _skeletons(name, info, space))
        wanted, number = set(_spread(longer, space.max_fits)), 0
        for skeleton in _skeletons(name, info, space):
            if len(skeleton.shapes) > 2:
                number += 1
                if number - 1 not in wanted:
                    continue
            for structure in rank_choices(skeleton, fits, space.rank_levels, space.rank_multiple):
                found.setdefault(structure, CandidateStructure(structure, layer_cost(structure, info)))
    return tuple(found.values())


def _skeletons(name: str, info: LayerInfo, space: SearchSpace) -> Iterator[Skeleton]:
    return skeletons(name, info.weight_shape, space.max_factors, space.channel_multiple)


def scores(pool: Sequence[CandidateStructure], weight: Tensor, max_fits: int) -> list[float]:
    """Relative weight error of every candidate, infinity for those that cannot be worth it, NaN where none is needed.

    Two factors, nested ones, and those with a core: from spectra, without a fit. Where the structures of a rank graph
    differ by the size of one index only, as CP over the modes does, each is worth refining: NaN. Others: from quick
    fits, at most `max_fits`, spread evenly over those whose bound on the error leaves them a chance. What would take
    minutes to fit is left out, but for the cheapest.
    """
    scored = _Scored(pool, weight)
    scored.cores()
    scored.pairs()
    scored.nested()
    cheapest = set(_cheapest(pool))
    unknown = [i for i in range(len(pool)) if np.isnan(scored.errors[i])]
    most = MOST_PRODUCTS / weight.numel()
    dear = {i for i in unknown if i not in cheapest and pool[i].structure.largest_rank > most}
    ladders = _ladders(pool, unknown) - dear
    others = [i for i in unknown if i not in ladders and i not in dear]
    hopeful = [i for i in others if i in cheapest or not scored.beaten(i, scored.bound(i))]
    fitted = {hopeful[i] for i in _spread(len(hopeful), max_fits)} | (cheapest & set(hopeful))
    for i in unknown:
        if i in fitted:
            scored.errors[i] = project(weight, pool[i].structure, sweeps=SCORING_SWEEPS).rel_error
        elif i not in ladders:
            scored.errors[i] = np.inf
    return [float(error) for error in scored.errors]


def _ladders(pool: Sequence[CandidateStructure], indices: Sequence[int]) -> set[int]:
    """Those of the candidates that differ from all others of their rank graph by the size of their one index only."""
    shapes: dict[Graph, set[tuple[Shape, ...]]] = {}
    for i in indices:
        shapes.setdefault(pool[i].structure.graph, set()).add(pool[i].structure.shapes)
    return {i for i in indices if len(pool[i].structure.ranks) == 1 and len(shapes[pool[i].structure.graph]) == 1}


class _Scored:
    """Errors of a pool's candidates as far as they are known; NaN for the others."""

    def __init__(self, pool: Sequence[CandidateStructure], weight: Tensor) -> None:
        self.pool, self.weight = pool, weight
        self.costs = np.array([[c.cost.flops, c.cost.params] for c in pool], dtype=float).reshape(-1, 2)
        self.errors = np.full(len(pool), np.nan)
        shapes = {c.structure.weight_shape: c.structure for c in pool}
        self.spectra = {shape: PairSpectra(pad_channels(weight, s)) for shape, s in shapes.items()}

    def pairs(self) -> None:
        """Two factors: small spectra first; large ones only where some rank of them might not be beaten."""
        groups: dict[tuple[Shape, Shape], list[int]] = {}
        for i, candidate in enumerate(self.pool):
            if candidate.structure.num_factors == 2:
                groups.setdefault((candidate.structure.weight_shape, candidate.structure.shapes[0]), []).append(i)
        exact = tuple(self.weight.shape[1:])
        small = {
            key: own
            for key, own in groups.items()
            if key[0] != exact or min(map(prod, self.pool[own[0]].structure.shapes)) < LARGE
        }
        self._pairs(small)
        large = {key: own for key, own in groups.items() if key not in small}
        kept = {}
        for (whole, first), own in large.items():
            bounds = [self.spectra[whole].bound_from_nested(first, _rank(self.pool[i].structure)) for i in own]
            if all(self.beaten(i, bound) for i, bound in zip(own, bounds, strict=True)):
                self.errors[own] = np.inf
            else:
                kept[whole, first] = own
        self._pairs(kept)

    def cores(self) -> None:
        """Tucker: one rotation of the weight gives all ranks."""
        groups: dict[Structure, list[int]] = {}
        for i, candidate in enumerate(self.pool):
            structure = candidate.structure
            if structure.num_factors > 2 and core_of(structure) is not None and _largest_leaf(structure) <= MOST_LEAF:
                ones = {name: 1 for name, _ in structure.ranks}
                groups.setdefault(Structure.build(structure.shapes, structure.carries, ones), []).append(i)
        for structure, own in groups.items():
            core = core_of(structure)
            assert core is not None
            tails = core_tails(structure, self.spectra[structure.weight_shape].unit, core).sum(0)
            leaves = [carried[0] for k, carried in enumerate(structure.carries) if k != core]
            for i in own:
                sizes = self.pool[i].structure.rank_sizes
                at = tuple(min(sizes[name], n - 1) for name, n in zip(leaves, tails.shape, strict=True))
                self.errors[i] = float(tails[at]) ** 0.5

    def _pairs(self, groups: Mapping[tuple[Shape, Shape], Sequence[int]]) -> None:
        for whole, spectra in self.spectra.items():
            spectra.compute([first for shape, first in groups if shape == whole])
        for (whole, first), own in groups.items():
            for i in own:
                self.errors[i] = self.spectra[whole].error(first, _rank(self.pool[i].structure))

    def nested(self) -> None:
        """SeKron of three factors and more: one tree of spectra per sequence of shapes gives all its ranks."""
        groups: dict[Shape, dict[tuple[Shape, ...], list[int]]] = {}
        for i, candidate in enumerate(self.pool):
            structure = candidate.structure
            if structure.num_factors > 2 and structure.carries == nested_graph(structure.num_factors):
                groups.setdefault(structure.weight_shape, {}).setdefault(structure.shapes, []).append(i)
        for whole, sequences in groups.items():
            ranks = {shapes: [_ranks(self.pool[i].structure) for i in own] for shapes, own in sequences.items()}
            limits = {shapes: [max(column) for column in zip(*rows, strict=True)] for shapes, rows in ranks.items()}
            for shapes, tails in nested_tails(self.spectra[whole].unit, limits).items():
                for i, own_ranks in zip(sequences[shapes], ranks[shapes], strict=True):
                    self.errors[i] = float(tails.sum(0)[tuple(r - 1 for r in own_ranks)].clamp_min(0)) ** 0.5

    def bound(self, i: int) -> float:
        """An error below which no fit of a candidate comes; none is known where channels are padded."""
        structure = self.pool[i].structure
        padded = structure.weight_shape != tuple(self.weight.shape[1:])
        return 0.0 if padded else error_bound(structure, self.spectra[structure.weight_shape])

    def beaten(self, i: int, error: float) -> bool:
        """Whether a candidate of known error costs no more than this one, even if this one had that error."""
        with np.errstate(invalid="ignore"):
            better = (self.costs <= self.costs[i]).all(1) & (self.errors <= error)
        return bool(better.any())


def _largest_leaf(structure: Structure) -> int:
    return max(prod(shape) for k, shape in enumerate(structure.shapes) if k != core_of(structure))


def _ranks(structure: Structure) -> list[int]:
    return [size for _, size in structure.ranks]


def _rank(structure: Structure) -> int:
    return prod(_ranks(structure))


def shortlist(pool: Sequence[CandidateStructure], scores: Sequence[float], most: int) -> list[int]:
    """Indices of the candidates to refine: the non-dominated ones of every rank graph, and those without a score.

    Rank graphs do not compete with one another yet: refinement gains them differently much, and they take different
    memory and time. If there are more than `most`, the largest graphs give up options, evenly over their flops.
    """
    groups: dict[Graph, list[int]] = {}
    for i, score in enumerate(scores):
        if not np.isinf(score):
            groups.setdefault(pool[i].structure.graph, []).append(i)
    fronts = []
    for indices in groups.values():
        points = [[pool[i].cost.flops, pool[i].cost.params, scores[i]] for i in indices]
        keep = non_dominated(points) | np.isnan([scores[i] for i in indices])
        fronts.append([i for i, kept in zip(indices, keep, strict=True) if kept])
    chosen = set()
    for front, count in _shared_out(fronts, most):
        ordered = sorted(front, key=lambda i: pool[i].cost.flops)
        chosen |= {ordered[at] for at in _spread(len(ordered), count)}
    return sorted({*chosen, *_cheapest(pool)}, key=lambda i: pool[i].cost.flops)


def _shared_out(fronts: Sequence[list[int]], most: int) -> list[tuple[list[int], int]]:
    """How many of every front to take: all, or the same number of the longer ones; of all as one if that is too few."""
    longest = max(map(len, fronts), default=0)
    share = largest_where(lambda share: sum(min(len(front), share) for front in fronts) <= most, longest)
    if share < min(longest, LEAST_SHARE):
        return [([i for front in fronts for i in front], most)]
    counts = [min(len(front), share) for front in fronts]
    for k, front in enumerate(fronts):
        if len(front) > share and sum(counts) < most:
            counts[k] += 1
    return list(zip(fronts, counts, strict=True))


def _cheapest(pool: Sequence[CandidateStructure]) -> list[int]:
    """The candidates of least flops, params and peak: with them a budget can be met that the space can meet at all."""
    if not pool:
        return []
    costs = [(c.cost.flops, c.cost.params, c.cost.peak_elements) for c in pool]
    return [min(range(len(pool)), key=lambda i: (costs[i][which], costs[i])) for which in range(3)]


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` positions, evenly spread, the ends among them."""
    return [int(i) for i in np.linspace(0, count - 1, min(most, count)).round()] if count else []
