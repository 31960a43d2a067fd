"""Distillation of a compressed network from the original, resumable after every epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from sekron_search.config import FinetuneConfig
from sekron_search.data import Augment, Batch, batches, check_labels, length, sample_order, to_device
from sekron_search.errors import DataError
from sekron_search.files import read_checkpoint, write_checkpoint
from sekron_search.model import output_tensors
from sekron_search.proxies import DivergenceName, relative_mse


@dataclass(frozen=True)
class TrainingData:
    """Batches for training, the same for the same epoch and seed.

    Args:
        source: A dataset, which is shuffled with the seed, or an iterable of batches, which is taken as it comes.
        batch_size: Of a dataset.
        augment: Of the inputs, when the network takes one tensor.
        seed: Of the order and the augmentation.
    """

    source: Dataset[Any] | Iterable[Any]
    batch_size: int
    augment: Augment | None = None
    seed: int = 0

    def __len__(self) -> int:
        """Batches of an epoch."""
        if isinstance(self.source, Dataset):
            return length(self.source) // self.batch_size or 1
        try:
            return len(self.source)  # type: ignore[arg-type]
        except TypeError:
            return sum(1 for _ in self.source)

    def epoch(self, index: int) -> Iterator[Batch]:
        """The batches of an epoch."""
        generator = torch.Generator().manual_seed(self.seed * 7919 + index)
        if isinstance(self.source, Dataset):
            count = length(self.source)
            order = sample_order(count, self.seed * 7919 + index)[: len(self) * self.batch_size]
            source: Iterable[Any] = batches(self.source, self.batch_size, order=order)
        else:
            source = self.source
        for item in source:
            inputs, target = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
            inputs = inputs if isinstance(inputs, tuple) else (inputs,)
            if self.augment is not None:
                inputs = (self.augment(inputs[0], generator), *inputs[1:])
            yield inputs, target


def distillation_loss(name: DivergenceName, output: Any, reference: Any, target: Any, config: FinetuneConfig) -> Tensor:
    """The divergence from the original's outputs, mixed with the labels' loss where there are class labels.

    "kl": (1 - w) T^2 KL(softmax(reference / T) || softmax(output / T)) + w cross-entropy; "mse": the mean squared
    error relative to the reference's variance, mixed with the same against the target.

    Source: Hinton, Vinyals and Dean 2015, Sec. 2.
    """
    weight = config.label_weight if isinstance(target, Tensor) else 0.0
    ours, theirs = output_tensors(output), output_tensors(reference)
    if name == "mse":
        loss = torch.stack([relative_mse(a, b) for a, b in zip(ours, theirs, strict=True)]).mean()
        if weight and target.shape == ours[0].shape:
            return (1 - weight) * loss + weight * relative_mse(ours[0], target)
        return loss
    hot = config.temperature
    losses = []
    for a, b in zip(ours, theirs, strict=True):
        log_q, log_p = F.log_softmax(a.float() / hot, 1), F.log_softmax(b.float() / hot, 1)
        losses.append(F.kl_div(log_q, log_p, log_target=True, reduction="sum") * (a.shape[1] / a.numel()) * hot**2)
    loss = torch.stack(losses).mean()
    if weight and not target.is_floating_point():
        return (1 - weight) * loss + weight * F.cross_entropy(ours[0].float(), target)
    return loss


def finetune(
    model: nn.Module,
    teacher: nn.Module,
    data: TrainingData,
    config: FinetuneConfig,
    *,
    divergence: DivergenceName,
    validate: Callable[[nn.Module], float] | None,
    checkpoint: Path,
    after_epoch: Callable[[int, float], bool],
    device: torch.device,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, float]]:
    """Train the model in place; from the checkpoint on, if there is one.

    Args:
        model: The compressed network; ends with the weights of its last epoch, in evaluation mode.
        teacher: The original network.
        data: Training batches.
        config: Epochs, optimizer, loss.
        divergence: How outputs are compared.
        validate: Metric after every epoch, higher is better; without it the negative training loss counts.
        checkpoint: File that is rewritten after every epoch.
        after_epoch: Called with (epoch from 1, metric), also for the epochs of a checkpoint; False ends the training.
        device: To train on.
        progress: Called with the number of batches done in all.

    Returns:
        The curve: epoch, loss and metric of every epoch.

    Raises:
        DataError: If the loss is NaN or infinite; the last good checkpoint stays.
    """
    steps = len(data)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise DataError("the network has no parameter that requires a gradient; nothing can be fine-tuned")
    optimizer = torch.optim.SGD(
        parameters,
        config.learning_rate,
        config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )
    total = max(steps * config.epochs, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, total))
    curve: list[dict[str, float]] = []
    if checkpoint.exists():
        state = read_checkpoint(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        curve = state["curve"]
    going = True
    for row in curve:
        going = after_epoch(int(row["epoch"]), row["metric"])
    teacher.eval()
    for epoch in range(len(curve) + 1, config.epochs + 1):
        if not going:
            break
        model.train()
        torch.manual_seed(data.seed * 7919 + epoch)  # dropout and the like: a resumed epoch draws what it would have
        summed = 0.0
        for step, (inputs, target) in enumerate(data.epoch(epoch), start=1):
            inputs, target = to_device(inputs, device), to_device(target, device)
            summed += _train_step(model, teacher, inputs, target, optimizer, divergence, config)
            schedule.step()
            if not math.isfinite(summed):
                raise DataError(
                    f"fine-tuning: the loss became {summed} in epoch {epoch}, step {step}; lower "
                    f"finetune.learning_rate (now {config.learning_rate:g}). "
                    f"The checkpoint of epoch {epoch - 1} is kept"
                )
            if progress is not None:
                progress((epoch - 1) * steps + step)
        model.eval()
        metric = validate(model) if validate is not None else -summed / steps
        curve.append({"epoch": float(epoch), "loss": summed / steps, "metric": metric})
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": {k: v for k, v in schedule.state_dict().items() if k != "lr_lambdas"} | {"lr_lambdas": [None]},
            "curve": curve,
        }
        write_checkpoint(checkpoint, state)
        going = after_epoch(epoch, metric)
    model.eval()
    return curve


def _train_step(
    model: nn.Module,
    teacher: nn.Module,
    inputs: tuple[Any, ...],
    target: Any,
    optimizer: torch.optim.Optimizer,
    divergence: DivergenceName,
    config: FinetuneConfig,
) -> float:
    kind = inputs[0].device.type
    cast = torch.autocast(kind, torch.bfloat16) if config.autocast == "bfloat16" else nullcontext()
    with cast:
        with torch.no_grad():
            reference = teacher(*inputs)
        output = model(*inputs)
    if divergence == "kl" and isinstance(target, Tensor) and isinstance(output, Tensor) and config.label_weight:
        check_labels(target, output.shape[1])
    loss = distillation_loss(divergence, output, reference, target, config)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    return float(loss.detach())


def _rate(step: int, total: int) -> float:
    """Share of the learning rate: linear warm-up over the first tenth, then cosine decay."""
    warm = max(total // 10, 1)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))
