"""What fine-tuning minimises: distances from the original's outputs, of the targets, and of the replaced layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sekron_search.config import FinetuneConfig
from sekron_search.data import check_labels
from sekron_search.divergence import DivergenceName, relative_l1, relative_mse
from sekron_search.errors import DataError, users_own
from sekron_search.model import output_tensors
from sekron_search.nested import named_leaves

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
    return F.cross_entropy(ours.float(), wanted)


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
