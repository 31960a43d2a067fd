"""Every family at 1/2, 1/4 and 1/8 of the flops against the dense layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.layers.structures import Choice, Shape, choices, families_of
from sekron_search.costs.measure import Latency, measure_callables
from sekron_search.runtimes.base import MemoryFormat, RuntimeName
from sekron_search.runtimes.registry import make_runtime

LEVELS = (0.5, 0.25, 0.125)

FORMATS: dict[str, tuple[MemoryFormat, ...]] = {
    "pytorch-eager": ("contiguous", "channels_last"),
    "onnxruntime": ("contiguous",),
}

#: (family or number, level or memory format), and what is timed by that name.
Key = tuple[str, str]
Timed = tuple[nn.Module, MemoryFormat]

#: Structures of a family and level among which quick timings choose.
STRUCTURES = 6


def compare(shape: Shape, runtime: RuntimeName, threads: int) -> dict[str, Any]:
    """The fastest option of every family at every level, timed beside the dense layer."""
    dense: dict[Key, Timed] = {("dense", form): (shape.conv(), form) for form in FORMATS[runtime]}
    finalists = dict(dense)
    chosen: dict[Key, tuple[Choice, float]] = {}
    for kind in families_of(shape):
        family = kind[0] if kind[1] is None else f"{kind[0]}, S = {kind[1]}"
        for level in LEVELS:
            tried: dict[Key, tuple[Choice, MemoryFormat]] = {
                (str(i), memory_format): (choice, memory_format)
                for i, choice in enumerate(choices(kind, shape, level, most=STRUCTURES))
                for memory_format in FORMATS[runtime]
            }
            if not tried:
                continue
            modules: dict[Key, Timed] = {key: (choice.module(shape), form) for key, (choice, form) in tried.items()}
            timed = _timed(modules, shape, runtime, threads, rounds=3)
            best = min(timed, key=lambda key: timed[key].median_ms)
            finalists[family, str(level)] = modules[best]
            chosen[family, str(level)] = tried[best][0], level
    timed = _timed(finalists, shape, runtime, threads, rounds=15)
    reference = min((timed[key] for key in dense), key=lambda latency: latency.median_ms)
    options = [
        {
            "family": key[0],
            "level": level,
            "flops": choice.flops,
            "structure": str(choice.structure),
            "schedule": str(choice.schedule),
            "memory_format": finalists[key][1],
            "latency_ms": timed[key].median_ms,
            "noise_ms": timed[key].noise_ms,
            "speedup": reference.median_ms / timed[key].median_ms,
        }
        for key, (choice, level) in chosen.items()
    ]
    for level in LEVELS:
        best_option = max((o for o in options if o["level"] == level), key=lambda o: float(str(o["speedup"])))
        print(
            f"  {level}: {best_option['speedup']:.2f}x, {best_option['family']}, {best_option['structure']}", flush=True
        )
    return {
        "shape": shape.name,
        "runtime": runtime,
        "threads": threads,
        "dense_ms": {form: timed["dense", form].median_ms for form in FORMATS[runtime]},
        "dense_noise_ms": reference.noise_ms,
        "options": options,
    }


def _timed(
    modules: dict[Key, Timed],
    shape: Shape,
    runtime: RuntimeName,
    threads: int,
    *,
    rounds: int,
) -> dict[Key, Latency]:
    inputs = shape.inputs()
    runtimes = {form: make_runtime(runtime, num_threads=threads, memory_format=form) for form in FORMATS[runtime]}
    with runtimes["contiguous"].active():
        calls = {"|".join(key): runtimes[form].compile(module, inputs) for key, (module, form) in modules.items()}
        timed = measure_callables(calls, rounds=rounds)
    return {key: timed["|".join(key)] for key in modules}
