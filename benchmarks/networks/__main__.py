"""Whole networks under a latency budget of half the original's: how much of the saved flops is saved time.

    python -m benchmarks.networks --data DIR [--only resnet18 resnet20 resnet20-single] [--runtimes ...] [--runs DIR]

ResNet-18 (224x224, batch 1) has random weights and random inputs: its speed does not depend on them, its accuracy is
not reported. ResNet-20 is trained and calibrated on CIFAR-10 (JPEG); batch 128, and batch 1, where every layer is
mostly overhead of its operators. One thread. DIR holds data/cifar10_jpeg.tar.xz and models/resnet20_cifar10_jpeg.pt.
Nothing is trained; the compressed network is measured as saved, loaded again and deployed, beside the original.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cifar10.config import archive_of, resnet20_weights
from benchmarks.cifar10.data import cifar10
from benchmarks.cifar10.resnet import ResNet20
from benchmarks.resnet18 import resnet18
from benchmarks.results_file import RESULTS, Target, samples_of, write_results
from sekron_search import InfeasibleBudgetError, compress
from sekron_search.costs.layers import Measurement, layer_key, measure_layers
from sekron_search.costs.measure import Latency
from sekron_search.export import load_weights
from sekron_search.inspection import inspect_model
from sekron_search.kron.families import dense
from sekron_search.kron.steps import Schedule
from sekron_search.kron.structure import Structure
from sekron_search.runtimes.base import RuntimeName
from sekron_search.runtimes.registry import make_runtime
from sekron_search.search.space import SearchSpace

#: Least (time speed-up) / (flop speed-up) of what is found.
BOUNDS: dict[RuntimeName, float] = {"pytorch-eager": 0.8, "onnxruntime": 0.9}

BUDGET = "0.5x"
THREADS = 1
SPACE = Path(__file__).parents[2] / "search_spaces" / "fast_cpu.yaml"


@dataclass(frozen=True)
class Case:
    """A network, its example batch and calibration inputs, and what the search does.

    Args:
        refine_steps: Of every option, on calibration data; the speed does not depend on it.
    """

    model: nn.Module
    example: Tensor
    calibration: Tensor
    refine_steps: int


def resnet18_case(data: Path) -> Case:
    images = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return Case(resnet18(), images[:1], images, refine_steps=0)


def resnet20_case(data: Path, batch: int = 128) -> Case:
    model = ResNet20().eval()
    load_weights(model, resnet20_weights(data))
    train = cifar10(str(archive_of(data))).train
    images = torch.stack([train[i][0] for i in range(1024)])
    return Case(model, images[:batch], images, refine_steps=20)


CASES: dict[str, Callable[[Path], Case]] = {
    "resnet18": resnet18_case,
    "resnet20": resnet20_case,
    "resnet20-single": partial(resnet20_case, batch=1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=CASES)
    parser.add_argument("--runtimes", nargs="+", choices=list(BOUNDS), default=list(BOUNDS))
    parser.add_argument("--runs", type=Path, default=Path("runs/networks"))
    args = parser.parse_args()
    torch.set_num_threads(2)
    earlier = RESULTS / "networks.json"
    samples: dict[str, Any] = samples_of(earlier) if args.only and earlier.exists() else {}
    for name in args.only or CASES:
        case = CASES[name](args.data.resolve())
        for runtime in args.runtimes:
            print(f"--- {name} in {runtime}", flush=True)
            samples[f"{name}, {runtime}"] = search(case, runtime, args.runs / f"{name}-{runtime}", args.runs / "tables")
            write_results("networks", targets(samples), samples, command="make bench NAME=networks DATA=...")


def search(case: Case, runtime: RuntimeName, out: Path, tables: Path) -> dict[str, Any]:
    """The network found under the budget, or what can be reached; layers that were replaced, timed once more."""
    try:
        found = compress(
            case.model,
            case.example,
            budget={"latency_ms": BUDGET},
            calibration=torch.utils.data.TensorDataset(case.calibration),
            out=out,
            resume=True,
            tables=tables,
            space=SearchSpace.load(SPACE),
            calibration_settings={
                "batch_size": min(128, len(case.calibration)),
                "refine_steps": case.refine_steps,
                "sequential_steps": 0,
                "curvature": False,
            },
            search={"trials": 12},
            latency={"runtime": runtime, "num_threads": THREADS, "rounds": 31},
            finetune={"epochs": 0, "candidates": 1},
        )
    except InfeasibleBudgetError as error:
        print(error)
        return {"infeasible": str(error), "best_reachable": error.best}
    report = found.report
    before, after = report["original"], report["compressed"]
    time_speedup = before["latency_ms"] / after["latency_ms"]
    flop_speedup = before["flops"] / after["flops"]
    return {
        "time_speedup": time_speedup,
        "flop_speedup": flop_speedup,
        "efficiency": time_speedup / flop_speedup,
        "original": before,
        "compressed": after,
        "budgets": report["budgets"],
        "latency": report["latency"],
        "layers": replaced_layers(case, runtime, report),
    }


def replaced_layers(case: Case, runtime: RuntimeName, report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every replaced layer timed once more beside the dense one."""
    clock = make_runtime(runtime, num_threads=THREADS, memory_format=report["latency"]["memory_format"])
    infos = {info.name: info for info in inspect_model(case.model, case.example).layers}
    rows = []
    for layer in report["layers"]:
        if layer["family"] == "dense":
            continue
        info, samples = infos[layer["name"]], len(case.example)
        jobs: list[Measurement] = [
            (info, dense(info.weight_shape), Schedule((0,)), "factored"),
            (info, Structure.parse(layer["structure"]), Schedule.parse(layer["schedule"]), layer["execution"]),
        ]
        timed: dict[str, Latency] = {}
        measure_layers(jobs, samples, clock, rounds=31, after_chunk=timed.update)
        whole, own = (timed[layer_key(*job, samples)] for job in jobs)
        rows.append(
            {
                "layer": layer["name"],
                "structure": layer["structure"],
                "schedule": layer["schedule"],
                "dense_ms": whole.median_ms,
                "latency_ms": own.median_ms,
                "noise_ms": own.noise_ms,
                "flops": layer["after"]["flops"] / layer["before"]["flops"],
            }
        )
    return rows


def targets(samples: dict[str, Any]) -> list[Target]:
    """What was asked of the networks that were found."""
    found = []
    for name, row in samples.items():
        case, _, runtime = name.partition(", ")
        if "infeasible" in row:
            if case != "resnet20-single":
                found.append(Target(f"a network at {BUDGET} of the latency: {name}", 0.0, 1.0))
            continue
        budget = row["budgets"][0]
        found.append(Target(f"latency, ms: {name}", budget["value"], budget["bound"], at_least=False))
        slower = sum(layer["latency_ms"] > layer["dense_ms"] for layer in row["layers"])
        found.append(Target(f"replaced layers that are slower: {name}", slower, 0, at_least=False))
        if case != "resnet20-single":
            bound = BOUNDS[runtime]  # type: ignore[index]
            found.append(Target(f"(time speed-up) / (flop speed-up): {name}", row["efficiency"], bound))
    return found


if __name__ == "__main__":
    main()
