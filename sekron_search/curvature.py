"""How much errors of the layers' outputs matter to the network's own output: the curvature of the divergence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sekron_search.calibration import output_rows
from sekron_search.errors import DataError
from sekron_search.model import Inputs, LayerInfo, batch_size, output_tensors, run_model

#: Logits are softened by this wherever outputs are compared. At 1 the few samples near a boundary between classes
#: decide, and with them chance: at 4 the divergence on a thousand samples foretells far better what other samples will
#: show.
TEMPERATURE = 4.0

#: Random directions of the output per sample, one backward pass each: other samples teach more than other directions.
DRAWS = 1

#: Every so many batches one enters: with the forward pass the whole costs about as much as the inputs' moments.
BATCH_SHARE = 1 + DRAWS

#: Samples that enter at most: a matrix of F x F needs fewer than the inputs' second moment.
MAX_SAMPLES = 1024


def spread(reference: Tensor) -> Tensor:
    """Variance of an output's entries around their mean; of a single one, which has none, its square."""
    reference = reference.float()
    variance = (reference - reference.mean()).square().mean()
    if reference.numel() == 1:
        variance = reference.square().mean()
    return variance.clamp_min(torch.finfo(torch.float32).tiny)


def output_curvature(
    model: nn.Module, layers: Sequence[LayerInfo], batches: Sequence[Inputs], *, classes: bool, seed: int = 0
) -> dict[str, Tensor]:
    """H = E[g g'] of the gradient g at every layer's output, over samples and positions, (G, F, F) in float64.

    g is the gradient of v' z for the network's output z and a random v with E[v v'] = diag(p) - p p' for class
    probabilities p = softmax(z / T), the Hessian of the KL divergence at temperature T, or the identity for other
    outputs. Of several outputs each v is scaled as the divergence scales its output: by how many entries it has a mean
    of, and by its spread. To second order, and with positions taken as independent, an error d of the layer's output
    raises the divergence by d' H d, up to a constant per layer.

    Args:
        model: The network; left in evaluation mode.
        layers: Layers to observe.
        batches: Calibration inputs; one of `BATCH_SHARE` enters, as long as there are fewer than `MAX_SAMPLES` samples.
        classes: Whether the outputs are logits (N, classes, ...).
        seed: Of the directions.

    Returns:
        By name; a layer that the output does not depend on differentiably is left out.

    Raises:
        DataError: If the network cannot be differentiated.

    Source: Martens and Grosse 2015, Optimizing Neural Networks with Kronecker-factored Approximate Curvature, Sec. 3.
    """
    model.eval()
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys((info.name for info in layers), 0)
    outputs: dict[str, Tensor] = {}
    directions = _Directions(classes, seed)

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            outputs[name] = output if output.requires_grad else output.detach().requires_grad_()
            # A copy goes on, for an operation in place would change what the gradient is taken of.
            return outputs[name].clone()

        return record

    handles = [model.get_submodule(info.name).register_forward_hook(hook(info.name)) for info in layers]
    samples = 0
    try:
        for inputs in batches[::BATCH_SHARE]:
            if samples >= MAX_SAMPLES:
                break
            samples += batch_size(inputs)
            for gradients in _gradients(model, inputs, outputs, directions):
                for info in layers:
                    gradient = gradients.get(info.name)
                    if gradient is not None:
                        rows = output_rows(gradient.float(), info).double()
                        sums[info.name] = sums.get(info.name, 0) + rows @ rows.mT
                        counts[info.name] += rows.shape[-1]
    finally:
        for handle in handles:
            handle.remove()
    found = {name: total / counts[name] for name, total in sums.items()}
    return {name: h for name, h in found.items() if bool(torch.isfinite(h).all()) and float(h.abs().max()) > 0}


def _gradients(
    model: nn.Module, inputs: Inputs, outputs: dict[str, Tensor], directions: _Directions
) -> Iterable[dict[str, Tensor | None]]:
    """The gradients at the recorded outputs, for one random direction after the other."""
    outputs.clear()
    with torch.enable_grad():
        ends = [t for t in output_tensors(run_model(model, inputs)) if t.requires_grad]
    names = list(outputs)
    for draw in range(DRAWS if ends and names else 0):
        try:
            found = torch.autograd.grad(
                ends, [outputs[n] for n in names], directions.of(ends), retain_graph=draw < DRAWS - 1, allow_unused=True
            )
        except RuntimeError as error:
            raise DataError(
                f"the network cannot be differentiated: {error}; set calibration.curvature to false"
            ) from error
        yield dict(zip(names, found, strict=True))


class _Directions:
    """Random directions of outputs, with the curvature as their second moment.

    Args:
        classes: Whether the outputs are logits (N, classes, ...).
        seed: Of the directions.
    """

    def __init__(self, classes: bool, seed: int) -> None:
        self.classes = classes
        self.generator = torch.Generator().manual_seed(seed)
        self.weights: list[float] = []

    def of(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """A direction for every output; each has the weight in the divergence that it had on the first batch."""
        if not self.weights:
            scales = [self._scale(output.detach()) for output in outputs]
            self.weights = [(scales[0] / scale) ** 0.5 for scale in scales]
        return [self._one(output.detach()) * w for output, w in zip(outputs, self.weights, strict=True)]

    def _scale(self, output: Tensor) -> float:
        """What the divergence divides the squared error of a sample's output by, summed over its entries."""
        each = output.numel() / max(output.shape[0], 1) if output.dim() else 1
        return each / output.shape[1] if self.classes else each * float(spread(output))

    def _one(self, output: Tensor) -> Tensor:
        """A random v with E[v v'] = diag(p) - p p', or the identity."""
        signs = (torch.randint(0, 2, output.shape, generator=self.generator) * 2 - 1).to(output)
        if not self.classes:
            return signs
        p = torch.softmax(output / TEMPERATURE, 1)
        rooted = p.sqrt() * signs
        return rooted - p * rooted.sum(1, keepdim=True)
