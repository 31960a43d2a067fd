"""Speed of factorized layers: every family against the dense layer, and against tensorly-torch.

    python -m benchmarks.layers [--only forward rivals training] [--threads 1 2] [--runtimes pytorch-eager onnxruntime]

Batch 1, float32. What is compared is measured in one process, interleaved. An option's structure, schedule and memory
format are chosen by quick timings; what is reported is measured anew. Dense layers have the memory format that serves
them best. With --only or --threads, other results are kept as they are.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.layers import forward, rivals, training
from benchmarks.layers.structures import Shape
from benchmarks.results_file import RESULTS, Target, samples_of, write_results

#: The 3x3 convolutions of a residual network, from its first stage to its last.
KERNELS = [Shape(64, 64, 3, 56), Shape(128, 128, 3, 28), Shape(256, 256, 3, 14), Shape(512, 512, 3, 7)]

#: The 1x1 convolutions of bottlenecks.
POINTWISE = [Shape(64, 256, 1, 56), Shape(256, 64, 1, 56), Shape(256, 1024, 1, 14), Shape(1024, 256, 1, 14)]

#: Least speed-up of the best option at a quarter of the flops, on the four shapes of `KERNELS`.
BOUNDS = {"pytorch-eager": (2.5, 2.5, 2.5, 2.5), "onnxruntime": (2.7, 3.7, 3.7, 3.7)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="not needed; every benchmark takes it")
    parser.add_argument("--only", nargs="+", choices=["forward", "rivals", "training"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runtimes", nargs="+", choices=list(BOUNDS), default=list(BOUNDS))
    args = parser.parse_args()
    torch.manual_seed(0)
    earlier = RESULTS / "layers.json"
    samples: dict[str, Any] = samples_of(earlier) if earlier.exists() and (args.only or len(args.threads) < 2) else {}
    for part in args.only or ["forward", "rivals", "training"]:
        samples[part] = [row for row in samples.get(part, []) if row["threads"] not in args.threads]
        for threads in args.threads:
            if threads > (os.cpu_count() or 1):
                print(f"--- {threads} threads: there are fewer cores here, left out")
                continue
            if part == "forward":
                for runtime in args.runtimes:
                    for shape in (*KERNELS, *POINTWISE):
                        print(f"--- {runtime}, {threads} threads, {shape.name}", flush=True)
                        samples[part].append(forward.compare(shape, runtime, threads))
            elif part == "rivals":
                samples[part] += [rivals.compare(shape, threads) for shape in KERNELS]
            else:
                samples[part] += [training.compare(shape, threads) for shape in KERNELS]
            write_results("layers", targets(samples), samples, command="make bench NAME=layers")


def targets(samples: dict[str, Any]) -> list[Target]:
    """What was asked of every part that was run."""
    found = []
    for row in samples.get("forward", []):
        names = [shape.name for shape in KERNELS]
        if row["shape"] in names:
            best = max(o["speedup"] for o in row["options"] if o["level"] == 0.25)
            bound = BOUNDS[row["runtime"]][names.index(row["shape"])]
            where = f"{row['shape']}, {row['runtime']}, {row['threads']} threads"
            found.append(Target(f"speed-up of the best option at a quarter of the flops: {where}", best, bound))
    for threads in sorted({row["threads"] for row in samples.get("rivals", [])}):
        for family in ("tucker", "cp"):
            ratio = rivals.geometric_mean(samples["rivals"], threads, family)
            found.append(Target(f"speed over tensorly-torch, {family}, {threads} threads, geometric mean", ratio, 1.3))
    return found


if __name__ == "__main__":
    main()
