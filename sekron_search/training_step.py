"""What a network learns from a batch; on a GPU as one launch, recorded once and then played."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sekron_search.data import Batch, to_device
from sekron_search.model import device_of
from sekron_search.nested import leaves, map_tensors
from sekron_search.training_state import TrainingState

#: Of (inputs, target, weight of the layers' errors).
Loss = Callable[[tuple[Any, ...], Any, float | Tensor], Tensor]

#: Learns from a batch, of a number from 0 in its epoch, with a weight of the layers' errors; its loss.
Take = Callable[[Batch, float, int], Tensor]

#: Steps before the recording, in which libraries choose their algorithms and optimizers make their state.
WARM_UP = 2


def taker(state: TrainingState, loss: Loss, count: int, together: int, *, records: bool) -> Take:
    """What learns from the batches of a training.

    Args:
        state: Of the training.
        loss: Of a batch that is where the network is.
        count: Batches of an epoch.
        together: Batches whose gradients are averaged for one step.
        records: Whether the loss may be recorded as a `StepGraph` where that is possible: not if it is a user's, which
            may do anything.
    """
    device = device_of(state.model)

    def take(batch: Batch, weight: float, number: int) -> Tensor:
        inputs, target = to_device(batch, device)
        found = loss(inputs, target, weight)
        # What is left over at the end of an epoch makes a step of its own, as large as there are batches in it.
        state.add(found / min(together, count - number // together * together))
        if (number + 1) % together == 0 or number + 1 == count:
            state.step()
        return found.detach().clone()

    # What is recorded must not wait for other processes, nor look at gradients to see whether they overflow.
    alone = together == 1 and state.team.size == 1 and not state.scaler.is_enabled()
    if device.type != "cuda" or not alone or not records:
        return take
    graph = StepGraph(state, loss)

    def play(batch: Batch, weight: float, number: int) -> Tensor:
        found = graph(batch, weight)
        state.schedule.step()
        return found

    return play


class StepGraph:
    """The steps of a training, each launched as one: loss, gradients, and what the optimizer makes of them.

    A compressed network's step is thousands of small kernels, and launching one by one takes longer than all of them
    run. The first batch's step is recorded; batches of its form are copied to where it takes its own from. Batches of
    another form, the last one of a list say, are gone through as ever, and so are all if the step cannot be recorded:
    where the network looks at values to choose what it computes.

    Args:
        state: Of the training, of a network on a GPU.
        loss: Of a batch.
    """

    def __init__(self, state: TrainingState, loss: Loss) -> None:
        self._state, self._loss, self._device = state, loss, device_of(state.model)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._works = True
        self._form: list[Any] = []
        self._batch: Batch = ((), None)
        self._weight = self._mean = torch.zeros(())

    def __call__(self, batch: Batch, weight: float) -> Tensor:
        """Take the step of a batch, of which the schedule is not told; the loss."""
        if self._works and self._graph is None:
            self._record(batch, weight)
        if self._graph is None or _form_of(batch) != self._form:
            return self._step(to_device(batch, self._device), torch.tensor(weight, device=self._device)).clone()
        for own, given in zip(leaves(self._batch), leaves(batch), strict=True):
            if isinstance(own, Tensor):
                own.copy_(given, non_blocking=True)
        self._weight.fill_(weight)
        self._graph.replay()
        return self._mean.clone()

    def _step(self, batch: Batch, weight: Tensor) -> Tensor:
        loss = self._loss(*batch, weight)
        self._state.add(loss)
        self._state.update()
        return loss.detach()

    def _record(self, batch: Batch, weight: float) -> None:
        self._form = _form_of(batch)
        self._batch = map_tensors(lambda tensor: tensor.to(self._device).clone(), batch)
        self._weight = torch.tensor(weight, device=self._device)
        put_back = self._state.kept()
        stream, graph = torch.cuda.Stream(self._device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.random.fork_rng([self._device]):
                with torch.cuda.stream(stream):
                    for _ in range(WARM_UP):
                        self._step(self._batch, self._weight)
                torch.cuda.current_stream(self._device).wait_stream(stream)
                with torch.cuda.graph(graph, stream=stream):
                    self._mean = self._step(self._batch, self._weight)
            self._graph = graph
        except RuntimeError as error:  # torch's, of whatever a recording cannot hold
            self._works = False
            self._state.optimizer.zero_grad()
            warnings.warn(
                f"fine-tuning: steps cannot be recorded as CUDA graphs, and take longer ({error})", stacklevel=2
            )
        finally:
            put_back()


def _form_of(batch: Batch) -> list[Any]:
    """What batches have in common that one recording serves: shapes and types of tensors, and all other values."""
    plain = str | int | float | None
    return [
        (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf if isinstance(leaf, plain) else object()
        for leaf in leaves(batch)
    ]
