"""Distillation of a compressed network from the original, resumable after every epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sekron_search.data import Batch, to_device
from sekron_search.divergence import DivergenceName, divergence
from sekron_search.errors import ConfigError, DataError, DivergedError, users_own
from sekron_search.export import layers_json, with_layers
from sekron_search.layer_outputs import Reference, layer_error, references_of, seen
from sekron_search.losses import TargetLoss, check_labels_of, check_loss, distillation_loss
from sekron_search.mirrored import check_alike, mean_with_mirrored
from sekron_search.model import batch_size, device_of, part_of, run_model
from sekron_search.precision import autocast_dtype
from sekron_search.references import import_reference
from sekron_search.sections import FinetuneConfig
from sekron_search.team import Team
from sekron_search.team_task import Task
from sekron_search.tensor_files import read_checkpoint, write_checkpoint
from sekron_search.training_data import TrainingData
from sekron_search.training_form import training_form
from sekron_search.training_state import Measure, TrainingState, trainable
from sekron_search.training_step import Take, one_behind, seeded, taker

#: Networks whose outputs diverge by more than this from the original's learn more where the statistics of batch-norms
#: are trained too. Source: measured on networks of ResNet-20 (CIFAR-10) after 1 to 10 epochs: those that start at 0.1
#: and less end nearer with kept ones, those at 0.43 alike, those at 0.5 with trained ones.
FAR = 0.45

#: Batches on which that is seen.
COMPARED = 8


@dataclass(frozen=True)
class Distillation:
    """Training of compressed networks towards their original.

    Args:
        teacher: The original network.
        data: Training batches.
        config: Epochs, optimizer, loss.
        divergence: How outputs are compared.
        frees_layers: Whether errors of layers count less and less.
        known: Filled with `references`, once for all distillations that are made of this one.
    """

    teacher: nn.Module
    data: TrainingData
    config: FinetuneConfig
    divergence: DivergenceName
    frees_layers: bool = True
    known: dict[str, Reference] = field(default_factory=dict, repr=False, compare=False)

    @property
    def total_batches(self) -> int:
        """Batches of all epochs."""
        return len(self.data) * self.config.epochs

    @property
    def total_steps(self) -> int:
        """Steps of the optimizer in all epochs."""
        return -(-len(self.data) // self.config.accumulate) * self.config.epochs

    @property
    def rate(self) -> float:
        """The learning rate.

        Raises:
            ConfigError: If it has not been found yet; see `learning_rate.tuned`.
        """
        if self.config.learning_rate == "auto":
            raise ConfigError("finetune.learning_rate is 'auto': find it before training, or give a number")
        return self.config.learning_rate

    def with_rate(self, rate: float) -> Distillation:
        """The same at a learning rate."""
        return replace(self, config=self.config.model_copy(update={"learning_rate": rate}))

    def briefly(self, steps: int) -> Distillation:
        """The beginning, from warm-up to the end of the decay, in one epoch of at most so many steps.

        Errors of layers count in full to the end, as they do at the beginning of a long training.
        """
        data = replace(self.data, limit=steps * self.config.accumulate)
        return replace(self, config=self.config.model_copy(update={"epochs": 1}), data=data, frees_layers=False)

    def settled(self, model: nn.Module) -> Distillation:
        """The same, with `batch_norm` "auto" decided by how far a network's outputs are from the original's."""
        if self.config.batch_norm != "auto":
            return self
        has_norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
        return self._with_norms("trained" if has_norms and not self.distance(model) <= FAR else "frozen")

    def _with_norms(self, how: str) -> Distillation:
        return replace(self, config=self.config.model_copy(update={"batch_norm": how}))

    @torch.no_grad()
    def distance(self, model: nn.Module) -> float:
        """Mean divergence of a network's outputs from the original's on the first batches, as they run."""
        networks = [(net.eval(), device_of(net)) for net in (model, self.teacher)]
        found = []
        with seeded(networks[1][1], self.data.seed):
            for inputs, _ in islice(self.data.epoch(1), COMPARED):
                output, reference = (run_model(net, to_device(inputs, device)) for net, device in networks)
                found.append(float(divergence(self.divergence, to_device(output, networks[1][1]), reference)))
        return math.fsum(found) / max(len(found), 1)

    def check(self) -> None:
        """Compute the loss of one batch, before any long work depends on it.

        Raises:
            DataError: If the data is empty, the network does not run on it, labels do not fit, or nothing can be
                trained.
        """
        device = trainable(self.teacher)[0].device
        if len(self.data) == 0:
            raise DataError("train: the data is empty; give at least one batch")
        first = next(self.data.epoch(1))
        inputs, target = to_device(first, device)
        with torch.no_grad():
            output = run_model(self.teacher.eval(), inputs)
            reference = self._wanted(inputs, output)
            if self.config.mirrored_teacher:
                check_alike(self.divergence, output, reference)
        check_loss(self.divergence, output, reference, target, self.config, self.own_loss)

    @cached_property
    def own_loss(self) -> TargetLoss | None:
        """The user's loss against the targets, if the configuration names one."""
        return import_reference(self.config.loss, "finetune.loss") if ":" in self.config.loss else None

    def train(
        self,
        model: nn.Module,
        *,
        checkpoint: Path | None,
        measure: Measure | None,
        after_epoch: Callable[[Mapping[str, float]], bool],
        progress: Callable[[int], None],
    ) -> list[dict[str, float]]:
        """Train a network in place, on the device where the original is; from the checkpoint on, if there is one.

        Args:
            model: The compressed network; ends with the weights of its last epoch, in evaluation mode.
            checkpoint: File that is rewritten after every epoch; None keeps nothing.
            measure: Adds to the row of every epoch; without a `metric` (higher is better) it is the negative loss.
            after_epoch: Called with the row of the curve, also for the epochs of a checkpoint; False ends it.
            progress: Called with the number of batches done in all.

        In a team, all its processes train, those that wait in `assist` too; validation, checkpoints and what is decided
        after an epoch are the first one's.

        Returns:
            The curve: epoch (from 1), loss and metric of every epoch.

        Raises:
            DivergedError: If the loss or a weight is NaN or infinite; the last good checkpoint stays.
        """
        saved = read_checkpoint(checkpoint) if checkpoint is not None and checkpoint.exists() else None
        settled = self._with_norms(saved["batch_norm"]) if saved and "batch_norm" in saved else self.settled(model)
        return settled._train(model, checkpoint, saved, measure, after_epoch, progress)

    def _train(
        self,
        model: nn.Module,
        checkpoint: Path | None,
        saved: dict[str, Any] | None,
        measure: Measure | None,
        after_epoch: Callable[[Mapping[str, float]], bool],
        progress: Callable[[int], None],
    ) -> list[dict[str, float]]:
        team = Team.here()
        if team.size > 1:
            layers, weights = layers_json(model), dict(model.state_dict())
            task = Task(self.config, self.data.limit, self.frees_layers, layers, weights, saved)
            team.told(task.to_plain())
        with self._started(model, saved, team) as (state, take):
            going = [after_epoch(row) for row in state.curve][-1:] != [False]
            while team.told(going and len(state.curve) < self.config.epochs):
                epoch = len(state.curve) + 1
                loss = self._epoch(state, take, epoch, progress)
                row = {"epoch": float(epoch), "loss": loss, "metric": -loss}
                state.curve.append(row | dict(measure(model.eval()) if measure is not None else {}))
                if checkpoint is not None:
                    write_checkpoint(checkpoint, {**state.to_save(), "batch_norm": self.config.batch_norm})
                going = after_epoch(state.curve[-1])
            return state.curve

    @torch.no_grad()
    def loss_of(self, model: nn.Module, batches: Iterable[Batch]) -> float:
        """Mean loss of a network in training mode, of its outputs alone; statistics that are trained may change."""
        self._to_training(model)
        device = device_of(model)
        with seeded(device, self.data.seed):
            losses = [float(self._loss(model, [], 0.0, *to_device(batch, device))) for batch in batches]
        return math.fsum(losses) / len(losses)

    @contextmanager
    def _started(
        self, model: nn.Module, saved: dict[str, Any] | None, team: Team
    ) -> Iterator[tuple[TrainingState, Take]]:
        """A training, from a checkpoint on if there is one; both networks are where, and in the form, they train."""
        self.teacher.eval()
        home = device_of(model)
        model.to(device_of(self.teacher))
        with training_form(model, self.teacher):
            state = TrainingState.start(model, self.config, self.rate, self.total_steps, team)
            if saved is not None:
                state.restore(saved)
            try:
                yield state, self._taker(state)
            finally:
                model.eval().to(home)

    def assist(self, task: Task) -> None:
        """Take part in a training that the team's first process has begun."""
        data = replace(self.data, limit=task.limit)
        team, brief = Team.here(), replace(self, data=data, frees_layers=task.frees_layers)
        model = with_layers(self.teacher, task.layers).to(device_of(self.teacher))
        model.load_state_dict(task.state)
        # The first process decides what comes of a training that diverges.
        with suppress(DivergedError), brief._started(model, task.checkpoint, team) as (state, take):
            while team.told() is True:  # anything else is said when the first process fails
                brief._epoch(state, take, len(state.curve) + 1, lambda done: None)
                state.curve.append({})

    def _epoch(self, state: TrainingState, take: Take, epoch: int, progress: Callable[[int], None]) -> float:
        """Mean loss over one epoch of training; what is random in the network is drawn as in any run of this epoch."""
        with seeded(device_of(state.model), state.team.seed(self.data.seed * 7919 + epoch)):
            return self._steps(state, take, epoch, progress)

    def _steps(self, state: TrainingState, take: Take, epoch: int, progress: Callable[[int], None]) -> float:
        self._to_training(state.model)
        summed, done = 0.0, 0
        # Reading a loss waits until a GPU has computed it: meanwhile the next batch is made ready.
        for done, loss in enumerate(one_behind(self._losses(state, take, epoch)), start=1):
            summed += float(loss)
            if not math.isfinite(summed):
                raise self._diverged(state, f"the loss became {summed} in epoch {epoch}, batch {done}")
            progress((epoch - 1) * len(self.data) + done)
        state.team.mean_buffers(state.model)
        if not all(bool(p.isfinite().all()) for p in trainable(state.model)):
            raise self._diverged(state, f"a weight became NaN or infinite in the last step of epoch {epoch}")
        return summed / max(done, 1)

    def _losses(self, state: TrainingState, take: Take, epoch: int) -> Iterator[Tensor]:
        """The loss of every batch of an epoch, each when the network has learned from it."""
        for number, batch in enumerate(self.data.epoch(epoch, state.team)):
            # Close to the original's layers first, then free to make up for each other's errors.
            weight = self.config.layer_weight * (state.remaining if self.frees_layers else 1.0)
            with users_own(f"train: the network cannot be trained on batch {number + 1} of epoch {epoch}"):
                loss = take(batch, weight, number)
            state.team.mean([loss])
            yield loss

    def _taker(self, state: TrainingState) -> Take:
        replaced = self._layers_of(state.model)

        def loss(inputs: tuple[Any, ...], target: Any, weight: float | Tensor) -> Tensor:
            return self._loss(state.model, replaced, weight, inputs, target)

        def check(target: Any) -> None:
            check_labels_of(self.divergence, self.outputs, target, self.config)

        recorded = check if self.own_loss is None else None
        return taker(state, loss, len(self.data), self.config.accumulate, recorded)

    def _to_training(self, model: nn.Module) -> None:
        """Training mode; batch-norms stay as they will run, unless they are trained too."""
        model.train()
        if self.config.batch_norm != "trained":
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.training = False  # not `eval()`, which modules inside of it would follow

    def _diverged(self, state: TrainingState, what: str) -> DivergedError:
        message = f"fine-tuning: {what}; lower finetune.learning_rate (now {self.rate:g})"
        return DivergedError(message, state.curve)

    @cached_property
    def outputs(self) -> Any:
        """Shapes of the original's outputs for the first batch."""
        device = device_of(self.teacher)
        with seeded(device, self.data.seed), torch.no_grad():
            inputs, _ = to_device(next(self.data.epoch(1)), device)
            return to_device(run_model(self.teacher.eval(), inputs), torch.device("meta"))

    @property
    def references(self) -> dict[str, Reference]:
        """What is to be known of the original's layers, by name: of the first batch, drawn as at the seed.

        In a team it is of the same samples in all processes, as many as one has.
        """
        if not self.known:
            device = device_of(self.teacher)
            with seeded(device, self.data.seed), self._cast():
                inputs, _ = to_device(next(self.data.epoch(1)), device)
                part = part_of(inputs, slice(-(-batch_size(inputs) // Team.here().size)))
                self.known.update(references_of(self.teacher, part))
        return self.known

    def _layers_of(self, model: nn.Module) -> list[str]:
        """Names of the layers whose outputs are compared: those that are of another class than the original's."""
        if not self.config.layer_weight:
            return []
        return [name for name, known in self.references.items() if type(model.get_submodule(name)) is not known.kind]

    def _wanted(self, inputs: tuple[Any, ...], output: Any) -> Any:
        """What networks are to give where the original gives an output."""
        return mean_with_mirrored(self.teacher, inputs, output) if self.config.mirrored_teacher else output

    def _cast(self) -> AbstractContextManager[Any]:
        device = device_of(self.teacher)
        dtype = autocast_dtype(self.config.autocast, device)
        return nullcontext() if dtype is None else torch.autocast(device.type, dtype)

    def _loss(
        self,
        model: nn.Module,
        replaced: Sequence[str],
        layer_weight: float | Tensor,
        inputs: tuple[Any, ...],
        target: Any,
    ) -> Tensor:
        ours: dict[str, Tensor] = {}
        theirs: dict[str, Tensor] = {}

        def keep(found: dict[str, Tensor], name: str, output: Tensor) -> None:
            found[name] = output.clone() if self.references[name].is_overwritten else output

        with self._cast():
            with torch.no_grad(), seen(self.teacher, replaced, partial(keep, theirs)):
                reference = self.teacher(*inputs)
            reference = self._wanted(inputs, reference)
            with seen(model, replaced, partial(keep, ours)):
                output = model(*inputs)
        loss = distillation_loss(self.divergence, output, reference, target, self.config, self.own_loss)
        errors = [layer_error(own, theirs[name], self.references[name].spread) for name, own in ours.items()]
        return loss + layer_weight * torch.stack(errors).mean() if errors else loss
