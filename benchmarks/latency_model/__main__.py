"""Predicted against measured latency of whole networks, with a profile that has seen none of them.

    python -m benchmarks.latency_model --data DIR [--count 32] [--only pytorch-eager]

The device is profiled first, on one thread, through every runtime. Then random assignments of ResNet-18 (224x224,
batch 1) and ResNet-20 (32x32, batch 128), drawn as `assignments.py` says, are deployed and measured whole, a few of
them in turn.
DIR is not read: weights are random. With --only, the results of the other runtime are kept as they are.
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

from benchmarks.cifar10.resnet import ResNet20
from benchmarks.latency_model.assignments import random_networks
from benchmarks.resnet18 import resnet18
from benchmarks.results_file import RESULTS, Target, samples_of, write_results
from sekron_search.costs.measure import measure_networks
from sekron_search.costs.profile import DeviceProfile
from sekron_search.costs.profiling import measure_device, summary_rows
from sekron_search.costs.trace import traced_operations
from sekron_search.progress import ConsoleReporter
from sekron_search.runtimes.base import MemoryFormat, Runtime, RuntimeName, laid_out
from sekron_search.runtimes.registry import make_runtime

RUNTIMES: dict[RuntimeName, MemoryFormat] = {"pytorch-eager": "channels_last", "onnxruntime": "contiguous"}
ROUNDS = 15

#: Networks that take turns. PyTorch keeps 1,024 compiled convolutions: with all 32 networks in turn, every call would
#: compile its own anew, which was measured to add a fifth to ResNet-18.
GROUP = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--only", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--quick", action="store_true", help="a quick profile")
    args = parser.parse_args()
    torch.set_num_threads(1)
    networks = {
        "resnet18": (resnet18(), torch.randn(1, 3, 224, 224)),
        "resnet20": (_resnet20(), torch.randn(128, 3, 32, 32)),
    }
    earlier = RESULTS / "latency_model.json"
    samples: dict[str, Any] = samples_of(earlier) if set(args.only) != set(RUNTIMES) else {}
    for runtime_name in args.only:
        runtime = make_runtime(runtime_name, num_threads=1, memory_format=RUNTIMES[runtime_name])
        profile, facts = _profiled(runtime, quick=args.quick)
        samples[runtime_name] = {"profile": facts}
        for name, (network, x) in networks.items():
            assigned = random_networks(network, x, args.count, seed=4)
            samples[runtime_name][name] = _compare(profile, runtime, assigned, x)
    write_results("latency_model", _targets(samples), samples, command="make bench NAME=latency_model DATA=...")


def _targets(samples: dict[str, Any]) -> list[Target]:
    found = []
    for runtime_name, of_runtime in samples.items():
        for name in ("resnet18", "resnet20"):
            rows, label = of_runtime[name], f"{name}, {runtime_name}"
            mean = float(np.mean([abs(row["error"]) for row in rows]))
            rank = spearmanr([r["predicted_ms"] for r in rows], [r["measured_ms"] for r in rows]).statistic
            found.append(Target(f"mean absolute relative error: {label}", mean, 0.10, at_least=False))
            found.append(Target(f"Spearman correlation: {label}", float(rank), 0.95))
    return found


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
    names, measured, rows = list(networks), {}, []
    for start in range(0, len(names), GROUP):
        group = {name: networks[name] for name in names[start : start + GROUP]}
        measured.update(measure_networks(group, x, runtime, rounds=ROUNDS))
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
