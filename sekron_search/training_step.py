"""What a network learns from a batch; on a GPU as one launch, recorded once and then played."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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


def taker(state: TrainingState, loss: Loss, count: int, together: int, check: Callable[[Any], None] | None) -> Take:
    """What learns from the batches of a training.

    Args:
        state: Of the training.
        loss: Of a batch that is where the network is.
        count: Batches of an epoch.
        together: Batches whose gradients are averaged for one step.
        check: Of a batch's target, what the loss checks of it unless it is recorded; None if it must not be, for it is
            a user's, which may do anything.
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
    if device.type != "cuda" or not alone or check is None:
        return take
    graph = StepGraph(state, loss, check)

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
    where the network looks at values to choose what it computes, draws random numbers on the CPU, or keeps numbers of
    its own. That is seen by trying, and told by a warning.

    Args:
        state: Of the training, of a network on a GPU.
        loss: Of a batch.
        check: Of a target.
    """

    def __init__(self, state: TrainingState, loss: Loss, check: Callable[[Any], None]) -> None:
        self._state, self._loss, self._check, self._device = state, loss, check, device_of(state.model)
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
        self._check(batch[1])
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
        put_back, before = self._state.kept(), _kept_elsewhere(self._state.model)
        here, stream = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        stream.wait_stream(here)
        try:
            with torch.random.fork_rng([self._device]), torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self._step(self._batch, self._weight)
                if (changed := _changed(before, _kept_elsewhere(self._state.model))) is not None:
                    raise RuntimeError(f"a step changes {changed}")
                graph = torch.cuda.CUDAGraph()
                # A user's loader may copy to the GPU by threads of its own meanwhile.
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    self._mean = self._step(self._batch, self._weight)
            self._graph = graph
        except RuntimeError as error:  # torch's, of whatever a recording cannot hold
            self._works = False
            self._state.optimizer.zero_grad()
            _release_generator(self._device)
            warnings.warn(
                f"fine-tuning: steps cannot be recorded as CUDA graphs, and take longer ({error})", stacklevel=2
            )
        finally:
            here.wait_stream(stream)
            put_back()


def _kept_elsewhere(model: nn.Module) -> dict[str, Any]:
    """What a network's passes may change, by name, that no recording would change again."""
    kept: dict[str, Any] = {
        "Python's random numbers": random.getstate(),
        "numpy's random numbers": repr(np.random.get_state(legacy=True)),  # noqa: NPY002 - a user's network may
        "random numbers of the CPU": torch.get_rng_state().tolist(),
    }
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, bool | int | float | str | None):
                kept[f"{path}.{name}"] = value
        kept |= {f"{path}.{name}": id(buffer) for name, buffer in module.named_buffers(recurse=False)}
    return kept


def _changed(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The first that differs."""
    return next((name for name in {**before, **after} if before.get(name) != after.get(name)), None)


def _release_generator(device: torch.device) -> None:
    """A recording that failed may have left the generator of random numbers waiting for more of it."""
    generator = torch.cuda.default_generators[device.index or 0]
    generator.graphsafe_set_state(generator.clone_state())


def _form_of(batch: Batch) -> list[Any]:
    """What batches have in common that one recording serves: shapes and types of tensors, and all other values."""
    plain = str | int | float | None
    return [
        (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf if isinstance(leaf, plain) else object()
        for leaf in leaves(batch)
    ]


def one_behind(items: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same, each when the next one is there."""
    before = next(items, None)
    for item in items:
        assert before is not None
        yield before
        before = item
    if before is not None:
        yield before


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """What is drawn follows from the seed, and changes nothing that is drawn later."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
