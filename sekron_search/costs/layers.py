"""Options of a network's layers: their keys in a profile, their plain modules, their exact latencies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sekron_search.costs.anchored import layer_samples
from sekron_search.costs.measure import Latency, measure_callables
from sekron_search.costs.trace import Traced, traced_operations
from sekron_search.kron.dense import AXES, KINDS
from sekron_search.kron.families import dense
from sekron_search.kron.layer import Execution
from sekron_search.kron.plain import plain_layer
from sekron_search.kron.steps import Schedule
from sekron_search.kron.structure import Structure
from sekron_search.model import REPLACEMENTS, LayerInfo
from sekron_search.runtimes.base import MemoryFormat, Runtime, formatted, with_memory_format

#: What a latency is of: layer, structure, schedule of the factors, execution.
Measurement = tuple[LayerInfo, Structure, Schedule, Execution]

#: Options that take turns: interleaving needs neighbours in time, not all of them in memory.
CHUNK = 16


def geometry_key(info: LayerInfo, samples_per_batch: int) -> str:
    """Text that is equal for layers that take the same time with the same structure."""
    geometry = info.geometry
    batch, dtype = _applied(info, samples_per_batch), "" if info.dtype == "float32" else f" {info.dtype}"
    if info.kind == "linear":
        return f"linear rows={batch} {info.in_channels}->{info.out_channels}{dtype}"
    kernel = "x".join(map(str, info.weight_shape[2:]))
    size = "x".join(map(str, info.input_size))
    return (
        f"{info.kind} batch={batch} {info.in_channels}->{info.out_channels} at {size} kernel={kernel} "
        f"stride={geometry.stride} padding={geometry.padding} dilation={geometry.dilation} groups={geometry.groups}"
        f"{dtype}"
    )


def layer_key(
    info: LayerInfo, structure: Structure, schedule: Schedule, execution: Execution, samples_per_batch: int
) -> str:
    """Key of a latency in a profile."""
    how = "dense" if structure.is_dense or execution == "dense" else f"{structure} schedule={schedule}"
    return f"{geometry_key(info, samples_per_batch)} | {how}"


def measure_layers(
    jobs: Sequence[Measurement],
    samples_per_batch: int,
    runtime: Runtime,
    *,
    rounds: int,
    after_chunk: Callable[[dict[str, Latency]], None],
    known: Mapping[str, Latency] | None = None,
) -> None:
    """Measure options of layers; those of equal geometry are timed one beside the other.

    The layer as it is takes part in every chunk, and the chunk's latencies are scaled by how far its own has drifted
    since it was measured first: options are compared with it and with one another.

    Args:
        jobs: What to measure.
        samples_per_batch: Batch size.
        runtime: What runs them.
        rounds: Interleaved samples of each.
        after_chunk: Called with the latencies of every chunk, by their keys.
        known: What was measured before.
    """
    groups: dict[str, dict[str, Measurement]] = {}
    for job in jobs:
        groups.setdefault(geometry_key(job[0], samples_per_batch), {})[layer_key(*job, samples_per_batch)] = job
    for group in groups.values():
        x = random_input(next(iter(group.values()))[0], samples_per_batch)
        info = next(iter(group.values()))[0]
        whole: Measurement = (info, dense(info.weight_shape), Schedule((0,)), "factored")
        first = layer_key(*whole, samples_per_batch)
        others = [key for key in group if key != first]
        group[first] = whole
        reference_ms = known[first].median_ms if known and first in known else None
        for start in range(0, max(len(others), 1), CHUNK):
            keys = [first, *others[start : start + CHUNK]]
            found = _timed({k: random_layer(*group[k]) for k in keys}, group[first][0], x, runtime, rounds)
            if reference_ms is None:
                reference_ms = found[first].median_ms
                after_chunk(found)
            else:
                drift = reference_ms / found.pop(first).median_ms
                after_chunk({k: latency.scaled(drift) for k, latency in found.items()})


def _timed(
    modules: dict[str, nn.Module], info: LayerInfo, x: Tensor, runtime: Runtime, rounds: int
) -> dict[str, Latency]:
    """By the runtime's own clock, as they stand in a network, where it has one and takes images; else by ours.

    What stands around them there is in float32.
    """
    with runtime.active(), torch.inference_mode():
        if x.dim() == 4 and x.dtype == torch.float32:
            channels, size = (info.in_channels, info.out_channels), (len(x), *x.shape[2:])
            samples = layer_samples(list(modules.values()), channels, size, runtime, rounds)
            if samples is not None:
                return {key: Latency.of(values) for key, values in zip(modules, samples, strict=True)}
        calls = {key: runtime.compile(module, (x,)) for key, module in modules.items()}
        return measure_callables(calls, rounds=rounds, device=runtime.device)


def traced_layer(job: Measurement, samples_per_batch: int, memory_format: MemoryFormat) -> Traced:
    """What the plain module of an option executes; nothing is computed."""
    with torch.device("meta"):
        module = random_layer(*job)
        x = random_input(job[0], samples_per_batch)
    module, x = with_memory_format(module, memory_format), formatted(x, memory_format)
    return traced_operations(module, (x,))


def random_input(info: LayerInfo, samples: int) -> Tensor:
    """An input of a layer."""
    size = info.input_size
    if info.geometry.transposed:
        size = info.geometry.output_size(size, info.weight_shape[2:])
    shape = (_applied(info, samples), info.in_channels, *size[: AXES[info.kind]])
    return torch.randn(shape, dtype=getattr(torch, info.dtype))


def _applied(info: LayerInfo, samples: int) -> int:
    """How often a layer is applied to a batch of so many samples."""
    return max(round(samples * info.positions_per_sample), 1)


def random_layer(info: LayerInfo, structure: Structure, schedule: Schedule, execution: Execution) -> nn.Module:
    """The plain module of an option, with random weights: of zeros, some operations take another time."""
    dtype = getattr(torch, info.dtype)
    if structure.is_dense or execution == "dense":
        return _dense_layer(info, None).to(dtype).eval()
    dense: Any = _dense_layer(info, "meta")
    layer = REPLACEMENTS[type(dense)](dense, structure, schedule=schedule, execution=execution).eval()
    with torch.no_grad():
        for weight in layer.weights:
            weight.normal_()
    return plain_layer(layer).to(dtype).eval()


def _dense_layer(info: LayerInfo, device: str | None) -> nn.Module:
    """A dense layer of that geometry, without a bias."""
    geometry, kernel = info.geometry, info.weight_shape[2:]
    options: dict[str, Any] = {"bias": False, "device": device}
    if info.kind != "linear":
        axes = slice(AXES[info.kind])
        even = all(before == after for before, after in geometry.padding)
        options |= {
            "kernel_size": kernel[axes],
            "stride": geometry.stride[axes],
            "padding": tuple(before for before, _ in geometry.padding)[axes] if even else "same",
            "dilation": geometry.dilation[axes],
            "groups": geometry.groups,
        }
        if geometry.transposed:
            options["output_padding"] = geometry.unread(info.input_size, kernel)[axes]
    return KINDS[info.kind](info.in_channels, info.out_channels, **options)
