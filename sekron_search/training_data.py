"""Batches for fine-tuning, the same for the same epoch and seed, shared out among processes that train together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sekron_search.data import Augment, Batch, as_batch, batches, length, readable, sample_order
from sekron_search.errors import DataError, users_own
from sekron_search.model import batch_size, cut, part_of
from sekron_search.team import ALONE, Team


@dataclass(frozen=True)
class TrainingData:
    """Batches for training, the same for the same epoch and seed.

    Args:
        source: A dataset, which is shuffled with the seed, or an iterable of batches, which is taken as it comes. A
            generator that a DataLoader was given is seeded before every epoch.
        batch_size: Of a dataset.
        augment: Of the network's first argument.
        seed: Of the order and the augmentation.
        limit: Batches of an epoch at most.
    """

    source: Dataset[Any] | Iterable[Any]
    batch_size: int
    augment: Augment | None = None
    seed: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.source, Dataset | Iterable) or isinstance(self.source, str | Mapping | Tensor):
            raise DataError(
                f"train: expected a dataset, or an iterable of batches, got {type(self.source).__name__}; a tensor of "
                "inputs goes into a TensorDataset"
            )
        if isinstance(self.source, tuple) and self.source and all(isinstance(item, Tensor) for item in self.source):
            raise DataError(
                f"train: expected a dataset, or an iterable of batches, got a tuple of {len(self.source)} tensors; "
                "inputs and targets go into a TensorDataset(inputs, targets)"
            )
        if isinstance(self.source, Iterator):
            raise DataError(
                f"train: expected a dataset, or batches that can be gone over again every epoch; a "
                f"{type(self.source).__name__} can be gone over once: give a list or a DataLoader"
            )

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self._count if self.limit is None else min(self._count, self.limit)

    @cached_property
    def _count(self) -> int:
        if isinstance(self.source, Dataset):
            count = length(self.source)
            return count // self.batch_size or min(count, 1)
        try:
            return len(self.source)  # type: ignore[arg-type]
        except TypeError:
            return sum(1 for _ in islice(self.source, self.limit))

    def epoch(self, index: int, team: Team = ALONE) -> Iterator[Batch]:
        """The batches of an epoch; of each, the samples that are a process's own.

        What the source draws of torch's random numbers, for its order or its transforms, follows from seed and epoch,
        whatever else draws some.
        """
        seed = self.seed * 7919 + index
        if isinstance(self.source, Dataset):
            return _drawn_apart(self._epoch(seed, team), team.seed(seed))
        # All processes go through the same batches, of which each takes its part.
        samplers = getattr(self.source, "sampler", None), getattr(self.source, "batch_sampler", None)
        for drawing in (self.source, *samplers, getattr(samplers[1], "sampler", None)):
            if isinstance(own := getattr(drawing, "generator", None), torch.Generator):
                own.manual_seed(seed)
        return _drawn_apart(self._epoch(seed, team), seed)

    def _epoch(self, seed: int, team: Team) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(team.seed(seed))
        if isinstance(self.source, Dataset):
            order = sample_order(length(self.source), seed)[: len(self) * self.batch_size]
            chunks = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
            own = [chunk[team.part(len(chunk))] for chunk in chunks]
            found = batches(self.source, max(map(len, own), default=1), order=list(chain.from_iterable(own)))
        else:
            found = (_part(as_batch(item), team) for item in readable(islice(self.source, self.limit)))
        for inputs, target in found:
            if self.augment is not None:
                inputs = (_augmented(self.augment, inputs[0], generator), *inputs[1:])
            yield inputs, target


def _drawn_apart(items: Iterator[Batch], seed: int) -> Iterator[Batch]:
    """The same, made with random numbers of the CPU that follow from a seed, and that change no others."""
    state = torch.Generator().manual_seed(seed).get_state()
    while True:
        with torch.random.fork_rng([]):
            torch.set_rng_state(state)
            item = next(items, None)
            state = torch.get_rng_state()
        if item is None:
            return
        yield item


def _augmented(augment: Augment, images: Tensor, generator: torch.Generator) -> Tensor:
    with users_own("train: its augmentation failed"):
        found = augment(images, generator)
    if not isinstance(found, Tensor):
        raise DataError(f"train: expected its augmentation to return a tensor, got {type(found).__name__}")
    return found


def _part(batch: Batch, team: Team) -> Batch:
    """The samples of a batch that are a process's own."""
    if team.size == 1:
        return batch
    inputs, target = batch
    size = batch_size(inputs)
    own = team.part(size)
    return part_of(inputs, own), cut(target, own, size)
