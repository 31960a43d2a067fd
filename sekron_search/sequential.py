"""Fitting layer after layer to the original's outputs, on the inputs that the compressed network really produces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from sekron_search.calibration import Moments, output_rows
from sekron_search.costs.traced import NormStatistics, reestimate_batch_norm
from sekron_search.kron.dense import KINDS, DenseLayer, dense_weight, layer_kind, native_weight
from sekron_search.kron.layer import KroneckerLayer
from sekron_search.kron.metric import InputMetric
from sekron_search.kron.projection import Fit
from sekron_search.kron.refine import refine
from sekron_search.model import Inputs, LayerInfo, layer_weight
from sekron_search.sums import observe, scale_at_sum

#: Kinds of layers that are fitted.
_FITTED: tuple[type[nn.Module], ...] = (KroneckerLayer, *KINDS.values())


@torch.no_grad()
def fit_sequentially(
    compressed: nn.Module,
    original: nn.Module,
    layers: Sequence[LayerInfo],
    batches: Sequence[Inputs],
    *,
    steps: int,
    curvature: Mapping[str, Tensor] | None = None,
    trained: NormStatistics | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Fit every layer in running order to what makes up for the errors before it.

    With x' the unfolded input that the layer gets in the compressed network and t its target, the best unconstrained
    weight is W* = E[t x''] E[x' x'']^-1, and for every other weight the output error grows by
    tr(H (W^ - W*) E[x' x''] (W^ - W*)') with H the curvature at the output: factors are refined to W* under that
    metric, and a layer that stays dense takes W* itself. The target is the original's output y; where y, scaled by a,
    is added to some s, as at the end of a residual block, it is y + (s - s') / a, s' being what the compressed network
    has for s. Batch-norm statistics follow after every layer.

    Args:
        compressed: The network to fit, in place; left in evaluation mode.
        original: The network it came from.
        layers: All layers, in running order. Those before the first replaced one are passed over.
        batches: Calibration inputs.
        steps: L-BFGS steps per layer.
        curvature: H by layer, from `output_curvature`; layers without one weigh all errors alike.
        trained: Of the original on the batches, where they are at hand; else they are computed.
        progress: Called with the number of layers done.

    Source: Zhang et al. 2016, Accelerating Very Deep Convolutional Networks (asymmetric reconstruction); He et al.
    2017, Channel Pruning, Sec. 3.3 (residual blocks); here for any structure and metric.
    """
    compressed.eval()
    original.eval()
    trained = trained or NormStatistics(original, batches)
    changed = False
    for done, info in enumerate(layers, start=1):
        layer = compressed.get_submodule(info.name)
        changed = changed or isinstance(layer, KroneckerLayer)
        if changed and isinstance(layer, _FITTED):
            reestimate_batch_norm(compressed, batches, original=trained, until=info.name)
            moments = _observed(compressed, original, info, batches)
            weight = layer_weight(original, info).double()
            target, metric = moments.best_weight(weight), moments.metric((curvature or {}).get(info.name))
            _set_weight(layer, target, metric, steps)
            bias = layer.bias
            if isinstance(bias, Tensor) and info.output_shift == "correctable":
                predicted = _weight_of(layer).double().flatten(2)
                mean_output = moments.collected()[0][1].flatten()
                bias.copy_(mean_output - (predicted @ metric.mean[:, :, None].to(predicted)).flatten())
        if progress is not None:
            progress(done)
    reestimate_batch_norm(compressed, batches, original=trained)


def _observed(compressed: nn.Module, original: nn.Module, info: LayerInfo, batches: Sequence[Inputs]) -> Moments:
    """The moments of what a layer gets in the compressed network, and of its products with the layer's targets."""
    scale = scale_at_sum(original, batches[0], info)
    moments = Moments(info, seed=0, batches=len(batches))
    for inputs in batches:
        ours = observe(compressed, inputs, info.name, to_sum=scale is not None)
        theirs = observe(original, inputs, info.name, to_sum=scale is not None)
        rows = output_rows(theirs.output.float(), info)
        if scale is not None and ours.other is not None and theirs.other is not None:
            missing = output_rows((theirs.other - ours.other).float(), info)
            rows = rows + missing / scale[:, :, None].to(missing)
        moments.add(ours.entered, original.get_submodule(info.name), output=theirs.output, rows=rows)
    return moments


def _set_weight(layer: nn.Module, target: Tensor, metric: InputMetric, steps: int) -> None:
    """Bring a layer as close to the target weight (G, F, C, *kernel) as it can come."""
    if isinstance(layer, KroneckerLayer):
        start = Fit(tuple(a.double() for a in layer.factors()), float("nan"))
        layer.set_factors(refine(layer.structure, start, target, metric, steps=steps).factors)
    else:
        assert isinstance(layer.weight, Tensor)
        layer.weight.copy_(native_weight(target, layer_kind(layer)))


def _weight_of(layer: nn.Module) -> Tensor:
    """The weight of every group, (G, F, C, *kernel), of a replaced layer or a dense one."""
    return layer.group_weights() if isinstance(layer, KroneckerLayer) else dense_weight(cast(DenseLayer, layer))
