"""Structures of every family near a share of the dense layer's flops, and the modules that run them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn

from sekron_search.kron.conv import KroneckerConv
from sekron_search.kron.enumeration import FAMILIES, FamilyName, Skeleton, largest_where, skeletons
from sekron_search.kron.families import dense
from sekron_search.kron.geometry import ConvGeometry
from sekron_search.kron.plain import plain_layer
from sekron_search.kron.plan import best_plan, good_plans, make_plan
from sekron_search.kron.steps import Schedule
from sekron_search.kron.structure import Structure

#: Ranks are tried at these granularities: odd ones can cost as much as the next multiple.
GRANULARITIES = (1, 8, 16)

#: A structure stands for a level if it uses at least this share of the flops that the level allows.
LEAST_USE = 0.75


#: A family, and how many factors it has where that is not its own affair.
Family = tuple[FamilyName, int | None]


@dataclass(frozen=True)
class Shape:
    """A convolution of a network: batch 1, stride 1, padded to keep its size."""

    out_channels: int
    in_channels: int
    kernel: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.in_channels}->{self.out_channels} {self.kernel}x{self.kernel} at {self.size}x{self.size}"

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.out_channels, self.in_channels, self.kernel, self.kernel

    @property
    def geometry(self) -> ConvGeometry:
        return ConvGeometry(padding=((self.kernel // 2,) * 2,) * 2)

    def conv(self) -> nn.Conv2d:
        return nn.Conv2d(self.in_channels, self.out_channels, self.kernel, padding=self.kernel // 2, bias=False).eval()

    def inputs(self) -> tuple[torch.Tensor]:
        return (torch.randn(1, self.in_channels, self.size, self.size),)


@dataclass(frozen=True)
class Choice:
    """A structure, how it runs, and the share of the dense layer's flops that it needs."""

    structure: Structure
    schedule: Schedule
    flops: float

    def module(self, shape: Shape) -> nn.Module:
        """Modules of torch alone, of random factors."""
        layer = KroneckerConv.like(shape.conv(), self.structure, schedule=self.schedule)
        scale = 1 / shape.in_channels**0.5
        layer.set_factors([torch.randn_like(a) * scale for a in layer.factors()])
        return plain_layer(layer.eval())


@lru_cache(maxsize=1024)
def choices(family: Family, shape: Shape, level: float, *, most: int, seed: int = 0) -> list[Choice]:
    """At most `most` structures of a family that need between `LEAST_USE` and all of the flops that a level allows.

    Where there are more, those of fewest parameters and a random draw of the others in equal parts; for each, the
    plans of fewest flops that are presumably fastest, two at most.
    """
    size = (shape.size, shape.size)
    whole = make_plan(dense(shape.weight_shape), shape.geometry, Schedule((0,))).cost(size).flops
    found: dict[Structure, float] = {}
    for skeleton in _few(_skeletons(family, shape), 48, seed):
        for structure in _largest(skeleton, shape, level * whole):
            share = best_plan(structure, shape.geometry, size).cost(size).flops / whole
            if LEAST_USE * level <= share <= level:
                found[structure] = share
    chosen = sorted(found, key=lambda s: s.num_params)
    if len(chosen) > most:
        chosen = chosen[: most // 2] + _few(chosen[most // 2 :], most - most // 2, seed)
    return [
        Choice(structure, plan.schedule, found[structure])
        for structure in chosen
        for plan in good_plans(structure, shape.geometry, size)[:2]
    ]


def families_of(shape: Shape) -> list[Family]:
    """The families that have structures for a weight of that shape; nested ones apart by their number of factors."""
    named: list[Family] = [(name, None) for name in FAMILIES if name != "sekron"]
    families: list[Family] = [("sekron", 2), ("sekron", 3), *named]
    return [family for family in families if _skeletons(family, shape)]


def _skeletons(family: Family, shape: Shape) -> list[Skeleton]:
    name, factors = family
    found = skeletons(name, shape.weight_shape, 3, 1)
    return [skeleton for skeleton in found if factors in (None, len(skeleton.shapes))]


def _largest(skeleton: Skeleton, shape: Shape, flops: float) -> Iterator[Structure]:
    """The skeleton with ranks as large as the flops allow, all at the same share of their largest useful size."""
    largest = skeleton.max_ranks()
    size = (shape.size, shape.size)

    def fits(structure: Structure) -> bool:
        return best_plan(structure, shape.geometry, size).cost(size).flops <= flops

    for multiple in GRANULARITIES:

        def at(share: int, multiple: int = multiple) -> Structure:
            ranks = (
                round(n * share / 512 / multiple) * multiple if n >= multiple else n * share / 512 for n in largest
            )
            return skeleton.with_ranks(tuple(int(min(max(r, 1), n)) for r, n in zip(ranks, largest, strict=True)))

        if share := largest_where(lambda share, at=at: fits(at(share)), 512):  # type: ignore[misc]
            yield at(share)


def _few(items: list[Any], most: int, seed: int) -> list[Any]:
    if len(items) <= most:
        return items
    kept = np.random.default_rng(seed).permutation(len(items))[:most]
    return [items[i] for i in sorted(kept)]


def dense_flops(shape: Shape) -> int:
    """Multiply-adds of the convolution on one sample."""
    return prod(shape.weight_shape) * shape.size**2
