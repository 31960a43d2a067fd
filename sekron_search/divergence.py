"""How far a network's outputs are from the original's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sekron_search.curvature import TEMPERATURE, spread
from sekron_search.errors import DataError
from sekron_search.model import Inputs, batch_size, is_finite, output_tensors, run_model

DivergenceName = Literal["kl", "mse"]

#: What trained networks are told apart by: their metric, or how far their outputs are from the original's.
ChosenBy = Literal["metric", "divergence"]


def kl_divergence(output: Tensor, reference: Tensor) -> Tensor:
    """Mean over the samples of T^2 KL(reference || output) of the class distributions, for logits (N, classes, ...).

    Both are softened by a temperature T, `TEMPERATURE`; the square keeps the scale.

    Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, Sec. 2.
    """
    log_p, log_q = (F.log_softmax(logits.float() / TEMPERATURE, 1) for logits in (reference, output))
    share = TEMPERATURE**2 * reference.shape[1] / reference.numel()
    # Of outputs that hardly differ the sum may round to less than nothing.
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum").clamp_min(0) * share


def relative_mse(output: Tensor, reference: Tensor) -> Tensor:
    """Squared error relative to the reference's variance around its mean."""
    reference = reference.float()
    return (output.float() - reference).square().mean() / spread(reference)


def relative_l1(output: Tensor, reference: Tensor) -> Tensor:
    """Absolute error relative to the reference's mean deviation from its mean."""
    reference = reference.float()
    deviation = (reference - reference.mean()).abs().mean()
    if reference.numel() == 1:  # as `spread`
        deviation = reference.abs().mean()
    return (output.float() - reference).abs().mean() / deviation.clamp_min(torch.finfo(torch.float32).tiny)


#: Divergences by name: functions of (output, reference), both tensors of the same shape.
DIVERGENCES: dict[DivergenceName, Callable[[Tensor, Tensor], Tensor]] = {"kl": kl_divergence, "mse": relative_mse}


def divergence(name: DivergenceName, output: Any, reference: Any) -> Tensor:
    """Mean divergence over all floating-point tensors of the outputs, however they are nested; empty ones are equal."""
    ours, theirs = output_tensors(output), output_tensors(reference)
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        raise DataError(
            f"outputs differ in shape: {[tuple(t.shape) for t in ours]} against {[tuple(t.shape) for t in theirs]}; "
            "a network that selects outputs by their values (boxes above a score) can be compared only before it does: "
            "compress it without that step"
        )
    pairs = zip(ours, theirs, strict=True)
    return torch.stack([DIVERGENCES[name](a, b) if a.numel() else a.new_zeros(()) for a, b in pairs]).mean()


def check_divergence(name: DivergenceName, output: Any, *, asked_for: bool = True) -> None:
    """Raise a `DataError` unless the divergence means something on such outputs: "kl" needs logits of classes.

    Args:
        name: Of the divergence.
        output: Of the network.
        asked_for: Whether the user named it: of several outputs only the user knows whether all are logits.
    """
    if name != "kl":
        return
    found = output_tensors(output)
    if bad := [tuple(t.shape) for t in found if t.dim() < 2 or t.shape[1] < 2]:
        raise DataError(
            f"search.divergence is 'kl', which needs logits of shape (N, classes, ...) with two classes or more; the "
            f"network gives {bad[0]}: set search.divergence to 'mse'"
        )
    if len(found) > 1 and not asked_for:
        raise DataError(
            f"the network returns {len(found)} tensors, of shapes {[tuple(t.shape) for t in found]}: set "
            "search.divergence to 'kl' if all of them are logits (N, classes, ...), else to 'mse'"
        )


@torch.no_grad()
def reference_outputs(model: nn.Module, batches: Sequence[Inputs]) -> list[Any]:
    """The original network's outputs, to be compared with; checks that they are finite."""
    model.eval()
    outputs = [run_model(model, inputs) for inputs in batches]
    if not is_finite(outputs):
        raise DataError(
            "the network gives NaN or infinity on the calibration data; check its weights and the data's scale"
        )
    return outputs


@torch.no_grad()
def mean_divergence(
    name: DivergenceName, model: nn.Module, batches: Sequence[Inputs], references: Sequence[Any]
) -> float:
    """Divergence of a network from the reference outputs, averaged over the batches by their sizes."""
    model.eval()
    total = count = 0.0
    for inputs, reference in zip(batches, references, strict=True):
        size = float(batch_size(inputs))
        total += float(divergence(name, run_model(model, inputs), reference)) * size
        count += size
    return total / count
