"""What fine-tuning minimises: distances from the original's outputs, of the targets, and of the replaced layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sekron_search.data import check_labels
from sekron_search.divergence import DivergenceName, relative_l1, relative_mse
from sekron_search.errors import ConfigError, DataError, users_own
from sekron_search.model import is_finite, output_tensors
from sekron_search.nested import leaves, map_tensors, named_leaves
from sekron_search.sections import FinetuneConfig

#: A loss of (output, target).
TargetLoss = Callable[[Any, Any], Tensor]


def distillation_loss(
    name: DivergenceName,
    output: Any,
    reference: Any,
    target: Any,
    config: FinetuneConfig,
    own: TargetLoss | None = None,
) -> Tensor:
    """The divergence from the original's outputs, mixed with the loss against the targets where there are any.

    "kl": (1 - w) T^2 KL(softmax(reference / T) || softmax(output / T)) + w cross-entropy; "mse": the mean squared
    error relative to the reference's variance, or the absolute one, mixed with the same against the target. Of several
    outputs it is the mean; targets are nested and named as the outputs are, or there is one, for the first output.
    Integer targets are class indices, whose loss is the cross-entropy; those of logits may be probabilities instead.

    Args:
        name: How outputs are compared.
        output, reference: Of the network and of the original.
        target: Of the batch.
        config: Temperature, weights, loss.
        own: The user's loss of (output, target), instead of the one against the targets.

    Raises:
        DataError: If labels are no classes of the network, targets are of another shape than their outputs, or none
            belongs to an output.

    Source: Hinton, Vinyals and Dean 2015, Sec. 2.
    """
    pairs = list(zip(output_tensors(output), output_tensors(reference), strict=True))
    values = relative_l1 if config.loss == "l1" else relative_mse
    if name == "mse":
        distilled = torch.stack([values(a, b) for a, b in pairs]).mean()
    else:
        distilled = torch.stack([_softened_kl(a, b, config.temperature) for a, b in pairs]).mean()
    weight = config.label_weight
    if weight == 0:
        return distilled
    if own is not None:
        labelled = _own_loss(own, config.loss, output, target)
    elif losses := [_target_loss(name, ours, wanted, values) for ours, wanted in _with_targets(output, target)]:
        labelled = torch.stack(losses).mean()
    else:
        return distilled
    return (1 - weight) * distilled + weight * labelled


def check_loss(
    name: DivergenceName, output: Any, reference: Any, target: Any, config: FinetuneConfig, own: TargetLoss | None
) -> None:
    """Compute the loss of a batch, of the original's own outputs, and check that something can be learned from it.

    Args:
        name, reference, target, config, own: As of `distillation_loss`.
        output: Of the original.

    Raises:
        DataError: If outputs or loss are NaN or infinite, targets are none that the loss is of or are missing where
            nothing else counts, or the user's own loss has no gradient.
        ConfigError: If the user's own loss would never be used.
    """
    if own is not None and config.label_weight == 0:
        raise ConfigError(
            f"config key 'finetune.loss': {config.loss} is a loss of the targets, which finetune.label_weight: 0 "
            "leaves out; give them a weight above 0, or leave finetune.loss out"
        )
    if not is_finite(output):
        raise DataError("train: the network gives NaN or infinity on the first batch; check the inputs and their scale")
    if config.label_weight and own is None:
        if any(isinstance(leaf, np.ndarray | np.generic) for leaf in leaves(target)):
            raise DataError(
                "train: targets are numpy's, expected tensors (torch.from_numpy), or give finetune.loss a function of "
                "your own; finetune.label_weight: 0 leaves the targets out"
            )
        _check_targets(name, _with_targets(output, target), config.label_weight)
    if any(t.is_inference() for t in output_tensors(output)):
        raise DataError(
            "train: the network computes under torch.inference_mode, so that nothing can be trained; take that out of "
            "its forward, or set finetune.epochs to 0"
        )
    learns = []

    def watched(output: Any, target: Any) -> Any:
        assert own is not None
        value = own(output, target)
        # Nothing to learn from in this batch is told by a plain zero.
        learns.append(not isinstance(value, Tensor) or value.requires_grad or not value.any())
        return value

    with torch.enable_grad():
        # Not leaves of the graph, which a user's loss could not change in place, as it can a network's outputs.
        output = map_tensors(lambda t: t.detach().requires_grad_().clone() if t.is_floating_point() else t, output)
        loss = distillation_loss(name, output, reference, target, config, watched if own is not None else None)
    if not all(learns):
        raise DataError(
            f"finetune.loss {config.loss!r}: the value has no gradient, so nothing could be learned from it; "
            "compute it from the output with torch, without detach(), item() or no_grad()"
        )
    loss = loss.detach()
    if not bool(loss.isfinite()):
        what = "finetune.loss" if own is not None else "train"
        raise DataError(
            f"{what}: the loss of the original network on the first batch is {loss.item()}; check the data, "
            "targets that do not vary among them"
        )


def _check_targets(name: DivergenceName, pairs: Sequence[tuple[Tensor, Tensor]], label_weight: float) -> None:
    """Raise DataError unless there are targets where they alone count, and values for logits are probabilities."""
    if label_weight == 1 and not pairs:
        raise DataError("train: finetune.label_weight is 1, so that targets alone count, and the data has none")
    for ours, wanted in pairs:
        if name == "mse" or not (wanted.is_floating_point() and _are_values(name, ours, wanted)):
            continue
        # Mixed and smoothed labels add up to 1, however rounded; ignored ones to 0, the likeliest few alone to less.
        if bool((wanted < 0).any()) or bool((wanted.float().sum(1) > 1.01).any()):
            raise DataError(
                f"train: targets of shape {tuple(wanted.shape)}, as the outputs have, are compared with logits and are "
                "no probabilities of classes, which add up to 1 at most over axis 1; for images and other values set "
                "search.divergence to 'mse', else give finetune.loss a function of your own"
            )


def check_labels_of(name: DivergenceName, output: Any, target: Any, config: FinetuneConfig) -> None:
    """What `distillation_loss` checks of class indices, where it is recorded and can look at no values.

    Args:
        name, target, config: As there.
        output: Of the same shapes as there.

    Raises:
        DataError: If labels are no classes of the network.
    """
    for ours, wanted in _with_targets(output, target) if config.label_weight else ():
        if not wanted.is_floating_point() and not _are_values(name, ours, wanted):
            check_labels(wanted, ours)


def _with_targets(output: Any, target: Any) -> list[tuple[Tensor, Tensor]]:
    """Outputs and their targets: one alone is the first output's, others are of the outputs of their names."""
    if isinstance(target, Tensor):
        return [(output_tensors(output)[0], target)]
    ours = {name: leaf for name, leaf in named_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()}
    theirs = {name: leaf for name, leaf in named_leaves(target) if isinstance(leaf, Tensor)}
    found = [(ours[name], wanted) for name, wanted in theirs.items() if name in ours]
    if theirs and not found:
        raise DataError(
            f"train: none of the targets ({', '.join(theirs)}) has the name or position of an output ({', '.join(ours)}"
            "); name them alike, or give finetune.loss a function of your own; finetune.label_weight: 0 leaves the "
            "targets out"
        )
    return found


def _target_loss(
    name: DivergenceName, ours: Tensor, wanted: Tensor, values: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Of an output against its target: class indices, probabilities for logits, or else values of the same shape.

    Raises:
        DataError: If the target is neither.
    """
    if _are_values(name, ours, wanted):
        return values(ours, wanted) if name == "mse" else F.cross_entropy(ours.float(), wanted.float())
    if wanted.is_floating_point():
        raise DataError(
            f"train: an output of shape {tuple(ours.shape)} has a target of {wanted.dtype} of shape "
            f"{tuple(wanted.shape)}; expected one of its shape, or integer class labels. Give the data or the network "
            "the other's shape, or finetune.loss a function of your own; finetune.label_weight: 0 leaves targets out"
        )
    if not (wanted.is_cuda and torch.cuda.is_current_stream_capturing()):  # see `check_labels_of`
        check_labels(wanted, ours)
    return F.cross_entropy(ours.float(), wanted.long())


def _are_values(name: DivergenceName, ours: Tensor, wanted: Tensor) -> bool:
    """Whether a target is values, or probabilities for logits, of its output's shape."""
    return wanted.shape == ours.shape and (name == "mse" or wanted.is_floating_point())


def _softened_kl(output: Tensor, reference: Tensor, hot: float) -> Tensor:
    log_q, log_p = F.log_softmax(output.float() / hot, 1), F.log_softmax(reference.float() / hot, 1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum") * (output.shape[1] / output.numel()) * hot**2


def _own_loss(own: TargetLoss, name: str, output: Any, target: Any) -> Tensor:
    """A loss of the user's, checked to be one."""
    with users_own(f"finetune.loss {name!r}: it failed"):
        value = own(output, target)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        came = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise DataError(f"finetune.loss: expected a function of (output, target) that returns a scalar, got {came}")
    return value.reshape(())
