"""Flops of a whole network as fvcore counts them. The only module that imports fvcore."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

with warnings.catch_warnings():
    # fvcore compiles a few functions with torch.jit when it is imported, which torch deprecates.
    warnings.simplefilter("ignore")
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats

from sekron_search.errors import DataError
from sekron_search.model import Inputs, as_inputs, batch_size


@dataclass(frozen=True)
class TracedFlops:
    """One multiply-add is one flop.

    Args:
        total: Per sample.
        uncounted: Operators that fvcore does not count, and how often they run: elementwise ones, as a rule.
    """

    total: float
    uncounted: dict[str, int]


def traced_flops(model: nn.Module, example_inputs: object) -> TracedFlops:
    """What fvcore counts on one forward pass in evaluation mode, per sample."""
    inputs = as_inputs(example_inputs)
    training = model.training
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.eval()(*inputs)  # layers that rebuild their weight do so once, here, and not in the trace
        analysis = FlopCountAnalysis(model, inputs)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        try:
            total = analysis.total()
        except Exception as error:
            raise DataError(
                f"the flops of the network cannot be counted, for torch.jit.trace fails on it: {error}; quantize, or "
                "convert otherwise, after compressing"
            ) from error
        uncounted = dict(analysis.unsupported_ops())
    model.train(training)
    return TracedFlops(total / batch_size(inputs), uncounted)


def reestimate_batch_norm(model: nn.Module, batches: Sequence[Inputs]) -> None:
    """Set every batch-norm's statistics to those of the data, as the network now is; leaves it in evaluation mode.

    Only the batch-norm layers are put into training mode, so that dropout and the like stay off.

    Source: Wu and Johnson, Rethinking "Batch" in BatchNorm (2021), as implemented by fvcore.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            module.train()
    if get_bn_modules(model):
        logging.getLogger("fvcore.nn.precise_bn").setLevel(logging.WARNING)
        try:
            update_bn_stats(_Splat(model), batches, len(batches))
        except ValueError as error:
            raise DataError(
                f"batch-norm statistics cannot be estimated from the calibration batches: {error}; give batches of "
                "two samples or more"
            ) from None
    model.eval()


class _Splat(nn.Module):
    """Lets fvcore, which calls the network with one argument, call it with several."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, inputs: Inputs) -> object:
        return self.model(*inputs)
