"""Against the factorized convolutions of tensorly-torch, with the same ranks."""

from __future__ import annotations

import statistics
import warnings
from typing import Any

import tltorch
import torch
from torch import nn

from benchmarks.layers.structures import Choice, Shape
from sekron_search.costs.measure import measure_callables
from sekron_search.kron.families import cp, tucker2
from sekron_search.kron.merge import merged_structure
from sekron_search.kron.plan import good_plans
from sekron_search.runtimes.base import MemoryFormat
from sekron_search.runtimes.registry import make_runtime

#: Of the dense layer's flops, about.
LEVEL = 0.25


def compare(shape: Shape, threads: int) -> dict[str, Any]:
    """Dense, tensorly-torch's and our layers of the same Tucker and CP ranks, one thread each, interleaved."""
    channels = shape.in_channels
    bound = LEVEL * 9 * channels**2
    # Tucker with both kernel modes kept whole, which is what Tucker-2 is: r channels, 9 r^2 in the core.
    tucker_rank = int(((2 * channels) ** 2 + 36 * bound) ** 0.5 - 2 * channels) // 18
    cp_rank = int(bound / (2 * channels + 6))
    ours = {"tucker": _ours(shape, "tucker", tucker_rank), "cp": _ours(shape, "cp", cp_rank)}
    theirs = {
        "tucker": _theirs(shape, "tucker", (tucker_rank, tucker_rank, 3, 3)),
        "cp": _theirs(shape, "cp", cp_rank),
    }
    inputs = shape.inputs()
    formats: tuple[MemoryFormat, ...] = ("contiguous", "channels_last")
    runtimes = {form: make_runtime("pytorch-eager", num_threads=threads, memory_format=form) for form in formats}
    with runtimes["contiguous"].active():
        # Both sides are given either memory format; the better one counts.
        calls = {
            f"{name}|{form}": runtimes[form].compile(module, inputs)
            for form in formats
            for name, module in (
                ("dense", shape.conv()),
                *((f"theirs {family}", module) for family, module in theirs.items()),
                *((f"ours {family} {i}", m) for family, modules in ours.items() for i, m in enumerate(modules)),
            )
        }
        timed = measure_callables(calls, rounds=25)

    def best(prefix: str) -> float:
        return min(latency.median_ms for name, latency in timed.items() if name.startswith(prefix))

    row = {
        "shape": shape.name,
        "threads": threads,
        "tucker_rank": tucker_rank,
        "cp_rank": cp_rank,
        "dense_ms": best("dense"),
        **{f"ours_{family}_ms": best(f"ours {family}") for family in ours},
        **{f"theirs_{family}_ms": best(f"theirs {family}") for family in ours},
    }
    print(row, flush=True)
    return row


def geometric_mean(rows: list[dict[str, Any]], threads: int, family: str) -> float:
    """How many times faster our layers of a family are."""
    own = [row for row in rows if row["threads"] == threads]
    return statistics.geometric_mean(row[f"theirs_{family}_ms"] / row[f"ours_{family}_ms"] for row in own)


def _ours(shape: Shape, family: str, rank: int) -> list[nn.Module]:
    """The ways in which the structure can run: its best plans, and for CP the kernel's two factors as one."""
    size = (shape.size, shape.size)
    if family == "tucker":
        structures = [tucker2(shape.weight_shape, (rank, rank))]
    else:
        whole = cp(shape.weight_shape, rank)
        structures = [whole, merged_structure(whole, whole.num_factors - 2)]
    return [
        Choice(structure, plan.schedule, LEVEL).module(shape)
        for structure in structures
        for plan in good_plans(structure, shape.geometry, size)[:2]
    ]


def _theirs(shape: Shape, decomposition: str, rank: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer: nn.Module = tltorch.FactorizedConv(
            shape.in_channels,
            shape.out_channels,
            (shape.kernel, shape.kernel),
            order=2,
            padding=shape.kernel // 2,
            bias=False,
            rank=rank,
            factorization=decomposition,
            implementation="factorized",
        )
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.05)
        with torch.no_grad():
            assert layer(*shape.inputs()).shape[1] == shape.out_channels
    return layer.eval()
