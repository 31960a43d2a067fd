"""Fitting layer after layer to the original's outputs, on the inputs that the compressed network really produces."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sekron_search.calibration import output_rows, unfold_input
from sekron_search.costs.traced import reestimate_batch_norm
from sekron_search.kron.layer import KroneckerLayer
from sekron_search.kron.projection import Fit
from sekron_search.kron.refine import DAMPING, InputMetric, refine
from sekron_search.model import Inputs, LayerInfo, layer_weight, run_until


@torch.no_grad()
def fit_sequentially(
    compressed: nn.Module,
    original: nn.Module,
    layers: Sequence[LayerInfo],
    batches: Sequence[Inputs],
    *,
    steps: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Fit the factors of every replaced layer in running order, so that earlier errors are made up for.

    With x' the unfolded input that the layer gets in the compressed network and y the original's output, the best
    unconstrained weight is W* = E[y x''] E[x' x'']^-1, and for every other weight the output error grows by
    tr((W^ - W*) E[x' x''] (W^ - W*)'): the factors are refined to W* under that metric. Batch-norm statistics are
    re-estimated after every layer.

    Args:
        compressed: The network to fit, in place; left in evaluation mode.
        original: The network it came from.
        layers: All layers, in running order; those that were not replaced are passed over.
        batches: Calibration inputs.
        steps: L-BFGS steps per layer.
        progress: Called with the number of layers done.

    Source: in the spirit of Zhang et al. 2016 (asymmetric reconstruction), for any structure.
    """
    compressed.eval()
    original.eval()
    for done, info in enumerate(layers, start=1):
        layer = compressed.get_submodule(info.name)
        if isinstance(layer, KroneckerLayer):
            reestimate_batch_norm(compressed, batches, until=info.name)
            moments = _Moments(info)
            dense = original.get_submodule(info.name)
            for inputs in batches:
                output = run_until(original, inputs, info.name, after=True)
                columns = unfold_input(run_until(compressed, inputs, info.name), info, dense, output)
                moments.add(columns, output)
            target, metric, mean_output = moments.solve(layer_weight(original, info).double())
            start = Fit(tuple(a.double() for a in layer.factors()), float("nan"))
            layer.set_factors(refine(layer.structure, start, target, metric, steps=steps).factors)
            if layer.bias is not None and info.output_shift == "correctable":
                predicted = layer.group_weights().double().flatten(2)
                layer.bias.copy_(mean_output - (predicted @ metric.mean[:, :, None]).flatten())
        if progress is not None:
            progress(done)
    reestimate_batch_norm(compressed, batches)


class _Moments:
    """Second moments of the compressed network's inputs, and their products with the original's outputs."""

    def __init__(self, info: LayerInfo) -> None:
        self.info = info
        self.count = 0
        self.sums: list[Tensor] | None = None

    def add(self, columns: Tensor, output: Tensor) -> None:
        rows = output_rows(output, self.info)
        new = [columns @ columns.mT, rows @ columns.mT, columns.sum(-1), rows.sum(-1)]
        self.sums = [a.double() + (0 if self.sums is None else self.sums[i]) for i, a in enumerate(new)]
        self.count += columns.shape[-1]

    def solve(self, weight: Tensor) -> tuple[Tensor, InputMetric, Tensor]:
        """(best unconstrained weight, metric, mean of the output); without data the weight is the original's."""
        assert self.sums is not None
        second, cross, mean_in, mean_out = (s / self.count for s in self.sums)
        centered = self.info.output_shift != "kept"
        if centered:
            cross = cross - mean_out[:, :, None] * mean_in[:, None, :]
        metric = InputMetric.from_moments(second, mean_in, centered=centered)
        damped = metric.root @ metric.root.mT
        moment = second - mean_in[:, :, None] * mean_in[:, None, :] if centered else second
        damping = DAMPING * moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        best = torch.linalg.solve(damped, (cross + damping * weight.flatten(2)).mT).mT
        return best.reshape(weight.shape), metric, mean_out.flatten()
