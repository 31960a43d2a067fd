"""Flops of a whole network as fvcore counts them. The only module that imports fvcore."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    # fvcore compiles a few functions with torch.jit when it is imported, which torch deprecates.
    warnings.simplefilter("ignore")
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import conv_flop_count, get_shape
    from fvcore.nn.precise_bn import update_bn_stats

from sekron_search.errors import DataError
from sekron_search.model import Inputs, as_inputs, batch_size, copy_model, run_until, with_plain_outputs


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
        # Run once: layers that rebuild their weight do so here, and not in the trace.
        analysis = FlopCountAnalysis(with_plain_outputs(model.eval(), inputs), inputs)
        analysis.set_op_handle("aten::_convolution_mode", _named_padding_flops)
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


def _named_padding_flops(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Of a convolution with padding='same' or 'valid': an operator of its own, which fvcore does not know."""
    x, weight, out = (get_shape(value) for value in (*inputs[:2], outputs[0]))
    return Counter({"conv": conv_flop_count(x, weight, out)})


class NormStatistics:
    """Trained statistics of a network's batch-norms, and what the same batch-norms show on some batches.

    Trained statistics come from other data than the calibration batches: more of it, and augmented. So a network that
    changed takes over how its statistics changed on the batches, not what they are there: one that did not change
    keeps those it was trained with.

    Args:
        original: The trained network; it is not changed.
        batches: Inputs.
    """

    def __init__(self, original: nn.Module, batches: Sequence[Inputs]) -> None:
        # Copies, for whoever changes the network in place.
        self.trained = {n: tuple(t.clone() for t in _statistics(norm)) for n, norm in _norms(original).items()}
        shown = copy_model(original)
        reestimate_batch_norm(shown, batches)
        self.run_once = tuple(_norms_that_run_once(original.eval(), batches[0], None))
        self.shown = {name: _statistics(norm) for name, norm in _norms(shown).items()}

    def correct(self, name: str, norm: nn.Module) -> None:
        """Turn a batch-norm's statistics on the batches into its trained ones, changed by as much."""
        if name not in self.trained:
            return
        (mean, var), (shown_mean, shown_var) = self.trained[name], self.shown[name]
        own_mean, own_var = _statistics(norm)
        alive = (shown_var > 0) & (var > 0)
        own_mean.copy_(torch.where(alive, mean + (own_mean - shown_mean), own_mean))
        own_var.copy_(torch.where(alive, var * (own_var / shown_var), own_var))


def _norms(model: nn.Module) -> dict[str, nn.Module]:
    kind = nn.modules.batchnorm._BatchNorm
    return {name: m for name, m in model.named_modules() if isinstance(m, kind) and m.track_running_stats}


def _statistics(norm: nn.Module) -> tuple[Tensor, Tensor]:
    mean, var = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(var, Tensor)
    return mean, var


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module,
    batches: Sequence[Inputs],
    *,
    original: NormStatistics | None = None,
    until: str | None = None,
) -> None:
    """Set the batch-norms' statistics to those of the network as it now is; leaves it in evaluation mode.

    Only batch-norms that run once per forward pass are put into training mode: dropout and the like stay off, and a
    batch-norm with several inputs keeps the statistics it was trained with.

    Args:
        model: The network.
        batches: Inputs.
        original: Of the network that it was made from, on the same batches: the statistics it was trained with are then
            changed by as much as those on the batches; else those on the batches are taken as they are.
        until: Name of a layer; only batch-norms that run before it are touched.

    Raises:
        DataError: If the batches are too small.

    Source: Wu and Johnson, Rethinking "Batch" in BatchNorm (2021), as implemented by fvcore.
    """
    model.eval()
    whole = original is not None and until is None
    norms = _norms(model) if whole else _norms_that_run_once(model, batches[0], until)
    if original is not None:  # also those of which only the first run comes before a layer
        norms = {name: norm for name, norm in norms.items() if name in original.run_once}
    if norms:
        logging.getLogger("fvcore.nn.precise_bn").setLevel(logging.WARNING)
        for norm in norms.values():
            norm.train()
        try:
            update_bn_stats(_Partial(model, until), batches, len(batches))
        except ValueError as error:
            raise DataError(
                f"batch-norm statistics cannot be estimated from the calibration batches: {error}; give batches of "
                "two samples or more"
            ) from None
    model.eval()
    if original is not None:
        for name, norm in norms.items():
            original.correct(name, norm)


def _norms_that_run_once(model: nn.Module, inputs: Inputs, until: str | None) -> dict[str, nn.Module]:
    calls: Counter[nn.Module] = Counter()
    norms = _norms(model)
    handles = [m.register_forward_pre_hook(lambda module, args: calls.update([module])) for m in norms.values()]
    try:
        run_until(model, inputs, until)
    finally:
        for handle in handles:
            handle.remove()
    return {name: norm for name, norm in norms.items() if calls[norm] == 1}


class _Partial(nn.Module):
    """The network up to a layer, for fvcore, which calls it with one argument."""

    def __init__(self, model: nn.Module, until: str | None) -> None:
        super().__init__()
        self.model, self.until = model, until
        self.training = model.training

    def forward(self, inputs: Inputs) -> object:
        return run_until(self.model, inputs, self.until)
