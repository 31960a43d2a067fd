"""Distillation of a compressed network from the original, resumable after every epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sekron_search.config import FinetuneConfig
from sekron_search.data import import_reference, to_device
from sekron_search.divergence import DivergenceName
from sekron_search.errors import DataError, SekronError
from sekron_search.export import layers_json, with_layers
from sekron_search.files import read_checkpoint, write_checkpoint
from sekron_search.kron.linear import KroneckerLinear
from sekron_search.losses import TargetLoss, distillation_loss, layer_loss
from sekron_search.model import kronecker_layers, run_model
from sekron_search.team import Team
from sekron_search.training_data import TrainingData

#: Gradients are scaled down to this norm over all parameters: the first steps of a bad start stay small.
MAX_GRADIENT_NORM = 5.0


@dataclass(frozen=True)
class Distillation:
    """Training of compressed networks towards their original.

    Args:
        teacher: The original network.
        data: Training batches.
        config: Epochs, optimizer, loss.
        divergence: How outputs are compared.
    """

    teacher: nn.Module
    data: TrainingData
    config: FinetuneConfig
    divergence: DivergenceName

    @property
    def total_batches(self) -> int:
        """Batches of all epochs."""
        return len(self.data) * self.config.epochs

    @property
    def total_steps(self) -> int:
        """Steps of the optimizer in all epochs."""
        return -(-len(self.data) // self.config.accumulate) * self.config.epochs

    def check(self) -> None:
        """Compute the loss of one batch, before any long work depends on it.

        Raises:
            DataError: If the data is empty, the network does not run on it, labels do not fit, or nothing can be
                trained.
        """
        device = _trainable(self.teacher)[0].device
        if len(self.data) == 0:
            raise DataError("train: the data is empty; give at least one batch")
        first = next(self.data.epoch(1))
        inputs, target = to_device(first, device)
        with torch.no_grad():
            output = run_model(self.teacher.eval(), inputs)
            try:
                distillation_loss(self.divergence, output, output, target, self.config, self.own_loss)
            except SekronError:
                raise
            except Exception as error:
                if self.own_loss is None:
                    raise
                raise DataError(
                    f"finetune.loss {self.config.loss!r}: it failed: {type(error).__name__}: {error}"
                ) from error

    @cached_property
    def own_loss(self) -> TargetLoss | None:
        """The user's loss against the targets, if the configuration names one."""
        return import_reference(self.config.loss, "finetune.loss") if ":" in self.config.loss else None

    def train(
        self,
        model: nn.Module,
        *,
        checkpoint: Path,
        validate: Callable[[nn.Module], float] | None,
        after_epoch: Callable[[int, float], bool],
        progress: Callable[[int], None],
    ) -> list[dict[str, float]]:
        """Train a network in place, on the device where it is; from the checkpoint on, if there is one.

        Args:
            model: The compressed network; ends with the weights of its last epoch, in evaluation mode.
            checkpoint: File that is rewritten after every epoch.
            validate: Metric after every epoch, higher is better; without it the negative training loss counts.
            after_epoch: Called with (epoch from 1, metric), also for the epochs of a checkpoint; False ends it.
            progress: Called with the number of batches done in all.

        In a team, all its processes train, those that wait in `assist` too; validation, checkpoints and what is decided
        after an epoch are the first one's.

        Returns:
            The curve: epoch, loss and metric of every epoch.

        Raises:
            DataError: If the loss is NaN or infinite; the last good checkpoint stays.
        """
        saved = read_checkpoint(checkpoint) if checkpoint.exists() else None
        team = Team.here()
        if team.size > 1:
            team.told(_Task(self.config, layers_json(model), dict(model.state_dict()), saved))
        with self._started(model, saved, team) as state:
            going = [after_epoch(int(row["epoch"]), row["metric"]) for row in state.curve][-1:] != [False]
            while team.told(going and len(state.curve) < self.config.epochs):
                epoch = len(state.curve) + 1
                loss = self._epoch(state, epoch, progress)
                metric = validate(model.eval()) if validate is not None else -loss
                state.curve.append({"epoch": float(epoch), "loss": loss, "metric": metric})
                write_checkpoint(checkpoint, state.to_save())
                going = after_epoch(epoch, metric)
            return state.curve

    @contextmanager
    def _started(self, model: nn.Module, saved: dict[str, Any] | None, team: Team) -> Iterator[_State]:
        """The state of a training, from a checkpoint on if there is one; both networks are laid out for it."""
        for network in (model, self.teacher):
            _set_memory_format(network, torch.channels_last)
        state = _State.start(model, self.config, self.total_steps, team)
        if saved is not None:
            state.restore(saved)
        self.teacher.eval()
        yield state
        for network in (model.eval(), self.teacher):
            _set_memory_format(network, torch.contiguous_format)

    def assist(self, task: _Task) -> None:
        """Take part in a training that the team's first process has begun."""
        team = Team.here()
        model = with_layers(self.teacher, task.layers).to(_trainable(self.teacher)[0].device)
        model.load_state_dict(task.state)
        with self._started(model, task.checkpoint, team) as state:
            while team.told():
                self._epoch(state, len(state.curve) + 1, lambda done: None)
                state.curve.append({})

    def _epoch(self, state: _State, epoch: int, progress: Callable[[int], None]) -> float:
        """Mean loss over one epoch of training; what is random in the network is drawn as in any run of this epoch."""
        device = next(state.model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(state.team.seed(self.data.seed * 7919 + epoch))
            return self._steps(state, epoch, progress)

    def _steps(self, state: _State, epoch: int, progress: Callable[[int], None]) -> float:
        state.model.train()
        device = next(state.model.parameters()).device
        replaced = list(kronecker_layers(state.model)) if self.config.layer_weight else []
        summed, done, together = 0.0, 0, self.config.accumulate
        for done, (inputs, target) in enumerate(self.data.epoch(epoch, state.team), start=1):
            loss = self._loss(state.model, replaced, to_device(inputs, device), to_device(target, device))
            # What is left over at the end of an epoch makes a step of its own, as large as there are batches in it.
            state.add(loss / min(together, len(self.data) - (done - 1) // together * together))
            mean = loss.detach().clone()
            state.team.mean([mean])
            summed += float(mean)
            if not math.isfinite(summed):
                raise DataError(
                    f"fine-tuning: the loss became {summed} in epoch {epoch}, batch {done}; lower "
                    f"finetune.learning_rate (now {self.config.learning_rate:g}). "
                    f"The checkpoint of epoch {epoch - 1} is kept"
                )
            if done % together == 0 or done == len(self.data):
                state.step()
            progress((epoch - 1) * len(self.data) + done)
        state.team.mean_buffers(state.model)
        return summed / max(done, 1)

    def _loss(self, model: nn.Module, replaced: Sequence[str], inputs: tuple[Any, ...], target: Any) -> Tensor:
        config = self.config
        cast = (
            torch.autocast(inputs[0].device.type, getattr(torch, config.autocast)) if config.autocast else nullcontext()
        )
        with cast, _outputs_of(model, replaced) as ours, _outputs_of(self.teacher, replaced) as theirs:
            with torch.no_grad():
                reference = self.teacher(*inputs)
            output = model(*inputs)
        loss = distillation_loss(self.divergence, output, reference, target, config, self.own_loss)
        if replaced:
            loss = loss + config.layer_weight * layer_loss(ours, theirs)
        return loss


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | KroneckerLinear)


@contextmanager
def _outputs_of(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Filled, while the network runs, with the outputs of the named layers as (N, channels, ...)."""
    found: dict[str, Tensor] = {}

    def keep(name: str, linear: bool) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            # A copy, for what follows may change the output in place; in the precision in which it is compared.
            found[name] = (output.flatten(0, -2) if linear else output).to(torch.float32, copy=True)

        return hook

    layers = [(name, model.get_submodule(name)) for name in names]
    handles = [layer.register_forward_hook(keep(name, _is_linear(layer))) for name, layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Task:
    """What the processes of a team need to know of a training.

    Args:
        config: Of it.
        layers: How the replaced layers are built.
        state: Of the network.
        checkpoint: To go on from.
    """

    config: FinetuneConfig
    layers: Mapping[str, Mapping[str, str]]
    state: Mapping[str, Tensor]
    checkpoint: dict[str, Any] | None


@dataclass(frozen=True)
class _State:
    """What a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler
    team: Team
    curve: list[dict[str, float]]

    @classmethod
    def start(cls, model: nn.Module, config: FinetuneConfig, total_steps: int, team: Team) -> _State:
        # Factors of one layer differ in scale and in how much hangs on them; steps that adapt to each do not mind.
        optimizer = torch.optim.AdamW(_trainable(model), config.learning_rate, weight_decay=config.weight_decay)
        optimizer.zero_grad()  # a copy of a network has the gradients that the user's training left in it
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, max(total_steps, 1)))
        # Gradients below the least number of float16 would vanish; bfloat16 has the range of float32.
        device = next(model.parameters()).device.type
        scaler = torch.amp.GradScaler(device, enabled=config.autocast == "float16")
        return cls(model, optimizer, schedule, scaler, team, [])

    def add(self, loss: Tensor) -> None:
        """Add the gradient of a loss to those that the next step takes together."""
        self.scaler.scale(loss).backward()

    def step(self) -> None:
        """Take a step down the gradients that were added, in all processes of the team."""
        self.team.mean_gradients(self.model.parameters())
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.scaler.get_scale() >= scale:  # else float16 overflowed, and the step was left out
            self.schedule.step()

    def to_save(self) -> dict[str, Any]:
        schedule = {name: value for name, value in self.schedule.state_dict().items() if name != "lr_lambdas"}
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {**schedule, "lr_lambdas": [None]},
            "scaler": self.scaler.state_dict(),
            "curve": self.curve,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.scaler.load_state_dict(saved["scaler"])
        self.curve[:] = saved["curve"]


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient; a `DataError` if there is none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise DataError("the network has no parameter that requires a gradient; nothing can be fine-tuned")
    return parameters


def _set_memory_format(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Lay out the weights of 2-d convolutions; activations follow. Channels last trains up to twice as fast on CPUs."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)


def _rate(step: int, total: int) -> float:
    """Share of the learning rate: linear warm-up over the first tenth, then cosine decay."""
    warm = max(total // 10, 1)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))
