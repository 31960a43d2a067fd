"""Processes that train a network together, one per GPU, as `torchrun` starts them."""

from __future__ import annotations

import atexit
import datetime
import importlib
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sekron_search.errors import DataError

#: Between the seeds of two processes.
RANK_SEED = 104729

#: How long the others wait for the first process, which searches alone between two trainings.
PATIENCE = datetime.timedelta(days=30)


@dataclass(frozen=True)
class Team:
    """The processes of this job; without torchrun, one that is alone.

    Args:
        rank: Of this process, from 0.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Team:
        """The team that torchrun has started; it is joined in the first call.

        A process that was started by something else is alone.
        """
        if not (dist.is_available() and dist.is_torchelastic_launched()):
            return cls()
        if not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            # Its threads have to end before the interpreter does, which aborts otherwise. They end with the group, and
            # this module, which torch.compile imports, would keep it in its default arguments if it came later.
            importlib.import_module("torch.distributed.nn.functional")
            # What processes tell each other goes through gloo: waiting for it keeps no GPU busy.
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
            atexit.register(dist.destroy_process_group)
        return cls(dist.get_rank(), dist.get_world_size())

    def seed(self, of_all: int) -> int:
        """The seed of this process, where all processes would draw the same from one."""
        return of_all + self.rank * RANK_SEED

    def told(self, value: Any = None) -> Any:
        """What the first process says, in all of them; it waits for all of them.

        Args:
            value: Plain data and tensors, in dictionaries, lists and tuples. The others get the tensors on the CPU.
        """
        if self.size == 1:
            return value
        content = io.BytesIO()
        if self.rank == 0:
            torch.save(value, content)
        size = torch.tensor([content.getbuffer().nbytes])
        dist.broadcast(size, src=0)
        said = torch.empty(int(size), dtype=torch.uint8)
        if self.rank == 0:
            said.copy_(torch.frombuffer(content.getbuffer(), dtype=torch.uint8))
        dist.broadcast(said, src=0)
        if self.rank == 0:
            return value
        # Unlike torch's own way to send objects, this runs no code that a message might hold.
        return torch.load(io.BytesIO(said.numpy().tobytes()), map_location="cpu", weights_only=True)

    def part(self, count: int) -> slice:
        """Which of the samples of a batch are this process's; all processes get equally many.

        Raises:
            DataError: If there are fewer samples than processes.
        """
        if count < self.size:
            raise DataError(
                f"fine-tuning: a batch of {count} samples for {self.size} processes; give finetune.batch_size at least "
                "one for each, or start fewer"
            )
        return slice(self.rank, count // self.size * self.size, self.size)

    def mean(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors, of one dtype and device, by their means over the processes."""
        own = list(tensors)
        if self.size == 1 or not own:
            return
        joined = torch.cat([tensor.detach().flatten() for tensor in own])
        dist.all_reduce(joined)
        joined /= self.size
        for tensor, mean in zip(own, joined.split([tensor.numel() for tensor in own]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def mean_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their means over the processes; where one has none, it counts as zero."""
        if self.size == 1:
            return
        own = [p for p in parameters if p.requires_grad]
        for parameter in own:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.mean(p.grad for p in own if p.grad is not None)

    @torch.no_grad()
    def mean_buffers(self, model: nn.Module) -> None:
        """Replace running statistics by their means over the processes, each of which has seen other samples."""
        self.mean(buffer for buffer in model.buffers() if buffer.is_floating_point())


#: A process that no others help.
ALONE = Team()
