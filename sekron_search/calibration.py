"""What the layers of a network see: second moments of their unfolded inputs, streamed over calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sekron_search.errors import DataError
from sekron_search.kron.refine import InputMetric
from sekron_search.model import Inputs, LayerInfo, run_model

#: Positions (pixels or rows) of one batch that enter a layer's moment; more are drawn from with a seed. The moment of
#: P unknowns needs some multiple of P samples, not every pixel of every image.
MAX_POSITIONS_PER_BATCH = 32768


class _Moment:
    """Running sums of x x' and x over the unfolded input, per group."""

    def __init__(self, info: LayerInfo, seed: int) -> None:
        self.info = info
        self.count = 0
        self.second: Tensor | None = None
        self.first: Tensor | None = None
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, x: Tensor, conv: nn.Module) -> None:
        columns = unfold_input(x, self.info, conv)
        if columns.shape[-1] > MAX_POSITIONS_PER_BATCH:
            chosen = torch.randperm(columns.shape[-1], generator=self.generator)[:MAX_POSITIONS_PER_BATCH]
            columns = columns[..., chosen.to(columns.device)]
        second, first = (columns @ columns.mT).double(), columns.double().sum(-1)
        self.second = second if self.second is None else self.second + second
        self.first = first if self.first is None else self.first + first
        self.count += columns.shape[-1]

    def metric(self, curvature: Tensor | None) -> InputMetric:
        if self.second is None or self.first is None:
            raise DataError(f"layer '{self.info.name}' saw no calibration data; give at least one batch")
        if not bool(torch.isfinite(self.second).all()):
            raise DataError(f"layer '{self.info.name}': its input holds NaN or infinity on the calibration data")
        centered = self.info.output_shift != "kept"
        second, first = self.second / self.count, self.first / self.count
        return InputMetric.from_moments(second, first, centered=centered, curvature=curvature)


def unfold_input(x: Tensor, info: LayerInfo, module: nn.Module) -> Tensor:
    """The columns that meet the weight: (G, C Kh Kw, samples times positions).

    Args:
        x: The layer's input.
        info: The layer.
        module: The layer's module, for padding modes other than zeros.
    """
    x = x.detach().float()
    if info.kind == "linear":
        return x.reshape(1, -1, x.shape[-1]).mT
    if getattr(module, "padding_mode", "zeros") != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)  # type: ignore[arg-type]
    geometry = info.geometry
    (top, bottom), (left, right) = geometry.padding
    x = F.pad(x, (left, right, top, bottom))
    columns = F.unfold(x, info.weight_shape[2:], geometry.dilation, stride=geometry.stride)
    grouped: Tensor = columns.unflatten(1, (geometry.groups, -1))
    return grouped.permute(1, 2, 0, 3).flatten(2)


def output_rows(output: Tensor, info: LayerInfo) -> Tensor:
    """A layer's output as (G, F, samples times positions), in the order of `unfold_input`."""
    if info.kind == "linear":
        return output.reshape(1, -1, output.shape[-1]).mT
    grouped: Tensor = output.unflatten(1, (info.geometry.groups, -1))
    return grouped.movedim(0, 2).flatten(2)


@torch.no_grad()
def collect_metrics(
    model: nn.Module,
    layers: Sequence[LayerInfo],
    batches: Iterable[Inputs],
    *,
    curvature: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, InputMetric]:
    """The input metric of every layer, from one pass over the batches; memory does not grow with their number.

    Args:
        model: The network, in the mode in which it will be used.
        layers: Layers to observe.
        batches: Calibration inputs.
        curvature: Of the layers' outputs, from `output_curvature`; layers without one weigh all errors alike.
        seed: Of the choice of positions.
        progress: Called with the number of batches done.

    Raises:
        DataError: If there is no batch, or an input holds NaN or infinity.
    """
    moments = {info.name: _Moment(info, seed) for info in layers}
    handles = []

    def hook(moment: _Moment) -> Any:
        return lambda module, args: moment.add(args[0], module)

    try:
        for name, moment in moments.items():
            handles.append(model.get_submodule(name).register_forward_pre_hook(hook(moment)))
        for done, inputs in enumerate(batches, start=1):
            run_model(model, inputs)
            if progress is not None:
                progress(done)
    finally:
        for handle in handles:
            handle.remove()
    return {name: moment.metric((curvature or {}).get(name)) for name, moment in moments.items()}
