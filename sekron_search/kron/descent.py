"""Minimisation by L-BFGS for few, dear evaluations: well-scaled variables, a short first step, an early end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: The first step: variables of which the curvature is about one have directions of which it is several.
FIRST = 0.3

#: A step that is too long is followed by one of at least this part of it: few evaluations are all there may be.
SHORTEST = 1e-4

#: Pairs of steps and changes of the gradient that are remembered.
HISTORY = 20

#: A step has to keep this part of the decrease that the slope promises.
SUFFICIENT = 1e-4

#: Steps over which the decrease is looked at.
WINDOW = 4

Point = list[Tensor]


@dataclass(frozen=True)
class Minimum:
    """The lowest point found, and its value."""

    point: Point
    value: float


def minimise(
    value_and_gradient: Callable[[Sequence[Tensor]], tuple[float, Point]],
    start: Sequence[Tensor],
    *,
    evaluations: int,
    tolerance: float,
) -> Minimum:
    """The lowest point found.

    The inverse Hessian starts as the identity, so variables should be scaled to a Hessian of about one: then nearly
    every step is taken at the first attempt. Shorter ones follow by interpolation.

    Args:
        value_and_gradient: Of the function; a value that is not finite counts as too large.
        start: The first point.
        evaluations: At most so many.
        tolerance: Ends when `WINDOW` steps lowered the value by less than this part of it.

    Source: Nocedal and Wright 2006, Algorithms 7.4 and 3.1.
    """
    x = _flat(start)
    value, parts = value_and_gradient(start)
    gradient, memory, values = _flat(parts), list[tuple[Tensor, Tensor]](), [value]
    left = evaluations - 1
    while left > 0:
        direction = -_inverse_times(gradient, memory)
        slope = float(direction @ gradient)
        if not slope < 0:
            break
        step, found = 1.0 if memory else FIRST, None
        while left > 0 and step > 1e-8:
            left -= 1
            trial = x + step * direction
            new_value, parts = value_and_gradient(_shaped(trial, start))
            if new_value <= value + SUFFICIENT * step * slope:
                found = _flat(parts)
                break
            # The minimum of the parabola through both values and the slope.
            curved = (new_value - value - step * slope) / step**2
            best = -slope / (2 * curved) if 0 < curved < float("inf") else 0.1 * step
            step = min(max(best, SHORTEST * step), 0.5 * step)
        if found is None:
            break
        moved, change = trial - x, found - gradient
        if float(moved @ change) > 1e-10 * float(change @ change):
            memory = [*memory, (moved, change)][-HISTORY:]
        x, value, gradient = trial, new_value, found
        values.append(value)
        if len(values) > WINDOW and values[-1 - WINDOW] - value <= tolerance * value:
            break
    return Minimum(_shaped(x, start), value)


def _inverse_times(gradient: Tensor, memory: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The two-loop recursion."""
    result, shares = gradient.clone(), []
    for moved, change in reversed(memory):
        share = float(moved @ result) / float(moved @ change)
        result -= share * change
        shares.append(share)
    if memory:
        moved, change = memory[-1]
        result *= float(moved @ change) / float(change @ change)
    for (moved, change), share in zip(memory, reversed(shares), strict=True):
        result += (share - float(change @ result) / float(moved @ change)) * moved
    return result


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _shaped(x: Tensor, like: Sequence[Tensor]) -> Point:
    return [piece.reshape(a.shape) for piece, a in zip(x.split([a.numel() for a in like]), like, strict=True)]
