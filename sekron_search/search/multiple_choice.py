"""Multiple-choice knapsacks as arrays: their relaxation, a good choice by local search, and the proof that it is good.

One option of every group is chosen; each has an error, and some costs whose sums are bounded. The multipliers of the
relaxed problem give every option a reduced error r >= 0, and any choice costs at least the relaxed optimum plus the sum
of the r it takes. So few options can be part of a better choice than the one that local search finds. A sweep over the
groups lists all partial choices of these that may still become one. It tells by many multipliers at once: each proves a
bound, and what passes one of them fails another. What it leaves open HiGHS decides, on these few options.

Source: Kellerer, Pferschy, Pisinger 2004, Knapsack Problems, Sec. 11.2 (relaxation), 3.2 (reduction), 3.4 (lists).
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace
from math import isinf

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

#: Options per group that local search looks at, on average; pairs of all of them are tried in every step.
CORE_OPTIONS = 5

#: What sums of costs may exceed their bounds by, relative to them: the rounding of the sums themselves.
ROUNDING = 1e-12

#: Powers of e by which the multipliers of the relaxed problem are changed, in all combinations, for other bounds.
CHANGES = (0.1, 0.3)

#: Partial choices that a sweep goes on with: the next number where one does not prove the gap. What even the last does
#: not prove is left to HiGHS: close to what no choice meets, it branches on what a sweep has to keep.
WIDTHS = (200, 2_000, 20_000)

#: Nodes of HiGHS at most, which take a minute or so: without a limit of time a solution is the same on every machine.
NODES = 20_000

#: What HiGHS says where nothing meets the bounds.
INFEASIBLE = 2

#: Partial choices that are looked at in one step of a sweep; what bounds its memory.
LOOKED_AT = 4_000_000

#: A sweep looks for what is better than this share of the gap that is asked for, so that rounding does not undo it.
SHARE = 0.999

#: HiGHS takes a bound for met that is missed by less, and a choice for the best if no other is better by more: it is
#: given tighter bounds, and what it proves is lowered.
SOLVER_TOLERANCE = 2e-6


@dataclass(frozen=True)
class Choice:
    """One option of every group, by its place in the arrays, with the total error and a proven lower bound of it."""

    options: Indices
    error: float
    lower_bound: float

    def proves(self, relative_gap: float) -> bool:
        """Whether it is that close to the best."""
        return self.error - self.lower_bound <= max(relative_gap, ROUNDING) * abs(self.error)


class MultipleChoice:
    """A knapsack.

    Args:
        errors: (options,) of all groups in turn.
        costs: (bounds, options), each row as a multiple of its bound's scale.
        room: (bounds,) what the sums of the costs may be, in the same scale.
        owner: (options,) the group of every option, ascending, from 0; no group is empty.
    """

    def __init__(self, errors: Floats, costs: Floats, room: Floats, owner: Indices) -> None:
        self.errors, self.costs, self.room, self.owner = errors, costs, room, owner
        self.starts = np.flatnonzero(np.diff(owner, prepend=-1))

    def part(self, keep: NDArray[np.bool_]) -> tuple[MultipleChoice, Indices]:
        """The knapsack of some of the options, and which they are."""
        kept = np.flatnonzero(keep)
        return MultipleChoice(self.errors[kept], self.costs[:, kept], self.room, self.owner[kept]), kept

    def error(self, options: Indices) -> float:
        """The total error of a choice."""
        return float(self.errors[options].sum())

    def excess(self, options: Indices) -> float:
        """By how much a choice misses its bounds, added up; 0 if it meets them."""
        missed = self.costs[:, options].sum(axis=1) - self.room
        return float(np.where(missed > ROUNDING * np.abs(self.room), missed, 0.0).sum())

    @property
    def _ends(self) -> Indices:
        return np.append(self.starts[1:], len(self.errors))

    @property
    def multipliers(self) -> Floats | None:
        """(bounds,) what a unit of room is worth in the relaxed problem; None if even that has no solution."""
        if not len(self.room):
            return np.zeros(0)
        scale = float(np.abs(self.errors).max()) or 1.0
        found = linprog(
            self.errors / scale,
            A_ub=self.costs,
            b_ub=self.room,
            A_eq=self._one_of_each(),
            b_eq=np.ones(len(self.starts)),
            method="highs-ds",
        )
        if found.x is None:
            return None
        prices: Floats = np.maximum(-found.ineqlin.marginals, 0.0) * scale
        return prices

    def reduced(self, multipliers: Floats) -> tuple[float, Floats]:
        """The bound that multipliers prove, whatever they are, and what every option adds to it: (options,)."""
        priced = self.errors + multipliers @ self.costs
        best = np.minimum.reduceat(priced, self.starts)
        return float(best.sum() - multipliers @ self.room), priced - best[self.owner]

    def improved(self, options: Indices) -> Indices:
        """A choice from which no change of two options leads to a better one; first its excess is brought down."""
        current = options.copy()
        clash = self.owner[:, None] == self.owner[None, :]  # of options of one group only one is taken
        np.fill_diagonal(clash, False)
        slack = ROUNDING * np.abs(self.room)
        while True:
            gains = _in_pairs(self.errors - self.errors[current][self.owner])
            excess = np.zeros_like(gains)
            for row, own, limit, allowed in zip(
                self.costs, self.costs[:, current].sum(axis=1), self.room, slack, strict=True
            ):
                missed = _in_pairs(row - row[current][self.owner]) + (own - limit)
                excess += np.where(missed > allowed, missed, 0.0)
            gains[clash] = excess[clash] = np.inf
            best = np.argmin(np.where(excess > 0, np.inf, gains) if (excess == 0).any() else excess)
            step = current.copy()
            for option in np.unravel_index(best, gains.shape):
                step[self.owner[option]] = option
            if (self.excess(step), self.error(step)) >= (self.excess(current), self.error(current)):
                return current
            current = step

    def solved(
        self, errors: Floats, relative_gap: float, deadline: float, nodes: int | None
    ) -> tuple[Indices | None, float]:
        """A choice by HiGHS that meets the bounds, of least total error but for a gap, and a bound of that error.

        Args:
            errors: (options,), so scaled that what they add up to is about one: HiGHS has an absolute tolerance.
            relative_gap: Of the total error.
            deadline: When to stop, in the seconds of `time.monotonic`.
            nodes: At most so many.

        Returns:
            No choice if there is none, or none was found in time; the bound is infinity if there is none.
        """
        bound = -np.inf
        for tighter in (0.0, SOLVER_TOLERANCE):
            room = self.room - tighter * np.abs(self.room)
            limits: dict[str, float] = {"mip_rel_gap": relative_gap}
            if nodes is not None:
                limits["node_limit"] = nodes
            if not isinf(deadline):
                limits["time_limit"] = max(deadline - time.monotonic(), 0.1)
            result = milp(
                errors,
                constraints=[
                    LinearConstraint(self._one_of_each(), 1, 1),
                    LinearConstraint(self.costs, -np.inf, room),
                ],
                integrality=np.ones(len(errors)),
                bounds=Bounds(0, 1),
                options=limits,
            )
            if tighter == 0:  # what is shown of tighter bounds holds for them alone
                known = result.mip_dual_bound
                bound = (
                    np.inf if result.status == INFEASIBLE else -np.inf if known is None else known - SOLVER_TOLERANCE
                )
            if result.x is None:
                break
            ranges = zip(self.starts, self._ends, strict=True)
            found = np.array([start + int(np.argmax(result.x[start:end])) for start, end in ranges])
            if self.excess(found) == 0:
                return found, bound
        return None, bound

    def _one_of_each(self) -> csr_array:
        count = len(self.errors)
        return csr_array((np.ones(count), (self.owner, np.arange(count))), shape=(len(self.starts), count))

    def better(self, multipliers: Floats, cutoff: float, width: int) -> tuple[Indices | None, float]:
        """The best choice of less error than a cutoff, and a lower bound of the error of all choices.

        A sweep over the groups. Where more partial choices are left than `width`, those of the least bounds are gone on
        with, and the least bound of the others is what the sweep proves.

        Args:
            multipliers: Of the relaxed problem; those of a part's whole serve it as well.
            cutoff: What does not get below it is dropped.
            width: Partial choices to go on with.
        """
        proofs = [self.reduced(changed) for changed in _changed(multipliers)]
        bounds, added = np.array([bound for bound, _ in proofs]), np.array([r for _, r in proofs]).T
        least = np.minimum.reduceat(self.costs, self.starts, axis=1)
        left, slack = least.sum(axis=1), ROUNDING * np.abs(self.room)
        sums, used = bounds[None, :], np.zeros((1, len(self.room)))
        taken = np.zeros((1, len(self.starts)), dtype=np.int64)
        proven = cutoff
        ends = self._ends
        wide = int((ends - self.starts).max())
        for group in np.argsort(ends - self.starts, kind="stable"):  # the narrowest first: partial choices stay few
            own = np.arange(self.starts[group], ends[group])
            left = left - least[:, group]
            state, option = (a.ravel() for a in np.meshgrid(np.arange(len(sums)), own, indexing="ij"))
            fits = sums[state, 0] + added[option, 0] < cutoff
            fits &= (used[state] + self.costs[:, option].T + left <= self.room + slack).all(axis=1)
            state, option = state[fits], option[fits]
            sums = sums[state] + added[option]
            fits = (sums < cutoff).all(axis=1)
            sums, state, option = sums[fits], state[fits], option[fits]
            room = min(width, LOOKED_AT // wide)
            if len(sums) > room:
                highest = sums.max(axis=1)
                order = np.argsort(highest, kind="stable")
                proven = min(proven, float(highest[order[room]]))
                sums, state, option = (a[order[:room]] for a in (sums, state, option))
            used, taken = used[state] + self.costs[:, option].T, taken[state]
            taken[:, group] = option
            if not len(sums):
                return None, proven
        errors = self.errors[taken].sum(axis=1)
        best = int(np.argmin(errors))
        return taken[best], min(proven, float(errors[best]))


def solve(problem: MultipleChoice, relative_gap: float, time_limit_s: float) -> Choice | None:
    """The choice of least error, or one that is close to it; None if none meets the bounds.

    Args:
        problem: The knapsack.
        relative_gap: How close it shall be proven to be; the bound of what is given back says how close it is.
        time_limit_s: After which no new attempt at a proof is begun.
    """
    deadline = time.monotonic() + time_limit_s
    multipliers = problem.multipliers
    if multipliers is None:
        return None
    relaxed, reduced = problem.reduced(multipliers)
    found = _local_search(problem, reduced)
    if found is None:
        # However long it takes, if there is time: not to have found a choice is no proof that there is none.
        found, _ = problem.solved(np.zeros(len(reduced)), relative_gap, deadline, None)
        if found is None:
            return None
    best = Choice(found, problem.error(found), relaxed)
    for width in (*WIDTHS, None):
        if best.proves(relative_gap) or time.monotonic() > deadline:
            break
        cutoff = best.error - relative_gap * SHARE * abs(best.error)
        part, kept = problem.part(relaxed + reduced < cutoff)
        if len(part.starts) < len(problem.starts):  # a group has nothing that could make the choice better
            return replace(best, lower_bound=cutoff)
        if width is None:
            better, proven = part.solved(part.errors / best.error, relative_gap / 2, deadline, NODES)
            proven *= best.error
        else:
            better, proven = part.better(multipliers, cutoff, width)
        proven = max(min(proven, cutoff), best.lower_bound)
        if better is not None and part.error(better) < best.error:
            best = Choice(kept[better], part.error(better), proven)
        best = replace(best, lower_bound=min(proven, best.error))
    return best


def _local_search(problem: MultipleChoice, reduced: Floats) -> Indices | None:
    """A good choice among the options of least reduced error; None if local search finds none that meets the bounds."""
    count = min(CORE_OPTIONS * len(problem.starts), len(reduced)) - 1
    core, kept = problem.part(reduced <= np.partition(reduced, count)[count])
    own = reduced[kept]
    start = np.array([s + int(np.argmin(own[s:e])) for s, e in zip(core.starts, core._ends, strict=True)])
    found = core.improved(start)
    return None if core.excess(found) else kept[found]


def _changed(multipliers: Floats) -> list[Floats]:
    """Multipliers, and others around them; those first."""
    found = {
        tuple(multipliers * np.exp(change))
        for size in CHANGES
        for change in itertools.product((-size, 0.0, size), repeat=len(multipliers))
    }
    return [multipliers, *(np.array(m) for m in sorted(found - {tuple(multipliers)}))]


def _in_pairs(values: Floats) -> Floats:
    """The sum of every two values; on the diagonal every one alone."""
    pairs: Floats = values[:, None] + values[None, :]
    np.fill_diagonal(pairs, values)
    return pairs
