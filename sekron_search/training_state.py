"""What changes while a network is trained, as a checkpoint holds it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sekron_search.costs.provenance import processor_of
from sekron_search.errors import DataError
from sekron_search.model import device_of
from sekron_search.muon import Muon
from sekron_search.precision import autocast_dtype
from sekron_search.sections import FinetuneConfig
from sekron_search.team import Team
from sekron_search.tensor_files import read_checkpoint

#: Measures a network in the middle of its training, by the names that its curve gives the values.
Measure = Callable[[nn.Module], Mapping[str, float]]

#: Gradients are scaled down to this norm over all parameters: the first steps of a bad start stay small.
MAX_GRADIENT_NORM = 5.0


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint holds.

    Args:
        model: It is trained in place.
        optimizer, schedule, scaler: Of its parameters; of the learning rate by steps; of losses in float16.
        team: The processes that train together.
        curve: Epoch, loss and metric of every epoch so far.
        steps: Of the optimizer, in all.
        processors: On which was trained, in order.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler
    team: Team
    curve: list[dict[str, float]]
    steps: int
    processors: list[str]

    @classmethod
    def start(cls, model: nn.Module, config: FinetuneConfig, rate: float, steps: int, team: Team) -> TrainingState:
        """The state before the first of so many steps, at a learning rate."""
        device = device_of(model)
        on_gpu = device.type == "cuda"  # what changes from step to step has to lie there, or no step can be recorded
        lr = torch.tensor(rate, device=device) if on_gpu else rate
        # Factors of one layer differ in scale and in how much hangs on them; steps that adapt to each do not mind.
        optimizer: torch.optim.Optimizer
        if config.optimizer == "muon":
            optimizer = Muon(trainable(model), lr, weight_decay=config.weight_decay)
        else:
            optimizer = torch.optim.AdamW(trainable(model), lr, weight_decay=config.weight_decay, capturable=on_gpu)
        optimizer.zero_grad()  # a copy of a network has the gradients that the user's training left in it
        steps = max(steps, 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        schedule.base_lrs = [rate]  # a number: of a tensor on a GPU every step would wait for all before it
        # Gradients below the least number of float16 would vanish; bfloat16 has the range of float32.
        half = autocast_dtype(config.autocast, device) == torch.float16
        scaler = torch.amp.GradScaler(device.type, enabled=half)
        return cls(model, optimizer, schedule, scaler, team, [], steps, [])

    @property
    def remaining(self) -> float:
        """From 1 at the first step to 0 at the last, falling like a cosine."""
        return 0.5 * (1 + math.cos(math.pi * min(self.schedule.last_epoch / self.steps, 1)))

    def add(self, loss: Tensor) -> None:
        """Add the gradient of a loss to those that the next step takes together."""
        self.scaler.scale(loss).backward()

    def step(self) -> None:
        """Take a step down the gradients that were added, in all processes of the team."""
        scale = self.scaler.get_scale()
        self.update()
        if self.scaler.get_scale() >= scale:  # else float16 overflowed, and the step was left out
            self.schedule.step()

    def update(self) -> None:
        """What a step does, but for the schedule."""
        self.team.mean_gradients(self.model.parameters())
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def kept(self) -> Callable[[], None]:
        """What puts weights, buffers and the optimizer's state back, in place, to what they are now."""
        networks = [(t, t.detach().clone()) for t in (*self.model.parameters(), *self.model.buffers())]
        states = {p: {name: t.clone() for name, t in own.items()} for p, own in self.optimizer.state.items()}

        @torch.no_grad()
        def put_back() -> None:
            for tensor, value in networks:
                tensor.copy_(value)
            for parameter, own in self.optimizer.state.items():
                for name, tensor in own.items():  # all of it is zero before the first step
                    before = states.get(parameter, {}).get(name)
                    tensor.zero_() if before is None else tensor.copy_(before)

        return put_back

    def to_save(self) -> dict[str, Any]:
        """Everything that `restore` needs."""
        schedule = {name: value for name, value in self.schedule.state_dict().items() if name != "lr_lambdas"}
        here = processor_of(device_of(self.model))
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {**schedule, "lr_lambdas": [None]},
            "scaler": self.scaler.state_dict(),
            "curve": self.curve,
            "processors": [*self.processors, *({here} - set(self.processors))],
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on where another state was saved."""
        self.model.load_state_dict(saved["model"])
        # How an optimizer works where it is stays its own: what was saved may come from another device.
        own = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({**saved["optimizer"], "param_groups": own})
        self.schedule.load_state_dict(saved["schedule"])
        for group, before in zip(self.optimizer.param_groups, saved["optimizer"]["param_groups"], strict=True):
            lr = float(before["lr"])
            group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr
        self.scaler.load_state_dict(saved["scaler"])
        self.curve[:] = saved["curve"]
        self.processors[:] = saved.get("processors", [])


def how_trained(checkpoint: Path) -> dict[str, Any]:
    """`trained_on`, the processors of a training, and `batch_norm`, by its checkpoint; empty without one."""
    saved = read_checkpoint(checkpoint) if checkpoint.exists() else {}
    return {"trained_on": saved.get("processors", []), "batch_norm": saved.get("batch_norm")}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient; a `DataError` if there is none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise DataError("the network has no parameter that requires a gradient; nothing can be fine-tuned")
    return parameters


def _rate(step: int, total: int) -> float:
    """Share of the learning rate: linear warm-up over the first tenth, then cosine decay."""
    warm = max(total // 10, 1)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))
