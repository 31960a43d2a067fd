"""Predicted against measured latency of whole networks, with a profile that has seen none of them.

    python -m benchmarks.latency_model --data DIR [--count 32]

The device is profiled first, on one thread, through every runtime. Then random assignments of ResNet-18 (224x224,
batch 1) and ResNet-20 (32x32, batch 128), drawn as `assignments.py` says, are deployed and measured whole, interleaved.
DIR is not read: weights are random.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from benchmarks.cifar10_resnet20.network import ResNet20
from benchmarks.latency_model.assignments import random_networks
from benchmarks.resnet18 import resnet18
from benchmarks.results_file import Target, write_results
from sekron_search.costs.measure import measure_networks
from sekron_search.costs.profile import DeviceProfile
from sekron_search.costs.profiling import measure_device, summary_rows
from sekron_search.costs.trace import traced_operations
from sekron_search.progress import ConsoleReporter
from sekron_search.runtimes.base import MemoryFormat, Runtime, RuntimeName, laid_out
from sekron_search.runtimes.registry import make_runtime

RUNTIMES: tuple[tuple[RuntimeName, MemoryFormat], ...] = (
    ("pytorch-eager", "channels_last"),
    ("onnxruntime", "contiguous"),
)
ROUNDS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="a quick profile")
    args = parser.parse_args()
    torch.set_num_threads(1)
    networks = {
        "resnet18": (resnet18(), torch.randn(1, 3, 224, 224)),
        "resnet20": (_resnet20(), torch.randn(128, 3, 32, 32)),
    }
    samples: dict[str, Any] = {}
    targets: list[Target] = []
    for runtime_name, memory_format in RUNTIMES:
        runtime = make_runtime(runtime_name, num_threads=1, memory_format=memory_format)
        profile, facts = _profiled(runtime, quick=args.quick)
        samples[runtime_name] = {"profile": facts}
        for name, (network, x) in networks.items():
            found = _compare(profile, runtime, random_networks(network, x, args.count, seed=4), x)
            samples[runtime_name][name] = found
            errors = np.array([row["error"] for row in found])
            rank = spearmanr([r["predicted_ms"] for r in found], [r["measured_ms"] for r in found]).statistic
            label = f"{name}, {runtime_name}"
            mean = float(np.abs(errors).mean())
            targets.append(Target(f"mean absolute relative error: {label}", mean, 0.10, at_least=False))
            targets.append(Target(f"Spearman correlation: {label}", float(rank), 0.95))
            print(f"{label}: mean error {errors.mean():+.3f}, mean absolute error {mean:.3f}, Spearman {rank:.3f}")
    write_results("latency_model", targets, samples, command="make bench NAME=latency_model DATA=...")


def _resnet20() -> nn.Module:
    torch.manual_seed(0)
    return ResNet20().eval()


def _profiled(runtime: Runtime, *, quick: bool) -> tuple[DeviceProfile, dict[str, Any]]:
    start = time.monotonic()
    profile = DeviceProfile.empty(runtime)
    measure_device(profile, runtime, ConsoleReporter(), lambda: None, quick=quick)
    for name, value in summary_rows(profile):
        print(f"{name:<28} {value}")
    assert profile.fitted is not None
    facts = {
        "seconds": time.monotonic() - start,
        "operations": len(profile.operations),
        "granularity": profile.fitted.granularity,
        "node_ms": profile.fitted.node_ms,
        "errors": {name: dataclasses.asdict(error) for name, error in profile.fitted.errors.items()},
    }
    return profile, facts


def _compare(
    profile: DeviceProfile, runtime: Runtime, networks: dict[str, nn.Module], x: torch.Tensor
) -> list[dict[str, Any]]:
    measured = measure_networks(networks, x, runtime, rounds=ROUNDS)
    rows = []
    for name, network in networks.items():
        traced = traced_operations(*laid_out(network, (x,), runtime))
        assert not traced.unknown, traced.unknown
        predicted = profile.model.predict_sum(profile.costly(traced.operations))
        row = {"network": name, "predicted_ms": predicted.ms, "std_ms": predicted.std_ms}
        row |= {"measured_ms": measured[name].median_ms, "noise_ms": measured[name].noise_ms}
        rows.append(row | {"error": predicted.ms / measured[name].median_ms - 1})
    return rows


if __name__ == "__main__":
    main()
